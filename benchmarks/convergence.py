r"""Measured order of every solver, on problems whose solution is known to rounding.

The order is the mean log₂ ratio of the errors over the last two doublings of the number of steps: on two
problems, over three families of grids on the interior range of σ from :data:`LOW` to :data:`HIGH`, in both
directions. ``tests/test_order.py`` asserts it on these very cases; this command records and draws it::

    python -m benchmarks.convergence [--out benchmarks/results] [--figures docs/figures] [--figures-only]

The figure is drawn from ``convergence.json`` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from benchmarks.folders import into_page
from ddim_ode import (
    DATA,
    Adaptive,
    EpsilonField,
    Gaussian,
    Grid,
    Multistep,
    NoiseSchedule,
    RungeKutta,
    Solver,
    integrate,
    solvers,
)
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, replacing, write_json
from ddim_ode.models.analytic import GaussianEpsilon, MixtureEpsilon
from ddim_ode.solvers import AsynchronousLeapfrog, ImplicitMidpoint, Inverse, TwoStep, get
from ddim_ode.solvers.runge_kutta import BS32, DOP853, DOPRI5, EES25, HEUN, KUTTA3, MIDPOINT, RK4

ROOT = Path(__file__).resolve().parents[1]

#: The range of σ. Both problems bend about as much at one end as at the other, so that a few dozen steps are
#: asymptotic, and what the first step of a run leaves behind is seen in either direction.
LOW, HIGH = 0.6, 1.5
GRIDS = ("uniform", "quadratic", "jittered")
DIRECTIONS = ("sampling", "encoding")
#: Steps the order is measured at; multiples of three, the period of the jittered grid.
STEPS = (48, 96, 192)
#: The same for runs that end or begin at σ = 0, where fewer steps are not asymptotic yet.
STEPS_TO_ZERO = (96, 192, 384)
#: The same for orders that leave nothing to measure above float64's rounding after so many steps: on a problem of their
#: own, :func:`steep`, as the others are too tame to be asymptotic before it.
STEPS_STEEP = {5: (120, 240, 480), 8: (12, 24, 48)}
#: The same for members whose first step is no better than the rest of the run, but so good that what it leaves behind is
#: not seen over fewer steps; and for weights that miss the slope on uneven steps by little.
STEPS_LATE = {
    "flowdown5-rk": (240, 480, 960), "flowup4": (768, 1536, 3072), "ipndm": (768, 1536, 3072), "unipc3": (192, 384, 768),
    # Of an error that the coupling adds, and that (1 − ζ) N steps change, fewer show less.
    "mf-ddim": (24, 48, 96), "mf-midpoint": (24, 48, 96), "mf-kutta3": (24, 48, 96),
}  # fmt: skip
SCHEDULE = NoiseSchedule.linear()
#: Levels between the nodes of every grid of the study, and as evenly spread as so few can be: for dense output.
BETWEEN = LOW + (HIGH - LOW) * np.sort(np.arange(1.0, 49.0) * 0.6180339887498949 % 1.0)
_ITERATE = (ImplicitMidpoint, Inverse)
#: What the package and its pages say of measured orders is read from here.
ORDERS = ROOT / "ddim_ode/solvers/orders.json"


# -- cases --------------------------------------------------------------------------------------
def cases() -> dict[str, Solver]:
    """Every solver whose order is measured, by name.

    All named solvers; the multistep ones with their Runge–Kutta start too; Runge–Kutta in other clocks; the adaptive ones
    and their tableaus on fixed steps; and a multistep member that has no name: a Gaussian linear
    part (not the problem's own).
    """
    members = [
        *(s for s in solvers() if s.budgeted),
        # Those that iterate, to rounding.
        *(
            replace(s, tol=1e-13)
            for s in (*solvers(), get("inverse-heun"), get("inverse-rk4"))
            if isinstance(s, _ITERATE)
        ),
        *(get(f"mf-{name}") for name in ("ddim", "kutta3")),
        *(make(clock=u) for make in (TwoStep, AsynchronousLeapfrog) for u in ("log", "arctan")),
        ImplicitMidpoint(tol=1e-13, clock="arctan"),
        *(get(f"{s.name}-rk") for s in solvers() if isinstance(s, Multistep) and s.k > 1),
        *(RungeKutta(tableau, clock=u) for u in ("log", "arctan") for tableau in (MIDPOINT, HEUN, KUTTA3, RK4, EES25)),
        RungeKutta(RK4, clock="t"),
        Multistep(3, linear=Gaussian(torch.tensor(0.3), torch.tensor(0.7)), start="rk", label="gaussian3"),
    ]
    # The adaptive solvers themselves, so tolerant that they go from node to node in a step; and their tableaus in another clock.
    pairs: dict[str, Solver] = {}
    for tableau in (BS32, DOPRI5, DOP853):
        pairs[f"fixed-{tableau.name}"] = Adaptive(tableau, rtol=1e8, atol=1e8, clock="sigma", first_step=HIGH)
        pairs[f"fixed-{tableau.name}-arctan"] = RungeKutta(tableau, clock="arctan")
    return {member.name: member for member in members} | pairs


def problems_of(solver: Solver) -> tuple[str, ...]:
    """The problems that a solver's order is measured on: names in :data:`PROBLEMS`."""
    return ("steep",) if solver.order in STEPS_STEEP else ("gaussian", "mixture")


def steps_of(solver: Solver) -> tuple[int, ...]:
    """The numbers of steps that its order is measured at."""
    return STEPS_LATE.get(solver.name) or STEPS_STEEP.get(solver.order, STEPS)


_SUPERCONVERGENT = {"midpoint": 3, "mf-midpoint": 3, "alf": 4, "alf-flow": 4}


def expected_order(solver: Solver, problem: str, grid: str = "jittered") -> int:
    r"""The order theory gives a solver on a problem: its own, but for one superconvergent pair, and for iPNDM.

    The explicit midpoint rule in σ has the leading local error :math:`h^3 (x'''/24 + a x''/8)` on a linear field
    :math:`x' = a(\sigma) x`. On Gaussian data :math:`x = \sqrt{\lambda + \sigma^2}` times a constant and
    :math:`a = \sigma/x^2`, so that :math:`x'' = \lambda/x^3`, :math:`x''' = -3\lambda\sigma/x^5`, and the two terms
    cancel: the order is 3 there, in both directions and on any grid; so it is for what is made of it. The asynchronous
    leapfrog takes the same step and is symmetric besides, so that its order is even: 4.

    iPNDM's order of 1 is that of any grid; where steps change smoothly it is 2.
    """
    if solver.name == "ipndm" and grid != "jittered":
        return 2
    return _SUPERCONVERGENT.get(solver.name, solver.order) if problem == "gaussian" else solver.order


# -- grids --------------------------------------------------------------------------------------
def smooth_at_zero(solver: Solver) -> bool:
    r"""Whether a solver's order holds on any grid down to σ = 0.

    ε is a smooth function of σ, odd along a trajectory, and x̂₀ an even one: of σ², hence of t, which starts like σ².
    So polynomials in σ, arctan σ or asinh σ follow both, polynomials in t follow x̂₀ alone, and none in log σ reaches 0.
    """
    u = getattr(getattr(solver, "base", solver), "clock", "sigma")
    u = u if isinstance(u, str) else u.name.partition("(")[0]
    if isinstance(solver, Multistep) and (solver.linear is DATA or solver.quantity == "score"):
        return u in ("t", "variance")
    return u in ("sigma", "arctan", "asinh", "flow", "paced") or getattr(solver, "full_order", 0) == 1


def sigma_grid(name: str, steps: int, direction: str, low: float = LOW, high: float = HIGH) -> Grid:
    """One of :data:`GRIDS` over [low, high]: families that refine self-consistently.

    Parameters
    ----------
    name : str
        ``"uniform"``: even in σ. ``"quadratic"``: σ the squares of an even spacing. ``"jittered"``: even in σ, each
        inner node then moved by a fixed fraction of the spacing, in a pattern that repeats every three nodes:
        some neighbouring steps differ by a factor of two, however fine the grid is.
    steps : int
        Number of steps.
    direction : str
        One of :data:`DIRECTIONS`.
    low, high : float
        The ends.
    """
    place = np.arange(steps + 1.0)
    if name == "jittered":
        place[1:-1] += np.resize([0.2, -0.2, 0.0], steps - 1)
    if name == "quadratic":
        sigmas = (math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * place / steps) ** 2
    else:
        sigmas = low + (high - low) * place / steps
    sigmas[0], sigmas[-1] = low, high
    grid = Grid.explicit(sigmas, SCHEDULE)
    return grid if direction == "encoding" else grid.reversed()


# -- problems -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Problem:
    """A field, and one solution of its equation at both ends of the range.

    Attributes
    ----------
    name : str
        What it is called.
    eps : callable
        ε(x̄, σ), exact.
    low, high : Tensor
        States (B, d) at :data:`LOW` and :data:`HIGH` on one trajectory each.
    high_from_zero : Tensor
        States at :data:`HIGH` of the trajectories that are at `low` where σ = 0.
    """

    name: str
    eps: Callable[[Tensor, float], Tensor]
    low: Tensor
    high: Tensor
    high_from_zero: Tensor


@lru_cache(maxsize=1)
def gaussian() -> Problem:
    """Correlated Gaussian data in four dimensions; the solution is a formula."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    basis = torch.from_numpy(turn)
    variance = torch.tensor([0.4, 0.6, 1.0, 1.5], dtype=torch.float64)
    eps = GaussianEpsilon(torch.tensor([0.5, -1.0, 0.0, 2.0]), (basis * variance) @ basis.T)
    low = torch.from_numpy(np.random.default_rng(2).standard_normal((3, 4)))
    return Problem("gaussian", eps, low, eps.solution(low, LOW, HIGH), eps.solution(low, 0.0, HIGH))


@lru_cache(maxsize=1)
def mixture() -> Problem:
    """Three correlated components in three dimensions; the solution is by DOP853 at the end of its tolerance."""
    means, covariances = _components()
    eps = MixtureEpsilon(_WEIGHTS, torch.from_numpy(means), torch.from_numpy(covariances))
    low = torch.from_numpy(np.random.default_rng(4).standard_normal((3, 3)))
    high, high_from_zero = (by_dop853(eps, low, start, HIGH) for start in (LOW, 0.0))
    return Problem("mixture", eps, low, high, high_from_zero)


@lru_cache(maxsize=1)
def steep() -> Problem:
    r"""No data's ε, but a field that bends enough for orders 5 and 8: :math:`x' = 18\, x \cos(3\sigma + \phi)`, in 32 phases φ."""
    phase = (torch.arange(32, dtype=torch.float64) * (2.0 * math.pi / 32)).reshape(-1, 1)

    def solution(sigma: float) -> Tensor:
        return torch.exp(6.0 * torch.sin(3.0 * sigma + phase))

    low = solution(LOW)
    high_from_zero = low * solution(HIGH) / solution(0.0)
    return Problem("steep", lambda x, s: 18.0 * x * torch.cos(3.0 * s + phase), low, solution(HIGH), high_from_zero)


PROBLEMS = {"gaussian": gaussian, "mixture": mixture, "steep": steep}

_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def _components() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    roots = draw.standard_normal((3, 3, 3)) * 0.5
    return 1.2 * draw.standard_normal((3, 3)), roots @ roots.transpose(0, 2, 1) + 0.3 * np.eye(3)


def by_dop853(eps: Callable[[Tensor, float], Tensor], x_bar: Tensor, sigma: float, to: float) -> Tensor:
    """Solve eq. 14 with scipy's DOP853, relative tolerance 1e-13."""

    def slope(s: float, flat: np.ndarray) -> np.ndarray:
        return eps(torch.from_numpy(flat).reshape(x_bar.shape), s).numpy().ravel()

    run = solve_ivp(slope, (sigma, to), x_bar.numpy().ravel(), method="DOP853", rtol=1e-13, atol=1e-14)
    return torch.from_numpy(run.y[:, -1].copy()).reshape(x_bar.shape)


# -- measuring ----------------------------------------------------------------------------------
def errors(
    problem: Problem,
    solver: Solver,
    grid: str = "uniform",
    direction: str = "sampling",
    steps: Sequence[int] = STEPS,
    low: float = LOW,
) -> list[float]:
    """Root-mean-square error of x̄ at the end of the range, for each number of steps.

    Parameters
    ----------
    problem : Problem
        What to solve.
    solver : Solver
        By what.
    grid, direction : str
        One of :data:`GRIDS`, one of :data:`DIRECTIONS`.
    steps : sequence of int
        Numbers of steps.
    """
    field = EpsilonField.from_sigma(problem.eps, SCHEDULE)
    ends = problem.low, problem.high if low == LOW else problem.high_from_zero
    start, end = ends if direction == "encoding" else ends[::-1]
    runs = (integrate(field, start, sigma_grid(grid, n, direction, low), solver) for n in steps)
    return [float((run.x_bar - end).square().mean().sqrt()) for run in runs]


def measured_order(errors: Sequence[float]) -> float:
    """Mean log₂ ratio over the last two of successive doublings of the number of steps."""
    return 0.5 * math.log2(errors[-3] / errors[-1])


def along(problem: Problem, levels: np.ndarray, low: float = LOW) -> Tensor:
    """The trajectory from `low` at those rising levels: by the formula, or DOP853 from each to the next."""
    solve = getattr(problem.eps, "solution", None) or (lambda x, s, to: by_dop853(problem.eps, x, s, to))
    out, x, sigma = [], problem.low, low
    for to in levels.tolist():
        x, sigma = solve(x, sigma, to), to
        out.append(x)
    return torch.stack(out)


def dense_errors(
    problem: Problem,
    solver: Solver,
    grid: str,
    direction: str,
    levels: np.ndarray,
    truth: Tensor,
    steps: Sequence[int] = STEPS,
    low: float = LOW,
) -> tuple[list[float], list[float]]:
    """Errors of dense output at `levels`, where `truth` is right, for each number of steps; and at the end of each run.

    Levels within the first five of the fewest steps are left out: a predictor–corrector's first states are Euler's
    predictions, mended only later, and there it is of that order.
    """
    field = EpsilonField.from_sigma(problem.eps, SCHEDULE)
    high = problem.high if low == LOW else problem.high_from_zero
    start, end = (problem.low, high) if direction == "encoding" else (high, problem.low)
    beyond = np.abs(levels - (low if direction == "encoding" else HIGH)) > 5.0 * (HIGH - low) / min(steps)
    levels, truth = levels[beyond], truth[torch.from_numpy(beyond)]
    runs = [
        integrate(field, start, sigma_grid(grid, n, direction, low), solver, save_at=levels.tolist()) for n in steps
    ]
    assert not any(np.isin(levels, run.grid.sigmas).any() for run in runs)
    saved = [run.saved for run in runs if run.saved is not None]
    rms = lambda difference: float(difference.square().mean().sqrt())
    return [rms(x - truth) for x in saved], [rms(run.x_bar - end) for run in runs]


# -- the record ---------------------------------------------------------------------------------
def _rows(steps: Sequence[int], low: float) -> list[dict[str, Any]]:
    """Every case over [low, HIGH]; the order is that of the last three numbers of steps."""
    rows = []
    usual = lambda solver: low == 0.0 or steps_of(solver) == STEPS
    truth = {name: along(PROBLEMS[name](), BETWEEN) for name in ("gaussian", "steep")}
    measured = [
        (name, solver, problem, steps if usual(solver) else steps_of(solver))
        for name, solver in cases().items()
        for problem in problems_of(solver)
        # Down to 0 such orders are out of float64's sight.
        if low > 0.0 or problem != "steep"
    ]
    for (name, solver, problem, steps), grid, direction in itertools.product(measured, GRIDS, DIRECTIONS):
        found = errors(PROBLEMS[problem](), solver, grid, direction, steps, low)
        dense = None
        if problem in truth and low > 0.0:
            own = dense_errors(PROBLEMS[problem](), solver, grid, direction, BETWEEN, truth[problem], steps_of(solver))
            dense = measured_order(own[0])
        rows.append(
            {
                "solver": name,
                "order": solver.order,
                "problem": problem,
                "grid": grid,
                "direction": direction,
                # Down to 0 a stated order is a lower bound where it is promised at all.
                "expected_order": expected_order(solver, problem, grid) if low > 0.0 else None,
                "smooth_at_zero": smooth_at_zero(solver),
                "measured_order": measured_order(found),
                "dense_order": dense,
                "steps": list(steps),
                "nfe": [solver.calls(sigma_grid(grid, n, direction, low)) if solver.budgeted else None for n in steps],
                "errors": found,
            }
        )
    return rows


def measure(steps: Sequence[int] = (12, 24, *STEPS)) -> dict[str, Any]:
    """Run every case, on the inner range and down to σ = 0; the whole study as plain data.

    Parameters
    ----------
    steps : sequence of int
        Successive doublings; the order is that of the last three.
    """
    began = time.perf_counter()
    rows, to_zero = _rows(steps, LOW), _rows(STEPS_TO_ZERO, 0.0)
    return {
        "study": "convergence",
        **circumstances(),
        "device": "cpu",
        "dtype": "float64",
        "seconds": round(time.perf_counter() - began, 1),
        "schedule": SCHEDULE.config,
        "sigma_range": [LOW, HIGH],
        "error": "root mean square over samples and dimensions of x_bar at the end of the range",
        "sources": {name: solver.source for name, solver in cases().items()},
        "results": rows,
        "to_zero": to_zero,
    }


def orders(record: dict[str, Any]) -> dict[str, dict[str, list[float] | None]]:
    """The least and the greatest order measured of each solver, at the end of a run and of dense output, by name.

    An adaptive solver's are those of its tableau on fixed steps.
    """
    found: dict[str, dict[str, list[float] | None]] = {}
    for name in dict.fromkeys(row["solver"] for row in record["results"]):
        mine = [row for row in record["results"] if row["solver"] == name]
        spans = {}
        for key in ("measured_order", "dense_order"):
            values = [row[key] for row in mine if row[key] is not None]
            spans[key] = [round(min(values), 2), round(max(values), 2)] if values else None
        found[name.removeprefix("fixed-")] = spans
    return found


def page() -> str:
    """The table of all named solvers, as Markdown, from what each says of itself and what was measured."""
    lines = ["| name | order | measured | dense output | calls a step | start | exact for | states | source |"]
    lines.append("|---" * 9 + "|")
    span = lambda found: "–" if found is None else f"{found[0]:.2f} to {found[1]:.2f}"
    for solver in (*solvers(), *(get(f"{s.name}-rk") for s in solvers() if isinstance(s, Multistep) and s.k > 1)):
        found = solver.measured or {"measured_order": None, "dense_order": None}
        calls = "iterates" if solver.iterative else solver.nfe_per_step
        lines.append(
            f"| `{solver.name}` | {solver.order} | {span(found['measured_order'])} | {span(found['dense_order'])} | "
            f"{calls} | {solver.start} | {solver.exact} | {solver.states} | {solver.source} |"
        )
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    """Measured orders, one line a solver and a problem, one column a grid and a direction."""
    columns = [(grid, direction) for grid in GRIDS for direction in DIRECTIONS]
    lines = [f"{'solver':18} {'problem':9} {'order':>5}  " + "  ".join(f"{g[:7]} {d[:3]}" for g, d in columns)]
    found = {(r["solver"], r["problem"], r["grid"], r["direction"]): r for r in results}
    for solver, problem in dict.fromkeys((r["solver"], r["problem"]) for r in results):
        row = [found[solver, problem, grid, direction] for grid, direction in columns]
        orders = "  ".join(f"{r['measured_order']:11.2f}" for r in row)
        lines.append(f"{solver:18} {problem:9} {row[0]['expected_order'] or row[0]['order']:5d}  {orders}")
    return "\n".join(lines)


# -- the figure ---------------------------------------------------------------------------------
#: What is drawn: enough to tell the orders and the families apart, few enough to read. Colour is the order,
#: the marker the family.
_COLOURS = {1: "#7f7f7f", 2: "#1f77b4", 3: "#e07b00", 4: "#c01f3a"}
_DRAWN = {
    "ddim": "o", "pf-euler": "x", "ab2": "o", "ab4": "v", "dpmpp2m": "D", "heun": "s", "ab3-rk": "o", "deis3-rk": "^",
    "dpmpp3m-rk": "D", "abm3": "<", "kutta3": "s", "ab4-rk": "o", "deis4-rk": "^", "abm4-rk": "<", "rk4": "s",
}  # fmt: skip


def draw(record: dict[str, Any], path: Path, problem: str = "mixture") -> None:
    """Error against model calls on the uniform grid, one panel a direction, from the record alone.

    Parameters
    ----------
    record : dict
        What :func:`measure` returned, or its JSON.
    path : Path
        The PNG to write.
    problem : str
        Which problem to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in record["results"] if r["grid"] == "uniform" and r["problem"] == problem]
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 5.0), sharey=True, layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        found = {r["solver"]: r for r in rows if r["direction"] == direction}
        for name, marker in _DRAWN.items():
            row = found[name]
            # JSON has no infinity or NaN: a run that failed is null, and leaves a gap.
            values = [math.nan if e is None else e for e in row["errors"]]
            panel.loglog(
                row["nfe"], values, color=_COLOURS[row["order"]], marker=marker, markersize=5, linewidth=1.2,
                markerfacecolor="none" if marker in "^D" else None, label=f"{name} ({row['order']})",
            )  # fmt: skip
        _reference_slopes(panel, anchor=(9.0, 3e-8), span=(9.0, 24.0))
        low, high = record["sigma_range"]
        arrow = f"σ: {high:g} → {low:g}" if direction == "sampling" else f"σ: {low:g} → {high:g}"
        panel.set_title(f"{direction}, {arrow}")
        panel.set_xlabel("model calls")
        panel.grid(True, which="major", color="0.9", linewidth=0.7)
        panel.set_axisbelow(True)
        calls = [10, 20, 50, 100, 200, 500]
        panel.set_xticks(calls, labels=[str(n) for n in calls])
        panel.minorticks_off()
    panels[0].set_ylabel("RMS error of x̄")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", title="solver (its order)", frameon=False
    )
    figure.suptitle(f"Error against model calls: exact ε of a Gaussian {problem}, uniform grid in σ", fontsize=12)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _reference_slopes(panel: Any, anchor: tuple[float, float], span: tuple[float, float]) -> None:
    """Dashed lines of slopes 1 to 4 through one point, in the corner that the curves leave empty."""
    x, y = anchor
    for order in (1, 2, 3, 4):
        end = y * (span[1] / x) ** -order
        panel.plot(span, [y * (span[0] / x) ** -order, end], "--", color="0.4", linewidth=0.9)
        panel.annotate(f"{order}", (span[1], end), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    panel.annotate("slopes", (x, y), xytext=(0, 5), textcoords="offset points", ha="left", fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, print, draw."""
    parser = argparse.ArgumentParser(description="Measure the order of every solver.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for convergence.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for convergence.png")
    parser.add_argument("--figures-only", action="store_true", help="draw from the JSON there is, measure nothing")
    options = parser.parse_args(argv)
    file = options.out / "convergence.json"
    figures = output_folder(options.figures)
    if not options.figures_only:
        output_folder(options.out)
        torch.set_num_threads(1)  # states of a dozen numbers gain nothing from more
        write_json(file, measure())
    record = json.loads(file.read_text(encoding="utf-8"))
    write_json(ORDERS, orders(record))
    into_page("solvers.md", {"solvers": page()})
    print(table(record["results"]))
    print("\ndown to sigma = 0")
    print(table(record["to_zero"]))
    draw(record, figures / "convergence.png")


if __name__ == "__main__":
    main()
