r"""Table 1 of the paper: the quality of samples by η and the number of steps; and the solvers of this package at few calls.

Two parts:

``table1``
    η ∈ {0, 0.2, 0.5, 1} and σ̂, in S ∈ {10, 20, 50, 100, 1000} steps over linear and quadratic τ (at S = T they are one).
``table1b``
    Deterministic solvers at 5, 10, 15 and 20 calls.

Image i of all of them comes from one latent, so that differences between them are paired: what the latents do to a distance is counted
once. Two kinds of them are recorded: of a row from the first of its column, η = 0 or the default, and (``changes``) from the same η
or solver at the number of steps before. Distances are those of ``ddim_ode.quality`` by the features of a named network beside test
images; the floor is that of as many training images. None of it can be set beside a published FID.

Run from the root of a checkout::

    python -m benchmarks.table1 [--images 256] [--parts …] [--model … --data …] [--workers N] [--short] [--figures-only]

On the bundled Fashion-MNIST network it takes an hour and a half for 256 images on two cores, half of it at S = 1000. Batches are
sampled side by side, one thread each: small convolutions gain little from a second one. It goes on where it was stopped: samples
are kept in ``out/table1``, batch by batch, beside what made them, and are made again where that would make others. The record is
``table1.json`` (``table1-NAME.json`` for other models); it holds rows of one number of images, one data set and one network only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

import ddim_ode
from benchmarks.folders import FIGURES, ROOT, SHORT, add_folders, folders, into_page, recorded
from benchmarks.metrics import features_of, kept_features, splits
from ddim_ode import EfficientNetLite0, EpsilonField, Features, LatentWarning, Quality, quality
from ddim_ode.comparison import circumstances
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.files import output_folder, replacing, to_json, write_json
from ddim_ode.models.analytic import MixtureEpsilon
from ddim_ode.models.checkpoints import bundled
from ddim_ode.plotting import STYLE, save_figure
from ddim_ode.quality import NEIGHBOURS

PARTS = ("table1", "table1b")
STEPS = (10, 20, 50, 100, 1000)
ETAS = ("0", "0.2", "0.5", "1", "sigma-hat")
RULES = ("linear", "quadratic")
SOLVERS = ("default", "ddim", "pf-euler", "ab2", "abm3", "deisx4", "dpmpp2m", "unipc2", "heun")
BUDGETS = (5, 10, 15, 20)
BATCH = 32
#: The distances that tables and figures show: their names, and what they are multiplied by.
MEASURES = {"frechet": ("Fréchet distance", 1.0), "kernel": ("kernel distance × 10³", 1e3)}


class Cell(NamedTuple):
    """One entry: which part, the grid's rule, steps or calls, and η or the solver."""

    part: str
    rule: str
    steps: int
    how: str

    @property
    def key(self) -> str:
        return f"{self.part}-{self.rule}-{self.steps}-{self.how}"

    @property
    def options(self) -> dict[str, Any]:
        """How it samples."""
        if self.part == "table1":
            how: dict[str, Any] = {"sigma_hat": True} if self.how == "sigma-hat" else {"eta": float(self.how)}
            return {"steps": self.steps, "grid": self.rule, "seed": 0} | how
        return {"nfe": self.steps, "solver": None if self.how == "default" else self.how, "seed": 0}

    def sample(self, field: EpsilonField, first: int, n: int) -> Tensor:
        """Images `first` to `first` + n, clamped to [−1, 1]."""
        run = ddim_ode.sample(field, n=n, first=first, **self.options)
        if not run.success:
            raise RuntimeError(f"{self.key}: {run.status}")
        return run.x.clamp(-1.0, 1.0).float()

    def sampler(self, field: EpsilonField) -> dict[str, Any]:
        """What the sampler is and does: its name, its grid, and what it draws from a mixture of two Gaussians in the plane.

        The name alone tells neither what the default has come to be nor that a solver, or the noise that it is given, has changed.
        """
        toy = MixtureEpsilon(
            torch.tensor([1.0, 2.0]), torch.tensor([[-0.8, 0.3], [0.5, -0.1]]), 0.05 * torch.eye(2).repeat(2, 1, 1)
        )
        run = ddim_ode.sample(
            EpsilonField.from_sigma(toy, field.schedule, shape=(2,)), n=2, first=BATCH, **self.options
        )
        return {"solver": run.solver, "grid": run.grid.name, "nodes": run.grid.steps, "draws": run.x.tolist()}


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two samplers are one, up to rounding."""
    return all(a.get(name) == b[name] for name in ("solver", "grid", "nodes")) and np.allclose(
        a["draws"], b["draws"], rtol=0.0, atol=1e-6
    )


def cells(parts: list[str], short: bool) -> list[Cell]:
    """All entries, cheap ones first."""
    steps, budgets = (STEPS[:2], BUDGETS[:1]) if short else (STEPS, BUDGETS)
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


#: Samples batches: cell, first image, how many, the file to write.
Batches = Callable[[list[tuple[Cell, int, int, Path]]], object]


def one_by_one(field: EpsilonField) -> Batches:
    """Batches sampled here, one after another."""

    def sample(batches: list[tuple[Cell, int, int, Path]]) -> None:
        for batch in batches:
            _batch(field, *batch)

    return sample


@contextmanager
def side_by_side(model: str, workers: int) -> Iterator[Batches]:
    """Batches sampled by as many processes, each with a model and a thread of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(model,)) as pool:
        yield lambda batches: list(pool.map(_work, batches))


