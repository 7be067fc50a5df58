"""Methods whose step is an equation: what they solve, what they report of it, and what they refuse.

Their orders are measured with all others', in test_order.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import root

import ddim_ode
from benchmarks.convergence import HIGH, LOW, sigma_grid
from ddim_ode import (
    Adaptive,
    AsynchronousLeapfrog,
    Clock,
    EpsilonField,
    Grid,
    ImplicitMidpoint,
    Inverse,
    Multistep,
    NoiseSchedule,
    Status,
    TwoStep,
    encode,
    integrate,
    noise,
    round_trip,
    sample,
)
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.models.analytic import MixtureEpsilon
from ddim_ode.solvers import arctan, get

LINEAR = NoiseSchedule.linear()
DDIM = get("ddim")
BASES = ["ddim", "pf-euler", "midpoint", "heun", "heun-edm", "rk4", "ees25-arctan", "dpm2s", "dpm3s"]
START = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rms(x):
    return float(x.square().mean().sqrt())


def bits(a, b):
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def elementwise(x, sigma):
    """ε that asks every number by itself, so that what differs between batches is the solver's."""
    return torch.tanh(x) * (0.8 + 0.3 * math.cos(sigma))


FIELD = EpsilonField.from_sigma(elementwise, LINEAR)


@pytest.fixture(scope="module")
def modes():
    """Two narrow modes at −1 and 1, in one dimension."""
    return MixtureEpsilon(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.01))


# -- what they solve ------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["encoding", "sampling"])
@pytest.mark.parametrize("clock", ["sigma", "log", arctan(2.0)], ids=lambda clock: getattr(clock, "name", clock))
def test_implicit_midpoint_of_a_gaussian_is_a_linear_solve(problems, clock, direction):
    problem = problems["gaussian"]
    eps, grid = problem.eps, sigma_grid("jittered", 6, direction)
    solver = ImplicitMidpoint(clock=clock, tol=1e-12)
    x, start = problem.low, problem.low
    u, back, slope = {
        "sigma": (lambda s: s, lambda u: u, lambda s: 1.0),
        "log": (math.log, math.exp, lambda s: s),
    }.get(clock, (lambda s: math.atan(s / 2), lambda u: 2 * math.tan(u), lambda s: 2 + s * s / 2))
    covariance = (eps.basis * eps.variance) @ eps.basis.T
    for a, b in zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True):
        s = back(0.5 * (u(a) + u(b)))
        # x' − x = h dσ/du σ (Σ + σ²)⁻¹ ((x + x')/2 − μ)
        m = (u(b) - u(a)) * slope(s) * s * torch.linalg.inv(covariance + s * s * torch.eye(4, dtype=torch.float64))
        eye = torch.eye(4, dtype=torch.float64)
        x = eps.mean + torch.linalg.solve(eye - 0.5 * m, (eye + 0.5 * m) @ (x - eps.mean).T).T
    run = integrate(EpsilonField.from_sigma(eps, LINEAR), start, grid, solver)
    assert run.success
    torch.testing.assert_close(run.x_bar, x, rtol=0.0, atol=1e-10)


