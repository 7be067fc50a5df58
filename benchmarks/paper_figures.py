r"""Figures 3 to 6 of the paper, and numbers for what they show.

``figure3``
    Samples from one set of latents by η and the number of steps.
``figure4``
    Seconds against dim(τ): a straight line through them, the power of dim(τ) that they follow, and seconds a step.
``figure5``
    The same x_T over different τ: how far the images are from those of the longest, in the features of a network, as a share of
    their distance from what the longest makes of unrelated latents. With η = 1 nothing is left to be consistent.
``figure6``
    Interpolation between latents: a grid between four corners on the sphere. What norms and contrasts are on the spherical and on
    the straight path is in ``latents.py``.

Run from the root of a checkout::

    python -m benchmarks.paper_figures [--parts …] [--model …] [--short] [--figures-only]

It takes about a quarter of an hour on two cores. What is recorded already, by the same weights and version, is left out unless
``--parts`` names it. Numbers go to ``paper_figures.json``, images to ``paper_figures.npz`` in 8 bits, and figures are drawn from these;
for other models than the bundled Fashion-MNIST one with the model's name behind theirs.
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
from matplotlib.ticker import NullLocator
from scipy.stats import linregress

import ddim_ode
from benchmarks.folders import add_folders, folders, recorded
from ddim_ode import EfficientNetLite0, EpsilonField, Features, noise, sample
from ddim_ode.comparison import circumstances
from ddim_ode.data import to_uint8
from ddim_ode.files import replacing, write_json
from ddim_ode.plotting import STYLE, save_figure

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
    fits = {eta: line(lengths, rows) for eta, rows in seconds.items()}
    for eta, fit in fits.items():
        each = ", ".join(f"{1e3 * s:.2f} ms at {S}" for s, S in zip(fit["seconds_each"], lengths, strict=True))
        print(
            f"η = {eta}: seconds ~ S^({fit['power']:.4f} ± {fit['power_error']:.4f}); a step takes {each}", flush=True
        )
    return {"lengths": lengths, "samples": n, "seconds": seconds, "fits": fits, "threads": torch.get_num_threads()}, {}


def line(lengths: tuple[int, ...], seconds: list[list[float]]) -> dict[str, Any]:
    """A straight line through medians, and, for R² is near 1 for curves too, the slope of their logarithms with its standard error."""
    x, y = np.array(lengths), np.median(seconds, axis=1)
    straight, power = linregress(x, y), linregress(np.log(x), np.log(y))
    return {
        "seconds_a_step": float(straight.slope), "seconds_at_0": float(straight.intercept), "r2": float(straight.rvalue**2),
        "power": float(power.slope), "power_error": float(power.stderr), "seconds_each": (y / x).tolist(),
    }  # fmt: skip


def figure5(field: EpsilonField, short: bool) -> Found:
    """Distances to the image of the longest trajectory, in features, of the same latent and of unrelated ones."""
    steps, n = (STEPS[:3], 8) if short else (STEPS, 32)
    assert field.shape is not None
    network, latent = EfficientNetLite0(), noise(field.shape, n, 2)
    rows, pictures = [], {}
    for eta in ("0", "1"):
        images = {}
        for S in steps:
            # Noise of another seed for each: with η = 1 the latent is all that they share.
            images[S] = sample(field, latent, steps=S, grid="linear", seed=S, **_how(eta)).x.clamp(-1.0, 1.0)
            pictures[f"{eta}|{S}"] = to_uint8(images[S][:8])
        seen = {S: Features.of(x, network).values for S, x in images.items()}
        last = seen[steps[-1]]
        for S in steps[:-1]:
            apart = torch.cdist(seen[S], last)
            same = apart.diagonal()
            share = (same / ((apart.sum(dim=1) - same) / (n - 1))).numpy()
            nearest = apart.argmin(dim=1) == torch.arange(n)
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
        found_rows = [(pictures[f"{part}|{eta}|{S}"], f"{name(eta)}, S = {S}") for eta, S in found]
        return _draw_rows(found_rows, record[part] if part == "figure5" else None)


def _draw_rows(rows: list[tuple[np.ndarray, str]], shares: dict[str, Any] | None = None) -> Figure:
    """Images row by row, and beside them the shares of Figure 5, if they are given."""
    count = len(rows[0][0])
    width = 0.72 * count + 1.2
    figure: Any = Figure(figsize=(width + (4.2 if shares else 0.0), 0.74 * len(rows)), layout="constrained")
    whole = figure
    if shares:
        whole, right = figure.subfigures(1, 2, width_ratios=(width, 4.2))
        _draw_shares(right.subplots(), shares)
    panels = np.asarray(whole.subplots(len(rows), count, squeeze=False))
    for across, (images, label) in zip(panels, rows, strict=True):
        for panel, image in zip(across, images, strict=True):
            panel.imshow(
                image.squeeze() if image.shape[0] == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255
            )
            panel.set(xticks=[], yticks=[])
        across[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _draw_shares(panel: Any, record: dict[str, Any]) -> None:
    for eta, colour in (("0", "black"), ("1", "tab:orange")):
        rows = [row for row in record["rows"] if row["eta"] == eta]
        at, share, error = ([row[key] for row in rows] for key in ("steps", "share", "share_error"))
        panel.errorbar(at, share, [2.0 * e for e in error], color=colour, marker="o", markersize=4, label=f"η = {eta}")
    panel.axhline(1.0, color="0.6", linestyle=":", label="unrelated latents")
    ticks = sorted({row["steps"] for row in record["rows"]})
    panel.set(xscale="log", ylim=(0.0, None), xlabel="S")
    panel.set_xticks(ticks, list(map(str, ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_title(
        f"distance from the image of S = {record['longest']}, ± 2 s.e., {record['images']} latents", fontsize=8
    )
    panel.set_ylabel(f"share of that of unrelated latents\n{record['network']}", fontsize=7)
    panel.legend(fontsize=8)


def _draw_times(record: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = record["lengths"]
    for (eta, rows), colour in zip(record["seconds"].items(), ("black", "tab:orange"), strict=True):
        fit = record["fits"][eta]
        x = np.array([0, lengths[-1]])
        left.plot(x, fit["seconds_a_step"] * x + fit["seconds_at_0"], color=colour, linewidth=0.8)
        for S, row in zip(lengths, rows, strict=True):
            left.plot([S] * len(row), row, "o", color=colour, markersize=3)
            right.plot([S] * len(row), [1e3 * s / S for s in row], "o", color=colour, markersize=3)
        words = f"η = {eta}: seconds ~ S^({fit['power']:.3f} ± {2.0 * fit['power_error']:.3f}), R² of the line {fit['r2']:.5f}"
        left.plot([], [], "o-", color=colour, label=words)
        right.plot(
            lengths, [1e3 * s for s in fit["seconds_each"]], color=colour, linewidth=0.8, label=f"η = {eta}, medians"
        )
    left.set(xlabel="dim(τ) = S", ylabel=f"seconds for {record['samples']} samples", xlim=(0, None), ylim=(0, None))
    left.set_title("power ± 2 s.e.", fontsize=8)
    right.set(xlabel="S", ylabel="milliseconds a step", xscale="log", ylim=(0, None))
    right.set_xticks(lengths, list(map(str, lengths)))
    right.xaxis.set_minor_locator(NullLocator())
    left.legend(fontsize=7, loc="lower right")
    right.legend(fontsize=7, loc="lower right")
    return figure


def main() -> None:
    """Measure, record part by part, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="what ddim_ode.load takes")
    parser.add_argument("--parts", help="comma-separated, run whether recorded or not; by default all that are not")
    add_folders(parser, "few steps and samples: a minute, to see that it runs")
    options = parser.parse_args()
    parts, name = options.parts.split(",") if options.parts else list(PARTS), Path(options.model).name
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"known parts are {', '.join(PARTS)}")
    tail = "" if name == "fashion-mnist" else f"-{name}"
    out, figures = folders(options)
    path = out / f"paper_figures{tail}.json"
    if not options.figures_only:
        measure(ddim_ode.load(options.model), parts, options.parts is not None, options.short, path)
    record = json.loads(recorded(path).read_text("utf-8"))
    pictures = dict(np.load(recorded(path.with_suffix(".npz"))))
    for part in parts:
        if part in record:
            save_figure(draw(record, pictures, part), figures / f"paper-{part}{tail}.png")


def measure(field: EpsilonField, parts: list[str], again: bool, short: bool, path: Path) -> None:
    """Record part by part; those that are there are left, unless they are to be made `again`."""
    kept = path.with_suffix(".npz")
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"study": "paper_figures"}
    pictures: dict[str, np.ndarray] = dict(np.load(kept)) if kept.exists() else {}
    for part in parts:
        about = {"weights": field.describe()["weights"], "short": short, "ddim_ode": ddim_ode.__version__}
        whole = part == "figure4" or any(name.startswith(part) for name in pictures)
        if not again and whole and record.get(part, {}).get("made") == about:
            print(f"{part} is recorded; --parts {part} runs it again", flush=True)
            continue
        found, made = PARTS[part](field, short)
        record[part] = found | {"made": about, "circumstances": circumstances(field, torch.float64)}
        pictures = {k: v for k, v in pictures.items() if not k.startswith(part)} | {
            f"{part}|{k}": v for k, v in made.items()
        }
        with replacing(kept) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **pictures)  # type: ignore[arg-type]
        write_json(path, record)
        print(f"{part} done", flush=True)


if __name__ == "__main__":
    main()
