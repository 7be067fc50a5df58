"""Identities between solvers, and coefficients taken back out of solvers that run.

A sampler with one wrong weight still makes images. So each formula here is written out a second time, by hand,
and compared to the last digits: the paper's two equations, the textbook weights of every method, the closed
forms and limits that join one method to another.
"""

from __future__ import annotations

import doctest
import itertools
import math
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import least_squares
from torch import Tensor

from ddim_ode import (
    DATA,
    NOISE,
    Clock,
    EpsilonField,
    Gaussian,
    Grid,
    Multistep,
    NoiseSchedule,
    RungeKutta,
    Solver,
    Tableau,
    encode,
    grids,
    integrate,
    noise,
    sample,
    solvers,
)
from ddim_ode.models.analytic import GaussianEpsilon, MixtureEpsilon
from ddim_ode.solvers import get
from ddim_ode.solvers.runge_kutta import (
    BS32,
    DOP853,
    DOPRI5,
    EES25,
    HEUN,
    KUTTA3,
    MIDPOINT,
    RK4,
    Inside,
    density,
    size,
    trees,
)

#: Those whose calls are known beforehand; adaptive ones have a file of their own.
ALL = [s for s in solvers() if s.budgeted]
ALL += [*(get(f"{s.name}-rk") for s in solvers() if isinstance(s, Multistep) and s.k > 1)]
CLOCKS = ("sigma", "t", "log", "variance", "arctan", "asinh")


def by_name(value: Any) -> str | None:
    """A solver's id in the test report."""
    return value.name if isinstance(value, (Solver, Tableau)) else None


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Equal to `tolerance`, relative to the largest entry."""
    scale = float(wanted.abs().max())
    assert scale > 0.0
    assert float((got - wanted).abs().max()) <= tolerance * scale


def epsilon(x: float, t: float) -> float:
    """A nonlinear ε_θ of one pixel and the time label, for plain floats."""
    return 0.6 * math.tanh(x * (1.0 + 0.3 * math.cos(t / 150.0))) + 0.2 * x + 0.1 * math.sin(t / 90.0)


def epsilon_model(x: Tensor, t: Tensor) -> Tensor:
    """The same as a network: pixel by pixel, whatever the batch."""
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return 0.6 * torch.tanh(x * (1.0 + 0.3 * torch.cos(t / 150.0))) + 0.2 * x + 0.1 * torch.sin(t / 90.0)


@pytest.fixture
def field(schedule):
    return EpsilonField(epsilon_model, schedule, shape=(2, 3))


@pytest.fixture
def latent():
    return noise((2, 3), 4, seed=5)


def alphas(grid: Grid) -> list[Decimal]:
    """The paper's α at every node, to 28 digits: 1 − α, which the equations are written in, loses float64's where σ is small."""
    return [1 / (1 + Decimal(float(s)) ** 2) for s in grid.sigmas]


# -- the paper's equations ----------------------------------------------------------------------
def eq_13(x: float, alpha: Decimal, alpha_next: Decimal, label: float) -> float:
    r"""x_{t−Δt}/√α_{t−Δt} = x_t/√α_t + (√((1−α_{t−Δt})/α_{t−Δt}) − √((1−α_t)/α_t)) ε_θ(x_t)."""
    change = ((1 - alpha_next) / alpha_next).sqrt() - ((1 - alpha) / alpha).sqrt()
    return math.sqrt(alpha_next) * (x / math.sqrt(alpha) + float(change) * epsilon(x, label))


def eq_15(x: float, alpha: Decimal, alpha_next: Decimal, label: float) -> float:
    r"""x_{t−Δt}/√α_{t−Δt} = x_t/√α_t + ½((1−α_{t−Δt})/α_{t−Δt} − (1−α_t)/α_t) √(α_t/(1−α_t)) ε_θ(x_t)."""
    change = ((1 - alpha_next) / alpha_next - (1 - alpha) / alpha) / 2
    return math.sqrt(alpha_next) * (
        x / math.sqrt(alpha) + float(change * (alpha / (1 - alpha)).sqrt()) * epsilon(x, label)
    )


@pytest.mark.parametrize("steps", [2, 10, 37])
@pytest.mark.parametrize("rule", grids())
@pytest.mark.parametrize(("solver", "equation"), [("ddim", eq_13), ("pf-euler", eq_15)])
def test_sampling_is_the_paper_s_equation(schedule, field, latent, solver, equation, rule, steps):
    grid = Grid.make(rule, schedule, steps)
    got = integrate(field, latent / math.sqrt(alphas(grid)[0]), grid, solver).x
    alpha, labels = alphas(grid), grid.labels.tolist()
    out = []
    for x in latent.flatten().tolist():
        for n in range(grid.steps):
            x = equation(x, alpha[n], alpha[n + 1], labels[n])
        out.append(x)
    close(got, torch.tensor(out, dtype=torch.float64).reshape(latent.shape))
    close(sample(field, latent, grid=grid, solver=solver).x, got)


@pytest.mark.parametrize("steps", [2, 10, 37])
@pytest.mark.parametrize("rule", grids())
@pytest.mark.parametrize(("solver", "equation"), [("ddim", eq_13), ("pf-euler", eq_15)])
def test_encoding_is_the_paper_s_equation(schedule, field, latent, solver, equation, rule, steps):
    grid = Grid.make(rule, schedule, steps).reversed()
    images = latent / 4.0
    got = encode(field, images, grid=grid, solver=solver).x
    alpha, labels = alphas(grid), grid.labels.tolist()
    out = []
    for x in images.flatten().tolist():
        first = 0
        if equation is eq_15:  # it divides by √(1 − α_0) = 0: it starts at the first σ above 0, x̄ being the data
            x, first = math.sqrt(alpha[1]) * x, 1
        for n in range(first, grid.steps):
            x = equation(x, alpha[n], alpha[n + 1], labels[n])
        out.append(x)
    close(got, torch.tensor(out, dtype=torch.float64).reshape(latent.shape))


def test_labels_are_those_of_the_source(schedule, latent):
    """Of each step's beginning, in both directions; that of the first trained step at σ = 0."""
    asked: list[float] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return epsilon_model(x, t)

    field = EpsilonField(spy, schedule, shape=(2, 3))
    grid = Grid.make("linear", schedule, 10)
    sample(field, latent, grid=grid, solver="ddim")
    assert asked == [999.0, 899.0, 799.0, 699.0, 599.0, 499.0, 399.0, 299.0, 199.0, 99.0]
    asked.clear()
    encode(field, latent, grid=grid, solver="ddim")
    assert asked == [0.0, 99.0, 199.0, 299.0, 399.0, 499.0, 599.0, 699.0, 799.0, 899.0]


