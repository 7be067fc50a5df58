"""Adaptive pairs: tolerances kept, samples on their own, and every way a run can end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.convergence import by_dop853
from ddim_ode import (
    Adaptive,
    Clock,
    EpsilonField,
    Grid,
    NoiseSchedule,
    Status,
    Tableau,
    encode,
    integrate,
    noise,
    sample,
)
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import asinh, get
from ddim_ode.solvers.runge_kutta import BS32, DOP853, DOPRI5, HEUN

LINEAR = NoiseSchedule.linear()
TOP = LINEAR.sigma_max
PAIRS = [BS32, DOPRI5, DOP853]
EXACT = GaussianEpsilon(torch.zeros(2, 3), torch.full((2, 3), 0.5))
FIELD = EpsilonField.from_sigma(EXACT, LINEAR, shape=(2, 3))
X = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixture(problems):
    """A field, data, and the states they lead to at σ_T."""
    eps, low = problems["mixture"].eps, problems["mixture"].low
    return EpsilonField.from_sigma(eps, LINEAR, shape=(3,)), low, by_dop853(eps, low, 0.0, TOP)


# -- errors -------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", [False, True], ids=["sampling", "encoding"])
@pytest.mark.parametrize(
    ("tableau", "tolerances"),
    [(BS32, (1e-3, 1e-5, 1e-7)), (DOPRI5, (1e-3, 1e-6, 1e-10)), (DOP853, (1e-3, 1e-6, 1e-10))],
    ids=["bs32", "dopri5", "dop853"],
)
def test_the_error_follows_the_tolerance(mixture, tableau, tolerances, encoding):
    """In data units, within a factor of 100 of it, on the whole range of σ."""
    field, low, high = mixture
    start, end, nodes = (low, high, [0.0, TOP]) if encoding else (high, low, [TOP, 0.0])
    found = []
    for tolerance in tolerances:
        run = integrate(field, start, nodes, Adaptive(tableau, tolerance, tolerance))
        assert run.success
        root = np.sqrt(1.0 + nodes[-1] ** 2)
        found.append(float((run.x_bar - end).square().mean(dim=1).sqrt().max()) / root)
        assert found[-1] < 100.0 * tolerance
    # From one to the next it falls by about as much.
    slopes = np.diff(np.log(found)) / np.diff(np.log(tolerances))
    assert np.all((slopes > 0.6) & (slopes < 1.5))


def test_a_higher_order_needs_fewer_calls_for_a_small_error(mixture):
    field, _, high = mixture
    calls = [integrate(field, high, [TOP, 0.0], Adaptive(pair, 1e-8, 1e-8)).nfe for pair in PAIRS]
    assert calls[0] > 3 * calls[1]
    assert calls[1] > 1.5 * calls[2]


@pytest.mark.parametrize("relative", [False, True], ids=["atol", "rtol"])
def test_the_tolerance_is_in_data_units(relative):
    """One step far up, where x̄ is large: accepted just above the error in x that it is seen to make, not just below."""
    heun_euler = Tableau("heun-euler", 2, ((), (1.0,)), (0.5, 0.5), error=((-0.5, 0.5, 0.0),), embedded_orders=(1,))
    start, low, high = 100.0 * X[:1], 100.0, 110.0
    eps = lambda x, s: torch.sin(x / 40.0)
    first = eps(start, low)
    second = eps(start + 10.0 * first, high)
    roots = [np.sqrt(1.0 + s * s) for s in (low, high)]
    error = 0.5 * 10.0 * (second - first) / roots[1]
    if relative:
        error /= torch.maximum(start.abs() / roots[0], (start + 5.0 * (first + second)).abs() / roots[1])
    wanted = float(error.square().mean().sqrt())
    for factor, rejected in ((1.01, False), (0.99, True)):
        tolerances = (factor * wanted, 1e-15) if relative else (1e-15, factor * wanted)
        solver = Adaptive(heun_euler, *tolerances, clock="sigma", first_step=10.0)
        outcome = integrate(EpsilonField.from_sigma(eps, LINEAR), start, [low, high], solver).outcome
        assert (outcome.rejected[0] > 0) is rejected
        assert (outcome.accepted[0] > 1) is rejected


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_dense_output_is_as_good_as_the_steps(mixture, tableau):
    field, low, high = mixture
    levels = [0.02, 0.3, 1.0, 3.0, 20.0, 90.0]
    run = integrate(field, high, [TOP, 0.0], Adaptive(tableau, 1e-6, 1e-6), dense=True, save_at=levels)
    state, sigma = low, 0.0
    for level, saved in zip(levels, run.saved, strict=True):
        state, sigma = by_dop853(field.model, state, sigma, level), level
        assert float((saved - state).square().mean().sqrt()) < 1e-4 * np.sqrt(1.0 + level**2)
        torch.testing.assert_close(run.out(level), saved, rtol=0, atol=0)


@pytest.mark.parametrize(("tableau", "order"), [(BS32, 3), (DOPRI5, 5), (DOP853, 7)], ids=["bs32", "dopri5", "dop853"])
def test_order_of_dense_output(problems, tableau, order):
    """Steps of one length, forced by nodes; read off between them. DOP853's own states inside a step are of order 7."""
    problem = problems["steep"]
    field = EpsilonField.from_sigma(problem.eps, LINEAR)
    exact = lambda s: torch.exp(6.0 * torch.sin(3.0 * s + torch.arange(32.0).double() * (2.0 * np.pi / 32)))[:, None]
    found = []
    for steps in (96, 192) if order < 7 else (12, 24):
        nodes = np.linspace(0.6, 1.5, steps + 1)
        solver = Adaptive(tableau, 1e4, 1e4, first_step=1.0, clock="sigma")  # every step is accepted
        run = integrate(field, problem.low, nodes, solver, dense=True)
        assert set(run.outcome.accepted) == {steps}
        levels = nodes[3:-4] + 0.37 * (nodes[1] - nodes[0])
        found.append(float(torch.stack([(run.out(s) - exact(s)).square().mean().sqrt() for s in levels]).max()))
    assert np.log2(found[0] / found[1]) > order - 0.4


