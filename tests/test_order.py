r"""Every solver falls at the order it states: measured, in both directions, on three kinds of grid.

The cases, problems and grids are those of ``benchmarks/convergence.py``, where they are explained. The range of σ
is an inner one, [0.6, 1.5]: there the problems bend at both ends. That matters for multistep members of k ≥ 3 with
the default start: their first step is Euler's, an error :math:`h^2 x''/2` that is never forgotten, so they are of
order 2 however high k is. Where x'' is small at the start (σ large) and the rest of the run is hard, that error
hides below :math:`O(h^3)` for any affordable number of steps, and a measurement would show 3.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from benchmarks.convergence import (
    DIRECTIONS,
    GRIDS,
    HIGH,
    LOW,
    ORDERS,
    PROBLEMS,
    ROOT,
    STEPS,
    STEPS_TO_ZERO,
    cases,
    errors,
    expected_order,
    measured_order,
    page,
    problems_of,
    sigma_grid,
    smooth_at_zero,
    steps_of,
)
from ddim_ode import (
    DATA,
    Adaptive,
    EpsilonField,
    Multistep,
    NoiseSchedule,
    RungeKutta,
    Scipy,
    TorchDiffEq,
    integrate,
    solvers,
)  # fmt: skip
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import get
from ddim_ode.solvers.multistep import Weights
from ddim_ode.solvers.runge_kutta import RK4

CASES = cases()


# Problems vary fastest: two runs over one grid share its weights.
MEASURED = [
    (name, grid, direction, problem)
    for name, solver in CASES.items()
    for grid in GRIDS
    for direction in DIRECTIONS
    for problem in problems_of(solver)
]


@pytest.mark.parametrize(("name", "grid", "direction", "problem"), MEASURED)
def test_measured_order_is_the_stated_one(problems, name, grid, direction, problem):
    solver = CASES[name]
    found = measured_order(errors(problems[problem], solver, grid, direction, steps_of(solver)))
    assert found == pytest.approx(expected_order(solver, problem, grid), abs=0.2)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "pf-euler",
        "ab3-rk",
        "abm4-rk",
        "arctan4-rk",
        "deisx2",
        "deisx4-rk",
        "flow3-rk",
        "heun-edm",
        "rk4",
    ],
)
def test_order_holds_down_to_sigma_zero(problems, name, grid, direction):
    """For those that are smooth there, flows among them."""
    solver = CASES[name]
    assert smooth_at_zero(solver)
    assert (
        measured_order(errors(problems["mixture"], solver, grid, direction, STEPS_TO_ZERO, 0.0)) > solver.order - 0.45
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["deis3-rk", "dpmpp3m-rk"])
def test_other_clocks_need_a_grid_that_shrinks_towards_zero(problems, name, direction):
    """ε in t starts like √t, and log σ does not reach 0: on even steps the last or first few are of lower order."""
    solver = CASES[name]
    assert not smooth_at_zero(solver)
    found = {g: measured_order(errors(problems["mixture"], solver, g, direction, STEPS_TO_ZERO, 0.0)) for g in GRIDS}
    assert found["uniform"] < 2.2
    assert found["jittered"] < 2.2
    assert found["quadratic"] > 2.55


def test_every_named_solver_is_a_case():
    multistep = [s for s in solvers() if isinstance(s, Multistep) and s.k > 1]
    assert {s.name for s in solvers() if not isinstance(s, (Adaptive, TorchDiffEq, Scipy))} | {
        f"{s.name}-rk" for s in multistep
    } <= set(CASES)
    # Each of the adaptive ones' tableaus too, on fixed steps.
    assert {f"fixed-{s.name}" for s in solvers() if isinstance(s, Adaptive)} <= set(CASES)
    # These alone may measure above their stated order, and the function that says so holds the proof.
    # iPNDM's is that of any grid, of which the jittered one stands for the worst.
    above = {(n, p) for n, s in CASES.items() for p in PROBLEMS if expected_order(s, p) != s.order}
    assert above == {(n, "gaussian") for n in ("midpoint", "mf-midpoint", "alf", "alf-flow")}


def test_the_orders_that_the_package_tells_are_those_stated():
    """Written by the benchmark; with a solver's name or order changed since, it must be run again."""
    told = json.loads(ORDERS.read_text("utf-8"))
    for name, solver in CASES.items():
        low, high = told[name.removeprefix("fixed-")]["measured_order"]
        assert low > solver.order - 0.2, name
        assert high < max(expected_order(solver, p, g) for p in PROBLEMS for g in GRIDS) + 0.2, name
    assert all(s.measured for s in solvers() if not isinstance(s, (TorchDiffEq, Scipy)))
    assert Multistep(2, clock="log", linear=DATA, label="unknown").measured is None


