r"""Figures 3 to 6 of the paper, and numbers for what they show.

``figure3``
    Samples from one set of latents by η and the number of steps.
``figure4``
    Seconds against dim(τ): a straight line through them, and its R².
``figure5``
    The same x_T over different τ: how far the images are from those of the longest, in the features of a network, as a share of
    the distance between images of unrelated latents. With η = 1 nothing is left to be consistent.
``figure6``
    Interpolation between latents: a grid between four corners on the sphere. What norms and contrasts are on the spherical and on
    the straight path is in ``latents.py``.

Run from the root of a checkout::

    python -m benchmarks.paper_figures [--parts …] [--model …] [--short] [--figures-only]

It takes about half an hour on two cores. Numbers go to ``paper_figures.json``, images to ``paper_figures.npz`` in 8 bits, and figures
are drawn from these; for other models than the bundled Fashion-MNIST one with the model's name behind theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import ddim_ode
from ddim_ode import EfficientNetLite0, EpsilonField, Features, noise, sample
from ddim_ode.comparison import circumstances
from ddim_ode.data import to_uint8
from ddim_ode.files import output_folder, replacing, write_json
from ddim_ode.plotting import STYLE, save_figure

ROOT = Path(__file__).resolve().parents[1]
ETAS = ("0", "0.2", "0.5", "1", "sigma-hat")
STEPS = (10, 20, 50, 100, 1000)
LENGTHS = (10, 20, 50, 100, 200, 500, 1000)


def _how(eta: str) -> dict[str, Any]:
    return {"sigma_hat": True} if eta == "sigma-hat" else {"eta": float(eta)}


Found = tuple[dict[str, Any], dict[str, np.ndarray]]


def figure3(field: EpsilonField, short: bool) -> Found:
    """Samples by η and S."""
    steps = STEPS[:2] if short else (10, 20, 100)
    pictures = {
        f"{eta}|{S}": to_uint8(sample(field, n=8, steps=S, grid="linear", seed=1, **_how(eta)).x)
        for eta in ETAS
        for S in steps
    }
    return {"steps": steps, "etas": ETAS, "grid": "linear", "seed": 1}, pictures


def figure4(field: EpsilonField, short: bool, n: int = 4) -> Found:
    """Seconds by steps, and a line through medians; each round goes over all lengths, so that other work falls on all alike."""
    lengths, rounds = (LENGTHS[:3], 2) if short else (LENGTHS, 3)
    sample(field, n=n, steps=2, eta=1.0)  # what only the first run costs
    seconds: dict[str, list[list[float]]] = {}
    for eta in ("0", "1"):
        rows = seconds[eta] = [[] for _ in lengths]
        for _ in range(rounds):
            for row, S in zip(rows, lengths, strict=True):
                start = time.perf_counter()
                sample(field, n=n, steps=S, grid="linear", **_how(eta))
                row.append(time.perf_counter() - start)
    fits = {}
    for eta, rows in seconds.items():
        x, y = np.array(lengths), np.median(rows, axis=1)
        slope, start = np.polyfit(x, y, 1)
        left = y - (slope * x + start)
        fits[eta] = {
            "seconds_a_step": float(slope), "seconds_at_0": float(start), "r2": float(1.0 - left @ left / np.var(y) / y.size),
        }  # fmt: skip
    return {"lengths": lengths, "samples": n, "seconds": seconds, "fits": fits, "threads": torch.get_num_threads()}, {}


def figure5(field: EpsilonField, short: bool) -> Found:
    """Distances to the image of the longest trajectory, in features, of the same latent and of unrelated ones."""
    steps, n = (STEPS[:3], 8) if short else (STEPS, 32)
    network, latent = EfficientNetLite0(), None if field.shape is None else noise(field.shape, n, 2)
    rows, pictures = [], {}
    for eta in ("0", "1"):
        images = {}
        for S in steps:
            # Noise of another seed for each: with η = 1 the latent is all that they share.
            images[S] = sample(field, latent, steps=S, grid="linear", seed=S, **_how(eta)).x.clamp(-1.0, 1.0)
            pictures[f"{eta}|{S}"] = to_uint8(images[S][:8])
        seen = {S: Features.of(x, network).values for S, x in images.items()}
        last = seen[steps[-1]]
        others = torch.cdist(last, last)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1).mean(dim=1)
        for S in steps[:-1]:
            same = (seen[S] - last).norm(dim=1)
            share = (same / others).numpy()
            nearest = torch.cdist(seen[S], last).argmin(dim=1) == torch.arange(n)
            rows.append(
                {
                    "eta": eta, "steps": S, "share": float(share.mean()), "share_error": float(share.std(ddof=1) / n**0.5),
                    "recognised": float(nearest.double().mean()),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return {"network": network.name, "images": n, "longest": steps[-1], "rows": rows}, pictures


def figure6(field: EpsilonField, short: bool) -> Found:
    """A grid between four latents, rows and columns by spherical paths."""
    assert field.shape is not None
    size = 4 if short else 8
    corners = noise(field.shape, 4, 11)
    at = np.linspace(0.0, 1.0, size)
    sides = [[ddim_ode.slerp(corners[i : i + 1], corners[j : j + 1], f) for f in at] for i, j in ((0, 1), (2, 3))]
    grid = torch.cat([ddim_ode.slerp(top, low, f) for f in at for top, low in zip(*sides, strict=True)])
    return {"size": size, "nfe": 20, "seed": 11}, {"grid": to_uint8(sample(field, grid, nfe=20).x)}


PARTS: dict[str, Callable[[EpsilonField, bool], Found]] = {
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
}


# -- figures --------------------------------------------------------------------------------------
def draw(record: dict[str, Any], pictures: dict[str, np.ndarray], part: str) -> Figure:
    """One of the figures."""
    with matplotlib.rc_context(STYLE):
        if part == "figure4":
            return _draw_times(record[part])
        if part == "figure6":
            size = round(len(pictures["figure6|grid"]) ** 0.5)
            rows = pictures["figure6|grid"].reshape(size, size, *pictures["figure6|grid"].shape[1:])
            return _draw_rows([(row, "") for row in rows])
        if part == "figure3":
            found = [(eta, S) for eta in record[part]["etas"] for S in record[part]["steps"]]
        else:
            steps = sorted({row["steps"] for row in record[part]["rows"]} | {record[part]["longest"]})
            found = [(eta, S) for eta in ("0", "1") for S in steps]
        name = lambda eta: "σ̂" if eta == "sigma-hat" else f"η = {eta}"
        return _draw_rows([(pictures[f"{part}|{eta}|{S}"], f"{name(eta)}, S = {S}") for eta, S in found])


def _draw_rows(rows: list[tuple[np.ndarray, str]]) -> Figure:
    count = len(rows[0][0])
    figure = Figure(figsize=(0.72 * count + 1.2, 0.74 * len(rows)), layout="constrained")
    panels = np.asarray(figure.subplots(len(rows), count, squeeze=False))
    for line, (images, label) in zip(panels, rows, strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(
                image.squeeze() if image.shape[0] == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255
            )
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _draw_times(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    panel = figure.subplots()
    for (eta, rows), colour in zip(record["seconds"].items(), ("black", "tab:orange"), strict=True):
        fit = record["fits"][eta]
        x = np.array([0, record["lengths"][-1]])
        panel.plot(x, fit["seconds_a_step"] * x + fit["seconds_at_0"], color=colour, linewidth=0.8)
        for S, row in zip(record["lengths"], rows, strict=True):
            panel.plot([S] * len(row), row, "o", color=colour, markersize=3)
        panel.plot(
            [],
            [],
            "o-",
            color=colour,
            label=f"η = {eta}: {1e3 * fit['seconds_a_step']:.1f} ms a step, R² = {fit['r2']:.5f}",
        )
    panel.set(xlabel="dim(τ)", ylabel=f"seconds for {record['samples']} samples", xlim=(0, None), ylim=(0, None))
    panel.legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, record part by part, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="what ddim_ode.load takes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the record")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for the figures")
    parser.add_argument("--short", action="store_true", help="few steps and samples: a minute, to see that it runs")
    parser.add_argument("--figures-only", action="store_true", help="draw from the record there is, measure nothing")
    options = parser.parse_args()
    parts, name = options.parts.split(","), Path(options.model).name
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"known parts are {', '.join(PARTS)}")
    tail = "" if name == "fashion-mnist" else f"-{name}"
    path = output_folder(options.out) / f"paper_figures{tail}.json"
    kept = path.with_suffix(".npz")
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"study": "paper_figures"}
    pictures: dict[str, np.ndarray] = dict(np.load(kept)) if kept.exists() else {}
    for part in () if options.figures_only else parts:
        field = ddim_ode.load(options.model)
        found, made = PARTS[part](field, options.short)
        record[part] = found | {"circumstances": circumstances(field, torch.float64)}
        pictures = {k: v for k, v in pictures.items() if not k.startswith(part)} | {
            f"{part}|{k}": v for k, v in made.items()
        }
        with replacing(kept) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **pictures)  # type: ignore[arg-type]
        write_json(path, record)
        print(f"{part} done", flush=True)
    for part in parts:
        if part in record:
            figure = draw(json.loads(json.dumps(record)), pictures, part)
            save_figure(figure, output_folder(options.figures) / f"paper-{part}{tail}.png")


if __name__ == "__main__":
    main()