# -- steps --------------------------------------------------------------------------------------
@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_it_lands_on_every_node(mixture, tableau):
    field, _, high = mixture
    nodes = [TOP, 30.0, 29.999, 1.0, 0.1 + 0.2, 0.0]
    seen = []
    run = integrate(
        field, high, nodes, Adaptive(tableau, 1e-7, 1e-7), trajectory=True, callback=lambda step: seen.append(step)
    )
    assert run.sigma == (0.0,) * 3
    assert [s.sigma_next for s in seen] == nodes[1:]
    whole = integrate(field, high, [TOP, 0.0], Adaptive(DOP853, 1e-10, 1e-10))
    torch.testing.assert_close(run.x_bar, whole.x_bar, rtol=0, atol=1e-5)
    # A node in the way costs a step or two, not a new start: the short hop beside 30 does not slow what follows.
    fewer = integrate(field, high, [TOP, 30.0, 1.0, 0.3, 0.0], Adaptive(tableau, 1e-7, 1e-7))
    assert max(run.outcome.accepted) - max(fewer.outcome.accepted) <= 4


def two_fields():
    """An easy sample and a hard one, told apart by the size of their first number."""

    def eps(x_bar, sigma):
        hard = (x_bar[:, :1].abs() > 50.0).to(x_bar.dtype)
        wave = torch.sin(12.0 * sigma * torch.ones_like(x_bar)) * hard
        wave = torch.cat((torch.zeros_like(hard), wave[:, 1:]), dim=1)
        return sigma * x_bar / (0.5 + sigma * sigma) * (1.0 - hard) + wave

    easy, hard = torch.tensor([[1.0, -0.5, 0.3]]).double(), torch.tensor([[100.0, -0.5, 0.3]]).double()
    return EpsilonField.from_sigma(eps, LINEAR), easy, hard


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_a_sample_takes_the_same_steps_alone_and_beside_a_hard_one(tableau):
    field, easy, hard = two_fields()
    solver = Adaptive(tableau, 1e-6, 1e-6)
    alone = [integrate(field, x, [3.0, 0.0], solver) for x in (easy, hard)]
    both = integrate(field, torch.cat((easy, hard)), [3.0, 0.0], solver)
    for name in ("accepted", "rejected", "nfe", "status", "sigma"):
        assert getattr(both.outcome, name) == tuple(getattr(run.outcome, name)[0] for run in alone)
    torch.testing.assert_close(both.x_bar, torch.cat([run.x_bar for run in alone]), rtol=1e-13, atol=1e-13)
    assert both.outcome.accepted[1] > 3 * both.outcome.accepted[0]
    assert both.outcome.rejected[1] > 0
    # The batch is called as often as its slowest sample needs.
    assert both.nfe == max(both.outcome.nfe) == alone[1].nfe