_field: EpsilonField  # a worker's own


def _start(model: str) -> None:
    global _field
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LatentWarning)
    _field = ddim_ode.load(model)


def _work(batch: tuple[Cell, int, int, Path]) -> None:
    _batch(_field, *batch)


def _batch(field: EpsilonField, cell: Cell, first: int, n: int, path: Path) -> None:
    x = cell.sample(field, first, n)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, x.numpy())


def drawn(field: EpsilonField, cell: Cell, images: int, folder: Path, batches: Batches) -> Tensor:
    """The samples of a cell, from `folder` as far as they are there and were made by this model and sampler."""
    made = json.loads(to_json({"model": field.describe(), "sampler": cell.sampler(field)}))
    beside = output_folder(folder) / "made.json"
    there = json.loads(beside.read_text("utf-8")) if beside.exists() else None
    if there is None or there["model"] != made["model"] or not alike(there["sampler"], made["sampler"]):
        for old in [*folder.glob("*.npy"), *folder.glob("*.npz")]:  # before it says that they are others
            old.unlink()
        write_json(beside, made)
    paths = {first: folder / f"{first:06d}.npy" for first in range(0, images, BATCH)}
    count = lambda first: min(BATCH, images - first)
    there_are = lambda path: len(np.load(path, mmap_mode="r")) if path.exists() else 0
    # None yet, or the last of fewer.
    batches([(cell, first, count(first), path) for first, path in paths.items() if there_are(path) < count(first)])
    return torch.cat([torch.from_numpy(np.load(path)) for path in paths.values()])[:images]