def test_the_page_holds_the_table_of_what_solvers_say():
    assert page() in (ROOT / "docs/solvers.md").read_text("utf-8")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_explicit_midpoint_superconverges_on_gaussian_data(direction):
    r"""By hand, without the package: h³(x'''/24 + a x''/8) vanishes on x = √(λ + σ²), and the order is 3, not 2."""
    variance = 0.7
    ends = (LOW, HIGH) if direction == "encoding" else (HIGH, LOW)

    def error(steps: int) -> float:
        sigma, h = ends[0], (ends[1] - ends[0]) / steps
        x = math.sqrt(variance + sigma**2)
        for n in range(steps):
            s = sigma + n * h
            middle = x + 0.5 * h * x * s / (variance + s * s)
            s += 0.5 * h
            x += h * middle * s / (variance + s * s)
        return abs(x - math.sqrt(variance + ends[1] ** 2))

    assert measured_order([error(n) for n in STEPS]) == pytest.approx(3.0, abs=0.05)


# -- the problems themselves --------------------------------------------------------------------
def _numpy_mixture_slope(eps):
    """The mixture's ε from its density, with solves and determinants instead of eigenvectors."""
    weights, means = eps.weights.numpy(), eps.means.numpy()
    covariances = [u.numpy() @ np.diag(v.numpy()) @ u.numpy().T for u, v in zip(eps.bases, eps.variances, strict=True)]

    def slope(sigma: float, x: np.ndarray) -> np.ndarray:
        noised = [c + sigma**2 * np.eye(len(c)) for c in covariances]
        pulls = [np.linalg.solve(c, (x - m).T).T for c, m in zip(noised, means, strict=True)]
        density = [
            w * np.exp(-0.5 * ((x - m) * p).sum(axis=1)) / math.sqrt(np.linalg.det(c))
            for w, m, c, p in zip(weights, means, noised, pulls, strict=True)
        ]
        return sigma * sum(d[:, None] * p for d, p in zip(density, pulls, strict=True)) / sum(density)[:, None]

    return slope


