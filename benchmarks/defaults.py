r"""Which pair of solver and grid is most accurate per model call, in each direction; and what it gains over DDIM.

Every candidate pair samples (and encodes back) the same latents of three problems at four budgets. A pair's score
is the geometric mean, over problems and budgets, of its RMS error over the least anyone reached there. The best
pairs are :data:`ddim_ode.sampling.DEFAULTS`. The gain is then measured on latents that had no part in the choice::

    python -m benchmarks.defaults [--out benchmarks/results] [--gain-only]

It takes about half an hour on two cores and needs Fashion-MNIST (see ``problems.py``) and scikit-learn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ddim_ode
from benchmarks.problems import Problem, problem
from ddim_ode import DATA, NOISE, Grid, Multistep, Solution, Solver
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.metrics import rms
from ddim_ode.sampling import DEFAULTS
from ddim_ode.solvers import Clock, arctan, asinh, get

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = {"digits": 32, "fashion": 4, "network": 4}
BUDGETS = (5, 10, 20, 50)
GRIDS: dict[str, tuple[str, dict[str, float]]] = {
    "quadratic": ("quadratic", {}),
    "karras": ("karras", {}),
    "log": ("log", {}),
    "asinh c=0.02": ("asinh", {"c": 0.02}),
    "asinh c=0.05": ("asinh", {"c": 0.05}),
}
CLOCKS: dict[str, str | Clock] = {
    "sigma": "sigma",
    "t": "t",
    "log": "log",
    "arctan(1)": arctan(1.0),
    "arctan(0.5)": arctan(0.5),
    "asinh(0.05)": asinh(0.05),
    "asinh(0.5)": asinh(0.5),
}


def members() -> Iterator[tuple[str, Solver]]:
    """The multistep members that compete, by a name that says what they are, and the Runge–Kutta methods."""
    yield "ddim", get("ddim")
    for linear, (at, clock), k in itertools.product((NOISE, DATA), CLOCKS.items(), (2, 3, 4)):
        yield f"{linear.name} {at} {k}", Multistep(k, clock=clock, linear=linear)
    for name in ("midpoint", "heun", "kutta3"):
        yield name, get(name)


def errors(task: Problem, solver: Solver, grid: str, budget: int) -> tuple[float | None, float | None]:
    """RMS error of sampling and of encoding, None where the budget does not pay for a step."""
    if solver.nfe(1) > budget:
        return None, None
    rule, options = GRIDS[grid]
    nodes = Grid.make(rule, task.field.schedule, solver.steps(budget), **options)
    there = ddim_ode.sample(task.field, task.latent, grid=nodes, solver=solver).x
    back = ddim_ode.encode(task.field, task.exact, grid=nodes, solver=solver, data_range=None).x
    return total(there, task.exact), total(back, task.latent)


def total(a: torch.Tensor, b: torch.Tensor) -> float:
    """RMS over all samples."""
    return float(rms(a, b).square().mean().sqrt())


def choose(tasks: dict[str, Problem]) -> dict[str, Any]:
    """Errors of every pair, and the pairs by score in each direction."""
    rows = []
    for name, task in tasks.items():
        for grid, (member, solver), budget in itertools.product(GRIDS, members(), BUDGETS):
            sampling, encoding = errors(task, solver, grid, budget)
            rows.append(
                {"problem": name, "grid": grid, "solver": member, "nfe": budget, "sample": sampling, "encode": encoding}
            )
        print(f"{name}: done (reference trusted to {task.difference:.1e})", flush=True)
    return {"rows": rows, "ranking": {direction: ranking(rows, direction) for direction in ("sample", "encode")}}


def ranking(rows: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Pairs by score, best first."""
    least: dict[tuple[str, int], float] = {}
    pairs: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for row in rows:
        error = row[direction]
        error = math.inf if error is None or not math.isfinite(error) else error
        at = row["problem"], row["nfe"]
        least[at] = min(least.get(at, math.inf), error)
        pairs.setdefault((row["solver"], row["grid"]), {})[at] = error
    scored: list[dict[str, Any]] = []
    for (solver, grid), found in pairs.items():
        score = math.exp(sum(math.log(found[at] / least[at]) for at in least) / len(least))
        scored.append(
            {"solver": solver, "grid": grid, "score": score, "errors": {f"{p} {n}": e for (p, n), e in found.items()}}
        )
    return sorted(scored, key=lambda row: row["score"])[:20]


def gain(tasks: dict[str, Problem]) -> list[dict[str, Any]]:
    """The default pair beside DDIM, which gets the better of its two grids of the paper, on the same latents."""
    rows = []
    run: Callable[..., Solution]
    for name, task in tasks.items():
        for direction, budget in itertools.product(("sample", "encode"), (10, 20, 50)):
            if direction == "sample":
                run, wanted, start = ddim_ode.sample, task.exact, task.latent
                options: dict[str, Any] = {"nfe": budget}
            else:
                run, wanted, start = ddim_ode.encode, task.latent, task.exact
                options = {"nfe": budget, "data_range": None}
            ddim = {
                g: total(run(task.field, start, solver="ddim", grid=g, **options).x, wanted)
                for g in ("linear", "quadratic")
            }
            ours = total(run(task.field, start, **options).x, wanted)
            rows.append(
                {
                    "problem": name,
                    "direction": direction,
                    "nfe": budget,
                    "default": ours,
                    "ddim": ddim,
                    "ratio": ours / min(ddim.values()),
                }
            )
    return rows


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for defaults.json")
    parser.add_argument(
        "--gain-only", action="store_true", help="keep the recorded choice, if any; measure the gain anew"
    )
    options = parser.parse_args()
    path = output_folder(options.out) / "defaults.json"
    if options.gain_only:
        record = json.loads(path.read_text("utf-8")) if path.exists() else {}
    else:
        record = choose({name: problem(name, n, seed=1) for name, n in PROBLEMS.items()})
    held_out = {name: problem(name, n, seed=2) for name, n in PROBLEMS.items()}
    record["gain"] = gain(held_out)
    record["reference_difference"] = {name: task.difference for name, task in held_out.items()}
    # A kept choice keeps the circumstances it was made in.
    record = circumstances(dtype=torch.float64) | record
    record |= {
        "study": "defaults",
        "problems": PROBLEMS,
        "defaults": {k: v._asdict() for k, v in DEFAULTS.items()},
        "gain_circumstances": circumstances(),
    }
    write_json(path, record)
    for direction, best in record.get("ranking", {}).items():
        print(f"\n{direction}: score, solver, grid")
        for row in best[:8]:
            print(f"  {row['score']:6.2f}  {row['solver']:<22}{row['grid']}")
    print(f"\n{'problem':<10}{'direction':<10}{'calls':>6}{'default':>11}{'ddim':>11}{'ratio':>8}")
    for row in record["gain"]:
        ddim = min(row["ddim"].values())
        print(
            f"{row['problem']:<10}{row['direction']:<10}{row['nfe']:>6}{row['default']:>11.2e}{ddim:>11.2e}{row['ratio']:>8.3f}"
        )


if __name__ == "__main__":
    main()