def measure(
    field: EpsilonField,
    network: Any,
    compared: tuple[Features, Features],
    parts: list[str],
    images: int,
    data: str,
    work: Path,
    path: Path,
    short: bool = False,
    batches: Batches | None = None,
) -> None:
    """All cells, recorded one by one, beside the `compared` features of reference images and of others for the floor."""
    reference, floor = compared
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    record["study"] = "table1"
    todo = cells(parts, short)
    samplers = {cell: cell.sampler(field) for cell in todo}
    about = {"images": images, "data": data, "reference_images": len(reference), "network": network.name}
    about["weights"] = field.describe()["weights"]
    for name in parts:
        # Rows of other images, data or weights are none of this table's, nor those of what a name once stood for.
        part = record.get(name, {})
        same = all(part.get(key) == value for key, value in about.items())
        own = {(cell.rule, cell.steps, cell.how): samplers[cell] for cell in todo if cell.part == name}
        kept = [
            row
            for row in (part["rows"] if same else [])
            if (at := (row["rule"], row["steps"], row["how"])) in own and alike(row["sampler"], own[at])
        ]
        record[name] = about | {"rows": kept, "changes": part["changes"] if same and len(kept) == len(own) else []}
    tops: dict[tuple[str, str, int], Quality] = {}
    before: dict[tuple[str, str, str], tuple[int, Quality]] = {}
    for cell in todo:
        folder = work / cell.key
        samples = drawn(field, cell, images, folder, batches or one_by_one(field))
        seen = kept_features(folder / f"features-{images}.npz", network, samples)
        found = quality(seen, reference, floor)
        row: dict[str, Any] = {"rule": cell.rule, "steps": cell.steps, "how": cell.how, "sampler": samplers[cell]}
        row |= found.record()
        top = tops.setdefault((cell.part, cell.rule, cell.steps), found)
        if found is not top:
            row |= _difference(found, top, "_more")
        part = record[cell.part]
        _put(part["rows"], row, ("rule", "steps", "how"))
        for rule in RULES if cell.part == "table1" and cell.steps == 1000 else (cell.rule,):
            last = before.get((cell.part, rule, cell.how))
            before[cell.part, rule, cell.how] = cell.steps, found
            if last is not None:
                change = {"rule": rule, "how": cell.how, "steps": cell.steps, "from": last[0]}
                _put(part["changes"], change | _difference(found, last[1], ""), ("rule", "how", "steps"))
        part["circumstances"] = circumstances(field, torch.float64)
        write_json(path, record)
        assert found.floor is not None
        print(f"{cell.key}: {found.network}, {found.frechet} (floor {found.floor.frechet})", flush=True)