def test_inverse_ddim_of_a_gaussian_is_a_division(problems):
    eps = problems["gaussian"].eps
    grid = Grid.make("quadratic", LINEAR, 8).reversed()
    turned = (START - eps.mean) @ eps.basis
    for low, high in zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True):
        turned = turned / (1.0 - (high - low) * high / (eps.variance + high * high))
    run = integrate(EpsilonField.from_sigma(eps, LINEAR), START, grid, Inverse(DDIM, tol=1e-12))
    assert run.success
    torch.testing.assert_close(run.x_bar, eps.mean + turned @ eps.basis.T, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("base", BASES)
def test_a_plain_decoder_returns_the_image(problems, base):
    field = EpsilonField.from_sigma(problems["mixture"].eps, LINEAR)
    grid = Grid.make("quadratic", LINEAR, 12)
    images = problems["mixture"].low
    run = encode(field, images, solver=Inverse(get(base), tol=1e-10), grid=grid)
    assert run.success
    assert rms(sample(field, run.x, solver=base, grid=grid).x - images) < 12 * 1e-9
    # That it is the inverse and not the encoding of the base itself.
    plain = encode(field, images, solver=base, grid=grid)
    assert rms(run.x - plain.x) > 1e-4
    assert rms(sample(field, plain.x, solver=base, grid=grid).x - images) > 1e-4


def test_the_network_returns_the_image_by_plain_ddim():
    field, tol = ddim_ode.load("fashion-mnist"), 1e-5
    images = as_tensor(bundled_images()[:1], torch.float64)
    run = encode(field, images, solver=Inverse(DDIM, tol=tol), steps=6, grid="log")
    assert run.success
    back = sample(field, run.x, solver="ddim", grid=run.grid)
    assert rms(back.x - images) < 10 * tol
    assert run.outcome.residual[0] >= 0.99 * float(rms(back.x - images))
    plain = encode(field, images, solver="ddim", grid=run.grid)
    assert rms(sample(field, plain.x, solver="ddim", grid=run.grid).x - images) > 1e-2


def test_small_residuals_that_the_decoder_multiplies_are_said():
    """Every step is solved to its tolerance; decoding makes more of what is left, and the status and the residual say so."""
    rates = torch.linspace(1.0, 2.0, START.shape[1], dtype=torch.float64)
    grow = lambda x_bar, sigma: -rates * x_bar  # decoding multiplies by 1 + rate · h a step
    field, tol = EpsilonField.from_sigma(grow, LINEAR), 1e-6
    grid = np.linspace(0.0, 2.4, 5)
    x = torch.stack((START[0], 0.0 * START[0]))
    run = integrate(field, x, grid, Inverse(DDIM, tol=tol, memory=1))
    steps = [integrate(field, x, grid[i : i + 2], Inverse(DDIM, tol=tol, memory=1)) for i in range(4)]
    back = integrate(field, run.x_bar, run.grid.reversed(), "ddim")
    missed = rms(back.x_bar[:1] - x[:1])
    assert missed > 10.0 * tol
    assert all(step.success for step in steps)
    assert run.status == (Status.UNCONVERGED, Status.SUCCESS)
    assert run.outcome.residual == pytest.approx((float(missed), 0.0), rel=1e-6)
    tight = integrate(field, x, grid, Inverse(DDIM, tol=1e-2 * tol, memory=1))
    assert float(rms(integrate(field, tight.x_bar, grid[::-1].copy(), "ddim").x_bar - x)) < 10.0 * tol


def test_sampling_by_an_inverse_is_its_base(problems):
    field = EpsilonField.from_sigma(problems["mixture"].eps, LINEAR)
    run = sample(field, noise((3,), 2, 0), solver="inverse-heun", steps=7)
    bits(run.x, sample(field, noise((3,), 2, 0), solver="heun", steps=7).x)
    assert run.outcome is None
    assert run.nfe == 14


@pytest.mark.parametrize("clock", ["sigma", "arctan", "log", "t"])
def test_implicit_midpoint_comes_back(problems, clock):
    field, images = EpsilonField.from_sigma(problems["mixture"].eps, LINEAR), problems["mixture"].low
    found = []
    for tol in (1e-6, 1e-11):
        trip = round_trip(field, images, solver=ImplicitMidpoint(tol=tol, clock=clock), steps=10)
        assert all(status is Status.SUCCESS for status in trip.status)
        found.append(rms(trip.reconstruction - images))
    assert found[1] < 1e-9
    assert found[0] > 10.0 * found[1]  # it is the tolerance that limits it


# -- what they report -----------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [[2.0, 0.3], [0.3, 2.0], [0.0, 40.0], [40.0, 0.0]])
@pytest.mark.parametrize("iterations", [3, 200])
def test_the_residual_is_the_true_one(grid, iterations):
    """Of a step: what its equation is missed by, over √(1 + σ²) of the lower level."""
    run = integrate(FIELD, START, grid, ImplicitMidpoint(tol=1e-9, max_iterations=iterations))
    h, middle, unit = grid[1] - grid[0], 0.5 * (grid[0] + grid[1]), math.sqrt(1.0 + min(grid) ** 2)
    missed = START + h * elementwise(0.5 * (START + run.x_bar), middle) - run.x_bar
    true = missed.square().mean(dim=1).sqrt() / unit
    torch.testing.assert_close(torch.tensor(run.outcome.residual, dtype=torch.float64), true, rtol=1e-6, atol=1e-13)
    assert run.status == tuple(Status.UNCONVERGED if r > 1e-9 else Status.SUCCESS for r in true.tolist())
    assert (max(run.outcome.residual) > 1e-9) == (iterations == 3)

    if grid[0] < grid[1]:
        run = integrate(FIELD, START, grid, Inverse(DDIM, tol=1e-9, max_iterations=iterations))
        missed = START - (run.x_bar - h * elementwise(run.x_bar, grid[1]))
        true = missed.square().mean(dim=1).sqrt() / unit
        torch.testing.assert_close(torch.tensor(run.outcome.residual, dtype=torch.float64), true, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("solver", [ImplicitMidpoint(max_iterations=2), Inverse(DDIM, max_iterations=2)], ids=str)
def test_too_few_iterations_are_said_and_the_run_goes_on(solver):
    x = START.clone()
    x[1] = 0.0  # where ε = 0, nothing is left to solve
    seen = []
    run = integrate(FIELD, x, np.linspace(0.5, 3.0, 6), solver, callback=lambda s: seen.append(s.sigma_next))
    assert run.status == (Status.UNCONVERGED, Status.SUCCESS, Status.UNCONVERGED)
    assert run.outcome.status == run.status
    assert not run.success
    assert run.sigma == (3.0,) * 3
    assert seen == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert run.outcome.residual[0] > solver.tol
    assert run.outcome.residual[1] == 0.0
    assert run.outcome.accepted == (5, 5, 5)
    back = 5 * isinstance(solver, Inverse)  # it looks whether its decoder comes back
    assert run.outcome.nfe == (10 + back, 5 + back, 10 + back)
    assert run.nfe == 10 + back
    # It is the best there is, not nothing.
    whole = integrate(FIELD, x, np.linspace(0.5, 3.0, 6), get(solver.name)).x_bar
    assert 1e-6 < rms(run.x_bar - whole) < 0.5
    assert run.x_bar.isfinite().all()


def test_a_callback_stops_it_and_what_was_not_solved_stays_said():
    x = START.clone()
    x[1] = 0.0
    run = integrate(
        FIELD, x, np.linspace(0.5, 3.0, 6), ImplicitMidpoint(max_iterations=2), callback=lambda s: s.index == 2
    )
    assert run.status == (Status.UNCONVERGED, Status.STOPPED, Status.UNCONVERGED)
    assert run.sigma == (2.0,) * 3


def test_round_trips_keep_what_was_not_solved(problems):
    field, images = EpsilonField.from_sigma(problems["mixture"].eps, LINEAR), problems["mixture"].low
    trip = round_trip(field, images, solver=Inverse(DDIM, max_iterations=2), steps=5)
    assert trip.status == (Status.UNCONVERGED,) * 3
    assert trip.decoding.success
    assert bool(trip.mse.isfinite().all())


def test_one_huge_step_has_two_solutions(modes):
    """From pure noise to the data in one step: scipy finds two from two starts, and the contraction says that there may be."""
    grid, x = [100.0, 0.001], 0.5
    solver = ImplicitMidpoint(clock="log", tol=1e-9)
    middle = math.sqrt(0.1)
    h = math.log(1e-5) * middle  # dσ/du = σ

    def equation(y):
        at = torch.tensor([[0.5 * (x + float(y[0]))]], dtype=torch.float64)
        return [x + h * float(modes(at, middle)) - float(y[0])]

    solver_middle = solver.plan(Grid.explicit(grid, LINEAR))[0]
    assert solver_middle.sigma == pytest.approx(middle)
    assert solver_middle.weight == pytest.approx(h)
    found = [root(equation, [y], tol=1e-12) for y in np.linspace(-20.0, 20.0, 9)]
    solutions = sorted({round(float(r.x[0]), 6) for r in found if r.success and abs(equation(r.x)[0]) < 1e-9})
    field = EpsilonField.from_sigma(modes, LINEAR)
    run = integrate(field, torch.tensor([[x]], dtype=torch.float64), grid, solver)
    assert len(solutions) >= 2
    assert run.outcome.contraction[0] > 1.0
    if run.success:
        assert min(abs(float(run.x_bar) - y) for y in solutions) < 1e-5
    # Steps over the same range that are not as large have one.
    fine = integrate(field, torch.tensor([[x]], dtype=torch.float64), np.geomspace(100.0, 0.001, 101), solver)
    assert fine.success
    assert fine.outcome.contraction[0] < 1.0


def test_the_inverse_of_ddim_has_one_solution_even_so(modes):
    """E[x₀ | x̄] rises with x̄: where the iteration expands, every start that gets anywhere gets to the same state."""
    low, high = 0.05, 0.4
    phi = lambda y: float(y) + (low - high) * float(modes(torch.tensor([[float(y)]], dtype=torch.float64), high))
    values = [phi(y) for y in np.linspace(-5.0, 5.0, 401)]
    assert np.all(np.diff(values) > 0.0)
    field = EpsilonField.from_sigma(modes, LINEAR)
    run = integrate(
        field, torch.tensor([[0.02], [0.3], [0.9]], dtype=torch.float64), [low, high], Inverse(DDIM, tol=1e-9)
    )
    assert run.success
    assert run.outcome.contraction[0] > 1.0
    for y, wanted in zip(run.x_bar.flatten().tolist(), (0.02, 0.3, 0.9), strict=True):
        assert phi(y) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("base", BASES)
def test_each_samples_calls_are_the_fields(base):
    """Down to σ = 0 some methods ask less."""
    FIELD.nfe = 0
    run = integrate(FIELD, START[:1], [0.0, 0.5, 1.0, 2.0], Inverse(get(base)))
    assert run.outcome.nfe == (run.nfe,)
    assert run.nfe == FIELD.nfe


def test_calls_of_a_batch_are_those_of_its_slowest():
    x = torch.stack((START[0], 0.0 * START[0], 0.1 * START[0]))
    FIELD.nfe = 0
    run = integrate(FIELD, x, [0.3, 2.0], ImplicitMidpoint(tol=1e-12))
    assert run.nfe == FIELD.nfe == max(run.outcome.nfe)
    assert run.outcome.nfe[1] == 1
    alone = [integrate(FIELD, x[i : i + 1], [0.3, 2.0], ImplicitMidpoint(tol=1e-12)).nfe for i in range(3)]
    assert list(run.outcome.nfe) == alone


# -- neighbours -----------------------------------------------------------------------------------
SOLVERS = [ImplicitMidpoint(), ImplicitMidpoint(clock="arctan", memory=1), Inverse(DDIM), Inverse(get("heun"))]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_results_do_not_hang_on_neighbours(solver):
    nodes = np.linspace(0.3, 3.0, 5)
    run = integrate(FIELD, START, nodes, solver)
    other = START.clone()
    other[1:] = 40.0 * torch.rand(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beside = integrate(FIELD, other, nodes, solver)
    bits(beside.x_bar[0], run.x_bar[0])
    assert beside.outcome.nfe[0] == run.outcome.nfe[0]
    assert beside.outcome.residual[0] == run.outcome.residual[0]
    assert beside.outcome.contraction[0] == run.outcome.contraction[0]
    alone = integrate(FIELD, START[:1], nodes, solver)
    torch.testing.assert_close(alone.x_bar[0], run.x_bar[0], rtol=0.0, atol=1e-12)
    assert alone.outcome.nfe[0] == run.outcome.nfe[0]
    split = encode(FIELD, START, grid=nodes, solver=solver, batch_size=2)
    torch.testing.assert_close(split.x_bar, encode(FIELD, START, grid=nodes, solver=solver).x_bar, rtol=0.0, atol=1e-12)
    assert len(split.outcome.residual) == len(split.outcome.contraction) == 3


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_one_that_fails_leaves_its_neighbours(solver):
    def spoiled(x, sigma):
        return torch.where((x[:, :1] > 20.0) & (sigma > 1.6), torch.nan, elementwise(x, sigma))

    x, nodes = START.clone(), np.linspace(0.5, 3.0, 6)
    x[1] += 30.0
    FIELD.nfe = 0
    good = integrate(FIELD, x, nodes, solver)
    bad = integrate(EpsilonField.from_sigma(spoiled, LINEAR), x, nodes, solver, trajectory=True)
    assert bad.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    bits(bad.x_bar[[0, 2]], good.x_bar[[0, 2]])
    assert bad.x_bar.isfinite().all()
    # It holds the state it had reached, and is not asked for any more.
    assert bad.sigma == (3.0, 1.5, 3.0)
    bits(bad.x_bar[1], bad.trajectory[2, 1])
    assert bool(bad.trajectory[3:, 1].isnan().all())
    assert bad.outcome.nfe[0] == good.outcome.nfe[0]
    assert bad.outcome.nfe[1] < good.outcome.nfe[1]
    assert bad.outcome.accepted == (5, 2, 5)
    assert all(math.isfinite(r) for r in bad.outcome.residual)


def test_all_may_fail():
    field = EpsilonField.from_sigma(lambda x, s: x * torch.nan, LINEAR)
    run = integrate(field, START, np.linspace(0.5, 3.0, 6), "implicit-midpoint")
    assert run.status == (Status.NONFINITE,) * 3
    assert run.sigma == (0.5,) * 3
    bits(run.x_bar, START)


def test_a_failure_late_in_the_iteration_is_one_that_is_not_solved():
    """An iterate that was finite is kept where later ones are not."""
    calls = []

    def once(x, sigma):
        calls.append(sigma)
        return torch.tanh(x) if len(calls) == 1 else x * torch.nan

    run = integrate(EpsilonField.from_sigma(once, LINEAR), START, [0.5, 1.0], ImplicitMidpoint())
    assert run.status == (Status.UNCONVERGED,) * 3
    assert run.sigma == (1.0,) * 3
    assert run.x_bar.isfinite().all()


# -- how they are asked -----------------------------------------------------------------------------
def test_no_budget_of_calls():
    FIELD.nfe = 0
    images = START.reshape(3, 1, 2, 2).clamp(-1.0, 1.0)
    for name in ("implicit-midpoint", "inverse-ddim"):
        for run in (encode, round_trip):
            with pytest.raises(ValueError, match=f"{name} iterates .* has no budget of nfe: say how many steps"):
                run(FIELD, images, nfe=20, solver=name)
    assert FIELD.nfe == 0
    assert encode(FIELD, images, solver="inverse-ddim", steps=3).grid.steps == 3
    assert encode(FIELD, images, solver=ImplicitMidpoint(tol=1e-3)).grid.steps == 50
    for name in ("implicit-midpoint", "inverse-ddim"):
        assert get(name).iterative
        assert not get(name).budgeted
        assert not get(name).adaptive


def test_sampling_by_an_inverse_is_sampling_by_its_base():
    latent = START.reshape(3, 1, 2, 2)
    run, base = (sample(FIELD, latent, nfe=12, solver=name) for name in ("inverse-heun", "heun"))
    assert (run.nfe, run.method) == (12, get("heun"))
    assert torch.equal(run.x, base.x)


def test_gradients_are_refused():
    for name in ("implicit-midpoint", "inverse-ddim"):
        for options in ({"gradients": True}, {"checkpoint": True}):
            with pytest.raises(ValueError, match=f"gradients do not flow through {name}"):
                integrate(FIELD, START, [0.5, 1.0], name, **options)
        with pytest.raises(ValueError, match="second is for solvers that keep two states"):
            integrate(FIELD, START, [0.5, 1.0], name, second=START)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_dense_output(solver):
    nodes = np.linspace(0.5, 1.5, 41)
    run = integrate(FIELD, START, nodes, solver, dense=True, save_at=[0.777])
    exact = integrate(FIELD, START, np.linspace(0.5, 0.777, 200), "rk4").x_bar
    assert rms(run.saved[0] - exact) < (2e-2 if solver.order == 1 else 1e-3)
    bits(run.out(1.5), run.x_bar)


def test_single_precision():
    """A float32 state repeats itself to 1e-7, and a tolerance it can hold is met."""
    x = START.float()
    run = integrate(FIELD, x, np.linspace(0.5, 1.5, 6), ImplicitMidpoint(tol=1e-5))
    assert run.success
    assert run.x_bar.dtype == torch.float32
    assert integrate(FIELD, x, [0.5, 1.5], ImplicitMidpoint(tol=1e-14)).status[0] in (
        Status.UNCONVERGED,
        Status.SUCCESS,
    )


def test_it_gives_up_where_nothing_improves():
    """A tolerance that cannot be met costs some iterations more, not all that there may be."""
    run = integrate(FIELD, START, [0.5, 1.5], ImplicitMidpoint(tol=1e-300, max_iterations=10_000))
    assert run.nfe < 200
    assert max(run.outcome.residual) < 1e-14


# -- what is refused --------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [ImplicitMidpoint, lambda **o: Inverse(DDIM, **o)], ids=["midpoint", "inverse"])
def test_bad_numbers(make):
    for tol in (0.0, -1.0, math.nan, math.inf, "1e-3", None, True):
        with pytest.raises(ValueError, match="tol must be a positive number, in the units of data"):
            make(tol=tol)
    for name, values in (("max_iterations", (1, 0, 2.5)), ("memory", (0, -1, 1.5))):
        for value in values:
            with pytest.raises((TypeError, ValueError), match=name):
                make(**{name: value})
    assert make(max_iterations=np.int64(7)).max_iterations == 7


@pytest.mark.parametrize("base", ["ab2", "alf", "mf-ddim", "dopri5", "implicit-midpoint", "inverse-ddim", "ipndm"])
def test_bad_bases(base):
    with pytest.raises(ValueError, match=f"base must be a solver of fixed steps .* but got {base}"):
        Inverse(get(base))
    with pytest.raises(ValueError, match="base must be a solver of fixed steps"):
        get(f"inverse-{base}")
    with pytest.raises(ValueError, match="base must be a solver of fixed steps"):
        Inverse("ddim")  # type: ignore[arg-type]


def test_bad_clocks():
    falls = Clock("falls", lambda s: -s, lambda u: -u, lambda s: -np.ones_like(s))
    FIELD.nfe = 0
    with pytest.raises(ValueError, match="must rise strictly"):
        integrate(FIELD, START, [0.5, 1.0], ImplicitMidpoint(clock=falls))
    assert FIELD.nfe == 0


@pytest.mark.parametrize(
    "make",
    [
        ImplicitMidpoint,
        AsynchronousLeapfrog,
        TwoStep,
        Adaptive,
        lambda clock: Multistep(2, clock=clock),
        lambda clock: replace(get("heun"), clock=clock),
        lambda clock: replace(get("dpm2s"), clock=clock),
    ],
)
def test_names_of_no_clock_are_refused_when_a_solver_is_made(make):
    for clock in ("tan", "", None, 1.0):
        with pytest.raises(ValueError, match=f"unknown clock {clock!r}: known are sigma, log, .*, t, paced"):
            make(clock=clock)
    assert make(clock="t").clock == "t"


def test_names():
    assert ImplicitMidpoint(clock="log").name == "implicit-midpoint-log"
    assert ImplicitMidpoint(clock=arctan(2.0)).name == "implicit-midpoint-arctan(2)"
    assert get("inverse-rk4") == Inverse(get("rk4"))
    assert (Inverse(get("rk4")).order, Inverse(DDIM).order, LOW < HIGH) == (4, 1, True)