# -- one step: every clock and linear part that is DDIM -----------------------------------------
@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
@pytest.mark.parametrize("rule", grids())
def test_order_1_is_ddim_in_any_clock(schedule, field, latent, rule, encoding):
    grid = Grid.make(rule, schedule, 12)
    grid = grid.reversed() if encoding else grid
    wanted = integrate(field, latent, grid, "ddim").x_bar
    # Adams–Bashforth 1 is DDIM: one and the same arithmetic.
    assert torch.equal(integrate(field, latent, grid, Multistep(1)).x_bar, wanted)
    own = Clock("own", lambda s: s**3 + s, lambda u: u, lambda s: 1.0 / (3.0 * s * s + 1.0))
    for u in (*CLOCKS, own):
        close(integrate(field, latent, grid, Multistep(1, clock=u)).x_bar, wanted)
    # DPM-Solver++ of order 1: x̂₀ held still.
    close(integrate(field, latent, grid, Multistep(1, linear=DATA, clock="log")).x_bar, wanted)
    # Not so with another quantity: ε/σ held still is eq. 15.
    other = integrate(field, latent, grid, Multistep(1, clock="variance", quantity="score")).x_bar
    assert float((other - wanted).abs().max()) > 1e-3


# -- directions ---------------------------------------------------------------------------------
class Recorder:
    """A field that remembers what it was asked."""

    def __init__(self, eps: Any) -> None:
        self.eps = eps
        self.sigmas: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, x_bar: Tensor, sigma: float) -> Tensor:
        self.sigmas.append(sigma)
        self.states.append(x_bar.clone())
        return self.eps(x_bar, sigma)


@pytest.mark.parametrize("rule", grids())
def test_encoding_and_decoding_visit_the_same_nodes(schedule, latent, rule):
    grid = Grid.make(rule, schedule, 17)
    back = grid.reversed()
    assert back.encoding
    assert not grid.encoding
    assert back.sigmas.tobytes() == grid.sigmas[::-1].tobytes()
    assert back.reversed() == grid
    assert np.array_equal(back.labels, grid.labels[::-1])
    nodes = grid.sigmas.tolist()
    for solver in (get("ddim"), RungeKutta(HEUN), RungeKutta(HEUN, clock="t"), RungeKutta(RK4)):
        down, up = (Recorder(lambda x, s: 0.3 * x / (1.0 + s)) for _ in range(2))
        sample(EpsilonField.from_sigma(down, schedule), latent, grid=grid, solver=solver)
        encode(EpsilonField.from_sigma(up, schedule), latent, grid=grid, solver=solver)
        stages = solver.nfe_per_step
        # Sources, bit by bit, whatever the clock.
        assert down.sigmas[::stages] == nodes[:-1]
        assert up.sigmas[::stages] == nodes[:0:-1]
        if stages > 1:  # and the ends of steps, where the last stage is at c = 1
            assert down.sigmas[stages - 1 :: stages] == nodes[1:]
            assert up.sigmas[stages - 1 :: stages] == nodes[-2::-1]


@pytest.mark.parametrize("solver", ALL, ids=by_name)
def test_a_solver_asks_where_it_says_it_will(schedule, latent, solver):
    grid = Grid.make("karras", schedule, 9)
    spy = Recorder(lambda x, s: 0.3 * x / (1.0 + s))
    sample(EpsilonField.from_sigma(spy, schedule), latent, grid=grid, solver=solver)
    assert spy.sigmas == solver.stages(grid).tolist()


# -- coefficients, from the running solver ------------------------------------------------------
class Impulses:
    """A field whose j-th evaluation is the unit vector j: the state then spells out the weight of each.

    It remembers what it was asked, too.
    """

    def __init__(self, size: int) -> None:
        self.unit = torch.eye(size, dtype=torch.float64)
        self.sigmas: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, x_bar: Tensor, sigma: float) -> Tensor:
        self.sigmas.append(sigma)
        self.states.append(x_bar.clone())
        return self.unit[len(self.sigmas) - 1].expand_as(x_bar).clone()