def test_samples_that_are_done_leave_the_batch():
    field, easy, hard = two_fields()
    sizes = []

    def eps(x_bar, sigma):
        sizes.append(x_bar.shape[0])
        return field.model(x_bar, sigma)

    watched = EpsilonField.from_sigma(eps, LINEAR)
    run = integrate(watched, torch.cat((easy, hard)), [3.0, 0.0], Adaptive(DOPRI5, 1e-6, 1e-6))
    assert sum(sizes) == sum(run.outcome.nfe)
    assert sizes[-1] == 1


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_the_last_slope_is_the_next_ones_first(tableau):
    """Two calls to start, and as many as the tableau has stages for each attempt, accepted or not."""
    field, _, hard = two_fields()
    outcome = integrate(field, hard, [3.0, 0.0], Adaptive(tableau, 1e-6, 1e-6)).outcome
    attempts = outcome.accepted[0] + outcome.rejected[0]
    assert outcome.rejected[0] > 0
    assert outcome.nfe[0] == 2 + len(tableau.b) * attempts
    given = integrate(field, hard, [3.0, 0.0], Adaptive(tableau, 1e-6, 1e-6, first_step=0.01)).outcome
    assert given.nfe[0] == 1 + len(tableau.b) * (given.accepted[0] + given.rejected[0])


def test_a_wrong_estimate_shows():
    """An error row ten thousand times too small leaves errors out of proportion: the estimate does steer the steps."""
    numb = replace(DOPRI5, error=(tuple(1e-4 * e for e in DOPRI5.error[0]),), embedded_orders=(1,))
    right, wrong = (
        float(
            (integrate(FIELD, X, [0.0, 5.0], Adaptive(pair, 1e-6, 1e-6)).x_bar - EXACT.solution(X, 0.0, 5.0))
            .abs()
            .max()
        )
        for pair in (DOPRI5, numb)
    )
    assert wrong > 30.0 * right