def _difference(found: Quality, other: Quality, tail: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, estimate in found.difference(other, paired=True).items():
        out |= {f"{name}{tail}": estimate.value, f"{name}{tail}_error": estimate.error}
    return out


def _put(rows: list[dict[str, Any]], row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Into the rows, in the place of the one with the same keys."""
    rows[:] = [r for r in rows if any(r[k] != row[k] for k in keys)] + [row]


# -- tables and figures ---------------------------------------------------------------------------
def _name(part: str, how: str) -> str:
    if part == "table1b":
        return f"`{how}`"
    return "σ̂" if how == "sigma-hat" else f"η = {how}"


def _columns(part: dict[str, Any]) -> list[tuple[str, int]]:
    """Rule and steps: for S = T, where the rules are one, the first."""
    return sorted({(r["rule"], r["steps"]) for r in part["rows"]}, key=lambda at: (at[1] == 1000, at))


def heading(record: dict[str, Any], part: str, measure: str) -> str:
    """What a table's numbers are."""
    about = record[part]
    return (
        f"{MEASURES[measure][0]} of {about['images']} samples from {about['reference_images']} images of {about['data']}, by "
        f"{about['network']}; ± are standard errors"
    )


def table(record: dict[str, Any], part: str, measure: str) -> str:
    """A Markdown table: the distance, and in brackets how much more it is than the first of its column; last the floor's."""
    rows, scale = record[part]["rows"], MEASURES[measure][1]
    columns = _columns(record[part])
    top = _name(part, (ETAS if part == "table1" else SOLVERS)[0])
    lines = [
        f"{heading(record, part, measure)}; in brackets how much more it is than that of {top}, the same latents:\n"
    ]
    lines.append("| | " + " | ".join(_column(rule, S) for rule, S in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    show = lambda row, name, sign="": (
        f"{scale * row[name]:{sign}.1f} ± {scale * row[f'{name}_error']:.1f}" if name in row else ""
    )
    found = {(r["how"], r["rule"], r["steps"]): r for r in rows}
    for how in ETAS if part == "table1" else SOLVERS:
        line = []
        for at in columns:
            row = found.get((how, *at), {})
            more = show(row, f"{measure}_more", "+")
            line.append(show(row, measure) + (f" ({more})" if more else ""))
        lines.append(f"| {_name(part, how)} | " + " | ".join(line) + " |")
    floors = {(r["rule"], r["steps"]): r["floor"] for r in rows}
    lines.append("| floor: other images | " + " | ".join(show(floors[at], measure) for at in columns) + " |")
    return "\n".join(lines)


def _column(rule: str, steps: int) -> str:
    return str(steps) if rule == "own" or steps == 1000 else f"{rule} {steps}"


def verdict(value: float, error: float) -> str:
    """What a change of a distance says of quality; nothing, unless it is larger than two standard errors."""
    return "open" if abs(value) <= 2.0 * error else "better" if value < 0.0 else "worse"


def changes(record: dict[str, Any], part: str, measure: str) -> str:
    """A Markdown table: whether quality rises from each number of steps to the next, by paired differences."""
    rows, scale = record[part]["changes"], MEASURES[measure][1]
    columns = sorted({(r["rule"], r["steps"], r["from"]) for r in rows})
    lines = [
        f"{heading(record, part, measure)}; changes from one number to the next, the same latents, and whether they are larger "
        "than two of their errors:\n"
    ]
    lines.append("| | " + " | ".join(f"{'' if r == 'own' else r + ' '}{a} → {b}" for r, b, a in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    found = {(r["how"], r["rule"], r["steps"], r["from"]): r for r in rows}
    for how in ETAS if part == "table1" else SOLVERS:
        line = []
        for at in columns:
            row = found.get((how, *at))
            value, error = (row[measure], row[f"{measure}_error"]) if row else (0.0, 0.0)
            line.append(f"{scale * value:+.1f} ± {scale * error:.1f} {verdict(value, error)}" if row else "")
        lines.append(f"| {_name(part, how)} | " + " | ".join(line) + " |")
    return "\n".join(lines)


_COLOURS = dict(zip(ETAS, ("black", "tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True))


def draw(record: dict[str, Any]) -> Figure:
    """Distances against steps by η, over both τ, and against calls by solver; each panel with its own floor."""
    shown = [("table1", rule) for rule in RULES if "table1" in record]
    shown += [("table1b", "own") for _ in range("table1b" in record)]
    about = record[shown[0][0]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * len(shown), 6.8), layout="constrained")
        panels = np.asarray(figure.subplots(2, len(shown), squeeze=False, sharex="col"))
        for column, (part, rule) in zip(panels.T, shown, strict=True):
            rows = [r for r in record[part]["rows"] if r["rule"] == rule or (part == "table1" and r["steps"] == 1000)]
            hows = ETAS if part == "table1" else SOLVERS
            ticks = sorted({r["steps"] for r in rows})
            for panel, (measure, (_, scale)) in zip(column, MEASURES.items(), strict=True):
                for i, how in enumerate(hows):
                    line = sorted((r for r in rows if r["how"] == how), key=lambda r: r["steps"])
                    value, error = ([scale * r[key] for r in line] for key in (measure, f"{measure}_error"))
                    # A little beside each other, so that bars can be told apart.
                    aside = (i - len(hows) // 2) / len(hows)
                    at = [S * 1.15**aside if part == "table1" else S + aside for S in (r["steps"] for r in line)]
                    colour, label = _COLOURS[how] if part == "table1" else f"C{i}", _name(part, how).strip("`")
                    panel.errorbar(
                        at, value, [2.0 * e for e in error], color=colour, marker="o", markersize=3, elinewidth=0.9, label=label
                    )  # fmt: skip
                floor = max(rows, key=lambda r: r["steps"])["floor"]
                value, error = scale * floor[measure], 2.0 * scale * floor[f"{measure}_error"]
                # The kernel distance is unbiased: its floor is about 0, which a logarithm does not show.
                place: Any = ("axes fraction", "data" if measure == "frechet" else "axes fraction")
                height = value if measure == "frechet" else 0.02
                words = f"floor {value:.1f} ± {error:.1f}"
                panel.annotate(words, (0.02, height), xycoords=place, va="bottom", fontsize=7, color="0.4")
                if measure == "frechet":
                    panel.axhline(value, color="0.6", linestyle=":")
                panel.set(yscale="log", xscale="log" if part == "table1" else "linear")
                panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_locator(NullLocator())
                panel.set_xticks(ticks, list(map(str, ticks)))
                panel.xaxis.set_minor_locator(NullLocator())
            if rule != RULES[1]:  # whose lines are those of the panel before
                # Solvers leave room below the worst of them.
                at_ = {} if part == "table1" else {"loc": "upper right", "bbox_to_anchor": (1.0, 0.85)}
                column[0].legend(fontsize=6.5, ncols=2, **at_)
            column[0].set_title(f"{rule} τ" if part == "table1" else "solvers")
            column[1].set_xlabel("steps S" if part == "table1" else "model calls")
        for panel, (name, _) in zip(panels[:, 0], MEASURES.values(), strict=True):
            panel.set_ylabel(f"{name}, ± 2 s.e.")
        figure.suptitle(
            f"{about['images']} samples, {about['reference_images']} images of {about['data']}, {about['network']}", fontsize=8
        )  # fmt: skip
    return figure


def main() -> None:
    """Sample, measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="what ddim_ode.load takes")
    parser.add_argument(
        "--data", help="what it was trained on, as ddim_ode.datasets.images takes it (default for bundled models: their name)"
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=256, help="samples in each cell")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that sample, of a thread each"
    )
    parser.add_argument("--work", type=Path, help="folder for samples (out/table1; with --short out/paper/table1)")
    add_folders(parser, "few cells, few images beside the bundled ones: a minute or two, to see that it runs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"known parts are {', '.join(PARTS)}")
    name = Path(options.model).name
    stem = "table1" if name == "fashion-mnist" else f"table1-{name}"
    out, figures = folders(options)
    path = out / f"{stem}.json"
    if not options.figures_only:
        warnings.simplefilter("ignore", LatentWarning)
        _measure(options, parts, name, path)
    record = json.loads(recorded(path).read_text("utf-8"))
    tables = {
        f"{part}:{measure_}": table(record, part, measure_) for part in parts if part in record for measure_ in MEASURES
    }
    tables |= {
        f"{part}:{measure_}:changes": changes(record, part, measure_)
        for part in parts
        if part in record and record[part]["changes"]
        for measure_ in MEASURES
    }
    for title, text in tables.items():
        print(f"\n{title}: {text}")
    if figures.resolve() == FIGURES and stem == "table1":
        into_page("paper.md", tables)
    save_figure(draw(record), figures / f"{stem}.png")


def _measure(options: argparse.Namespace, parts: list[str], name: str, path: Path) -> None:
    """Measure what the options ask for, or refuse it before anything is sampled."""
    if options.workers < 1:
        raise SystemExit(f"--workers must be 1 at least, but is {options.workers}")
    work = options.work or (SHORT / "table1" if options.short else ROOT / "out/table1")
    if options.short:
        # What comes with the package, so that it runs anywhere; of so few images the numbers say nothing.
        data, images, most = "the bundled images", 8, 32
    else:
        if options.data is None and options.model not in bundled():
            raise SystemExit(f"{options.model} is no bundled model: give --data, the data that it was trained on")
        data, images = options.data or options.model, options.images
        try:
            found = splits(data)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data {data}: {error}") from error
        most = len(found["train"]) if len(found["test"]) > NEIGHBOURS + 1 else 0
    if not NEIGHBOURS + 2 <= images <= most:
        raise SystemExit(
            f"--images must be {NEIGHBOURS + 2} at least and {most} at most, as many as {data} has for the floor, but is {images}"
        )
    field = ddim_ode.load(options.model)
    if field.shape is None or (not options.short and field.shape != found["test"].shape[1:]):
        made = None if options.short else found["test"].shape[1:]
        raise SystemExit(f"{options.model} makes images of shape {field.shape}, and {data} holds {made}: not its data")
    network = EfficientNetLite0()
    if options.short:
        seen = Features.of(as_tensor(bundled_images()), network)
        compared = seen[:32], seen[32:]
    else:
        compared = features_of(data, "test"), features_of(data, "train")
    work = work / f"{name}-{(field.describe()['weights'] or '')[:8]}"
    run = (field, network, compared, parts, images, data, work, path, options.short)
    if options.short or options.workers == 1:
        measure(*run)
    else:
        with side_by_side(options.model, options.workers) as batches:
            measure(*run, batches)


if __name__ == "__main__":
    main()