def response(solver: Solver, grid: Grid) -> tuple[list[Tensor], Impulses]:
    """States at all nodes of a run from zero on impulses, each (evaluations,), and what was asked."""
    size = 5 * grid.steps
    field = Impulses(size)
    x_bar = torch.zeros(1, size, dtype=torch.float64)
    states, state = [x_bar[0]], solver.init(field, x_bar, grid)
    for n in range(grid.steps):
        x_bar, state, _ = solver.step(field, x_bar, n, state)
        states.append(x_bar[0])
    return states, field


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.mark.parametrize("direction", [1, -1], ids=["encoding", "sampling"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_weights_of_adams_bashforth(schedule, k, direction):
    h, steps = 0.25, 8
    grid = Grid.explicit((1.0 + h * np.arange(steps + 1.0))[::direction], schedule)
    solver = get("ddim" if k == 1 else f"ab{k}")
    states, field = response(solver, grid)
    assert field.sigmas == grid.sigmas[:-1].tolist()
    for n in range(steps):
        weights = (states[n + 1] - states[n])[: n + 1].flip(0) / (direction * h)  # newest first
        used = min(k, n + 1)  # the ramp: as many evaluations as there are
        wanted = torch.tensor([*ADAMS_BASHFORTH[used], *[0.0] * (n + 1 - used)], dtype=torch.float64)
        assert float((weights - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("rule", ["quadratic", "karras", "log"])
def test_weights_of_adams_bashforth_2_off_a_uniform_grid(schedule, rule):
    """h(1 + r/2) and −h r/2, with r = h/h_prev: all the way down to σ = 0."""
    grid = Grid.make(rule, schedule, 12)
    states, _ = response(get("ab2"), grid)
    h = np.diff(grid.sigmas)
    for n in range(1, grid.steps):
        r = h[n] / h[n - 1]
        moved = (states[n + 1] - states[n])[: n + 1]
        assert float(moved[n]) == pytest.approx(h[n] * (1.0 + r / 2.0), rel=1e-12)
        assert float(moved[n - 1]) == pytest.approx(-h[n] * r / 2.0, rel=1e-12)
        # Older ones fell out; what is left of them is rounding of the state they built.
        assert moved[: n - 1].abs().sum() <= 1e-13 * float(states[n].abs().max())


@pytest.mark.parametrize("direction", [1, -1], ids=["encoding", "sampling"])
@pytest.mark.parametrize("k", [3, 4])
def test_runge_kutta_start_has_the_starter_s_weights(schedule, k, direction):
    h, steps = 0.25, 8
    grid = Grid.explicit((1.0 + h * np.arange(steps + 1.0))[::direction], schedule)
    starter = {3: ((0.0, 1.0), (0.0, 0.5)), 4: ((1 / 6, 2 / 3, 1 / 6), (0.0, 0.5, 1.0))}[k]
    stages, started = len(starter[0]), k - 1
    states, field = response(get(f"ab{k}-rk"), grid)
    # Which evaluations lie at nodes: the first of each starting step, and every later one.
    at_nodes = [*range(0, stages * started, stages), *range(stages * started, stages * started + steps - started)]
    for n in range(steps):
        moved = (states[n + 1] - states[n]) / (direction * h)
        wanted = torch.zeros_like(moved)
        if n < started:
            wanted[stages * n : stages * (n + 1)] = torch.tensor(starter[0], dtype=torch.float64)
            asked = [grid.sigmas[n] + c * direction * h for c in starter[1]]
            assert field.sigmas[stages * n : stages * (n + 1)] == pytest.approx(asked, rel=1e-15)
        else:
            for j, weight in enumerate(ADAMS_BASHFORTH[k]):
                wanted[at_nodes[n - j]] = weight
        assert float((moved - wanted).abs().max()) < 1e-12


BUTCHER = {
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "kutta3": ((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
    "ees25": ((0, 1 / 3, 5 / 6), ((), (1 / 3,), (-5 / 48, 15 / 16)), (1 / 10, 1 / 2, 2 / 5)),
}


def recovered(solver: Solver, grid: Grid, n: int, stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """σ asked for, and what each slope was worth in each stage and in the step: step n of a run on impulses."""
    states, field = response(solver, grid)
    own = slice(stages * n, stages * (n + 1))
    inner = torch.stack([x[0] - states[n] for x in field.states[own]])
    outside = torch.ones(inner.shape[1], dtype=torch.bool)
    outside[own] = False
    assert float(inner[:, outside].abs().max()) == 0.0  # one-step: nothing of earlier steps
    return np.array(field.sigmas[own]), inner[:, own].numpy(), (states[n + 1] - states[n])[own].numpy()


@pytest.mark.parametrize("sigmas", [(1.0, 1.7, 2.0, 5.0), (5.0, 2.0, 1.7, 1.0, 0.0)], ids=["encoding", "sampling"])
@pytest.mark.parametrize("name", BUTCHER)
def test_tableau_of_runge_kutta(schedule, name, sigmas):
    grid = Grid.explicit(sigmas, schedule)
    c, a, b = BUTCHER[name]
    for n in range(grid.steps):
        h = sigmas[n + 1] - sigmas[n]
        asked, inner, weights = recovered(get(name), grid, n, len(b))
        assert asked == pytest.approx([sigmas[n] + x * h for x in c], rel=1e-14)
        for i, row in enumerate(a):
            assert inner[i] / h == pytest.approx([*row, *[0.0] * (len(b) - i)], abs=1e-13)
        assert weights / h == pytest.approx(b, abs=1e-13)


@pytest.mark.parametrize("tableau", [MIDPOINT, HEUN, KUTTA3, RK4], ids=by_name)
def test_tableau_of_runge_kutta_in_log_sigma(schedule, tableau):
    """In u = log σ a slope at u_i counts h σ(u_i); the step to σ = 0, where u is infinite, is taken in σ."""
    grid = Grid.explicit((5.0, 2.0, 1.7, 0.0), schedule)
    c, a, b = BUTCHER[tableau.name]
    for n in range(2):
        u, h = math.log(grid.sigmas[n]), math.log(grid.sigmas[n + 1] / grid.sigmas[n])
        asked, inner, weights = recovered(RungeKutta(tableau, clock="log"), grid, n, len(b))
        at = np.exp(u + np.array(c) * h)
        assert asked == pytest.approx(at, rel=1e-14)
        for i, row in enumerate(a):
            assert inner[i] / (h * at) == pytest.approx([*row, *[0.0] * (len(b) - i)], abs=1e-13)
        assert weights / (h * at) == pytest.approx(b, abs=1e-13)
    asked, _, weights = recovered(RungeKutta(tableau, clock="log"), grid, 2, len(b))
    assert asked == pytest.approx([1.7 * (1.0 - x) for x in c], abs=1e-14)
    assert weights / -1.7 == pytest.approx(b, abs=1e-13)


def lagrange(j: int, nodes: list[float], at: float) -> float:
    """ℓ_j through `nodes`."""
    return math.prod((at - other) / (nodes[j] - other) for i, other in enumerate(nodes) if i != j)


def integral(f: Any, low: float, high: float) -> float:
    """By scipy's adaptive quadrature: independent of the package's own."""
    return quad(f, low, high, epsabs=0.0, epsrel=1e-13, limit=200)[0]


def propagator_and_weights(solver: Multistep, grid: Grid, stored: Any) -> list[tuple[np.ndarray, float]]:
    r"""(P, w_0, w_1, …) of every step, solved for from a run on impulses; and what that leaves unexplained.

    One entry of the state starts at 1 and is hit by no impulse. The state and what a run stores of its evaluations,
    ``stored(x_bar, eps, sigma)``, are then linearly independent, so that x̄' = P x̄ + Σ w_j z_{n−j} gives P and w.
    """
    size = grid.steps + 1
    field = Impulses(size)
    x_bar = torch.zeros(1, size, dtype=torch.float64)
    x_bar[0, -1] = 1.0
    state, past, out = solver.init(field, x_bar, grid), [], []
    for n, sigma in enumerate(grid.sigmas[:-1].tolist()):
        past.insert(0, stored(x_bar[0], field.unit[n], sigma))
        columns = torch.stack([x_bar[0], *past[: solver.k]], dim=1).numpy()
        x_bar, state, _ = solver.step(field, x_bar, n, state)
        moved = x_bar[0].numpy()
        # Columns of one size, or the solution would only be accurate relative to the largest of them.
        size_of = np.abs(columns).max(axis=0)
        found = np.linalg.lstsq(columns / size_of, moved, rcond=None)[0] / size_of
        out.append((found, float(np.abs(columns @ found - moved).max() / np.abs(columns * found).max())))
    return out


def denoised(x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """x̂₀."""
    return x_bar - sigma * eps


def _pull(variance: float) -> Any:
    return lambda x_bar, eps, sigma: eps - sigma / (variance + sigma**2) * x_bar


def _flow(variance: float) -> Any:
    return lambda s, to: math.sqrt((variance + to**2) / (variance + s**2))


def _gaussian(variance: float) -> Gaussian:
    return Gaussian(torch.tensor(0.0), torch.tensor(variance, dtype=torch.float64))


# Members, and by hand: what a run stores, P(s, σ'), g(s) with ε − a x̄ = g y, u(s), and y = turn(σ) · stored.
MEMBERS = {
    "DPM-Solver++": (
        {"linear": DATA, "clock": "log"},
        denoised, lambda s, to: to / s, lambda s: -1.0 / s, math.log, lambda s: 1.0,
    ),
    "x̂₀ solved, ε interpolated": (
        {"linear": DATA, "clock": "log", "quantity": "noise"},
        denoised, lambda s, to: to / s, lambda s: 1.0, math.log, lambda s: -1.0 / s,
    ),
    "DPM-Solver": (
        {"clock": "log"},
        lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: 1.0, math.log, lambda s: 1.0,
    ),
    "x̂₀ − x̄": (
        {"clock": "log", "quantity": "data"},
        lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: -1.0 / s, math.log, lambda s: -s,
    ),
    "eq. 15": (
        {"clock": "variance", "quantity": "score"},
        lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: s, lambda s: s * s / 2, lambda s: 1.0 / s,
    ),
    "arctan": (
        {"clock": "arctan"},
        lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: 1.0, lambda s: math.atan(s), lambda s: 1.0,
    ),
    "asinh": (
        {"clock": "asinh"},
        lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: 1.0, lambda s: math.asinh(20.0 * s), lambda s: 1.0,
    ),
    "Gaussian": (
        {"linear": _gaussian(0.5)},
        _pull(0.5), _flow(0.5), lambda s: 1.0, lambda s: s, lambda s: 1.0,
    ),
    "narrow Gaussian, log σ": (
        {"linear": _gaussian(0.003), "clock": "log"},
        _pull(0.003), _flow(0.003), lambda s: 1.0, math.log, lambda s: 1.0,
    ),
    "narrow Gaussian, x̂₀": (
        {"linear": _gaussian(0.003), "clock": "log", "quantity": "data"},
        _pull(0.003), _flow(0.003), lambda s: -1.0 / s, math.log, lambda s: -s,
    ),
}  # fmt: skip


@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
@pytest.mark.parametrize("sigmas", [(0.3, 0.45, 0.9, 1.4, 3.0, 4.0), (0.02, 0.4, 3.0, 140.0)], ids=["mild", "wide"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("member", MEMBERS)
def test_weights_of_the_family(schedule, member, k, sigmas, encoding):
    """∫ P(s, σ') g(s) ℓ_j(u(s)) ds, by an independent quadrature; and P itself."""
    options, stored, propagator, g, u, turn = MEMBERS[member]
    sigmas = sigmas if encoding else sigmas[::-1]
    found = propagator_and_weights(Multistep(k, **options), Grid.explicit(sigmas, schedule), stored)
    for n, (numbers, unexplained) in enumerate(found):
        s, to = sigmas[n], sigmas[n + 1]
        past = sigmas[max(0, n + 1 - k) : n + 1][::-1]  # newest first; the ramp has fewer
        nodes = [u(x) for x in past]

        def integrand(v: float, j: int) -> float:
            return v * propagator(v, to) * g(v) * lagrange(j, nodes, u(v))  # noqa: B023

        wanted = [
            # over log s, in which every integrand here is tame
            turn(x) * integral(lambda v, j=j: integrand(math.exp(v), j), math.log(s), math.log(to))
            for j, x in enumerate(past)
        ]
        assert unexplained < 1e-13
        # Weights reach 1e13 where a parabola in σ² is carried from 3 to 140; P is then below their last digit.
        digits = max(1e-10, 1e-15 * max(map(abs, wanted)))
        assert numbers == pytest.approx([propagator(s, to), *wanted], rel=1e-10, abs=digits)


@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
@pytest.mark.parametrize("times", [(40.0, 90.0, 130.0, 260.0, 333.3), (0.0, 5.0, 150.0, 600.0, 1000.0)], ids=str)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_weights_of_deis(schedule, k, times, encoding):
    """ε by a polynomial in the schedule's time, integrated over σ: by parts, from σ(t) alone."""
    times = times if encoding else times[::-1]
    sigmas = [schedule.sigma(t) for t in times]
    found = propagator_and_weights(get(f"deis{k}"), Grid.explicit(sigmas, schedule), lambda x, eps, s: eps)
    for n, (numbers, unexplained) in enumerate(found):
        nodes = times[max(0, n + 1 - k) : n + 1][::-1]
        wanted = []
        for j in range(len(nodes)):
            # ∫ ℓ dσ = [ℓ σ] − ∫ ℓ'(t) σ(t) dt: the quadrature sees neither the package's inverse t(σ) nor its slope.
            others = [x for i, x in enumerate(nodes) if i != j]
            polynomial = np.poly1d(others, r=True) / math.prod(nodes[j] - x for x in others)
            ends = [float(polynomial(t)) * schedule.sigma(t) for t in times[n : n + 2]]
            inner = integral(
                # t = r², as σ starts like √t
                lambda r: 2.0 * r * float(polynomial.deriv()(r * r)) * schedule.sigma(r * r),  # noqa: B023
                math.sqrt(times[n]), math.sqrt(times[n + 1]),
            )  # fmt: skip
            wanted.append(ends[1] - ends[0] - inner)
        assert unexplained < 1e-13
        assert numbers == pytest.approx([1.0, *wanted], rel=1e-9, abs=1e-10)


# Members with a node at σ = 0: what a run stores, P, g, and y at each node as a multiple of what is stored.
AT_ZERO = {
    "noise, arctan": (
        {"clock": "arctan"}, lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: 1.0, lambda s: 1.0, math.atan,
    ),
    "noise, t": ({"clock": "t"}, lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: 1.0, lambda s: 1.0, None),
    "x̂₀, t": ({"clock": "t", "linear": DATA}, denoised, lambda s, to: to / s, lambda s: -1.0 / s, lambda s: 1.0, None),
    "x̂₀ − x̄, arctan": (
        {"clock": "arctan", "quantity": "data"}, lambda x, eps, s: eps, lambda s, to: 1.0, lambda s: -1.0 / s, lambda s: -s,
        math.atan,
    ),
    "Gaussian, σ": (
        {"linear": _gaussian(0.5)}, _pull(0.5), _flow(0.5), lambda s: 1.0, lambda s: 1.0, lambda s: s,
    ),
}  # fmt: skip


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("member", AT_ZERO)
def test_weights_of_steps_that_have_left_zero(schedule, member, k):
    """The evaluation at σ = 0 is a node like any other; where y = −σε, it says that y is 0 there."""
    options, stored, propagator, g, turn, u = AT_ZERO[member]
    u = u or schedule.t
    sigmas = [0.0, 0.2, 0.7, 1.1, 2.0]
    found = propagator_and_weights(Multistep(k, **options), Grid.explicit(sigmas, schedule), stored)
    for n in range(1, 4):
        s, to = sigmas[n], sigmas[n + 1]
        past = sigmas[max(0, n + 1 - k) : n + 1][::-1]
        nodes = [float(u(x)) for x in past]
        wanted = [
            turn(x) * integral(lambda v, j=j: propagator(v, to) * g(v) * lagrange(j, nodes, float(u(v))), s, to)  # noqa: B023
            for j, x in enumerate(past)
        ]
        numbers = found[n][0][: 1 + len(past)]
        assert numbers == pytest.approx([propagator(s, to), *wanted], rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_last_step_of_deis_on_x0_is_the_polynomial_at_zero(schedule, k):
    """P → 0, and x̄ becomes the value at t = 0 of the polynomial through the last k x̂₀: the default's last step."""
    sigmas = [3.0, 1.5, 0.8, 0.3, 0.0]
    numbers, unexplained = propagator_and_weights(get(f"deisx{k}"), Grid.explicit(sigmas, schedule), denoised)[-1]
    nodes = [schedule.t(s) for s in sigmas[:-1][::-1][:k]]
    assert numbers == pytest.approx([0.0, *(lagrange(j, nodes, 0.0) for j in range(k))], abs=1e-10)
    assert unexplained < 1e-13


def test_last_step_of_dpm_solver_pp_lands_on_the_denoised(schedule):
    """P → 0 at σ = 0, where log σ has no polynomial left to offer: x̄ becomes x̂₀."""
    numbers, unexplained = propagator_and_weights(
        get("dpmpp2m"), Grid.explicit([2.0, 1.0, 0.5, 0.0], schedule), denoised
    )[-1]
    assert numbers == pytest.approx([0.0, 1.0, 0.0], abs=1e-14)
    assert unexplained < 1e-15


# -- the Gaussian member ------------------------------------------------------------------------
def gaussian_case(kind: str) -> tuple[GaussianEpsilon, Gaussian]:
    """Gaussian data in three dimensions, as an exact field and as a linear part."""
    mean = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    if kind == "isotropic":
        return GaussianEpsilon(mean, torch.full((3,), 0.37)), Gaussian(mean, torch.full((3,), 0.37).double()[0])
    variance = torch.tensor([0.02, 0.6, 2.5], dtype=torch.float64)
    if kind == "diagonal":
        return GaussianEpsilon(mean, variance), Gaussian(mean, variance)
    basis = torch.linalg.qr(torch.tensor([[1.0, 0.4, -0.2], [0.3, -1.0, 0.5], [0.7, 0.2, 0.9]]).double())[0]
    covariance = (basis * variance) @ basis.T
    return GaussianEpsilon(mean, 0.5 * (covariance + covariance.T)), Gaussian(mean, variance, basis)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("clock", ["sigma", "log", "t", "arctan"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_gaussian_member_is_exact_on_gaussian_data(schedule, kind, k, clock, steps):
    """In ONE step from σ_T to 0, and from 0 to σ_T; and however many steps it is asked to take."""
    eps, linear = gaussian_case(kind)
    field = EpsilonField.from_sigma(eps, schedule)
    solver = Multistep(k, clock=clock, linear=linear)
    x = torch.tensor([[0.5, -0.4, 1.7], [-1.2, 0.3, 0.2]], dtype=torch.float64)
    grid, top = Grid.make("quadratic", schedule, steps), schedule.sigma_max
    start = x * math.sqrt(1.0 + top * top)
    close(integrate(field, start, grid, solver).x_bar, eps.solution(start, top, 0.0), 1e-10)
    close(integrate(field, x, grid.reversed(), solver).x_bar, eps.solution(x, 0.0, top), 1e-10)
    # It is the linear part that does it: without it one step is far off.
    plain = integrate(field, start, grid, Multistep(k, clock=clock)).x_bar
    assert float((plain - eps.solution(start, top, 0.0)).abs().max()) > 1e-3


@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
@pytest.mark.parametrize("clock", ["sigma", "log"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gaussian_member_s_limits(schedule, field, latent, k, clock, encoding):
    r"""λ → ∞ leaves no linear part. λ → 0 makes a = 1/σ, the data part; its mean then no longer counts, as the
    polynomial through x̂₀ − μ is the polynomial through x̂₀, less μ.
    """
    grid = Grid.explicit(np.linspace(0.5, 4.0, 10)[:: 1 if encoding else -1], schedule)
    mean = torch.full((2, 3), 0.7)
    wide = Multistep(k, clock=clock, linear=Gaussian(mean, torch.tensor(1e14)))
    narrow = Multistep(k, clock=clock, linear=Gaussian(mean, torch.tensor(1e-13)), quantity="data")
    noise_part = integrate(field, latent, grid, Multistep(k, clock=clock, linear=NOISE)).x_bar
    data_part = integrate(field, latent, grid, Multistep(k, clock=clock, linear=DATA)).x_bar
    close(integrate(field, latent, grid, wide).x_bar, noise_part, 1e-10)
    close(integrate(field, latent, grid, narrow).x_bar, data_part, 1e-10)
    if k > 1:  # at k = 1 both limits are DDIM
        assert float((noise_part - data_part).abs().max()) > 1e-4


# -- batches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ALL, ids=by_name)
def test_a_batch_of_n_is_n_batches_of_one(field, latent, solver):
    options: dict[str, Any] = {"solver": solver, "steps": 8, "grid": "quadratic", "trajectory": True}
    whole = sample(field, latent, **options)
    single = sample(field, latent, batch_size=1, **options)
    # Elementwise kernels may take another path through vector registers for another size: rounding, no more.
    close(single.x, whole.x)
    close(single.trajectory, whole.trajectory)
    assert single.nfe == whole.nfe
    assert single.status == whole.status
    alone = torch.cat([sample(field, latent[i : i + 1], **options).x for i in range(4)])
    assert torch.equal(alone, single.x)
    images = latent / 4.0
    options.pop("trajectory")
    close(encode(field, images, batch_size=1, **options).x, encode(field, images, **options).x)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
def test_a_seed_means_the_same_images_in_any_batch_size(schedule, batch_size):
    mixture = MixtureEpsilon(
        torch.tensor([0.4, 0.6]),
        torch.tensor([[1.0, -1.0], [-2.0, 0.5]]),
        torch.stack([torch.eye(2), torch.tensor([[0.5, 0.2], [0.2, 0.3]])]),
    )
    field = EpsilonField.from_sigma(mixture, schedule)
    options: dict[str, Any] = {"seed": 11, "steps": 12, "solver": "ab3"}
    images = sample(field, n=5, batch_size=batch_size, **options).x
    close(images, sample(field, n=5, **options).x)
    # Image i knows its own index alone: fewer images, or a later start, are the same images.
    close(sample(field, n=3, batch_size=batch_size, **options).x, images[:3])
    later = noise((2,), 2, seed=11, first=3)
    assert torch.equal(later, noise((2,), 5, seed=11)[3:])
    options.pop("seed")
    close(sample(field, later, **options).x, images[3:])
    assert not torch.allclose(sample(field, n=5, seed=12, **options).x, images)


# -- a solver of one's own ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def trapezium() -> Solver:
    """The explicit trapezium of the contract's docstring, letter by letter."""
    scope: dict[str, Any] = {"Solver": Solver}
    for example in doctest.DocTestParser().get_examples(Solver.__doc__ or ""):
        exec(example.source, scope)
    return scope["Trapezium"]()


def test_a_user_s_solver_goes_wherever_a_name_goes(field, latent, trapezium):
    close(sample(field, latent, steps=9, solver=trapezium).x, sample(field, latent, steps=9, solver="heun").x)
    images = latent / 4.0
    close(encode(field, images, steps=9, solver=trapezium).x, encode(field, images, steps=9, solver="heun").x)
    assert sample(field, latent, nfe=19, solver=trapezium).nfe == 18


def test_a_user_s_tableau_plugs_in(schedule, field, latent):
    """Ralston's method of order 2: a second stage at 2/3."""
    solver = RungeKutta(Tableau("ralston", 2, ((), (2 / 3,)), (1 / 4, 3 / 4), "Ralston 1962"))
    assert (solver.name, solver.order, solver.nfe_per_step, solver.nfe(7)) == ("ralston", 2, 2, 14)
    grid = Grid.explicit((1.0, 1.7, 2.0), schedule)
    asked, inner, weights = recovered(solver, grid, 1, 2)
    assert asked == pytest.approx([1.7, 1.9])
    assert inner[1] / 0.3 == pytest.approx([2 / 3, 0.0])
    assert weights / 0.3 == pytest.approx([1 / 4, 3 / 4])
    assert sample(field, latent, steps=7, solver=solver).nfe == 14


@pytest.mark.parametrize(
    ("order", "a", "b", "text"),
    [
        (1, ((),), (0.9,), "a condition of order 1 gives 0.9 where 1 is needed"),
        (2, ((), (1 / 2,)), (1 / 2, 1 / 2), "a condition of order 2"),
        (3, ((), (1.0,)), (1 / 2, 1 / 2), "claims order 3, but a condition of order 3"),
        # Kutta's c and b, but a third stage that forgets the second: b·a·c = 0
        (3, ((), (1 / 2,), (1.0, 0.0)), (1 / 6, 2 / 3, 1 / 6), "a condition of order 3 gives 0 where"),
        # rk4 with the third row moved to the first column: c, and all conditions on c alone, still hold
        (4, ((), (1 / 2,), (1 / 2, 0.0), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "a condition of order"),
        (4, ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), "claims order 4, but a condition of order 4"),
        (2, ((), (1 / 2,), ()), (0.0, 1.0, 0.0), "row i of a must hold i entries"),
        (2, ((), (1 / 2,)), (0.0, 1.0, 0.0), "row i of a must hold i entries"),
    ],
)
def test_a_wrong_tableau_is_refused(order, a, b, text):
    with pytest.raises(ValueError, match=text):
        Tableau("wrong", order, a, b)


def order_conditions(numbers: np.ndarray) -> np.ndarray:
    """Left sides of the eight conditions up to order 4, tree by tree, of a tableau of four stages in one row."""
    a = np.zeros((4, 4))
    a[np.tril_indices(4, -1)] = numbers[:6]
    b, stages = numbers[6:], range(4)
    c = [sum(a[i, j] for j in stages) for i in stages]
    return np.array(
        [
            sum(b[i] for i in stages),
            sum(b[i] * c[i] for i in stages),
            sum(b[i] * c[i] ** 2 for i in stages),
            sum(b[i] * a[i, j] * c[j] for i in stages for j in stages),
            sum(b[i] * c[i] ** 3 for i in stages),
            sum(b[i] * c[i] * a[i, j] * c[j] for i in stages for j in stages),
            sum(b[i] * a[i, j] * c[j] ** 2 for i in stages for j in stages),
            sum(b[i] * a[i, j] * a[j, k] * c[k] for i in stages for j in stages for k in stages),
        ]
    )


@pytest.mark.parametrize("broken", [None, *range(8)])
def test_every_order_condition_is_checked(broken):
    """A tableau near rk4 that fails one condition only, by one part in 10⁴, is refused for that one."""
    wanted = np.array([1, 1 / 2, 1 / 3, 1 / 6, 1 / 4, 1 / 8, 1 / 12, 1 / 24])
    if broken is not None:
        wanted[broken] *= 1.0001
    start = np.array([1 / 2, 0, 1 / 2, 0, 0, 1, 1 / 6, 1 / 3, 1 / 3, 1 / 6])
    numbers = least_squares(lambda x: order_conditions(x) - wanted, start, xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    assert np.abs(order_conditions(numbers) - wanted).max() < 1e-13
    rows = tuple(tuple(numbers[i * (i - 1) // 2 : i * (i + 1) // 2].tolist()) for i in range(4))
    b = tuple(numbers[6:].tolist())
    if broken is None:
        Tableau("right", 4, rows, b)
        return
    order = (1, 2, 3, 3, 4, 4, 4, 4)[broken]
    with pytest.raises(ValueError) as caught:
        Tableau("wrong", 4, rows, b)
    named = re.search(r"a condition of order (\d) gives (\S+) where", str(caught.value))
    assert named is not None
    assert (int(named[1]), float(named[2])) == (order, pytest.approx(wanted[broken], abs=1e-12))
    # It may still claim what it does fulfil.
    if order > 1:
        assert Tableau("modest", order - 1, rows, b).order == order - 1


# -- rooted trees --------------------------------------------------------------------------------
def test_rooted_trees_are_all_there():
    """As many as there are (OEIS A000081), none twice, and their densities by two of their identities."""
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert all(len(set(trees(n))) == len(trees(n)) for n in range(1, 9))
    assert all(size(tree) == n for n in range(1, 9) for tree in trees(n))
    bushy, tall = ((),) * 7, ()
    for _ in range(7):
        tall = (tall,)
    assert (density(bushy), density(tall)) == (8, math.factorial(8))
    # Every monotonic labelling of n nodes is one of (n − 1)!: Σ over trees of α(t) = n!/(γ σ).
    assert sum(math.factorial(8) / density(t) / symmetry(t) for t in trees(8)) == pytest.approx(math.factorial(7))


def symmetry(tree: tuple) -> int:
    """σ(t): how many ways a tree maps onto itself."""
    repeated = math.prod(math.factorial(tree.count(branch)) for branch in set(tree))
    return repeated * math.prod(symmetry(branch) for branch in tree)


TABLEAUS = [MIDPOINT, HEUN, KUTTA3, RK4, EES25, BS32, DOPRI5, DOP853]


@pytest.mark.parametrize("tableau", TABLEAUS, ids=by_name)
def test_a_perturbed_coefficient_is_refused(tableau):
    """Each one of a tableau, by one part in 10⁶: of a, b, its estimates, its nodes, and what it has inside a step."""

    def nudged(values: tuple[float, ...], i: int) -> tuple[float, ...]:
        return (*values[:i], values[i] * (1.0 + 1e-6), *values[i + 1 :])

    def wrong(**change: Any) -> None:
        with pytest.raises(ValueError, match=f"tableau {tableau.name}"):
            replace(tableau, **change)

    assert replace(tableau) == tableau
    for i, value in enumerate(tableau.b):
        if value:
            wrong(b=nudged(tableau.b, i))
    for n, row in enumerate(tableau.a):
        for i, value in enumerate(row):
            if value:
                wrong(a=(*tableau.a[:n], nudged(row, i), *tableau.a[n + 1 :]))
    for n, row in enumerate(tableau.error):
        for i, value in enumerate(row):
            if value:
                wrong(error=(*tableau.error[:n], nudged(row, i), *tableau.error[n + 1 :]))
    if tableau.nodes is not None:
        wrong(nodes=nudged(tableau.nodes, 1))
    if tableau.inside is not None:
        for n, (theta, row) in enumerate(tableau.inside.b):
            wrong(inside=replace(tableau.inside, b=(*tableau.inside.b[:n], (theta, nudged(row, 0)))))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"order": 6}, "claims order 6, but a condition of order 6"),
        ({"order": 9}, "claims order 9, but conditions are checked up to order 8"),
        ({"embedded_orders": (5,)}, "the embedded solution 0 of tableau dopri5 claims order 5"),
        ({"embedded_orders": ()}, "error must hold one or two rows, and embedded_orders an order for each"),
        ({"error": (DOPRI5.error[0][:-1],)}, "a row of error must hold 7 entries, for 6 stages and the end"),
        ({"nodes": DOPRI5.c[:-1]}, "nodes must be the row sums of a"),
        ({"error": DOPRI5.error * 3, "embedded_orders": (4, 4, 4)}, "one or two rows"),
        ({"error": ((0.0,) * 7,)}, "a row of error must not be all zeros"),
        ({"order": 2.5}, "order of tableau dopri5 must be a whole number of at least 1, but got 2.5"),
        ({"order": "5"}, "order of tableau dopri5 must be a whole number"),
        ({"embedded_orders": 4}, "embedded_orders of tableau dopri5 must hold an order for each row of error"),
        ({"embedded_orders": (None,)}, "embedded_orders of tableau dopri5 must be a whole number"),
        ({"error": ((math.nan, *DOPRI5.error[0][1:]),)}, "a row of error of tableau dopri5 must hold finite numbers"),
        ({"a": 1.0}, "a of tableau dopri5 must hold rows of numbers"),
        ({"a": (None, *DOPRI5.a[1:])}, "a row of a of tableau dopri5 must hold finite numbers, but got None"),
        ({"b": (math.nan, *DOPRI5.b[1:])}, "b of tableau dopri5 must hold finite numbers"),
        ({"nodes": "abcdef"}, "nodes of tableau dopri5 must hold finite numbers"),
        ({"inside": Inside(4, (), ((0.5, (0.5,) * 6),))}, "a row of inside.b must hold 7 entries, but has 6"),
        ({"inside": Inside(4, ((0.5,),), ())}, "row i of inside.a must hold 7 \\+ i entries"),
        ({"inside": Inside(9, (), ())}, "claims order 9"),
        ({"inside": Inside(0, (), ())}, "inside.order of tableau dopri5 must be a whole number of at least 1"),
    ],
)
def test_an_embedded_tableau_with_a_mistake_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        replace(DOPRI5, **change)


@pytest.mark.parametrize("direction", [1, -1], ids=["encoding", "sampling"])
def test_ees_comes_back(problems, direction):
    """EES(2,5): a step and the same step back leave an error of order 6, where the midpoint rule leaves one of order 4."""
    eps, low = problems["mixture"].eps, problems["mixture"].low

    def defect(solver: Solver, h: float) -> float:
        field = EpsilonField.from_sigma(eps, NoiseSchedule.linear())
        there = integrate(field, low, [1.0, 1.0 + direction * h], solver).x_bar
        back = integrate(field, there, [1.0 + direction * h, 1.0], solver).x_bar
        return float((back - low).square().mean().sqrt())

    for solver, order in ((get("ees25"), 6), (RungeKutta(EES25, "arctan"), 6), (get("midpoint"), 4)):
        found = [defect(solver, h) for h in (0.2, 0.1, 0.05)]
        assert math.log2(found[0] / found[-1]) / 2.0 == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("there", [(0.6, 1.5), (1.5, 0.6)], ids=["encoding", "sampling"])
def test_ees_round_trips_at_order_5(problems, there):
    eps, low = problems["mixture"].eps, problems["mixture"].low
    field, found = EpsilonField.from_sigma(eps, NoiseSchedule.linear()), []
    for steps in (6, 12, 24):
        nodes = np.linspace(*there, steps + 1)
        up = integrate(field, low, nodes, "ees25").x_bar
        found.append(float((integrate(field, up, nodes[::-1].copy(), "ees25").x_bar - low).square().mean().sqrt()))
    assert 0.5 * math.log2(found[0] / found[-1]) == pytest.approx(5.0, abs=0.3)


def test_heun_of_edm_is_algorithm_1(schedule, field, latent):
    """Karras et al. 2022, by hand: the second call of a step is made unless it would be at σ = 0."""
    grid, solver = Grid.make("karras", schedule, 7), get("heun-edm")
    x = latent * math.sqrt(1.0 + float(grid.sigmas[0]) ** 2)
    wanted = x
    for sigma, to in itertools.pairwise(grid.sigmas.tolist()):
        d = field(wanted, sigma)
        euler = wanted + (to - sigma) * d
        wanted = euler if to == 0.0 else wanted + (to - sigma) * (0.5 * d + 0.5 * field(euler, to))
    run = integrate(field, x, grid, solver)
    close(run.x_bar, wanted)
    assert run.nfe == solver.nfe(7) == 13
    assert [solver.steps(nfe) for nfe in (1, 2, 3, 13, 14, 15)] == [1, 1, 2, 7, 7, 8]
    # Away from 0 it is Heun's method, and in both directions.
    inner = Grid.explicit([5.0, 2.0, 0.5], schedule)
    assert torch.equal(integrate(field, latent, inner, solver).x_bar, integrate(field, latent, inner, "heun").x_bar)


# -- counting -----------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("solver", ALL, ids=by_name)
def test_calls_are_as_many_as_stated(schedule, latent, solver, steps):
    calls = 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return epsilon_model(x, t)

    field = EpsilonField(counted, schedule, shape=(2, 3))
    run = sample(field, latent, steps=steps, solver=solver, grid="quadratic")
    assert calls == run.nfe == field.nfe == solver.nfe(steps)
    # A budget of calls buys as many steps as it pays for, and is never overdrawn.
    assert solver.steps(solver.nfe(steps)) == steps
    assert solver.steps(solver.nfe(steps + 1) - 1) == steps
    calls = 0
    back = encode(field, latent, grid=run.grid, solver=solver)
    # ε/σ does not exist at σ = 0: eq. 15 takes one step without a call there.
    assert calls == back.nfe == solver.nfe(steps) - (solver.name == "pf-euler")


def test_start_costs():
    """The k − 1 starting steps cost k − 1 calls each: two calls more for k = 3, six more for k = 4."""
    assert [get(f"ab{k}-rk").nfe(20) for k in (2, 3, 4)] == [20, 22, 26]
    assert [get(f"ab{k}").nfe(20) for k in (2, 3, 4)] == [20, 20, 20]


def test_stated_orders():
    """With the default start, Euler's first step caps a multistep member at 2, or, corrected, at 3."""
    assert {s.name: s.order for s in ALL} == {
        "ddim": 1, "pf-euler": 1, "ab2": 2, "ab3": 2, "ab4": 2, "deis2": 2, "deis3": 2, "deis4": 2,
        "deisx2": 2, "deisx3": 2, "deisx4": 2,
        "o-belm": 2, "bdia": 2, "mf-midpoint": 2, "mf-rk4": 4, "alf": 2, "alf-flow": 2, "ees25-arctan": 2,
        "arctan2": 2, "arctan3": 2, "arctan4": 2, "dpmpp2m": 2, "dpmpp3m": 2, "midpoint": 2, "heun": 2, "kutta3": 3, "rk4": 4,
        "ees25": 2, "heun-edm": 2, "abm2": 2, "abm3": 3, "abm4": 3, "abm2-pece": 2, "abm3-pece": 3, "abm4-pece": 3,
        "unipc2": 3, "unipc3": 3, "flow2": 2, "flow3": 2, "flowdown5": 3, "flowup4": 3, "ipndm": 1, "dpm2s": 2, "dpm3s": 3,
        "dpmpp2s": 2, "abm3-rk": 3, "abm4-rk": 4, "abm3-pece-rk": 3, "abm4-pece-rk": 4, "unipc2-rk": 3, "unipc3-rk": 4,
        "flow2-rk": 2, "flow3-rk": 3, "flowdown5-rk": 5, "flowup4-rk": 4,
        "ab2-rk": 2, "ab3-rk": 3, "ab4-rk": 4, "deis2-rk": 2, "deis3-rk": 3, "deis4-rk": 4,
        "deisx2-rk": 2, "deisx3-rk": 3, "deisx4-rk": 4,
        "arctan2-rk": 2, "arctan3-rk": 3, "arctan4-rk": 4, "dpmpp2m-rk": 2, "dpmpp3m-rk": 3,
    }  # fmt: skip