@pytest.mark.parametrize(
    "clock", ["sigma", "asinh", "arctan", asinh(1.0)], ids=lambda clock: getattr(clock, "name", clock)
)
def test_any_clock_that_is_regular_at_zero(clock):
    for nodes in ([0.0, 20.0], [20.0, 0.0]):
        run = integrate(FIELD, X, nodes, Adaptive(DOPRI5, 1e-8, 1e-8, clock=clock))
        torch.testing.assert_close(run.x_bar, EXACT.solution(X, *nodes), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clock", ["log", "t", "variance"])
def test_singular_clocks_keep_away_from_zero(clock):
    solver, calls = Adaptive(DOPRI5, 1e-8, 1e-8, clock=clock), FIELD.nfe
    with pytest.raises(ValueError, match=f"clock '{clock}' is singular at sigma = 0"):
        integrate(FIELD, X, [3.0, 0.0], solver)
    assert FIELD.nfe == calls
    run = integrate(FIELD, X, [3.0, 0.02], solver)
    torch.testing.assert_close(run.x_bar, EXACT.solution(X, 3.0, 0.02), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pid", [(0.0, 1.0, 0.0), (0.2, 0.5, 0.05)])
def test_other_controllers(pid):
    run = integrate(FIELD, X, [0.0, 5.0], Adaptive(DOPRI5, 1e-7, 1e-7, pid=pid))
    torch.testing.assert_close(run.x_bar, EXACT.solution(X, 0.0, 5.0), rtol=0, atol=1e-5)
    assert not torch.equal(run.x_bar, integrate(FIELD, X, [0.0, 5.0], Adaptive(DOPRI5, 1e-7, 1e-7)).x_bar)


def test_states_of_float32():
    run = integrate(FIELD, X.float(), [5.0, 0.0], Adaptive(DOPRI5, 1e-5, 1e-5))
    assert run.x_bar.dtype == torch.float32
    torch.testing.assert_close(run.x_bar.double(), EXACT.solution(X, 5.0, 0.0), rtol=0, atol=1e-3)


# -- ways to end --------------------------------------------------------------------------------
def wall(below):
    """A field that is NaN below a σ, for samples whose first number is marked."""

    def eps(x_bar, sigma):
        sigma = sigma * torch.ones_like(x_bar)
        bad = (x_bar[:, :1, :1] > 50.0) & (sigma < below)
        return torch.where(bad, torch.nan, EXACT(x_bar, sigma[:, :1, :1]))

    start = X.clone()
    start[2, 0, 0] = 1000.0
    return EpsilonField.from_sigma(eps, LINEAR), start


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_a_sample_that_meets_nan_stops_before_it_alone(tableau):
    field, start = wall(below=0.7)
    solver = Adaptive(tableau, 1e-6, 1e-6)
    run = integrate(field, start, [4.0, 1.0, 0.5, 0.0], solver, trajectory=True, dense=True)
    assert run.status == (Status.SUCCESS, Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    # Its last good state, close to the wall, and where it was.
    assert 0.7 <= run.sigma[2] < 0.701
    torch.testing.assert_close(run.x_bar[2:3], EXACT.solution(start[2:3], 4.0, run.sigma[2]), rtol=1e-4, atol=1e-4)
    whole = integrate(FIELD, start, [4.0, 1.0, 0.5, 0.0], solver)
    others = [0, 1, 3]
    torch.testing.assert_close(run.x_bar[others], whole.x_bar[others], rtol=1e-12, atol=1e-12)
    assert [run.outcome.accepted[i] for i in others] == [whole.outcome.accepted[i] for i in others]
    # The nodes it did not reach hold nothing of it, and nor does dense output beyond.
    assert bool(run.trajectory[:2, 2].isfinite().all())
    assert bool(run.trajectory[2:, 2].isnan().all())
    assert bool(run.trajectory[:, others].isfinite().all())
    assert bool(run.out(0.6)[2].isnan().all())
    assert bool(run.out(0.6)[others].isfinite().all())
    assert bool(run.out(0.9)[2].isfinite().all())


def test_nan_at_the_start_ends_at_once():
    field, start = wall(below=10.0)
    run = integrate(field, start, [4.0, 0.0], "dopri5")
    assert run.status[2] is Status.NONFINITE
    assert run.sigma[2] == 4.0
    assert run.outcome.nfe[2] == 2
    torch.testing.assert_close(run.x_bar[2], start[2], rtol=0, atol=0)
    assert run.status.count(Status.SUCCESS) == 3


def test_a_stage_into_nan_is_a_rejected_step():
    """A state that only too long a step reaches."""
    field = EpsilonField.from_sigma(lambda x, s: torch.where(x.abs() < 1.2, 1.0 - x * x, torch.nan), LINEAR)
    run = integrate(field, torch.zeros(1, 2).double(), [0.0, 8.0], Adaptive(DOPRI5, 1e-6, 1e-6, first_step=5.0))
    assert run.success
    assert run.outcome.rejected[0] > 0
    torch.testing.assert_close(run.x_bar, torch.full_like(run.x_bar, np.tanh(8.0)), rtol=0, atol=1e-5)


def test_each_step_into_nan_that_is_got_past_is_forgiven():
    """More of them over a run than any one place is given."""
    reached = {0}

    def hiccup(x_bar, sigma):
        """NaN at the first call beyond each whole number."""
        new = int(sigma.max()) not in reached
        reached.add(int(sigma.max()))
        return torch.full_like(x_bar, torch.nan if new else 1.0)

    solver = Adaptive(DOPRI5, 1e-6, 1e-6, clock="sigma", first_step=0.3)
    run = integrate(EpsilonField.from_sigma(hiccup, LINEAR), X[:1], np.arange(0.0, 101.0, 2.0), solver)
    assert run.outcome.rejected[0] > 35
    assert run.success
    torch.testing.assert_close(run.x_bar, X[:1] + 100.0, rtol=0, atol=1e-6)


def test_nan_at_the_end_alone_ends_soon():
    """However near it one comes: short of it there is always room for one more step."""
    field = EpsilonField.from_sigma(lambda x, s: torch.where(s > 0.0, torch.sin(x), torch.nan), LINEAR)
    run = integrate(field, X, [3.0, 0.0], "dopri5")
    assert set(run.status) == {Status.NONFINITE}
    assert run.nfe < 1000


def test_where_nobody_is_left_nobody_is_called():
    field = EpsilonField.from_sigma(lambda x, s: torch.where(s > 0.7, EXACT(x, s), torch.nan), LINEAR)
    nodes, seen = [4.0, 2.0, 0.5, 0.3, 0.0], []
    for solver in (get("dopri5"), get("scipy-dop853")):
        seen.clear()
        run = integrate(
            field, X, nodes, solver, trajectory=True, save_at=[3.0, 0.4], callback=lambda step: seen.append(step)
        )
        assert [step.sigma_next for step in seen] == [2.0]
        assert set(run.status) == set(run.outcome.status) == {Status.NONFINITE}
        assert run.trajectory.shape == (5, *X.shape)
        assert bool(run.trajectory[:2].isfinite().all())
        assert bool(run.trajectory[2:].isnan().all())
        assert bool(run.saved[0].isfinite().all())
        assert bool(run.saved[1].isnan().all())


def test_attempts_are_limited():
    field, easy, hard = two_fields()
    run = integrate(field, torch.cat((easy, hard)), [3.0, 0.0], Adaptive(DOPRI5, 1e-6, 1e-6, max_steps=30))
    assert run.status == (Status.SUCCESS, Status.MAX_STEPS)
    assert 0.0 < run.sigma[1] < 3.0
    assert run.outcome.accepted[1] + run.outcome.rejected[1] == 30
    there = integrate(field, hard, [3.0, run.sigma[1]], Adaptive(DOPRI5, 1e-9, 1e-9))
    torch.testing.assert_close(run.x_bar[1:], there.x_bar, rtol=0, atol=1e-4)


def test_a_singularity_stalls():
    """At a σ where the state runs off to infinity steps shrink until σ resolves no more."""
    field = EpsilonField.from_sigma(lambda x, s: (0.0 * x + s - 1.0).abs() ** -1.5, LINEAR)
    run = integrate(field, torch.ones(2, 2).double(), [3.0, 0.0], Adaptive(DOPRI5, 1e-6, 1e-6))
    assert set(run.status) == {Status.STALLED}
    assert 1.0 < run.sigma[0] < 1.001
    assert bool(run.x_bar.isfinite().all())


def test_a_callback_stops_it():
    run = integrate(FIELD, X, [3.0, 1.0, 0.0], "dop853", callback=lambda step: True)
    assert set(run.status) == {Status.STOPPED}
    assert run.outcome.status == run.status
    assert run.sigma == (1.0,) * 4


def test_a_branch_on_sigma_is_told_from_other_errors():
    """Samples at different σ cannot all take one branch."""
    field = EpsilonField.from_sigma(lambda x, s: x if s > 1.0 else 0.5 * x, LINEAR)
    with pytest.raises(ValueError, match=r"eps must take a tensor of noise levels, .* torch\.where") as caught:
        integrate(field, X, [3.0, 0.0], "dopri5")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert integrate(field, X, [3.0, 0.5, 0.0], "heun").success
    other = EpsilonField.from_sigma(lambda x, s: x @ x, LINEAR)
    with pytest.raises(RuntimeError, match=r"expected|size|shape"):
        integrate(other, X, [3.0, 0.0], "dopri5")


# -- arguments ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(({name: value}, name) for name in ("rtol", "atol") for value in (0.0, -1.0, np.nan, np.inf, 1e-17)),
        ({"max_steps": 0}, "max_steps"),
        ({"first_step": 0.0}, "first_step"),
        ({"first_step": np.nan}, "first_step"),
        ({"pid": (0.0, 0.0, 0.0)}, "pid"),
        ({"pid": (0.0, np.nan, 0.0)}, "pid"),
        ({"pid": 0.7}, "pid must be three numbers"),
        ({"pid": ("0.2", 0.7, 0.0)}, "pid must be three numbers"),
        *(({name: value}, f"{name} must be a number") for name in ("rtol", "atol") for value in ("1e-3", None, True)),
        ({"first_step": "a"}, "first_step must be"),
        ({"tableau": HEUN}, "tableau must have an embedded solution"),
    ],
)
def test_bad_arguments_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        Adaptive(**change)


def test_what_a_run_cannot_use_is_refused_before_any_call():
    calls = FIELD.nfe
    with pytest.raises(ValueError, match="rtol must be a number of at least"):
        integrate(FIELD, X.float(), [1.0, 0.0], Adaptive(rtol=1e-8))
    back = Clock("back", lambda s: np.sin(s), lambda u: np.arcsin(u), lambda s: 1.0 / np.cos(s))
    with pytest.raises(ValueError, match="clock 'back' must rise strictly"):
        integrate(FIELD, X, [3.0, 0.0], Adaptive(clock=back))
    with pytest.raises(ValueError, match="unknown clock 'sgima'"):
        integrate(FIELD, X, [3.0, 0.0], Adaptive(clock="sgima"))
    with pytest.raises(ValueError, match="no budget of steps or nfe"):
        sample(FIELD, X, solver="dopri5", nfe=20)
    assert FIELD.nfe == calls


# -- names, networks, gradients -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["bs32", "dopri5", "dop853"])
def test_by_name_there_and_back(name):
    solver = get(name)
    assert (solver.name, solver.adaptive, solver.differentiable) == (name, True, True)
    there = encode(FIELD, X, solver=name, data_range=None)
    back = sample(FIELD, there.x, solver=name)
    assert there.grid.sigmas.tolist() == [0.0, TOP]
    torch.testing.assert_close(back.x, X, rtol=0, atol=1e-3)


def test_a_batch_in_parts_is_the_whole():
    whole = sample(FIELD, noise((2, 3), 5, 0), solver="dopri5")
    parts = sample(FIELD, noise((2, 3), 5, 0), solver="dopri5", batch_size=2)
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-12, atol=1e-12)
    assert parts.outcome == whole.outcome
    assert parts.nfe == whole.nfe


