r"""Encode images and decode them again: by every method of the package, and by what diffusers has for it.

Four parts:

``exact``
    Exact models, whose true latents are known: the Gaussian of the digits by a formula, mixtures of real images by two adaptive
    pairs at 1e-10. Images are what latents lead to.
``networks``
    The bundled networks on test images that they never saw.
``peers``
    diffusers' ``DDIMInverseScheduler`` and ``DPMSolverMultistepInverseScheduler`` with the schedulers that go with them, at every
    setting worth trying, on the same images at the same calls. Each is entered at the best of its settings by round trip,
    chosen on those very images (on a network, of the 12 that are best on three of them). They are asked at their own labels,
    as their pipelines ask.
``table2``
    Table 2 of the paper: eq. 13 both ways on the quadratic grid, 10 to 1000 steps, on the networks, beside the default.

Run from the root of a checkout::

    python -m benchmarks.round_trip [--parts exact,networks,peers,table2] [--problems …] [--short] [--figures-only]

It takes about three quarters of an hour on one core, and needs the data sets and scikit-learn (see ``problems.py``); what is missing is
left out and named. The record is ``round_trip.json``, written part by part; figures and the tables of docs/inversion.md are
made of it alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor
from tqdm import tqdm

import ddim_ode
from benchmarks.folders import FIGURES, add_folders, folders, into_page, recorded
from benchmarks.problems import NETWORKS, problem
from ddim_ode import EpsilonField
from ddim_ode.comparison import Reference, circumstances
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.datasets import images as dataset_images
from ddim_ode.files import write_json
from ddim_ode.metrics import mse, rms
from ddim_ode.plotting import STYLE, save_figure
from ddim_ode.reconstruction import reconstruct, reference_latents
from ddim_ode.sampling import DEFAULTS, GRID

PARTS = ("exact", "networks", "peers", "table2")
#: Problems of the first part and of the second, and how many images each.
EXACT = {"gaussian": 16, "digits": 32, "mnist": 8, "cifar": 8}
TESTED = {"network": 12, "network-cifar10": 6}
BUDGETS = (10, 20, 50, 100)
#: On the quadratic grid: all kinds. And on the default's own: the explicit members it must not be worse than.
METHODS = (
    "default", "ddim", "ab2", "abm3", "dpmpp2m", "deisx4", "ees25", "ees25-arctan", "o-belm", "bdia", "mf-midpoint", "alf",
    "implicit-midpoint", "inverse-ddim", "dopri5",
)  # fmt: skip
EXPLICIT = ("ddim", "ab2", "abm3", "dpmpp2m", "flowup4", "flowdown5")
TABLE2 = (10, 20, 50, 100, 200, 500, 1000)
#: What the paper prints for CIFAR-10, with a network of another size and other training.
PAPER = (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001)
#: The first test image taken: the 64 before it are bundled, and have been looked at.
FIRST = 1000


# -- problems -----------------------------------------------------------------------------------
class Case:
    """A field, images, and the latents that they truly have."""

    def __init__(self, name: str, short: bool = False) -> None:
        self.name = name
        if name in EXACT:
            task = problem(name, EXACT[name], seed=7)
            self.field, self.images, self.range = task.field, task.exact, None
            self.exact = Reference(task.latent, task.difference, 0, ("known",))
        else:
            self.field = ddim_ode.load(NETWORKS[name])
            if short:
                found = bundled_images()[:2]
            else:
                found = dataset_images(NETWORKS[name], "test", None)[FIRST : FIRST + TESTED[name]]
            self.images, self.range = as_tensor(found), (-1.0, 1.0)
            self.exact = reference_latents(self.field, self.images)

    def study(self) -> dict[str, Any]:
        """Rows of all methods, on both grids."""
        out: dict[str, Any] = {}
        for grid, methods in ((GRID, METHODS), (DEFAULTS["encode"].grid, EXPLICIT)):
            with tqdm(total=len(methods) * len(BUDGETS), desc=f"{self.name}, {grid}", disable=None, leave=False) as bar:

                def advance(what: str, bar: Any = bar) -> None:
                    bar.update()

                found = reconstruct(
                    self.field, self.images, methods, BUDGETS, grid=grid, exact=self.exact, data_range=self.range, advance=advance
                )  # fmt: skip
            for row in found.record["rows"]:
                row.pop("seconds", None)
                row["each"] = None if row["each"] is None else _quantiles(row["each"])
                for key in ("residual", "contraction"):
                    row[key] = None if row[key] is None else max(row[key])
            out.setdefault("rows", []).extend(found.record["rows"])
        reference = {"rms_difference": self.exact.difference, "methods": self.exact.methods}
        return {"images": len(self.images), "reference": reference} | out


def _quantiles(each: dict[str, list[float]]) -> dict[str, list[float]]:
    """The least, the quartiles and the most, over images."""
    return {key: np.nanquantile(values, (0.0, 0.25, 0.5, 0.75, 1.0)).tolist() for key, values in each.items()}


# -- diffusers ------------------------------------------------------------------------------------
Options = dict[str, Any]
FAMILIES = ("DDIM", "DPMSolverMultistep")
_COMMON: Options = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
#: Images of a network by which settings are told to be far behind, and how many of each family are kept for all images.
SCREEN, KEPT = 3, 12


def settings() -> Iterator[tuple[str, Options, Options]]:
    """A family's name, and the options of its encoder and of its decoder."""
    spacings: tuple[Options, ...] = (
        {"timestep_spacing": "leading"}, {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"},
    )  # fmt: skip
    for spacing, one in itertools.product(spacings, (True, False)):
        options = _COMMON | spacing | {"clip_sample": False, "set_alpha_to_one": one}
        yield "DDIM", options, options
    orders: tuple[Options, ...] = (
        {"solver_order": 1}, *({"solver_order": k, "solver_type": kind} for k in (2, 3) for kind in ("midpoint", "heun")),
    )  # fmt: skip
    nodes = (
        *spacings,
        {"timestep_spacing": "linspace"},
        *({f"use_{r}_sigmas": True} for r in ("karras", "exponential", "beta")),
    )
    for order, node, lower, kind in itertools.product(orders, nodes, (True, False), ("dpmsolver++", "dpmsolver")):
        options = _COMMON | order | node | {"lower_order_final": lower, "algorithm_type": kind}
        for final in ("zero", "sigma_min"):
            if kind == "dpmsolver" and final == "zero":
                continue  # it refuses
            yield "DPMSolverMultistep", options, options | {"final_sigmas_type": final}


def peers(case: Case) -> dict[str, Any]:
    """At each budget the best setting of each family by round trip: its errors, and how many settings there were.

    On a network, where all of them on all images take an hour, a few images tell which settings come near the best.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    passes = (slice(SCREEN), slice(None)) if case.name in TESTED else (slice(None),)
    best = []
    for budget, family in tqdm(list(itertools.product(BUDGETS, FAMILIES)), desc=case.name, disable=None, leave=False):
        left, count = [(up, down) for name, up, down in settings() if name == family], 0
        for some in passes:
            tried = [(_try(case, some, family, *pair, budget), pair) for pair in left]
            found = [(row, pair) for row, pair in tried if row is not None]
            found.sort(key=lambda one: one[0]["round_trip_mse"])
            count, left = count or len(found), [pair for _, pair in found[:KEPT]]
        if found:
            best.append(found[0][0] | {"settings": count})
    return {"rows": best, "diffusers": diffusers.__version__}


def _try(case: Case, some: slice, family: str, up: Options, down: Options, budget: int) -> dict[str, Any] | None:
    """One setting there and back on some of the images; None where it does not run, or at more calls."""
    import diffusers

    images = case.images[some]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            latent, there = _walk(getattr(diffusers, f"{family}InverseScheduler")(**up), case, images.double(), budget)
            back, calls = _walk(getattr(diffusers, f"{family}Scheduler")(**down), case, latent, budget)
    except (ValueError, IndexError, RuntimeError):
        return None
    lost = float(mse(back, images, case.range or (-1.0, 1.0)).mean())
    if there > budget or calls > budget or not math.isfinite(lost):
        return None
    return {
        "family": family,
        "nfe": budget,
        "calls": [there, calls],
        "round_trip_mse": lost,
        "latent_rms": float(rms(latent, case.exact.x[some]).square().nanmean().sqrt()),
        "options": {k: v for k, v in down.items() if k not in _COMMON},
    }


def _walk(scheduler: Any, case: Case, x: Tensor, steps: int) -> tuple[Tensor, int]:
    """What a pipeline does with a scheduler: the model at its labels, one step each."""
    scheduler.set_timesteps(steps)
    schedule = case.field.schedule
    for t in scheduler.timesteps:
        sigma = schedule.sigma(min(max(float(t) + 1.0, schedule.t_min), schedule.T))
        with torch.no_grad():
            eps = case.field(x * math.sqrt(1.0 + sigma * sigma), sigma)
        x = scheduler.step(eps, t, x).prev_sample.double()
    return x, len(scheduler.timesteps)


# -- table 2 --------------------------------------------------------------------------------------
def table2(case: Case, steps: tuple[int, ...] = TABLE2) -> dict[str, Any]:
    """Eq. 13 and the default, mean squared errors over images and their standard errors, at the paper's numbers of steps."""
    paper = PAPER[: len(steps)]
    found: dict[str, Any] = {"steps": steps, "paper_cifar10": paper, "images": len(case.images)}
    for name, key in (("ddim", "round_trip_mse"), ("default", "alone_mse")):
        study = reconstruct(case.field, case.images, [name], steps, exact=case.exact, data_range=case.range)
        rows = study.record["rows"]
        found[name] = [row[key] for row in rows]
        each = [np.array(row["each"][key], dtype=float) for row in rows]
        each = [values[np.isfinite(values)] for values in each]  # as the means leave out images that failed
        found[f"{name}_error"] = [float(v.std(ddof=1) / v.size**0.5) if v.size > 1 else None for v in each]
        found[f"{name}_latent_rms"] = [row["latent_rms"] for row in rows]
    return found


# -- figures --------------------------------------------------------------------------------------
_LOOKS = {
    "default": ("black", "o"), "ddim": ("0.6", "o"), "dpmpp2m": ("tab:orange", "D"), "abm3": ("tab:cyan", "v"),
    "ees25": ("tab:blue", ">"), "o-belm": ("tab:purple", "v"), "bdia": ("tab:brown", "P"), "mf-midpoint": ("tab:pink", "*"),
    "alf": ("tab:green", "X"), "implicit-midpoint": ("tab:olive", "<"),
}  # fmt: skip


def draw(record: dict[str, Any], key: str, title: str) -> Figure:
    """A panel a problem: an error against calls each way, diffusers' best beside ours."""
    found = {**record.get("exact", {}), **record.get("networks", {})}
    found = {name: part for name, part in found.items() if "rows" in part}
    with matplotlib.rc_context(STYLE):
        across = min(3, len(found))
        figure = Figure(figsize=(3.4 * across + 1.8, 3.0 * -(-len(found) // across)), layout="constrained")
        panels = np.asarray(figure.subplots(-(-len(found) // across), across, squeeze=False)).ravel()
        for panel in panels[len(found) :]:
            panel.remove()
        for panel, (name, part) in zip(panels, found.items(), strict=False):
            for solver, (colour, marker) in _LOOKS.items():
                rows = [
                    r
                    for r in part["rows"]
                    if r["solver"] == solver and (r["grid"] == GRID or solver == "default") and r[key]
                ]
                wide = {"linewidth": 2.2, "zorder": 5} if solver == "default" else {"linewidth": 1.1}
                calls = [0.5 * (r["encode_calls"] + r["decode_calls"]) for r in rows]
                panel.plot(calls, [r[key] for r in rows], color=colour, marker=marker, label=solver, **wide)
            other = "latent_rms" if key == "latent_rms" else "round_trip_mse"
            for family, colour in (("DDIM", "tab:red"), ("DPMSolverMultistep", "darkred")):
                rows = [r for r in record.get("peers", {}).get(name, {}).get("rows", []) if r["family"] == family]
                panel.plot(
                    [r["nfe"] for r in rows],
                    [r[other] for r in rows],
                    "--s",
                    color=colour,
                    label=f"diffusers {family}Inverse",
                )
            panel.set(xscale="log", yscale="log", title=name)
            panel.set_xticks([10, 20, 50, 100, 200, 500], ["10", "20", "50", "100", "200", "500"])
            panel.minorticks_off()
            panel.set_ylim(top=10.0)
        figure.supxlabel("model calls each way", fontsize=9)
        figure.supylabel(title, fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def draw_table2(record: dict[str, Any]) -> Figure:
    """Table 2: mean squared errors by steps with two standard errors over images, if the record has them; the paper's beside."""
    found = {name: part for name, part in record["table2"].items() if "ddim" in part}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        panel = figure.subplots()
        longest = max(found.values(), key=lambda part: len(part["steps"]))
        for i, (name, part) in enumerate(found.items()):
            for key, what, style in (
                ("ddim", "eq. 13", "o-"),
                ("default", "the default, from the latent alone", "s--"),
            ):
                mean = np.array(part[key], dtype=float)
                error = np.array([np.nan if e is None else e for e in part.get(f"{key}_error", [None] * mean.size)])
                # Down to a tenth of the mean at most: a logarithm shows no less.
                bars = None if np.isnan(error).all() else np.stack([np.minimum(2.0 * error, 0.9 * mean), 2.0 * error])
                label = f"{name} ({part['images']} images), {what}"
                panel.errorbar(
                    part["steps"], mean, bars, fmt=style, color=f"C{i}", elinewidth=0.9, capsize=2, label=label
                )
        panel.plot(
            longest["steps"], longest["paper_cifar10"], "x:", color="0.4", label="the paper, CIFAR-10, a network of its own"
        )  # fmt: skip
        ticks = sorted({S for part in found.values() for S in part["steps"]})
        words = ", ± 2 s.e. over images" if any("ddim_error" in part for part in found.values()) else ""
        panel.set(xscale="log", yscale="log", xlabel="steps S each way", ylabel=f"MSE on [0, 1]{words}")
        panel.set_xticks(ticks, list(map(str, ticks)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.legend(fontsize=7)
    return figure


#: Tables of the page: what they hold, and whose second state counts.
TABLES = ("round_trip_mse", "alone_mse", "latent_rms")


def table(record: dict[str, Any], key: str) -> str:
    """A Markdown table: methods by problems, each cell the error at all budgets."""
    found = {**record.get("exact", {}), **record.get("networks", {})}
    found = {name: part for name, part in found.items() if "rows" in part}
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    kinds = dict.fromkeys((r["solver"], r["grid"]) for part in found.values() for r in part["rows"])
    for solver, grid in kinds:
        if solver == "ees25-arctan" or (grid != GRID and solver not in ("default", "dopri5", "flowup4", "flowdown5")):
            continue
        cells: list[str] = []
        for part in found.values():
            rows = [r for r in part["rows"] if (r["solver"], r["grid"]) == (solver, grid)]
            if key == "round_trip_mse" and rows and rows[0]["states"] == 1 and solver not in ("ddim", "dpmpp2m"):
                cells = []
                break
            cells.append(" / ".join(_digits(r[key]) + ("\\*" if r.get("unconverged") else "") for r in rows))
        on = "" if grid in (GRID, "explicit") or solver == "default" else f" on {grid}"
        if cells:
            lines.append(f"| `{solver}`{on} | " + " | ".join(cells) + " |")
    for family in FAMILIES:
        cells = []
        for name in found:
            rows = [r for r in record.get("peers", {}).get(name, {}).get("rows", []) if r["family"] == family]
            cells.append(
                " / ".join(_digits(r["latent_rms" if key == "latent_rms" else "round_trip_mse"]) for r in rows)
            )
        lines.append(f"| diffusers `{family}Inverse` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}".replace("e-0", "e-").replace("e+00", "").replace("e+0", "e")


def table2_page(record: dict[str, Any]) -> str:
    """Table 2 beside ours, with standard errors over images."""
    found = {name: part for name, part in record.get("table2", {}).items() if "ddim" in part}
    steps = max((part["steps"] for part in found.values()), key=len, default=TABLE2)
    lines = ["| S | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    lines.append("| the paper, CIFAR-10 | " + " | ".join(map(str, PAPER[: len(steps)])) + " |")
    for name, part in found.items():
        for key, what in (("ddim", "eq. 13"), ("default", "the default, from the latent alone")):
            errors = part.get(f"{key}_error", [None] * len(part[key]))
            cells = [
                _digits(value) + ("" if error is None else f" ± {_digits(error)}")
                for value, error in zip(part[key], errors, strict=True)
            ]
            lines.append(f"| {name}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(record: dict[str, Any]) -> None:
    """Put the tables into docs/inversion.md."""
    made = {key: table(record, key) for key in TABLES} | {"table2": table2_page(record)}
    into_page("inversion.md", {f"round-trip:{name}": text for name, text in made.items()})


def main() -> None:
    """Measure, record part by part, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    parser.add_argument(
        "--problems", default=",".join((*EXACT, *TESTED)), help="comma-separated; others keep their record"
    )
    add_folders(parser, "Table 2 alone, two numbers of steps and two images: half a minute, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, figures = folders(options)
    path = out / "round_trip.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts, problems = options.parts.split(","), options.problems.split(",")
    if not set(problems) <= {*EXACT, *TESTED} or not set(parts) <= set(PARTS):
        raise SystemExit(f"known problems are {', '.join((*EXACT, *TESTED))}, and parts {', '.join(PARTS)}")
    if options.short:
        parts, problems = ["table2"], ["network"]
    for name in () if options.figures_only else problems:
        try:
            case: Case | None = Case(name, options.short)
        except FileNotFoundError as error:
            case, missing = None, {"missing": str(error)}
        tasks = {"exact" if name in EXACT else "networks": Case.study, "peers": peers}
        if name in TESTED:
            tasks["table2"] = lambda case: table2(case, TABLE2[:2] if options.short else TABLE2)
        for part, measure in tasks.items():
            if part not in parts:
                continue
            found = missing if case is None else measure(case)
            field: EpsilonField | None = None if case is None else case.field
            record.setdefault(part, {})[name] = found | {"circumstances": circumstances(field, torch.float64)}
            record |= {"study": "round_trip", "budgets": BUDGETS, "grid": GRID}
            record["defaults"] = {k: v._asdict() for k, v in DEFAULTS.items()}
            write_json(path, record)
            print(f"{name}: {part} done", flush=True)
    record = json.loads(recorded(path).read_text("utf-8"))
    for key, title, file in (
        ("alone_mse", "MSE on [0, 1] from the latent alone", "round_trip-alone"),
        ("latent_rms", "RMS error of the latent", "round_trip-latent"),
    ):
        if any("rows" in part for kind in ("exact", "networks") for part in record.get(kind, {}).values()):
            save_figure(draw(record, key, title), figures / f"{file}.png")
    if any("ddim" in part for part in record.get("table2", {}).values()):
        print(table2_page(record))
        save_figure(draw_table2(record), figures / "round_trip-table2.png")
    if figures == FIGURES:
        write_page(record)


if __name__ == "__main__":
    main()
