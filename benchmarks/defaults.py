r"""Which pair of solver and grid is most accurate per model call, in each direction; and what it gains over DDIM.

Every candidate pair samples (and encodes back) the same latents of the problems of :data:`PROBLEMS` at four budgets; each problem
after the first, slower than the one before, sees only the best so far. A pair's score is the geometric mean, over problems
and budgets, of its RMS error over the least anyone reached there. The family that leads is then refined by Nelder and Mead's
method, budget by budget: its own numbers are the linear part's c, the clock's if that is free, the grid's c and ρ.
:data:`ddim_ode.sampling.DEFAULTS` and the numbers of the clock ``paced`` and of the grids ``flow`` and ``flow-up`` are round ones
from there, chosen by hand
between budgets. The gain is measured on latents that had no part in the
choice, and on :data:`UNSEEN` problems, which had none either::

    python -m benchmarks.defaults [--out benchmarks/results] [--gain-only]

It takes about a quarter of an hour on one core and needs Fashion-MNIST (see ``problems.py``) and scikit-learn; unseen problems
whose data are missing are left out of the gain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from tqdm import tqdm

import ddim_ode
from benchmarks.problems import Problem, problem
from ddim_ode import DATA, NOISE, Flow, Grid, Linear, Multistep, Solution, Solver
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.metrics import rms
from ddim_ode.sampling import DEFAULTS
from ddim_ode.solvers import AsynchronousLeapfrog, Clock, arctan, flow, get

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = {"digits": 16, "fashion": 4, "network": 4}
#: Problems that no choice was made on, for the gain alone.
UNSEEN = {"mnist": 8, "cifar": 8, "network-cifar10": 2}
BUDGETS = (5, 10, 20, 50)
GRIDS: dict[str, tuple[str, dict[str, float]]] = {
    "quadratic": ("quadratic", {}),
    "asinh c=0.02": ("asinh", {"c": 0.02}),
    "flow": ("flow", {}),
    "flow c=1.6 rho=2.4": ("flow", {"c": 1.6, "rho": 2.4}),
    "flow-up": ("flow-up", {}),
}
CLOCKS: dict[str, str | Clock] = {
    "sigma": "sigma",
    "t": "t",
    "log": "log",
    "arctan(1)": arctan(1.0),
    "arctan(0.1)": arctan(0.1),
    "paced": "paced",
}
LINEARS: tuple[Linear, ...] = (NOISE, DATA, Flow(0.15))
#: How many pairs, of the best in each direction so far, a problem runs that is slower than those before it.
KEPT = {"fashion": 40, "network": 10}


def _corrected(linear: float, at: float) -> Solver:
    return Multistep(4, clock=arctan(at), linear=Flow(linear), corrector="free")


def _leapfrog(linear: float) -> Solver:
    return AsynchronousLeapfrog(flow(linear), Flow(linear))


#: The family that is refined, by direction: what makes a member of its own numbers, and where the search begins: those, then
#: the grid's c and ρ.
REFINED: dict[str, tuple[Callable[..., Solver], dict[str, float]]] = {
    "sample": (_corrected, {"flow": 0.15, "arctan": 2.0, "c": 4.0, "rho": 2.1}),
    "encode": (_leapfrog, {"flow": 1.0, "c": 1.4, "rho": 2.1}),
}


def members() -> Iterator[tuple[str, Solver]]:
    """The multistep members that compete, by a name that says what they are, and the Runge–Kutta methods."""
    yield "ddim", get("ddim")
    correctors: tuple[Literal["free"] | None, ...] = (None, "free")
    for linear, (at, clock), k, corrector in itertools.product(LINEARS, CLOCKS.items(), (2, 3, 4), correctors):
        part = f"{linear.name} {linear.c:g}" if isinstance(linear, Flow) else linear.name
        name = f"{part} {at} {k}{' corrected' if corrector else ''}"
        yield name, Multistep(k, clock=clock, linear=linear, corrector=corrector)
    for c in (0.15, 1.0):
        yield f"alf flow {c:g}", AsynchronousLeapfrog(flow(c), Flow(c))
    for name in (
        "midpoint",
        "heun",
        "kutta3",
        "alf",
        "o-belm",
        "bdia",
        "flowup4",
        *(d.solver for d in DEFAULTS.values()),
    ):
        yield name, get(name)


def errors(task: Problem, solver: Solver, grid: str, budget: int) -> tuple[float | None, float | None]:
    """RMS error of sampling and of encoding, None where the budget does not pay for a step."""
    if solver.nfe(1) > budget:
        return None, None
    rule, options = GRIDS[grid]
    nodes = Grid.make(rule, task.field.schedule, solver.steps(budget), **options)
    return error(task, solver, nodes, "sample"), error(task, solver, nodes, "encode")


def error(task: Problem, solver: Solver, nodes: Grid, direction: str) -> float:
    """RMS error over these nodes."""
    if direction == "sample":
        return total(ddim_ode.sample(task.field, task.latent, grid=nodes, solver=solver).x, task.exact)
    return total(ddim_ode.encode(task.field, task.exact, grid=nodes, solver=solver, data_range=None).x, task.latent)


def total(a: torch.Tensor, b: torch.Tensor) -> float:
    """RMS over all samples."""
    return float(rms(a, b).square().mean().sqrt())


def choose(tasks: dict[str, Problem]) -> dict[str, Any]:
    """Errors of every pair, and the pairs by score in each direction."""
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        pairs = list(itertools.product(GRIDS, members()))
        if name in KEPT:
            kept = {(r["solver"], r["grid"]) for d in DEFAULTS for r in ranking(rows, d)[: KEPT[name]]}
            pairs = [(grid, member) for grid, member in pairs if (member[0], grid) in kept]
        for grid, (member, solver) in tqdm(pairs, desc=name, disable=None, leave=False):
            for budget in BUDGETS:
                sampling, encoding = errors(task, solver, grid, budget)
                rows.append(
                    {
                        "problem": name,
                        "grid": grid,
                        "solver": member,
                        "nfe": budget,
                        "sample": sampling,
                        "encode": encoding,
                    }
                )
        print(f"{name}: {len(pairs)} pairs (reference trusted to {task.difference:.1e})", flush=True)
    # All rows would be megabytes: what the ranking leaves out was worse on every account.
    return {
        "pairs": len(list(itertools.product(GRIDS, members()))),
        "ranking": {d: ranking(rows, d)[:20] for d in DEFAULTS},
    }


def refine(tasks: dict[str, Problem]) -> list[dict[str, Any]]:
    """The best numbers of the leading family at each budget, by direction, and what the default makes of the same."""
    rows = []
    for (direction, (make, start)), budget in itertools.product(REFINED.items(), BUDGETS):
        own = {
            name: task for name, task in tasks.items() if not name.startswith("network")
        }  # which is too slow for this

        def run(
            values: Any, own: Any = own, make: Any = make, budget: int = budget, direction: str = direction
        ) -> dict[str, float]:
            *numbers, c, rho = np.exp(values).tolist()
            solver = make(*numbers)
            schedule = next(iter(own.values())).field.schedule
            nodes = Grid.make("flow", schedule, solver.steps(budget), c=c, rho=rho)
            return {name: error(task, solver, nodes, direction) for name, task in own.items()}

        def loss(values: Any, run: Any = run) -> float:
            if np.abs(values).max() > 5.0:
                return 10.0
            found = list(run(values).values())
            return math.fsum(math.log(e) if math.isfinite(e) else 10.0 for e in found) / len(found)

        first = np.log(list(start.values()))
        simplex = np.vstack([first, first + 0.3 * np.eye(first.size)])
        found = minimize(loss, first, method="Nelder-Mead", options={"maxfev": 45, "initial_simplex": simplex})
        default = DEFAULTS[direction]
        solver = get(default.solver)
        steps = solver.steps(budget)
        nodes = {n: Grid.make(default.grid, t.field.schedule, steps, **default.options) for n, t in own.items()}
        rows.append(
            {
                "direction": direction,
                "nfe": budget,
                "best": dict(zip(start, np.exp(found.x).tolist(), strict=True)),
                "errors": run(found.x),
                "default": {name: error(task, solver, nodes[name], direction) for name, task in own.items()},
            }
        )
        print(f"refined {direction} at {budget}: {rows[-1]['best']}", flush=True)
    return rows


def ranking(rows: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Pairs by score, best first; those that ran on every problem."""
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
        if found.keys() != least.keys():
            continue
        score = math.exp(sum(math.log(found[at] / least[at]) for at in least) / len(least))
        scored.append(
            {"solver": solver, "grid": grid, "score": score, "errors": {f"{p} {n}": e for (p, n), e in found.items()}}
        )
    return sorted(scored, key=lambda row: row["score"])


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
        tasks = {name: problem(name, n, seed=1) for name, n in PROBLEMS.items()}
        record = choose(tasks) | {"refined": refine(tasks)}
    held_out, missing = {}, {}
    for name, n in (PROBLEMS | UNSEEN).items():
        try:
            held_out[name] = problem(name, n, seed=2)
        except FileNotFoundError as error:
            missing[name] = str(error)
    record["gain"] = gain(held_out)
    record["missing"] = missing
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
    print(f"\n{'problem':<16}{'direction':<10}{'calls':>6}{'default':>11}{'ddim':>11}{'ratio':>8}")
    for row in record["gain"]:
        ddim = min(row["ddim"].values())
        print(
            f"{row['problem']:<16}{row['direction']:<10}{row['nfe']:>6}{row['default']:>11.2e}{ddim:>11.2e}{row['ratio']:>8.3f}"
        )


if __name__ == "__main__":
    main()