def test_each_sample_keeps_its_condition():
    """Samples that leave the batch early must not shift the conditions of the rest, halved or doubled."""
    condition = torch.tensor([[0.1], [0.5], [0.9]]).double()
    model = lambda x, t, c: torch.tanh(c * x) * (1.0 + 0.2 * torch.sin(t / 60.0)).reshape(-1, 1)
    options = {"condition": condition, "null_condition": torch.zeros(1, 1).double(), "guidance_scale": 1.5}
    latent = noise((2,), 3, 1)
    both = sample(EpsilonField(model, LINEAR, shape=(2,), **options), latent, solver="dopri5")
    assert len(set(both.outcome.accepted)) > 1
    for i in range(3):
        own = {**options, "condition": condition[i : i + 1]}
        alone = sample(EpsilonField(model, LINEAR, shape=(2,), **own), latent[i : i + 1], solver="dopri5")
        torch.testing.assert_close(both.x[i : i + 1], alone.x, rtol=1e-10, atol=1e-10)
        assert both.outcome.accepted[i : i + 1] == alone.outcome.accepted


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda t: t.name)
def test_gradients_are_those_of_the_solution(tableau):
    """∂x̄(σ')/∂x̄(σ) of Gaussian data is √((λ + σ'²)/(λ + σ²)), whatever steps were taken."""
    x = X.clone().requires_grad_()
    run = integrate(FIELD, x, [0.0, 2.0, 4.0], Adaptive(tableau, 1e-8, 1e-8), gradients=True)
    (found,) = torch.autograd.grad(run.x_bar.sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, np.sqrt(16.5 / 0.5)), rtol=1e-6, atol=0)
    assert not integrate(FIELD, x, [0.0, 4.0], Adaptive(tableau)).x_bar.requires_grad


