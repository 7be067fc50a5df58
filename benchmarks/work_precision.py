r"""Error against work: what a model call and what a second buy, for every kind of solver.

Each solver samples the same latents of each problem, fixed-grid ones at a range of budgets, adaptive ones at a range of
tolerances. Problems: a Gaussian, whose solution is a formula; mixtures fitted to real images; a finite data set; the
bundled networks. An error is the root mean square over all samples of the state at the end, and the median and the worst
of the samples' own; a run in which a sample fails is a null. Seconds are processor time of one thread, the median of
three runs::

    python -m benchmarks.work_precision [--out benchmarks/results] [--problems digits,…] [--figures-only]

Records ``work_precision.json``, problem by problem, and draws ``docs/figures/work_precision-calls.png`` and
``-seconds.png`` from it alone. Problems whose data are not on this machine are named in the record.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import ddim_ode
from benchmarks.problems import NETWORKS, Problem, problem
from ddim_ode import Grid, Multistep, RungeKutta, Solution, Solver, fit_gaussian
from ddim_ode.comparison import circumstances
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, write_json
from ddim_ode.metrics import rms
from ddim_ode.models.analytic import MixtureEpsilon
from ddim_ode.plotting import STYLE, save_figure
from ddim_ode.sampling import DEFAULTS
from ddim_ode.solvers import get
from ddim_ode.solvers.adaptive import Adaptive
from ddim_ode.solvers.references import Scipy, TorchDiffEq
from ddim_ode.solvers.runge_kutta import EES25

ROOT = Path(__file__).resolve().parents[1]
#: Latents a problem.
SAMPLES = {
    "gaussian": 32,
    "digits": 32,
    "empirical": 16,
    "fashion": 4,
    "mnist": 4,
    "cifar": 4,
    "network": 4,
    "network-cifar10": 2,
}
BUDGETS = (5, 7, 10, 14, 20, 30, 50, 100, 200)
#: Problems whose calls cost so little that the largest budget is affordable.
QUICK = ("gaussian", "digits", "empirical")
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
#: Networks work in float32, whose rounding is the floor of what can be measured.
FLOOR = {"network": 1e-5, "network-cifar10": 1e-5}
GRID = "quadratic"
FIXED = (
    "ddim", "pf-euler", "heun", "heun-edm", "rk4", "ab2", "ab4", "deis3", "deisx3", "dpmpp2m", "dpm2s", "dpm3s", "unipc3",
    "abm3", "flow3", "ipndm",
)  # fmt: skip
ADAPTIVE = ("bs32", "dopri5", "dop853", "torchdiffeq-dopri5", "torchdiffeq-dopri8", "scipy-dop853", "scipy-lsoda")


def contenders(name: str, task: Problem, tolerances: list[float]) -> Iterator[tuple[str, float, Solver, Grid]]:
    """Name, budget or tolerance, solver and grid of every run."""
    own = fitted(name, task)
    for budget in BUDGETS if name in QUICK else BUDGETS[:-1]:
        default, (_, rule, options) = get(DEFAULTS["sample"].solver), DEFAULTS["sample"]
        yield "default", budget, default, task.grid(rule, default.steps(budget), **options)
        if own is not None:
            yield own.name, budget, own, task.grid(rule, budget, **options)
        for name in FIXED:
            if get(name).nfe(1) <= budget:
                yield name, budget, get(name), task.grid(GRID, get(name).steps(budget))
        ees = RungeKutta(EES25, "arctan")
        yield ees.name, budget, ees, task.grid(GRID, ees.steps(budget))
    ends = Grid.explicit([task.field.schedule.sigma_max, task.end], task.field.schedule)
    for name in ADAPTIVE:
        for tolerance in tolerances:
            solver = get(name)
            assert isinstance(solver, (Adaptive, TorchDiffEq, Scipy))
            yield name, tolerance, replace(solver, rtol=tolerance, atol=tolerance), ends


def fitted(name: str, task: Problem) -> Multistep | None:
    """The default's scheme with a Gaussian part fitted to images of the problem's own, where there are any."""
    if isinstance(task.field.model, MixtureEpsilon):
        images = task.field.model.sample(4000, torch.Generator().manual_seed(0))
    elif name in NETWORKS:
        try:
            images = torch.from_numpy(dataset(NETWORKS[name]).images[:4000]).double() / 127.5 - 1.0
        except FileNotFoundError:
            return None
    else:
        return None
    part = fit_gaussian(images, "low-rank", rank=32)
    return Multistep(4, clock="paced", linear=part, corrector="free", label="fitted")


def measure(task: Problem, name: str, work: float, solver: Solver, grid: Grid) -> dict[str, Any]:
    """One row: a run, its calls, its seconds and its errors."""
    seconds: list[float] = []
    run: Solution | None = None
    for _ in range(3):
        start = time.process_time()
        run = ddim_ode.sample(task.field, task.latent, solver=solver, grid=grid)
        seconds.append(time.process_time() - start)
        if seconds[0] > 0.5:
            break  # long enough to be its own median
    assert run is not None
    each = rms(run.x_bar, task.exact)
    if not run.success:
        each[:] = math.nan
    # An adaptive run's batched calls are those of its slowest sample; its own calls are what a sample costs.
    calls = run.nfe if run.outcome is None else statistics.fmean(run.outcome.nfe)
    return {
        "solver": name,
        "tolerance" if solver.adaptive else "nfe": work,
        "calls": calls,
        "seconds": statistics.median(seconds),
        "rms": float(each.square().mean().sqrt()),
        "median": float(each.median()),
        "worst": float(each.max()),
    }


def study(name: str) -> dict[str, Any]:
    """All rows of a problem."""
    task = problem(name, SAMPLES[name], seed=3)
    tolerances = [x for x in TOLERANCES if x >= FLOOR.get(name, 0.0)]
    runs = list(contenders(name, task, tolerances))
    rows = [measure(task, *run) for run in tqdm(runs, desc=name, disable=None, leave=False)]
    return {"samples": SAMPLES[name], "reference_difference": task.difference, "end": task.end, "rows": rows}


# -- figures ------------------------------------------------------------------------------------
#: What is drawn, and how: enough to tell the families apart.
_DRAWN = {
    "default": ("black", "o", "-"), "fitted": ("black", "*", ":"), "ddim": ("0.6", "o", "-"), "heun-edm": ("tab:brown", "s", "-"),
    "dpmpp2m": ("tab:orange", "D", "-"), "unipc3": ("tab:red", "D", "-"), "deis3": ("tab:olive", "^", "-"),
    "ab4": ("tab:green", "v", "-"), "abm3": ("tab:cyan", "v", "-"), "ipndm": ("tab:pink", "<", "-"),
    "rk4": ("tab:purple", "s", "-"), "ees25-arctan": ("tab:blue", ">", "-"), "bs32": ("tab:green", "x", "--"),
    "dopri5": ("tab:blue", "x", "--"), "dop853": ("tab:purple", "x", "--"), "torchdiffeq-dopri5": ("0.4", "+", ":"),
    "scipy-lsoda": ("0.4", "1", ":"),
}  # fmt: skip


def draw(record: dict[str, Any], against: str) -> Figure:
    """A panel a problem: RMS error against ``"calls"`` or ``"seconds"``, log–log, from the record alone."""
    found = {name: part for name, part in record["problems"].items() if "rows" in part}
    with matplotlib.rc_context(STYLE):
        across = min(4, len(found))
        down = -(-len(found) // across)
        figure = Figure(figsize=(3.1 * across + 1.6, 2.9 * down), layout="constrained")
        panels = np.asarray(figure.subplots(down, across, squeeze=False)).ravel()
        for panel in panels[len(found) :]:
            panel.remove()
        for panel, (name, part) in zip(panels, found.items(), strict=False):
            for solver, (colour, marker, line) in _DRAWN.items():
                rows = [row for row in part["rows"] if row["solver"] == solver]
                # A failed run is a null, and leaves a gap.
                errors = [math.nan if row["rms"] is None else row["rms"] for row in rows]
                wide = {"linewidth": 2.2, "zorder": 5} if solver == "default" else {"linewidth": 1.1}
                panel.plot(
                    [row[against] for row in rows],
                    errors,
                    line,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=solver,
                    **wide,
                )
            panel.set(xscale="log", yscale="log", title=name)
            floor = max(part["reference_difference"], 1e-12)
            panel.axhline(floor, color="0.5", linestyle=":", linewidth=0.8)
            panel.set_ylim(bottom=floor / 3.0, top=2.0)
            if against == "calls":
                panel.set_xlim(4.0, 450.0)
                panel.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
                panel.minorticks_off()
        figure.supxlabel(
            "model calls a sample" if against == "calls" else "seconds of one thread, whole batch", fontsize=9
        )
        figure.supylabel("RMS error at the end", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    """Measure, record problem by problem, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for work_precision.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for the figures")
    parser.add_argument("--problems", default=",".join(SAMPLES), help="comma-separated; others keep their record")
    parser.add_argument("--figures-only", action="store_true", help="draw from the JSON there is, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = output_folder(options.out) / "work_precision.json"
    record = json.loads(path.read_text("utf-8")) if path.exists() else {"problems": {}}
    for name in () if options.figures_only else options.problems.split(","):
        if name not in SAMPLES:
            raise SystemExit(f"unknown problem {name!r}: known are {', '.join(SAMPLES)}")
        try:
            found = study(name)
        except FileNotFoundError as error:
            found = {"missing": str(error)}
        record["problems"][name] = found | {"circumstances": circumstances(dtype=torch.float64)}
        record |= {
            "study": "work_precision",
            "grid": GRID,
            "defaults": DEFAULTS["sample"]._asdict(),
            "budgets": BUDGETS,
        }
        record["problems"] = {known: record["problems"][known] for known in SAMPLES if known in record["problems"]}
        write_json(path, record)
        print(f"{name}: done", flush=True)
    record = json.loads(path.read_text("utf-8"))
    for against in ("calls", "seconds"):
        save_figure(draw(record, against), output_folder(options.figures) / f"work_precision-{against}.png")


if __name__ == "__main__":
    main()
