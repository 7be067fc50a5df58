"""Single-step exponential methods and iPNDM, against their published formulas written out by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddim_ode import (
    DATA,
    EpsilonField,
    Flow,
    Gaussian,
    Grid,
    Ipndm,
    NoiseSchedule,
    SingleStep,
    encode,
    integrate,
    noise,
    sample,
)
from ddim_ode.solvers import get
from tests.test_identities import ADAMS_BASHFORTH, Recorder, close, epsilon_model, response

LINEAR = NoiseSchedule.linear()
X = noise((2, 3), 4, seed=5)


@pytest.fixture
def field():
    return EpsilonField(epsilon_model, LINEAR, shape=(2, 3))


# As printed, with x = √α x̄, λ = −log σ and α, σ the paper's; everything in x, so that nothing but ε is shared.
def _vp(sigma):
    """α and σ of the DPM-Solver papers, by the noise-to-signal ratio."""
    return 1.0 / math.sqrt(1.0 + sigma * sigma), sigma / math.sqrt(1.0 + sigma * sigma)


def _dpm2s(field, x, s, t):
    h = math.log(s / t)
    middle = s * math.exp(-0.5 * h)
    (a_s, _), (a_m, s_m), (a_t, s_t) = _vp(s), _vp(middle), _vp(t)
    u = a_m / a_s * x - s_m * math.expm1(0.5 * h) * field(x / a_s, s)
    return a_t / a_s * x - s_t * math.expm1(h) * field(u / a_m, middle)


def _dpm3s(field, x, s, t):
    h, r1, r2 = math.log(s / t), 1 / 3, 2 / 3
    m1, m2 = s * math.exp(-r1 * h), s * math.exp(-r2 * h)
    (a_s, _), (a_1, s_1), (a_2, s_2), (a_t, s_t) = _vp(s), _vp(m1), _vp(m2), _vp(t)
    e0 = field(x / a_s, s)
    u1 = a_1 / a_s * x - s_1 * math.expm1(r1 * h) * e0
    d1 = field(u1 / a_1, m1) - e0
    u2 = a_2 / a_s * x - s_2 * math.expm1(r2 * h) * e0 - s_2 * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1.0) * d1
    d2 = field(u2 / a_2, m2) - e0
    return a_t / a_s * x - s_t * math.expm1(h) * e0 - s_t / r2 * (math.expm1(h) / h - 1.0) * d2


def _dpmpp2s(field, x, s, t):
    h = math.log(s / t)
    middle = s * math.exp(-0.5 * h)
    (a_s, s_s), (a_m, s_m), (a_t, s_t) = _vp(s), _vp(middle), _vp(t)
    data = lambda y, a, sigma: y / a - sigma * field(y / a, sigma)
    u = s_m / s_s * x - a_m * math.expm1(-0.5 * h) * data(x, a_s, s)
    return s_t / s_s * x - a_t * math.expm1(-h) * data(u, a_m, middle)


@pytest.mark.parametrize(("name", "published"), [("dpm2s", _dpm2s), ("dpm3s", _dpm3s), ("dpmpp2s", _dpmpp2s)])
@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
def test_single_step_methods_are_the_published_ones(field, name, published, encoding):
    nodes = [8.0, 3.0, 1.0, 0.4, 0.05]
    nodes = nodes[::-1] if encoding else nodes
    got = integrate(field, X, nodes, name).x
    x = X * _vp(nodes[0])[0]
    for s, t in pairwise(nodes):
        x = published(field, x, s, t)
    close(got, x)


@pytest.mark.parametrize("name", ["dpm2s", "dpm3s", "dpmpp2s"])
def test_steps_at_zero_are_eq_13_and_calls_are_as_said(name):
    solver = get(name)
    for steps in (1, 2, 5):
        grid = Grid.make("quadratic", LINEAR, steps)
        spy = Recorder(lambda x, s: 0.3 * x / (1.0 + s))
        run = sample(EpsilonField.from_sigma(spy, LINEAR), X, grid=grid, solver=solver)
        assert run.nfe == solver.nfe(steps) == len(spy.sigmas)
        assert spy.sigmas == solver.stages(grid).tolist()
    last = float(grid.sigmas[-2])
    before = integrate(EpsilonField.from_sigma(spy, LINEAR), run.grid.sigmas[0] * X, grid.sigmas[:-1], solver).x_bar
    wanted = before - last * (0.3 * before / (1.0 + last))
    start = run.grid.sigmas[0] * X
    close(integrate(EpsilonField.from_sigma(spy, LINEAR), start, grid, solver).x_bar, wanted)
    back = encode(EpsilonField.from_sigma(spy, LINEAR), X, grid=grid, solver=solver, data_range=None)
    assert back.success
    assert back.nfe == solver.calls(grid.reversed())
    assert solver.steps(solver.nfe(5)) == 5


def test_the_exponential_part_is_exact_where_it_says():
    """A field of constant x̂₀ for DATA, of constant ε for NOISE, on one long step."""
    target = noise((2, 3), 4, seed=6)
    still = EpsilonField.from_sigma(lambda x, s: (x - target) / s, LINEAR)
    close(integrate(still, X, [3.0, 0.5], "dpmpp2s").x_bar, target + (X - target) * 0.5 / 3.0)
    constant = EpsilonField.from_sigma(lambda x, s: target.clone(), LINEAR)
    for name in ("dpm2s", "dpm3s"):
        close(integrate(constant, X, [3.0, 0.5], name).x_bar, X - 2.5 * target)


@pytest.mark.parametrize("clock", ["sigma", "arctan", "t"])
def test_leaving_zero_by_a_singular_part_is_eq_13(clock):
    """In a clock that is finite there too: x̄(1) = x̄(0) + 1 where ε = 1."""
    own = SingleStep("own", 2, [0.0, 0.5], ([0], [1]), DATA, clock)
    run = integrate(EpsilonField.from_sigma(lambda x, s: torch.ones_like(x), LINEAR), X, [0.0, 1.0, 3.0], own)
    close(run.x_bar, X + 3.0)
    assert run.nfe == own.calls(run.grid) == 3


def test_other_clocks_and_parts_keep_the_order(problems):
    from benchmarks.convergence import errors, measured_order

    own = SingleStep("own", 2, (0.0, 0.6), ((0,), (0, 1)), Flow(0.5), "arctan")
    assert measured_order(errors(problems["mixture"], own)) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("direction", [1, -1], ids=["encoding", "sampling"])
def test_ipndm_has_one_set_of_weights_for_any_grid(direction):
    grid = Grid.explicit(np.array([1.0, 1.3, 1.5, 2.6, 3.0, 4.4, 5.0])[::direction], LINEAR)
    states, _ = response(Ipndm(), grid)
    for n, h in enumerate(np.diff(grid.sigmas)):
        weights = ((states[n + 1] - states[n]) / h)[: n + 1].flip(0)
        wanted = [*ADAMS_BASHFORTH[min(4, n + 1)], 0.0, 0.0][: n + 1]
        assert weights.tolist() == pytest.approx(wanted, abs=1e-12)


def test_ipndm_is_adams_bashforth_on_even_steps(field):
    grid = Grid.explicit(np.linspace(3.0, 0.0, 13), LINEAR)
    for k in (2, 3, 4):
        close(integrate(field, X, grid, Ipndm(k)).x_bar, integrate(field, X, grid, get(f"ab{k}")).x_bar)
    uneven = Grid.make("quadratic", LINEAR, 12)
    apart = integrate(field, X, uneven, "ipndm").x_bar - integrate(field, X, uneven, "ab4").x_bar
    assert float(apart.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Ipndm(5), "k, the evaluations of iPNDM, must be 1, 2, 3 or 4"),
        (lambda: Ipndm(0), "k, the evaluations of iPNDM,"),
        (lambda: Ipndm(2.5), "k, the evaluations of iPNDM,"),
        (lambda: SingleStep("bad", 2, (0.5, 1.0), ((0,), (0, 1))), "c must begin with 0"),
        (lambda: SingleStep("bad", 2, (0.0, 1.5), ((0,), (0, 1))), "stay in"),
        (lambda: SingleStep("bad", 2, (0.0, 0.5), ((0,),)), "a row for each"),
        (lambda: SingleStep("bad", 2, (0.0, 0.5), ((1,), (0,))), "row 0"),
        (lambda: SingleStep("bad", 1, (0.0,), ((0,),), Gaussian(torch.zeros(2), torch.ones(2))), "by direction"),
    ],
)
def test_bad_arguments_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_clock_that_is_not_monotone_is_refused_before_any_call():
    from ddim_ode import Clock

    bad = Clock("wave", np.sin, np.arcsin, lambda s: 1.0 / np.cos(s))
    spy = Recorder(lambda x, s: x)
    for solver in (SingleStep("s", 2, (0.0, 0.5), ((0,), (1,)), DATA, bad),):
        with pytest.raises(ValueError, match="not strictly monotone"):
            integrate(EpsilonField.from_sigma(spy, LINEAR), X, [4.0, 3.0, 2.0, 1.0], solver)
    assert not spy.sigmas
