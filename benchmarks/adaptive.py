r"""Adaptive solvers: calls and true errors by tolerance, the clock they step in, and what a batch costs its samples.

Four parts, on the digits' mixture, the small mixture of ``convergence.py`` and the bundled network, in both
directions over the whole range of σ::

    python -m benchmarks.adaptive [--out benchmarks/results]

``proportion``
    True error over tolerance, for each pair and tolerances 1e-3 … 1e-10.
``clocks``
    Calls and true error in each clock. The score of a clock is the geometric mean, over all cases, of the calls
    it needs for an error over the fewest that any clock needs for it, read off between the tolerances it was run at.
``batch``
    The steps of easy and hard samples in one batch, and alone.
``others``
    The mixtures by torchdiffeq and scipy, at the same tolerances.

Errors are in data units: x̄/√(1 + σ²), root mean square over a sample's dimensions, the worst sample's. Calls are a
sample's own, the mean over the batch. The record is ``adaptive.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.convergence import DIRECTIONS, by_dop853, mixture
from benchmarks.problems import digits_mixture
from ddim_ode import Adaptive, Clock, EpsilonField, NoiseSchedule, Scipy, Solver, TorchDiffEq, integrate, load, noise
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.solvers import arctan, asinh
from ddim_ode.solvers.adaptive import CLOCK
from ddim_ode.solvers.runge_kutta import BS32, DOP853, DOPRI5

ROOT = Path(__file__).resolve().parents[1]
SCHEDULE = NoiseSchedule.linear()
PAIRS = (BS32, DOPRI5, DOP853)
TOLERANCES = tuple(10.0**-n for n in range(3, 11))
#: For the clocks: where a pair is used. A float32 network has no smaller errors to offer.
USED = {"bs32": (1e-3, 1e-4, 1e-5, 1e-6), "dopri5": (1e-3, 1e-4, 1e-6, 1e-8), "dop853": (1e-3, 1e-4, 1e-6, 1e-8)}
NETWORK = (1e-3, 1e-4, 1e-5)


@dataclass(frozen=True, eq=False)
class Case:
    """A field, and states on the same trajectories at both ends."""

    name: str
    field: EpsilonField
    low: Tensor
    high: Tensor

    def error(self, solver: Solver, direction: str) -> dict[str, Any]:
        """A run, and how far from the truth it ends."""
        top = self.field.schedule.sigma_max
        start, end, nodes = (
            (self.low, self.high, [0.0, top]) if direction == "encoding" else (self.high, self.low, [top, 0.0])
        )
        run = integrate(self.field, start, nodes, solver)
        assert run.outcome is not None
        off = (run.x_bar - end).flatten(1).square().mean(dim=1).sqrt() / math.sqrt(1.0 + nodes[1] ** 2)
        return {
            "problem": self.name,
            "direction": direction,
            "calls": float(np.mean(run.outcome.nfe)),
            "accepted": float(np.mean(run.outcome.accepted)),
            "rejected": float(np.mean(run.outcome.rejected)),
            "error": float(off.max()) if run.success else math.nan,
        }


def exact_cases(samples: int = 4) -> list[Case]:
    """The two mixtures; both ends by DOP853 at 1e-13."""
    top = SCHEDULE.sigma_max
    small, digits = mixture(), digits_mixture()
    latent = noise(digits.shape, samples, 0) * math.sqrt(1.0 + top * top)
    out = []
    for name, eps, low in (
        ("mixture", small.eps, small.low),
        ("digits", digits, by_dop853(digits, latent, top, 0.0)),
    ):
        field = EpsilonField.from_sigma(eps, SCHEDULE, shape=tuple(low.shape[1:]))
        out.append(Case(name, field, low, by_dop853(eps, low, 0.0, top)))
    return out


def network_case(samples: int = 2) -> Case:
    """The bundled network. Both ends by the same network in float64: its own float32 is part of the error."""
    field = load("fashion-mnist")
    assert field.shape is not None
    top = field.schedule.sigma_max
    high = noise(field.shape, samples, 0) * math.sqrt(1.0 + top * top)
    precise = EpsilonField(copy.deepcopy(field.model).double(), field.schedule)
    return Case("network", field, integrate(precise, high, [top, 0.0], Adaptive(DOP853, 1e-8, 1e-8)).x_bar, high)


def sqrt_t() -> Clock:
    """√t, in which σ is smooth down to 0, as it is not in t."""

    def slope(sigma: Any) -> Any:
        above = np.maximum(sigma, 1e-3 * SCHEDULE.sigma_min)
        t = SCHEDULE.t(above)
        return 2.0 * np.sqrt(t) * SCHEDULE.slope(t)

    return Clock("sqrt(t)", lambda s: np.sqrt(SCHEDULE.t(s)), lambda u: SCHEDULE.sigma(np.maximum(u, 0.0) ** 2), slope)


def clocks() -> list[str | Clock]:
    """Those that are compared."""
    return ["sigma", sqrt_t(), *map(arctan, (0.3, 1.0)), *map(asinh, (0.01, 0.03, 0.1, 0.3, 1.0))]


def _name(clock: str | Clock) -> str:
    return clock if isinstance(clock, str) else clock.name


def proportion(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """True error over tolerance."""
    rows = []
    for case in cases:
        for pair in PAIRS:
            for direction in DIRECTIONS:
                for tolerance in TOLERANCES:
                    row = case.error(Adaptive(pair, tolerance, tolerance), direction)
                    rows.append({"solver": pair.name, "tolerance": tolerance, **row, "ratio": row["error"] / tolerance})
    return rows


def by_clock(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Calls and errors in each clock."""
    rows = []
    for case in cases:
        # A call of the network costs a hundred of a mixture's: one pair.
        for pair in (DOPRI5,) if case.name == "network" else PAIRS:
            for clock in clocks():
                for direction in DIRECTIONS:
                    for tolerance in NETWORK if case.name == "network" else USED[pair.name]:
                        row = case.error(Adaptive(pair, tolerance, tolerance, clock=clock), direction)
                        rows.append({"solver": pair.name, "clock": _name(clock), "tolerance": tolerance, **row})
    return rows


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times the fewest calls each clock needs at equal error: geometric means over cases, 1 the best everywhere."""
    keys = sorted({(r["problem"], r["solver"], r["direction"]) for r in rows})
    names = list(dict.fromkeys(r["clock"] for r in rows))
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for problem_, solver, direction in keys:
        own = [r for r in rows if (r["problem"], r["solver"], r["direction"]) == (problem_, solver, direction)]
        curves = {}
        for name in names:
            mine = sorted((math.log(r["error"]), math.log(r["calls"])) for r in own if r["clock"] == name)
            # Fewer calls may meet a smaller error by luck: what an error costs is the least that met it or a smaller one.
            errors, calls = (np.array(x) for x in zip(*mine, strict=True))
            curves[name] = (errors, np.minimum.accumulate(calls))
        targets = [math.log(3.0 * t) for t in sorted({r["tolerance"] for r in own})[:-1]]
        for target in targets:
            needed = {name: float(np.interp(target, *curve)) for name, curve in curves.items()}
            least = min(needed.values())
            for name, value in needed.items():
                ratios[name].append(value - least)
    return {name: math.exp(float(np.mean(found))) for name, found in ratios.items()}


def batch(case: Case, solver: Solver) -> dict[str, Any]:
    """One batch of samples at a time, and the same samples one by one."""
    top = case.field.schedule.sigma_max
    together = integrate(case.field, case.high, [top, 0.0], solver)
    alone = [integrate(case.field, x[None], [top, 0.0], solver) for x in case.high]
    assert together.outcome is not None
    outcomes = [run.outcome for run in alone if run.outcome is not None]
    return {
        "problem": case.name,
        "solver": solver.name,
        "batched_calls": together.nfe,
        "accepted": list(together.outcome.accepted),
        "rejected": list(together.outcome.rejected),
        "accepted_alone": [outcome.accepted[0] for outcome in outcomes],
        "rejected_alone": [outcome.rejected[0] for outcome in outcomes],
        "largest_difference": max(
            float((run.x_bar[0] - x).abs().max()) for run, x in zip(alone, together.x_bar, strict=True)
        ),
    }


def others(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Ours and theirs, at the same tolerances (theirs are of x̄, ours of x)."""
    members: list[Any] = [Adaptive(DOPRI5), Adaptive(DOP853), TorchDiffEq("dopri5"), TorchDiffEq("dopri8")]
    members += [Scipy("RK45"), Scipy("DOP853"), Scipy("LSODA")]
    rows = []
    for case in cases:
        for member in members:
            for direction in DIRECTIONS:
                for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
                    solver = replace(member, rtol=tolerance, atol=tolerance)
                    name = f"ddim_ode-{member.name}" if isinstance(member, Adaptive) else member.name
                    rows.append({"solver": name, "tolerance": tolerance, **case.error(solver, direction)})
    return rows


