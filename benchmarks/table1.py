r"""Table 1 of the paper: the quality of samples by η and the number of steps; and the solvers of this package at few calls.

Two parts:

``table1``
    η ∈ {0, 0.2, 0.5, 1} and σ̂, in S ∈ {10, 20, 50, 100, 1000} steps over linear and quadratic τ (at S = T they are one).
``table1b``
    Deterministic solvers at 5, 10, 15 and 20 calls.

Image i of all of them comes from one latent, so that differences between them are paired: what the latents do to a distance is counted
once. Distances are those of ``ddim_ode.quality`` by the features of a named network beside test images; the floor is that of as
many training images. None of it can be set beside a published FID.

Run from the root of a checkout::

    python -m benchmarks.table1 [--images 256] [--parts …] [--model … --data …] [--short] [--figures-only]

On the bundled Fashion-MNIST network it takes about two hours for 256 images on two cores, three quarters of it at S = 1000. It goes on
where it was stopped: samples are kept in ``out/table1``, batch by batch. The record is ``table1.json`` (``table1-NAME.json`` for
other models).
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ddim_ode
from benchmarks.metrics import features_of
from ddim_ode import EfficientNetLite0, EpsilonField, Features, LatentWarning, Quality, quality
from ddim_ode.comparison import circumstances
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.files import output_folder, replacing, write_json
from ddim_ode.plotting import STYLE, save_figure

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("table1", "table1b")
STEPS = (10, 20, 50, 100, 1000)
ETAS = ("0", "0.2", "0.5", "1", "sigma-hat")
RULES = ("linear", "quadratic")
SOLVERS = ("default", "ddim", "pf-euler", "ab2", "abm3", "deisx4", "dpmpp2m", "unipc2", "heun")
BUDGETS = (5, 10, 15, 20)
BATCH = 32


class Cell(NamedTuple):
    """One entry: which part, the grid's rule, steps or calls, and η or the solver."""

    part: str
    rule: str
    steps: int
    how: str

    @property
    def key(self) -> str:
        return f"{self.part}-{self.rule}-{self.steps}-{self.how}"

    def sample(self, field: EpsilonField, first: int, n: int) -> Tensor:
        """Images `first` to `first` + n, clamped to [−1, 1]."""
        options: dict[str, Any] = {"n": n, "first": first, "seed": 0}
        if self.part == "table1":
            options |= {"steps": self.steps, "grid": self.rule}
            options |= {"sigma_hat": True} if self.how == "sigma-hat" else {"eta": float(self.how)}
        else:
            options |= {"nfe": self.steps, "solver": None if self.how == "default" else self.how}
        run = ddim_ode.sample(field, **options)
        if not run.success:
            raise RuntimeError(f"{self.key}: {run.status}")
        return run.x.clamp(-1.0, 1.0).float()


def cells(parts: list[str], short: bool) -> list[Cell]:
    """All entries, cheap ones first."""
    steps, budgets = (STEPS[:1], BUDGETS[:1]) if short else (STEPS, BUDGETS)
    # At S = T both rules visit every time.
    out = [
        Cell("table1", rule, S, how)
        for S in steps
        for rule in (RULES if S < 1000 else RULES[:1])
        for how in ETAS
        if "table1" in parts
    ]
    out += [Cell("table1b", "own", n, how) for n in budgets for how in SOLVERS if "table1b" in parts]
    return sorted(out, key=lambda cell: cell.steps)


def drawn(field: EpsilonField, cell: Cell, images: int, folder: Path) -> Tensor:
    """The samples of a cell, from `folder` as far as they are there."""
    batches = []
    for first in range(0, images, BATCH):
        path = folder / f"{first:06d}.npy"
        if not path.exists():
            made = cell.sample(field, first, BATCH)
            output_folder(folder)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, made.numpy())
        batches.append(torch.from_numpy(np.load(path)))
    return torch.cat(batches)[:images]


def seen(samples: Tensor, folder: Path, network: EfficientNetLite0) -> Features:
    """Their features, kept beside them."""
    path = folder / f"features-{len(samples)}.npy"
    if not path.exists():
        found = Features.of(samples, network)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found.values.float().numpy())
    return Features(network.name, torch.from_numpy(np.load(path)))


def measure(field: EpsilonField, data: str, parts: list[str], images: int, work: Path, short: bool, path: Path) -> None:
    """All cells, recorded one by one; each beside the first of its row, which is η = 0 or the default."""
    network = EfficientNetLite0()
    if short:
        # What comes with the package, so that it runs anywhere; of so few images the numbers say nothing.
        bundled, images = Features.of(as_tensor(bundled_images()), network), 16
        reference, floor = bundled[:32], bundled[32:]
    else:
        reference, floor = (features_of(data, split) for split in ("test", "train"))
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known: dict[tuple[str, str, int], Quality] = {}
    for cell in cells(parts, short):
        folder = work / cell.key
        found = quality(seen(drawn(field, cell, images, folder), folder, network), reference, floor)
        row: dict[str, Any] = {"rule": cell.rule, "steps": cell.steps, "how": cell.how} | found.record()
        first = known.setdefault((cell.part, cell.rule, cell.steps), found)
        if found is not first:
            for name, difference in found.difference(first, paired=True).items():
                row |= {f"{name}_more": difference.value, f"{name}_more_error": difference.error}
        part = record.setdefault(cell.part, {"rows": []})
        same = lambda r, row=row: all(r[k] == row[k] for k in ("rule", "steps", "how"))
        part["rows"] = [r for r in part["rows"] if not same(r)] + [row]
        part |= {"images": images, "data": data, "circumstances": circumstances(field, torch.float64)}
        record["study"] = "table1"
        write_json(path, record)
        print(f"{cell.key}: {found.network}, {found.frechet} (floor {found.floor.frechet})", flush=True)  # type: ignore[union-attr]