def test_gradients_survive_a_rejected_step_into_nan():
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    eps = lambda x, s: torch.where(x.abs() < 1.2, scale * (1.0 - x * x), torch.nan)
    x = torch.tensor([[0.0, 0.0], [0.9, 0.9]]).double().requires_grad_()
    solver = Adaptive(DOPRI5, 1e-8, 1e-8, first_step=3.0)
    run = integrate(EpsilonField.from_sigma(eps, LINEAR), x, [0.0, 2.0], solver, gradients=True)
    assert run.success
    assert min(run.outcome.rejected) > 0
    (found,) = torch.autograd.grad(run.x_bar[0, 0], scale)
    assert float(found) == pytest.approx(2.0 / np.cosh(2.0) ** 2, rel=1e-5)


def test_it_may_be_driven_by_hand(mixture):
    """By a plain function, without the loop: only the rows that are asked for come."""
    field, _, high = mixture
    solver, grid = get("dopri5"), Grid.explicit([TOP, 1.0, 0.0], LINEAR)
    ask = lambda x_bar, sigma, rows: field.model(x_bar, sigma.reshape(-1, 1))
    x_bar, state = high, solver.init(ask, high, grid)
    for n in range(grid.steps):
        before = x_bar.clone(), state.sigma.copy()
        moved, after, _ = solver.step(ask, x_bar, n, state)
        torch.testing.assert_close(x_bar, before[0], rtol=0, atol=0)
        np.testing.assert_array_equal(state.sigma, before[1])
        x_bar, state = moved, after
    torch.testing.assert_close(x_bar, integrate(field, high, grid, solver).x_bar, rtol=0, atol=0)


def test_a_users_pair():
    """Heun's method with Euler's inside, and the slope at the end of the step unused."""
    pair = Tableau("heun-euler", 2, ((), (1.0,)), (0.5, 0.5), error=((-0.5, 0.5, 0.0),), embedded_orders=(1,))
    run = integrate(FIELD, X, [0.0, 2.0], Adaptive(pair, 1e-5, 1e-5))
    torch.testing.assert_close(run.x_bar, EXACT.solution(X, 0.0, 2.0), rtol=0, atol=1e-3)