def measure() -> dict[str, Any]:
    """All parts, as plain data."""
    began = time.perf_counter()
    exact = exact_cases()
    network = network_case()
    found = by_clock([*exact, network])
    return {
        "study": "adaptive",
        **circumstances(network.field),
        "state_dtype": "float64",
        "seconds": None,
        "default_clock": CLOCK.name,
        "proportion": proportion(exact),
        "clocks": found,
        "scores": {pair.name: scores([r for r in found if r["solver"] == pair.name]) for pair in PAIRS}
        | {"all": scores(found)},
        "batch": [batch(case, Adaptive(pair, 1e-6, 1e-6)) for case in exact for pair in PAIRS],
        "others": others(exact),
    } | {"seconds": round(time.perf_counter() - began, 1)}


def table(record: dict[str, Any]) -> str:
    """The record in short."""
    lines = [f"{'solver':8} {'problem':8} {'direction':9}  error / tolerance at 1e-3 … 1e-10"]
    rows = record["proportion"]
    for key in dict.fromkeys((r["solver"], r["problem"], r["direction"]) for r in rows):
        own = [r["ratio"] for r in rows if (r["solver"], r["problem"], r["direction"]) == key]
        lines.append(f"{key[0]:8} {key[1]:8} {key[2]:9}  " + "  ".join(f"{ratio:6.2g}" for ratio in own))
    lines += ["", f"{'clock':12} " + " ".join(f"{name:>7}" for name in record["scores"])]
    for clock in record["scores"]["all"]:
        lines.append(f"{clock:12} " + " ".join(f"{found[clock]:7.2f}" for found in record["scores"].values()))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description="Measure adaptive solvers: errors by tolerance, clocks, batches.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for adaptive.json")
    options = parser.parse_args(argv)
    file = output_folder(options.out) / "adaptive.json"
    torch.set_num_threads(1)
    write_json(file, measure())
    print(table(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