# -- figures --------------------------------------------------------------------------------------
_COLOURS = dict(zip(ETAS, ("black", "tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))


def draw(record: dict[str, Any]) -> Figure:
    """Distance against steps by η, over both τ, and against calls by solver."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.8), layout="constrained")
        panels = figure.subplots(1, 3)
        for panel, rule in zip(panels, RULES, strict=False):
            rows = [r for r in record["table1"]["rows"] if r["rule"] == rule or r["steps"] == 1000]
            for how in ETAS:
                _line(
                    panel,
                    [r for r in rows if r["how"] == how],
                    _COLOURS[how],
                    "σ̂" if how == "sigma-hat" else f"η = {how}",
                )
            panel.set(title=f"{rule} τ", xlabel="steps S", xscale="log", yscale="log")
        rows = record.get("table1b", {"rows": []})["rows"]
        for solver in SOLVERS:
            _line(panels[2], [r for r in rows if r["how"] == solver], None, solver)
        panels[2].set(title="solvers", xlabel="model calls", yscale="log")
        for panel in panels:
            floor = record["table1"]["rows"][0]["floor"]["frechet"]
            panel.axhline(floor, color="0.6", linestyle=":", label="floor")
            panel.legend(fontsize=7)
        network = record["table1"]["rows"][0]["network"]
        figure.supylabel(f"Fréchet distance\n{network.split(',')[0]})", fontsize=8)
    return figure


def _line(panel: Any, rows: list[dict[str, Any]], colour: str | None, label: str) -> None:
    rows = sorted(rows, key=lambda r: r["steps"])
    error = [2.0 * r["frechet_error"] for r in rows]
    panel.errorbar(
        [r["steps"] for r in rows],
        [r["frechet"] for r in rows],
        error,
        color=colour,
        marker="o",
        markersize=3,
        label=label,
    )


def table(record: dict[str, Any], part: str) -> str:
    """A Markdown table: the distance and its error, and in brackets how much more it is than the first of its column."""
    rows = record[part]["rows"]
    rules = RULES if part == "table1" else ("own",)
    columns = [
        (rule, S)
        for rule in rules
        for S in sorted({r["steps"] for r in rows if r["rule"] == rule or r["steps"] == 1000})
    ]
    hows = ETAS if part == "table1" else SOLVERS
    lines = ["| | " + " | ".join(f"{'' if rule == 'own' else rule + ' '}{S}" for rule, S in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for how in hows:
        cells_ = []
        for rule, S in columns:
            row = next(
                (r for r in rows if r["how"] == how and r["steps"] == S and (r["rule"] == rule or S == 1000)), None
            )
            if row is None:
                cells_.append("")
                continue
            more = f" ({row['frechet_more']:+.1f} ± {row['frechet_more_error']:.1f})" if "frechet_more" in row else ""
            cells_.append(f"{row['frechet']:.1f}{more}")
        name = {"sigma-hat": "σ̂"}.get(how, f"η = {how}") if part == "table1" else f"`{how}`"
        lines.append(f"| {name} | " + " | ".join(cells_) + " |")
    return "\n".join(lines)


def main() -> None:
    """Sample, measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="what ddim_ode.load takes")
    parser.add_argument("--data", help="the data set that it was trained on (default: the model's name)")
    parser.add_argument("--images", type=int, default=256, help="samples in each cell")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the record")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for the figure")
    parser.add_argument("--work", type=Path, default=ROOT / "out/table1", help="folder for samples")
    parser.add_argument(
        "--short",
        action="store_true",
        help="few cells, 16 images beside the bundled ones: minutes, to see that it runs",
    )
    parser.add_argument("--figures-only", action="store_true", help="draw from the JSON there is, measure nothing")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"known parts are {', '.join(PARTS)}")
    name = Path(options.model).name
    stem = "table1" if name == "fashion-mnist" else f"table1-{name}"
    path = output_folder(options.out) / f"{stem}.json"
    if not options.figures_only:
        field = ddim_ode.load(options.model)
        work = options.work / f"{name}-{(field.describe()['weights'] or '')[:8]}"
        warnings.simplefilter("ignore", LatentWarning)
        measure(field, options.data or name, parts, options.images, work, options.short, path)
    record = json.loads(path.read_text("utf-8"))
    for part in parts:
        if part in record:
            print(f"\n{part}\n{table(record, part)}")
    if "table1" in record:
        save_figure(draw(record), output_folder(options.figures) / f"{stem}.png")


if __name__ == "__main__":
    main()
