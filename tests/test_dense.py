r"""Dense output: x̄ between the nodes of a run, as good as at them, for nothing.

Orders are measured as in ``test_order.py``, on its problems and grids, but at levels between the nodes all along the
run: the root mean square over 48 levels, since the error at one level depends on where in its step it falls.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ddim_ode
from benchmarks.convergence import (
    BETWEEN,
    DIRECTIONS,
    GRIDS,
    HIGH,
    LOW,
    STEPS_TO_ZERO,
    along,
    cases,
    dense_errors,
    expected_order,
    measured_order,
    sigma_grid,
)
from ddim_ode import EpsilonField, Grid, NoiseSchedule, Solver, Status, integrate, solvers
from ddim_ode.dense import Dense

LINEAR = NoiseSchedule.linear()
FROM_ZERO = HIGH * np.sort(np.arange(1.0, 49.0) * 0.6180339887498949 % 1.0)
CASES = {name: s for name, s in cases().items() if s.budgeted}
NAMES = [name for name in CASES if name in {s.name for s in solvers()} or name.endswith("-rk")]


@pytest.fixture(scope="session")
def truth(problems):
    return {name: along(problem, BETWEEN) for name, problem in problems.items()}


@pytest.fixture(scope="session")
def truth_from_zero(problems):
    return along(problems["mixture"], FROM_ZERO, 0.0)


# The problem with a formula on all grids, and the other on the grid that is hardest to interpolate on.
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("grid", "problem"), [*((grid, "gaussian") for grid in GRIDS), ("jittered", "mixture")])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_between_nodes_is_the_solvers(problems, truth, name, grid, direction, problem):
    solver = CASES[name]
    found = dense_errors(problems[problem], solver, grid, direction, BETWEEN, truth[problem])
    between, at_the_end = map(measured_order, found)
    expected = expected_order(solver, problem, grid)
    assert between > expected - 0.2
    # A stated order may be a lower bound that this grid exceeds, or not be reached yet; then it is so in between.
    assert between < expected + 0.2 or at_the_end > expected + 0.1


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["ddim", "pf-euler", "ab3-rk", "deisx2", "deisx4-rk", "rk4"])
def test_the_order_holds_down_to_sigma_zero(problems, truth_from_zero, name, direction):
    """For the solvers whose own order does: test_order.py, with its margin."""
    problem, solver = problems["mixture"], CASES[name]
    found = dense_errors(problem, solver, "quadratic", direction, FROM_ZERO, truth_from_zero, STEPS_TO_ZERO, 0.0)
    assert measured_order(found[0]) > solver.order - 0.45


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_straight_line_between_nodes_would_show(problems, truth, direction, monkeypatch):
    """The measurement can fail: without the slopes dense output is of order 2 whatever the solver."""
    window = Dense._window
    monkeypatch.setattr(Dense, "_window", lambda self, sigma: _nearest(window(self, sigma), self.sigmas, sigma))
    monkeypatch.setattr(Dense, "_weights", _straight)
    found = dense_errors(problems["gaussian"], "rk4", "uniform", direction, BETWEEN, truth["gaussian"])
    assert measured_order(found[0]) == pytest.approx(2.0, abs=0.2)


def _nearest(chosen, sigmas, sigma):
    before = next(i for i in chosen[:-1] if (sigmas[i] - sigma) * (sigmas[i + 1] - sigma) < 0.0)
    return [before, before + 1]


def _straight(self, sigma, chosen):
    a, b = self.sigmas[chosen]
    return [((sigma - b) / (a - b), None), ((sigma - a) / (b - a), None)]


# -- exactness ----------------------------------------------------------------------------------
class Exactly(Solver):
    """A stub whose states are those of a given polynomial, so that what is left is the interpolation."""

    name, order, nfe_per_step, source = "exactly", 1, 1, "a test"

    def __init__(self, polynomial, order=1):
        self.polynomial, self.order = polynomial, order

    def init(self, field, x_bar, grid):
        return grid.sigmas.tolist()

    def step(self, field, x_bar, n, state):
        field(x_bar, state[n])
        return torch.full_like(x_bar, self.polynomial(state[n + 1])), state, None


def exact_run(polynomial, nodes, order=1):
    field = EpsilonField.from_sigma(lambda x, s: torch.full_like(x, polynomial.deriv()(s)), LINEAR)
    start = torch.full((2, 3), polynomial(nodes[0]), dtype=torch.float64)
    return integrate(field, start, nodes, Exactly(polynomial, order), dense=True)


@pytest.mark.parametrize("nodes", [[3.0, 2.2, 1.9, 0.7, 0.0], [0.0, 0.7, 1.9, 2.2, 3.0], [3.0, 0.1, 0.05]])
def test_cubics_are_reproduced(nodes):
    """To rounding, in every piece, the last with its missing slope too."""
    polynomial = np.polynomial.Polynomial([0.3, -1.0, 0.7, 0.4])
    run = exact_run(polynomial, nodes)
    for sigma in np.linspace(min(nodes), max(nodes), 41):
        expected = torch.full((2, 3), polynomial(sigma), dtype=torch.float64)
        torch.testing.assert_close(run.out(sigma), expected, rtol=0, atol=2e-14)


@pytest.mark.parametrize(("steps", "degree"), [(1, 2), (2, 4), (3, 4)])
def test_short_runs_use_what_there_is(steps, degree):
    """One step has two states and one slope, hence a parabola; two have five conditions; and no run fails."""
    nodes = np.linspace(2.0, 0.5, steps + 1)
    right = np.polynomial.Polynomial([0.3, *[0.5] * degree])
    wrong = np.polynomial.Polynomial([*right.coef, 1.0])
    sigma = float(nodes[-1]) + 0.1  # the last piece
    torch.testing.assert_close(
        exact_run(right, nodes, order=4).out(sigma),
        torch.full((2, 3), right(sigma), dtype=torch.float64),
        rtol=0,
        atol=1e-13,
    )
    assert float((exact_run(wrong, nodes, order=4).out(sigma) - wrong(sigma)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_nodes_are_met_exactly(problems, name):
    problem = problems["gaussian"]
    field = EpsilonField.from_sigma(problem.eps, LINEAR)
    run = integrate(
        field, problem.high, sigma_grid("jittered", 9, "sampling"), CASES[name], dense=True, trajectory=True
    )
    for sigma, state in zip(run.grid.sigmas, run.trajectory, strict=True):
        assert torch.equal(run.out(sigma), state)
        assert run.out(sigma).data_ptr() != state.data_ptr()
    torch.testing.assert_close(run.out(LOW), run.x_bar, rtol=0, atol=0)
    # And it is continuous: a hair off a node is a hair off its state.
    for sigma, state in zip(run.grid.sigmas[1:-1], run.trajectory[1:-1], strict=True):
        for near in (sigma * (1 - 1e-9), sigma * (1 + 1e-9)):
            torch.testing.assert_close(run.out(near), state, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_runs_of_a_few_steps(problems, name, steps):
    """Between σ = 0 and one level, both ways: finite, and no further off than an interpolation of a few steps can be."""
    problem = problems["gaussian"]
    field = EpsilonField.from_sigma(problem.eps, LINEAR)
    for direction, start in (("sampling", problem.high_from_zero), ("encoding", problem.low)):
        run = integrate(field, start, sigma_grid("uniform", steps, direction, 0.0), CASES[name], dense=True)
        for sigma in (0.05, 0.4, 1.3):
            exact = problem.eps.solution(problem.low, 0.0, sigma)
            worst = max(float((x - e).abs().max()) for x, e in _ends(run, problem))
            assert float((run.out(sigma) - exact).abs().max()) < 2.0 * worst + 0.35 / steps


def _ends(run, problem):
    return [(run.out(s), problem.eps.solution(problem.low, 0.0, s)) for s in run.grid.sigmas.tolist()]


# -- what it promises ---------------------------------------------------------------------------
def counted(shape=(2, 3)):
    return EpsilonField(lambda x, t: torch.sin(x), LINEAR, shape=shape)


X = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = np.linspace(4.0, 0.5, 9)


@pytest.mark.parametrize("name", NAMES)
def test_no_model_call_and_no_other_result(name):
    field = counted()
    plain = integrate(field, X, SIGMAS, CASES[name])
    calls, field.nfe = field.nfe, 0
    run = integrate(field, X, SIGMAS, CASES[name], dense=True, save_at=[3.1, 0.6])
    assert (field.nfe, run.nfe) == (calls, plain.nfe)
    assert torch.equal(run.x_bar, plain.x_bar)
    run.out(1.234)
    assert field.nfe == calls
    assert torch.equal(run.saved[0], run.out(3.1))


def test_slopes_are_those_that_the_solver_had():
    """Each ε at a node is the one it was stepped with: nothing is asked twice, and the last is not known."""
    asked = []

    def eps(x, sigma):
        asked.append((sigma, torch.sin(x) + sigma))
        return asked[-1][1]

    for name in ("ddim", "heun", "rk4", "ab4-rk", "dpmpp3m"):
        asked.clear()
        run = integrate(EpsilonField.from_sigma(eps, LINEAR), X, SIGMAS, name, dense=True)
        at_nodes = {}
        for sigma, slope in asked:
            at_nodes.setdefault(sigma, slope)  # a stage at the step's end asks at the next node too, but in a guess
        for sigma, state, slope in zip(SIGMAS, run.dense[0].x_bar, run.dense[0].slopes, strict=True):
            if sigma == SIGMAS[-1]:
                assert slope is None
            else:
                torch.testing.assert_close(slope, torch.sin(state) + sigma, rtol=0, atol=0)


def test_a_solver_that_stays_has_no_slope_there():
    run = integrate(counted(), X, [0.0, 1.0, 2.0, 3.0], "pf-euler", dense=True)
    assert [slope is None for slope in run.dense[0].slopes] == [True, False, False, True]
    assert bool(run.out(0.3).isfinite().all())


def test_float32_states_stay_float32():
    exact = integrate(counted(), X, SIGMAS, "rk4", dense=True)
    run = integrate(counted(), X.float(), SIGMAS, "rk4", dense=True, save_at=[1.7])
    assert run.out(1.7).dtype == run.saved.dtype == torch.float32
    torch.testing.assert_close(run.out(1.7).double(), exact.out(1.7), rtol=0, atol=5e-6)


def test_batches_are_read_as_one():
    latent = ddim_ode.noise((2, 3), 5, 0)
    options = {"steps": 6, "solver": "ab3", "dense": True, "save_at": [30.0, 0.7]}
    whole, parts = (ddim_ode.sample(counted(), latent, batch_size=size, **options) for size in (None, 2))
    assert (len(whole.dense), len(parts.dense)) == (1, 3)
    torch.testing.assert_close(parts.out(3.3), whole.out(3.3), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.saved, whole.saved, rtol=1e-13, atol=1e-13)
    assert parts.saved.shape == (2, 5, 2, 3)


def test_a_stopped_run_covers_what_it_visited():
    run = integrate(counted(), X, SIGMAS, "ab2", dense=True, save_at=[3.9, 0.9], callback=lambda step: step.index == 3)
    assert run.dense[0].range == (SIGMAS[4], SIGMAS[0])
    whole = integrate(counted(), X, SIGMAS, "ab2", dense=True)
    assert torch.equal(run.out(3.9), whole.out(3.9))
    assert torch.equal(run.out(SIGMAS[4]), run.x_bar)
    # Further on, but within the run that was asked for, it knows nothing; the last known piece lacks its last slope.
    assert bool(run.out(0.9).isnan().all())
    assert torch.equal(run.saved[0], run.out(3.9))
    assert bool(run.saved[1].isnan().all())
    torch.testing.assert_close(run.out(2.3), whole.out(2.3), rtol=0, atol=1e-2)


def test_a_failed_sample_is_nan_for_itself_alone():
    def eps(x, sigma):
        bad = (x[:, :1, :1] > 100.0) & (sigma < 2.0)
        return torch.where(bad, torch.nan, torch.sin(x))

    start = X.clone()
    start[2, 0, 0] = 1000.0
    field = EpsilonField.from_sigma(eps, LINEAR)
    run = integrate(field, start, SIGMAS, "heun", dense=True, save_at=[3.3, 0.7])
    assert [bool(s) for s in run.status] == [False, False, True, False]
    others = [0, 1, 3]
    whole = integrate(field, start[others], SIGMAS, "heun", dense=True)
    for sigma in (3.3, 1.9, 0.7, 0.5):
        torch.testing.assert_close(run.out(sigma)[others], whole.out(sigma), rtol=1e-13, atol=1e-13)
    assert bool(run.out(3.3)[2].isfinite().all())  # before it failed
    assert bool(run.out(0.7)[2].isnan().any())
    assert bool(run.saved[1][others].isfinite().all())


@pytest.mark.parametrize("sigma", [0.49, 4.01, -0.5, np.nan, np.inf])
def test_levels_outside_are_refused(sigma):
    run = integrate(counted(), X, SIGMAS, dense=True)
    with pytest.raises(ValueError, match=r"sigma must lie in the run, 0.5 to 4, but got"):
        run.out(sigma)
    with pytest.raises(ValueError, match=r"lies outside the run, which covers 0.5 to 4"):
        run.dense[0](sigma)


def test_a_run_that_kept_nothing_says_so():
    with pytest.raises(ValueError, match="ask for it, dense=True"):
        integrate(counted(), X, SIGMAS).out(1.0)
    # Nor does save_at alone keep what it needed.
    with pytest.raises(ValueError, match="ask for it, dense=True"):
        integrate(counted(), X, SIGMAS, save_at=[1.0]).out(1.0)


# -- save_at ------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_levels_come_in_the_order_they_were_asked_for(direction):
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double() - 0.5
    field, run_it = counted((1, 4, 4)), getattr(ddim_ode, direction)
    start = images if direction == "encode" else ddim_ode.noise((1, 4, 4), 3, 0)
    ends = [0.0, LINEAR.sigma_max]
    levels = [1.0, ends[1], 0.01, ends[0], 1.0, 50.0]
    run = run_it(field, start, nfe=9, save_at=levels, dense=True)
    for level, saved in zip(levels, run.saved, strict=True):
        assert torch.equal(saved, run.out(level))
    assert torch.equal(run.saved[3 if direction == "sample" else 1], run.x_bar)
    for same in (tuple(levels), np.array(levels), torch.tensor(levels, dtype=torch.float64, requires_grad=True)):
        assert torch.equal(run_it(field, start, nfe=9, save_at=same).saved, run.saved)


def test_levels_in_float32_may_be_the_ends():
    levels = torch.tensor([LINEAR.sigma_max, 0.1, 0.0])
    high = torch.tensor([0.1], dtype=torch.float32)  # above 0.1 in float64
    assert float(levels[0]) != LINEAR.sigma_max
    assert float(high) > 0.1
    run = ddim_ode.sample(counted(), n=1, nfe=4, save_at=levels)
    assert torch.equal(run.saved[2], run.x_bar)
    part = integrate(counted(), X, [0.1, 0.05], save_at=high, dense=True)
    assert torch.equal(part.saved[0], X)
    assert torch.equal(part.out(float(high)), X)
    assert ddim_ode.sample(counted(), n=1, nfe=4, save_at=torch.tensor([1.0], dtype=torch.bfloat16)).saved is not None


@pytest.mark.parametrize(
    "save_at", [[], [1.0, 5.0], [-1e-3], [np.nan], 1.0, [[1.0]], ["one"], "1", [None], [1j], [[1.0], [2.0, 3.0]]]
)
def test_levels_that_cannot_be_are_refused_before_any_call(save_at):
    field = counted()
    with pytest.raises(ValueError, match=r"save_at must be sigmas in the run, 0 to 4, but got"):
        integrate(field, X, [4.0, 1.0, 0.0], save_at=save_at)
    with pytest.raises(ValueError, match="save_at must be sigmas"):
        ddim_ode.sample(field, n=5, nfe=4, batch_size=2, save_at=[1000.0])
    assert field.nfe == 0


def test_nothing_is_kept_unless_asked_for():
    run = ddim_ode.sample(counted(), n=2, nfe=4)
    assert (run.dense, run.saved, run.trajectory) == ((), None, None)
    assert Status.STOPPED not in run.status
    grid = Grid.make("quadratic", LINEAR, 4)
    kept = ddim_ode.sample(counted(), n=2, grid=grid, solver="ddim", dense=True)
    assert kept.trajectory is None
    assert kept.dense[0].x_bar.shape == (5, 2, 2, 3)
