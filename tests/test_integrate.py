"""The loop: what it promises whatever the solver."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ddim_ode import (
    DATA,
    NOISE,
    Adaptive,
    Clock,
    EpsilonField,
    Gaussian,
    Grid,
    Multistep,
    NoiseSchedule,
    RungeKutta,
    SingleStep,
    Solver,
    Status,
    integrate,
    solvers,
)
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import arctan, asinh, flow
from ddim_ode.solvers.runge_kutta import HEUN, RK4

LINEAR = NoiseSchedule.linear()
EXACT = GaussianEpsilon(torch.zeros(2, 3), torch.full((2, 3), 0.5))
FIELD = EpsilonField.from_sigma(EXACT, LINEAR, shape=(2, 3))
X = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = np.linspace(4.0, 0.5, 9)


class Still(Solver):
    """A stub that adds one to every state: it tests the loop without numerics."""

    name, order, nfe_per_step, source = "still", 1, 1, "a test"

    def init(self, field, x_bar, grid):
        return ()

    def step(self, field, x_bar, n, state):
        field(x_bar, 1.0)
        return x_bar + 1.0, (*state, n), None


def test_the_loop_drives_any_solver_step_by_step():
    run = integrate(FIELD, X, SIGMAS, Still(), trajectory=True)
    torch.testing.assert_close(run.x_bar, X + 8.0)
    assert run.nfe == 8
    assert run.trajectory.shape == (9, 4, 2, 3)
    torch.testing.assert_close(run.trajectory[3], X + 3.0)
    assert run.success
    assert run.sigma == (0.5,) * 4
    torch.testing.assert_close(run.x, (X + 8.0) / np.sqrt(1.25))


@pytest.mark.parametrize("solver", solvers(), ids=lambda s: s.name)
def test_no_solver_changes_its_input(solver):
    before = X.clone()
    seen = []
    run = integrate(FIELD, X, SIGMAS, solver, trajectory=True, callback=lambda step: seen.append(step.x_bar.clone()))
    torch.testing.assert_close(X, before, rtol=0, atol=0)
    # Nor a state it has handed out: as it was then and as it was when all were stacked at the end.
    for kept, state in zip(seen, run.trajectory[1:], strict=True):
        torch.testing.assert_close(kept, state, rtol=0, atol=0)


@pytest.mark.parametrize("solver", solvers(), ids=lambda s: s.name)
def test_a_model_that_returns_its_input_does_no_harm(solver):
    grid = Grid.explicit(SIGMAS, LINEAR)
    mine = integrate(EpsilonField(lambda x, t: x, LINEAR), X, grid, solver).x_bar
    copied = integrate(EpsilonField(lambda x, t: x.clone(), LINEAR), X, grid, solver).x_bar
    torch.testing.assert_close(mine, copied, rtol=0, atol=0)


@pytest.mark.parametrize("linear", [NOISE, DATA, Gaussian(torch.zeros(2, 3), torch.tensor(0.3))], ids=lambda p: p.name)
@pytest.mark.parametrize("quantity", ["noise", "data", "score"])
@pytest.mark.parametrize("clock", ["sigma", "t", "log", "variance", "arctan", "asinh"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_member_reaches_and_leaves_sigma_zero(linear, quantity, clock, k):
    """Those whose rest is infinite there are refused; all others are right."""
    member = Multistep(k, clock=clock, linear=linear, quantity=quantity)
    nodes = np.append(np.linspace(2.0, 0.02, 100) ** 2 / 2.0, 0.0)
    if linear is DATA and quantity != "data":
        with pytest.raises(ValueError, match="cannot touch sigma = 0"):
            integrate(FIELD, X, nodes, member)
        assert integrate(FIELD, X, nodes[:-1], member).success
        return
    down = integrate(FIELD, X, nodes, member)
    up = integrate(FIELD, X, nodes[::-1], member)
    torch.testing.assert_close(down.x_bar, EXACT.solution(X, 2.0, 0.0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(up.x_bar, EXACT.solution(X, 0.0, 2.0), rtol=0.05, atol=0.02)


def test_a_dtype_that_cannot_hold_the_states_is_refused():
    cosine = NoiseSchedule.cosine()
    field = EpsilonField(lambda x, t: x, cosine)
    with pytest.raises(ValueError, match="cannot hold states at sigma = "):
        integrate(field, X, [cosine.sigma_max, 0.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"x_bar, as torch.float16, must be finite"):
        integrate(field, 1e6 * X, [1.0, 0.0], dtype=torch.float16)


@pytest.mark.parametrize("high", [3.0, 1.7])
def test_a_clock_that_turns_back_is_refused(high):
    """Whatever uses it, and where only the last of the run lies beyond the turn."""
    back = Clock("back", np.sin, np.arcsin, lambda s: 1.0 / np.cos(s))
    methods = [RungeKutta(RK4, back), Adaptive(clock=back), Multistep(2, clock=back)]
    methods.append(SingleStep("s", 2, (0.0, 0.5), ((0,), (1,)), clock=back))
    calls = FIELD.nfe
    for method in methods:
        with pytest.raises(ValueError, match="clock 'back' must rise strictly over the run, from sigma = 0"):
            integrate(FIELD, X, [high, 0.0], method)
    assert FIELD.nfe == calls
    for method in methods:
        assert integrate(FIELD, X, [1.5, 0.0], method).success


@pytest.mark.parametrize("low", [0.0, 100.0, 149.9999999])
def test_clocks_that_rise_are_not_refused(low):
    """On long ranges and on ones that hardly resolve a tick."""
    sqrt = Clock("sqrt", np.sqrt, np.square, lambda s: 2.0 * np.sqrt(s))
    for u in (arctan(0.01), asinh(1e-3), flow(0.01), sqrt, Clock("cube", lambda s: s**3, np.cbrt, lambda s: s**-2 / 3)):
        for method in (RungeKutta(HEUN, u), Multistep(2, clock=u), *([Adaptive(clock=u)] if low else [])):
            assert integrate(FIELD, X, [150.0, low], method).success


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"sigma": lambda u: np.exp(u) * 1.01}, r"sigma\(u\(σ\)\) is 1.01"),
        ({"slope": lambda s: 2.0 * s}, "slope.* is 2 times"),
    ],
)
def test_a_clock_that_contradicts_itself_is_refused(part, says):
    good = {"u": np.log, "sigma": np.exp, "slope": lambda s: s}
    right, wrong = Clock("mine", **good), Clock("mine", **(good | part))
    nodes, calls = [4.0, 2.0, 1.0], FIELD.nfe
    methods = [lambda u: RungeKutta(HEUN, u), lambda u: Adaptive(clock=u)]
    if "sigma" in part:
        methods.append(lambda u: SingleStep("s", 2, (0.0, 0.5), ((0,), (1,)), clock=u))
    for method in methods:
        with pytest.raises(ValueError, match=says):
            integrate(FIELD, X, nodes, method(wrong))
    assert FIELD.nfe == calls
    for method in methods:
        assert integrate(FIELD, X, nodes, method(right)).success


def test_callbacks_see_every_step():
    steps = []
    integrate(FIELD, X, SIGMAS, "heun", callback=steps.append)
    assert [step.index for step in steps] == list(range(8))
    assert [(step.sigma, step.sigma_next) for step in steps] == list(pairwise(SIGMAS))
    assert [step.nfe for step in steps] == list(range(2, 18, 2))


def test_calls_are_those_of_the_run_alone():
    def other(step):
        integrate(FIELD, X, SIGMAS, "rk4")
        FIELD.nfe = 0

    assert integrate(FIELD, X, SIGMAS, "heun", callback=other).nfe == 16


def test_the_states_dtype_is_kept_or_chosen():
    assert integrate(FIELD, X.float(), SIGMAS, "ab3").x_bar.dtype == torch.float32
    assert integrate(FIELD, X.float(), SIGMAS, "ab3", dtype=torch.float64).x_bar.dtype == torch.float64


@pytest.mark.parametrize("solver", ["ddim", "ab3", "ab3-rk", "dpmpp2m", "heun"])
@pytest.mark.parametrize("when", [3.2, 1.0])
def test_a_failing_sample_stops_alone_at_its_last_finite_state(solver, when):
    def eps(x_bar, sigma):
        out = EXACT(x_bar, sigma)
        bad = (x_bar[:, 1, 1] > 100.0) & (sigma < when)
        return torch.where(bad[:, None, None], torch.nan, out)

    start = X.clone()
    start[2, 1, 1] = 1000.0  # marks the sample that will fail
    field = EpsilonField.from_sigma(eps, LINEAR)
    run = integrate(field, start, SIGMAS, solver)
    assert run.status == (Status.SUCCESS, Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    assert not run.success
    assert bool(run.x_bar.isfinite().all())
    assert run.sigma[2] in SIGMAS
    whole = integrate(FIELD, start, SIGMAS, solver, trajectory=True)
    for i in (0, 1, 3):
        torch.testing.assert_close(run.x_bar[i], whole.x_bar[i], rtol=0, atol=0)
    # The state it holds is the one it had at the σ it names.
    at = SIGMAS.tolist().index(run.sigma[2])
    torch.testing.assert_close(run.x_bar[2], whole.trajectory[at, 2], rtol=1e-12, atol=0)
    assert run.nfe == whole.nfe
    torch.testing.assert_close(run.x[2] * np.sqrt(1 + run.sigma[2] ** 2), run.x_bar[2])


def test_a_sample_that_fails_at_once_keeps_its_start():
    field = EpsilonField.from_sigma(lambda x_bar, sigma: x_bar * torch.inf, LINEAR)
    run = integrate(field, X, SIGMAS)
    assert set(run.status) == {Status.NONFINITE}
    torch.testing.assert_close(run.x_bar, X)
    assert run.sigma == (4.0,) * 4


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x_bar": X.numpy()}, TypeError, "x_bar must be a torch tensor"),
        ({"x_bar": (X * 10).long()}, TypeError, "x_bar must hold floats.*int64"),
        ({"x_bar": X[:, :1]}, ValueError, r"x_bar must have shape \(B, 2, 3\)"),
        ({"x_bar": torch.zeros(0, 2, 3)}, ValueError, "B >= 1"),
        ({"x_bar": torch.full((3, 2, 3), torch.nan)}, ValueError, "x_bar must be finite, but samples 0, 1, 2"),
        ({"sigmas": [1.0, 2.0, 1.5]}, ValueError, "strictly rise or strictly fall"),
        ({"sigmas": [1e9, 1.0]}, ValueError, "sigma_max"),
        ({"solver": "abb3"}, ValueError, "unknown solver 'abb3': did you mean ab3"),
        ({"solver": 3}, TypeError, "name or a Solver"),
        ({"sigmas": "karras"}, TypeError, r"a rule's grid is Grid.make"),
    ],
)
def test_bad_input_is_refused_before_any_call(change, error, says):
    calls = FIELD.nfe
    with pytest.raises(error, match=says):
        integrate(FIELD, **({"x_bar": X, "sigmas": SIGMAS, "solver": "ddim"} | change))
    assert FIELD.nfe == calls


def test_another_device_is_refused():
    network = torch.nn.Linear(3, 3)
    field = EpsilonField(network, LINEAR)
    with pytest.raises(ValueError, match=r"x_bar is on meta, but the model is on cpu.*\.to"):
        integrate(field, torch.zeros(1, 2, 3, device="meta"), SIGMAS)


def test_the_result_is_never_the_callers_own_tensor():
    assert integrate(FIELD, X, [0.0, 1.0], "pf-euler").x_bar is not X


def test_integer_dtypes_and_foreign_grids_are_refused():
    with pytest.raises(TypeError, match="floating dtype"):
        integrate(FIELD, X, SIGMAS, dtype=torch.int32)
    with pytest.raises(ValueError, match="the grid was made for"):
        integrate(FIELD, X, Grid.make("t", NoiseSchedule.cosine(), 5))


def test_a_gaussian_part_that_does_not_fit_is_refused_before_any_call():
    calls = FIELD.nfe
    for part in (Gaussian(torch.zeros(3), torch.ones(3)), Gaussian(torch.zeros(()), torch.ones(5), torch.eye(5))):
        with pytest.raises(ValueError, match="Gaussian part must fit"):
            integrate(FIELD, X, SIGMAS, Multistep(2, linear=part))
    assert FIELD.nfe == calls


def test_sigmas_may_be_tensors_of_float32():
    sigmas = torch.tensor([LINEAR.sigma_max, 1.0, 0.0], dtype=torch.float32, requires_grad=True)
    assert integrate(FIELD, X, sigmas).grid.sigmas[0] == LINEAR.sigma_max


def test_a_wrong_shape_from_the_model_is_said():
    field = EpsilonField(lambda x, t: x[:1], LINEAR)
    with pytest.raises(ValueError, match="must return what it was given"):
        integrate(field, X, SIGMAS)


# -- callbacks that stop ------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["ddim", "ab3-rk", "dpmpp2m", "heun"])
def test_a_callback_may_stop_the_run(solver):
    seen = []

    def enough(step):
        seen.append(step)
        return step.sigma_next < 2.0

    run = integrate(FIELD, X, SIGMAS, solver, callback=enough, trajectory=True)
    whole = integrate(FIELD, X, SIGMAS, solver, trajectory=True)
    assert len(seen) == 5  # 4.0, 3.5625, 3.125, 2.6875, 2.25, 1.8125
    assert run.status == (Status.STOPPED,) * 4
    assert not run.success
    assert run.sigma == (SIGMAS[5],) * 4
    assert run.nfe == seen[-1].nfe < whole.nfe
    assert torch.equal(run.trajectory, whole.trajectory[:6])
    assert torch.equal(run.x_bar, whole.trajectory[5])
    torch.testing.assert_close(run.x, run.x_bar / np.sqrt(1.0 + SIGMAS[5] ** 2))
    assert run.grid == whole.grid


def test_to_stop_at_the_last_step_is_to_end_well():
    run = integrate(FIELD, X, SIGMAS, callback=lambda step: step.index == 7)
    assert run.success
    assert run.sigma == (0.5,) * 4
    assert torch.equal(run.x_bar, integrate(FIELD, X, SIGMAS).x_bar)


@pytest.mark.parametrize("yes", [True, np.True_, np.float64(1.0) > 0, torch.tensor(True), torch.ones(1) > 0])
def test_every_kind_of_true_stops(yes):
    assert integrate(FIELD, X, SIGMAS, callback=lambda step: yes).sigma == (SIGMAS[1],) * 4


@pytest.mark.parametrize(
    "no", [None, False, np.False_, torch.tensor(False), 0, 1, 1.0, "stop", [True], torch.ones(()), {}]
)
def test_nothing_else_does(no):
    """Callbacks are often lambdas that hand on what some other function returns: a length, a list, a tensor."""
    assert integrate(FIELD, X, SIGMAS, callback=lambda step: no).success


def test_an_answer_for_each_sample_is_refused():
    with pytest.raises(ValueError, match=r"answer for the whole batch.*shape \(4,\).*\.all\(\)"):
        integrate(FIELD, X, SIGMAS, callback=lambda step: step.x_bar.flatten(1).std(dim=1) < 1.0)


def test_a_callback_that_raises_ends_the_run_with_its_own_error():
    class Enough(Exception):
        pass

    def raises(step):
        raise Enough

    with pytest.raises(Enough):
        integrate(FIELD, X, SIGMAS, callback=raises, gradients=True)
    assert torch.is_grad_enabled()


def test_a_sample_may_fail_in_a_run_that_is_stopped():
    def eps(x_bar, sigma):
        bad = (x_bar[:, 1, 1] > 100.0) & (sigma < 3.2)
        return torch.where(bad[:, None, None], torch.nan, EXACT(x_bar, sigma))

    start = X.clone()
    start[1, 1, 1] = 1000.0
    run = integrate(EpsilonField.from_sigma(eps, LINEAR), start, SIGMAS, callback=lambda step: step.index == 4)
    assert run.status == (Status.STOPPED, Status.NONFINITE, Status.STOPPED, Status.STOPPED)
    assert run.sigma == (SIGMAS[5], SIGMAS[2], SIGMAS[5], SIGMAS[5])
    assert bool(run.x_bar.isfinite().all())