def test_references_agree_by_independent_methods(problems):
    """DOP853 on the package's ε, against the classical Runge–Kutta method written out on an ε written out."""
    problem = problems["mixture"]
    slope, x, steps = _numpy_mixture_slope(problem.eps), problem.low.numpy(), 600
    h = (HIGH - LOW) / steps
    for n in range(steps):
        s = LOW + n * h
        k1 = slope(s, x)
        k2 = slope(s + h / 2, x + h / 2 * k1)
        k3 = slope(s + h / 2, x + h / 2 * k2)
        k4 = slope(s + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    # 1e-12, where the smallest error that an order is measured from is 3e-12.
    np.testing.assert_allclose(problem.high.numpy(), x, rtol=0.0, atol=1e-12)

    problem = problems["gaussian"]
    run = solve_ivp(
        lambda s, flat: problem.eps(torch.from_numpy(flat).reshape(3, 4), s).numpy().ravel(),
        (LOW, HIGH), problem.low.numpy().ravel(), method="DOP853", rtol=1e-13, atol=1e-14,
    )  # fmt: skip
    np.testing.assert_allclose(problem.high.numpy().ravel(), run.y[:, -1], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_refine_self_consistently(name):
    """Ends exact, both directions bit-equal, and no step ratio that grows as the grid gets finer."""
    ratios = []
    for steps in STEPS:
        grid = sigma_grid(name, steps, "sampling")
        assert (grid.sigmas[0], grid.sigmas[-1], grid.steps) == (HIGH, LOW, steps)
        assert np.array_equal(sigma_grid(name, steps, "encoding").sigmas, grid.sigmas[::-1])
        h = -np.diff(grid.sigmas)
        ratios.append((h[1:] / h[:-1]).max())
    assert np.ptp(ratios) < 0.05
    assert name != "jittered" or min(ratios) > 1.9


# -- the schedule -------------------------------------------------------------------------------
def _closed_form_sigma(t: float) -> float:
    r"""σ(t) of the linear schedule between its steps, without its table.

    β is linear in t, so :math:`\alpha_t = \prod_{s \le t} (1 - \beta_s) = \delta^t\, \Gamma(z) / \Gamma(z - t)` with
    :math:`\delta = (\beta_T - \beta_1)/(T - 1)` and :math:`z = (1 - \beta_1)/\delta + 1`: the Γ function carries it
    smoothly to fractions. Stirling's series, with the large parts cancelled by hand, keeps all the digits.
    """
    delta = (0.02 - 1e-4) / 999
    z = (1 - 1e-4) / delta + 1
    log_alpha = t * math.log(delta * z) - (z - t - 0.5) * math.log1p(-t / z) - t + (1 / z - 1 / (z - t)) / 12
    return math.sqrt(math.expm1(-log_alpha))


class _LabelledGaussian:
    """Exact ε of Gaussian data as a network would hold it: of x and the time label, 0-based, alone."""

    def __init__(self) -> None:
        self.exact = GaussianEpsilon(torch.tensor([0.4, -0.7]), torch.tensor([0.4, 1.2]))
        self.shape = (2,)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = _closed_form_sigma(float(t[0]) + 1.0)
        return self.exact(x * math.sqrt(1.0 + sigma * sigma), sigma)


def _labelled_errors(label: str, direction: str) -> list[float]:
    schedule = NoiseSchedule.linear()
    model = _LabelledGaussian()
    field = EpsilonField(model, schedule, label=label)
    low = torch.tensor([[1.0, -0.5], [0.2, 0.8]], dtype=torch.float64)
    high = model.exact.solution(low, LOW, HIGH)
    start, end = (low, high) if direction == "encoding" else (high, low)
    runs = [integrate(field, start, sigma_grid("quadratic", n, direction), RungeKutta(RK4)) for n in (6, 12, 24)]
    return [float((run.x_bar - end).abs().max()) for run in runs]


def test_closed_form_of_the_linear_schedule():
    """The two agree at the steps, where both are right; in between it is the schedule that is judged."""
    schedule = NoiseSchedule.linear()
    steps, between = np.arange(1.0, 1001.0), np.linspace(1.0, 1000.0, 1777)
    assert [_closed_form_sigma(t) for t in steps] == pytest.approx(schedule.sigma(steps), rel=1e-11)
    # σ²/t, continued, is zero about ten steps before t = 0, so that a curve through whole steps is at its worst there.
    assert [_closed_form_sigma(t) for t in between] == pytest.approx(schedule.sigma(between), rel=1e-6)
    between = between[between > 50.0]
    assert [_closed_form_sigma(t) for t in between] == pytest.approx(schedule.sigma(between), rel=1e-11)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fractional_labels_keep_fourth_order(direction):
    """σ → label → the model's own σ must be smooth and exact between trained steps for a 4th-order method."""
    found = _labelled_errors("fractional", direction)
    assert measured_order(found) == pytest.approx(4.0, abs=0.2)
    assert found[-1] < 1e-7


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nearest_labels_do_not(direction):
    found = _labelled_errors("nearest", direction)
    assert measured_order(found) < 1.5
    assert found[-1] > 1e-5  # a floor that no step size gets below


# -- the test can fail --------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class _Wrong(Multistep):
    """Adams–Bashforth 3 with its newest weight wrong by 1 %; `balanced` takes that 1 % from the oldest."""

    balanced: bool = False

    def plan(self, grid):
        out = []
        for step in super().plan(grid):
            if isinstance(step, Weights) and step.weights is not None and len(step.weights) == 3:
                w0, w1, w2 = step.weights
                step = step._replace(weights=(1.01 * w0, w1, w2 - (0.01 * w0 if self.balanced else 0.0)))
            out.append(step)
        return tuple(out)


@pytest.mark.parametrize(("balanced", "at_most"), [(False, 0.3), (True, 1.2)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_coefficient_shows(problems, direction, balanced, at_most):
    """Weights that no longer sum to h lose all order; weights that do, but miss the slope, are of order 1."""
    right = measured_order(errors(problems["mixture"], get("ab3-rk"), "uniform", direction))
    wrong = measured_order(errors(problems["mixture"], _Wrong(3, start="rk", balanced=balanced), "uniform", direction))
    assert right > 2.8
    assert wrong < at_most


def test_a_wrong_stage_shows(problems):
    """Slopes asked for a hundredth of a step off cost a Runge–Kutta method its order too."""

    class Late(RungeKutta):
        def plan(self, grid):
            h = np.diff(grid.sigmas)
            return tuple(
                step._replace(sigmas=(step.sigmas[0], *(s - 0.01 * d for s in step.sigmas[1:])))
                for step, d in zip(super().plan(grid), h, strict=True)
            )

    assert measured_order(errors(problems["mixture"], Late(RK4))) < 1.2
