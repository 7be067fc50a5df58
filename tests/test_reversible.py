"""Methods that carry a second state: their way back, what they are made of, and what they cost.

Their orders are measured with all others', in test_order.py.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_ode
from benchmarks.convergence import HIGH, LOW, measured_order, sigma_grid
from benchmarks.problems import _digits, digits_mixture
from ddim_ode import (
    AsynchronousLeapfrog,
    Clock,
    EpsilonField,
    Flow,
    Grid,
    McCallumFoster,
    NoiseSchedule,
    RungeKutta,
    Status,
    TwoStep,
    encode,
    integrate,
    noise,
    round_trip,
    sample,
    solvers,
)
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.models.analytic import MixtureEpsilon
from ddim_ode.sampling import LatentWarning
from ddim_ode.solvers import arctan, flow, get
from ddim_ode.solvers.base import asinh
from ddim_ode.solvers.runge_kutta import EES25, HEUN, RK4

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 4, 4)
NAMED = [s for s in solvers() if s.paired]
#: Members without a name: other clocks, other couplings, other bases.
OTHERS = [
    TwoStep(clock="log"),
    TwoStep(clock="arctan"),
    TwoStep(clock=asinh(0.1)),
    TwoStep(gamma=0.96),
    TwoStep(gamma=1.0, clock="flow"),
    get("mf-ddim"),
    get("mf-dpm2s"),
    McCallumFoster(RungeKutta(HEUN, "arctan"), zeta=0.99),
    AsynchronousLeapfrog(clock="log"),
    AsynchronousLeapfrog(clock=arctan(2.0)),
    AsynchronousLeapfrog(clock="t"),
    AsynchronousLeapfrog(clock=flow(0.5), linear=Flow(0.5)),
    AsynchronousLeapfrog(linear=Flow(0.2)),
]


def name(value):
    """A solver's id in the test report."""
    return value.name if hasattr(value, "nfe_per_step") else None


def rms(x):
    return float(x.square().mean().sqrt())


def bits(a, b):
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.fixture(autouse=True)
def _coarse_latents():
    """On ten steps some of these encode to what looks like no latent: that is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentWarning)
        yield


@pytest.fixture(scope="module")
def mixture():
    """Three broad components in 16 dimensions, and images drawn from them."""
    draw = torch.Generator().manual_seed(3)
    means = 0.5 * torch.randn(3, *SHAPE, generator=draw, dtype=torch.float64)
    roots = 0.1 * torch.randn(3, 16, 16, generator=draw, dtype=torch.float64)
    eps = MixtureEpsilon(torch.tensor([0.5, 0.3, 0.2]), means, roots @ roots.mT + 0.1 * torch.eye(16))
    return EpsilonField.from_sigma(eps, LINEAR, shape=SHAPE), eps.sample(4, draw).clamp(-1.0, 1.0), noise(SHAPE, 4, 0)


@pytest.fixture(scope="module")
def digits():
    eps = digits_mixture()
    images = _digits()[:4].reshape(-1, 1, 8, 8)
    return EpsilonField.from_sigma(eps, LINEAR, shape=eps.shape), images, noise(eps.shape, 4, 0)


@pytest.fixture(scope="module")
def network():
    """The bundled network in double precision: rounding of its input to float32 would be a step, and steps are not undone."""
    field = ddim_ode.load("fashion-mnist")
    double = EpsilonField(copy.deepcopy(field.model).double(), field.schedule, shape=field.shape)
    return double, as_tensor(bundled_images()[:1], torch.float64), noise(field.shape, 1, 0)


def there_and_back(field, x, solver, nfe, grid, encoding, **options):
    """Defects of a round trip from `x`, with the second state and without, and the largest state on the way."""
    if encoding:
        out = encode(field, x, nfe=nfe, solver=solver, grid=grid, trajectory=True, **options)
        back = lambda second: sample(field, out.x, solver=solver, grid=out.grid, second=second, **options)
    else:
        out = sample(field, x, nfe=nfe, solver=solver, grid=grid, trajectory=True, **options)
        back = lambda second: encode(
            field, out.x, solver=solver, grid=out.grid, second=second, data_range=None, **options
        )
    whole, alone = back(out.second), back(None)
    assert out.success
    assert whole.success
    np.testing.assert_array_equal(whole.grid.sigmas, out.grid.sigmas[::-1])
    assert whole.nfe <= out.nfe <= nfe
    return rms(whole.x - x), rms(alone.x - x), float(out.trajectory.abs().max())


def tolerance(solver, peak):
    """What a round trip may lose: the coupling amplifies rounding of the largest state that is passed, on few steps."""
    return 1e-12 * max(1.0, peak) if isinstance(solver, McCallumFoster) else 1e-12


# -- the way back -------------------------------------------------------------------------------
@pytest.mark.parametrize("nfe", [10, 20, 50])
@pytest.mark.parametrize("encoding", [True, False], ids=["encode", "sample"])
@pytest.mark.parametrize("solver", NAMED, ids=name)
def test_images_and_latents_come_back(mixture, solver, encoding, nfe):
    field, images, latent = mixture
    defect, alone, peak = there_and_back(field, images if encoding else latent, solver, nfe, "quadratic", encoding)
    assert defect < tolerance(solver, peak)
    assert alone > 10.0 * defect
    if nfe < 50 and not isinstance(solver, McCallumFoster):
        assert alone > 1e-6


@pytest.mark.parametrize("nfe", [10, 20, 50])
@pytest.mark.parametrize("encoding", [True, False], ids=["encode", "sample"])
@pytest.mark.parametrize("solver", OTHERS, ids=name)
def test_so_they_do_in_other_clocks(mixture, solver, encoding, nfe):
    field, images, latent = mixture
    defect, alone, peak = there_and_back(field, images if encoding else latent, solver, nfe, "quadratic", encoding)
    assert defect < 1e-11 * max(1.0, peak)
    assert alone > 10.0 * defect


@pytest.mark.parametrize("nfe", [10, 20, 50])
@pytest.mark.parametrize("solver", NAMED, ids=name)
def test_so_do_digits(digits, solver, nfe):
    field, images, latent = digits
    defect, alone, peak = there_and_back(field, images, solver, nfe, "quadratic", True, batch_size=3)
    assert defect < tolerance(solver, peak)
    assert alone > 1e-2 if nfe < 50 else alone > 10.0 * defect
    defect, alone, _ = there_and_back(field, latent, solver, nfe, "quadratic", False, batch_size=3)
    assert defect < 1e-12
    assert alone > 10.0 * defect


@pytest.mark.parametrize("solver", ["o-belm", "bdia", "mf-midpoint", "alf", "alf-flow"])
def test_so_do_images_of_the_network(network, solver):
    field, images, latent = network
    for nfe, x, encoding in ((10, images, True), (10, latent, False), (20, images, True)):
        defect, alone, peak = there_and_back(field, x, solver, nfe, "quadratic", encoding)
        # O-BELM's encoding multiplies rounding by its growth.
        assert defect < (1e-9 if solver == "o-belm" and not encoding else tolerance(get(solver), peak))
        assert alone > 1e-3


def test_fifty_calls_of_the_network_come_back(network):
    field, images, _ = network
    defect, alone, _ = there_and_back(field, images, "alf-flow", 50, "flow-up", True)
    assert defect < 1e-12
    assert alone > 1e-5


@pytest.mark.parametrize("solver", ["alf", "alf-flow"])
def test_a_single_precision_network_comes_back_to_the_bit(solver):
    """It is asked for the same bits on the way back; rounding across a border of its floats would make 1e-8 of 1e-16."""
    field = ddim_ode.load("fashion-mnist")
    images = as_tensor(bundled_images()[:12]).double()
    for nfe, grid in ((10, "flow-up"), (20, "quadratic"), (50, "quadratic")):
        trip = round_trip(field, images, nfe=nfe, solver=solver, grid=grid)
        # Pixels k/127.5 − 1 of uint8 images in float32 are multiples of 2⁻³¹ and more.
        assert float((trip.reconstruction - images).abs().max()) < 1e-12
        again = encode(field, trip.reconstruction, nfe=nfe, solver=solver, grid=grid)
        bits(again.x, trip.latent)
        bits(again.second, trip.encoding.second)


def test_numbers_too_large_for_the_lattice_still_come_back(mixture):
    """dx̄/du is 25,000 ε at the end of arctan σ: no sums of it are exact there."""
    field, images, _ = mixture
    trip = round_trip(field, images, steps=40, solver=AsynchronousLeapfrog(clock="arctan"), grid="flow-up")
    assert rms(trip.reconstruction - images) < 1e-6


@pytest.mark.parametrize("solver", NAMED, ids=name)
def test_batches_do_not_change_it(mixture, solver):
    field, images, _ = mixture
    whole = encode(field, images, nfe=20, solver=solver)
    split = encode(field, images, nfe=20, solver=solver, batch_size=3)
    assert split.second.shape == images.shape
    torch.testing.assert_close(split.second, whole.second, rtol=1e-8, atol=1e-8)
    back = sample(field, split.x, solver=solver, grid=split.grid, second=split.second, batch_size=3)
    torch.testing.assert_close(back.x, images, rtol=0.0, atol=1e-9)
    with pytest.raises(ValueError, match="second must be a tensor of the shape of the state"):
        sample(field, split.x, solver=solver, grid=split.grid, second=split.second[:3], batch_size=3)


def test_the_default_round_trip_goes_back_by_both_states(mixture):
    field, images, _ = mixture
    trip = round_trip(field, images, nfe=10)
    assert (trip.encoding.solver, trip.decoding.solver) == ("alf-flow", "alf-flow")
    assert float(trip.mse.max()) < 1e-24
    assert trip.nfe == 19  # nine steps there and back, and the first slope
    alone = round_trip(field, images, nfe=10, solver="ddim")
    assert float(alone.mse.min()) > 1e-6
    assert alone.encoding.second is None


def test_a_stopped_run_goes_back_too(mixture):
    field, images, _ = mixture
    for solver in NAMED:
        there = encode(field, images, steps=12, solver=solver, callback=lambda step: step.index == 6)
        assert there.status == (Status.STOPPED,) * 4
        nodes = there.grid.sigmas[:8]
        back = integrate(field, there.x_bar, nodes[::-1], solver, second=there.second)
        assert rms(back.x - images) < 1e-12


def test_what_is_between_nodes_on_the_way_back(mixture):
    """Dense output of a run that begins with a second state, whose first step may not ask for a slope."""
    field, _, latent = mixture
    grid = Grid.explicit(np.linspace(2.0, 0.2, 81), LINEAR)
    for solver in NAMED:
        down = integrate(field, latent, grid, solver, dense=True)
        up = integrate(field, down.x_bar, grid.reversed(), solver, second=down.second, dense=True)
        for level in (0.21, 0.55, 1.01, 1.99):
            assert rms(up.out(level) - down.out(level)) < 1e-3
        bits(up.out(2.0), up.x_bar)


# -- what they are ------------------------------------------------------------------------------
def test_bdia_tends_to_ddim(mixture):
    field, _, latent = mixture
    grid = Grid.make("quadratic", LINEAR, 10)
    ddim = sample(field, latent, solver="ddim", grid=grid).x
    gaps = [rms(sample(field, latent, solver=TwoStep(gamma=g), grid=grid).x - ddim) for g in (1e-2, 1e-4, 1e-6)]
    assert gaps[0] > 1e-6
    assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.1)
    assert gaps[2] / gaps[1] == pytest.approx(1e-2, rel=0.1)


def test_bdia_is_that_of_its_paper(mixture):
    """Its eq. in the variance-preserving x: the DDIM step, and γ of what the step back from here misses the last state by."""
    field, _, latent = mixture
    grid, gamma = Grid.make("quadratic", LINEAR, 8), 0.7
    s = grid.sigmas
    a = 1.0 / np.sqrt(1.0 + s * s)

    def ddim(x, i, j):
        eps = field(x / a[i], s[i])
        return a[j] * (x / a[i] + (s[j] - s[i]) * eps)

    before, x = latent, ddim(latent, 0, 1)
    for i in range(1, 8):
        before, x = x, gamma * (before - ddim(x, i, i - 1)) + ddim(x, i, i + 1)
    torch.testing.assert_close(sample(field, latent, solver=TwoStep(gamma=gamma), grid=grid).x, x, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("way", [1, -1], ids=["encode", "sample"])
def test_o_belm_on_even_steps_is_the_leapfrog(mixture, way):
    field, _, latent = mixture
    grid = Grid.explicit(np.linspace(0.3, 2.0, 21)[::way], LINEAR)
    h, s = grid.sigmas[1] - grid.sigmas[0], grid.sigmas.tolist()
    before, x = latent, latent + h * field(latent, s[0])
    for sigma in s[1:-1]:
        before, x = x, before + 2.0 * h * field(x, sigma)
    run = integrate(field, latent, grid, "o-belm")
    torch.testing.assert_close(run.x_bar, x, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(run.second, before, rtol=0.0, atol=1e-12)


def test_o_belm_is_that_of_its_paper(mixture):
    """x̄' = ρ² x̄₋ + (1 − ρ²) x̄ + (1 + ρ) h ε with ρ = h/h₋, in a clock with dσ/du beside ε."""
    field, _, latent = mixture
    for at, u, slope in (("sigma", lambda s: s, lambda s: 1.0), ("log", math.log, lambda s: s)):
        grid = sigma_grid("jittered", 9, "sampling")
        s = grid.sigmas.tolist()
        before, x = latent, latent + (s[1] - s[0]) * field(latent, s[0])
        for n in range(1, 9):
            h, rho = u(s[n + 1]) - u(s[n]), (u(s[n + 1]) - u(s[n])) / (u(s[n]) - u(s[n - 1]))
            new = rho**2 * before + (1 - rho**2) * x + (1 + rho) * h * slope(s[n]) * field(x, s[n])
            before, x = x, new
        torch.testing.assert_close(
            integrate(field, latent, grid, TwoStep(clock=at)).x_bar, x, rtol=0.0, atol=1e-12, msg=at
        )


@pytest.mark.parametrize("zeta", [0.999, 0.6])
def test_mccallum_foster_is_that_of_its_paper(mixture, zeta):
    """Both equations over Heun's step, written out; and sampling by their solution, from a pair that differs."""
    field, _, latent = mixture
    grid = sigma_grid("jittered", 9, "encoding")
    nodes = grid.sigmas.tolist()

    def psi(x, a, b):
        first = field(x, a)
        return 0.5 * (b - a) * (first + field(x + (b - a) * first, b))

    y = z = latent
    for a, b in itertools.pairwise(nodes):
        y = zeta * y + (1.0 - zeta) * z + psi(z, a, b)
        z = z - psi(y, b, a)
    solver = McCallumFoster(RungeKutta(HEUN), zeta)
    run = integrate(field, latent, grid, solver)
    torch.testing.assert_close(run.x_bar, y, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(run.second, z, rtol=0.0, atol=1e-12)

    y, z = latent, latent + 0.01
    for b, a in zip(nodes[:0:-1], nodes[-2::-1], strict=True):
        z = z + psi(y, b, a)
        y = (y - (1.0 - zeta) * z - psi(z, a, b)) / zeta
    run = integrate(field, latent, grid.reversed(), solver, second=latent + 0.01)
    torch.testing.assert_close(run.x_bar, y, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(run.second, z, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("way", [1, -1], ids=["encode", "sample"])
def test_alf_is_mutzes(mixture, way):
    """In a clock too: v is dx̄/du there, and is kept as ε."""
    field, _, latent = mixture
    for at, u, back, slope in (
        ("sigma", lambda s: s, lambda u: u, lambda s: 1.0),
        ("arctan", math.atan, math.tan, lambda s: 1.0 + s * s),
    ):
        grid = Grid.explicit((np.linspace(0.5, 1.5, 10) ** 2)[::way], LINEAR)
        s = grid.sigmas.tolist()
        x, v = latent, slope(s[0]) * field(latent, s[0])
        for a, b in itertools.pairwise(s):
            h = u(b) - u(a)
            middle = back(u(a) + 0.5 * h)
            k = x + 0.5 * h * v
            new = 2.0 * slope(middle) * field(k, middle) - v
            x, v = k + 0.5 * h * new, new
        run = integrate(field, latent, grid, AsynchronousLeapfrog(clock=at))
        torch.testing.assert_close(run.x_bar, x, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(run.second, v / slope(s[-1]), rtol=0.0, atol=1e-12)


def test_alf_flow_is_alf_on_rectified_flow(mixture):
    """In x_t = (1 − t) x₀ + t ε, t = σ/(1 + σ), whose velocity is ε − x̂₀; from t = 0, and back from both states."""
    field, images, _ = mixture

    def velocity(x, t):
        sigma = t / (1.0 - t)
        x_bar = x / (1.0 - t)
        eps = field(x_bar, sigma)
        return eps - (x_bar - sigma * eps)

    run = encode(field, images, steps=12, solver="alf-flow", grid="flow-up")
    t = run.grid.sigmas / (1.0 + run.grid.sigmas)
    x, v = images, velocity(images, 0.0)
    for a, b in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        k = x + 0.5 * (b - a) * v
        v = 2.0 * velocity(k, 0.5 * (a + b)) - v
        x = k + 0.5 * (b - a) * v
    torch.testing.assert_close(run.x_bar * (1.0 - t[-1]), x, rtol=0.0, atol=1e-11)
    torch.testing.assert_close(run.second, v, rtol=0.0, atol=1e-11)
    # The default of encoding is this.
    bits(encode(field, images, steps=12).x, run.x)


def test_the_second_state_does_not_depend_on_the_clock(mixture):
    """ALF's is ε for one linear part, the velocity for another, whatever the clock."""
    field, images, _ = mixture
    eps = field(images, 0.5)
    for at in ("sigma", "log", arctan(3.0)):
        fine = Grid.explicit([0.5, 0.5 + 1e-7], LINEAR)
        assert rms(integrate(field, images, fine, AsynchronousLeapfrog(clock=at)).second - eps) < 1e-6
        flowing = integrate(field, images, fine, AsynchronousLeapfrog(clock=at, linear=Flow(0.3))).second
        assert rms(flowing - (0.8 * eps - images)) < 1e-6


# -- nearly reversible, with one state ------------------------------------------------------------
def reversal(problem, solver, direction, steps):
    """Defects of whole runs there and back over uniform grids, for each number of steps."""
    field = EpsilonField.from_sigma(problem.eps, LINEAR)
    start = problem.low if direction == "encoding" else problem.high
    out = []
    for n in steps:
        grid = sigma_grid("uniform", n, direction)
        there = integrate(field, start, grid, solver)
        out.append(rms(integrate(field, there.x_bar, grid.reversed(), solver).x_bar - start))
    return out


@pytest.mark.parametrize("direction", ["encoding", "sampling"])
@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
@pytest.mark.parametrize(
    "solver", [RungeKutta(EES25), RungeKutta(EES25, "arctan"), RungeKutta(EES25, "log"), RungeKutta(EES25, "asinh")],
    ids=name,
)  # fmt: skip
def test_ees25_comes_back_to_fifth_order(problems, problem, solver, direction):
    found = reversal(problems[problem], solver, direction, (24, 48, 96))
    assert measured_order(found) == pytest.approx(5.0, abs=0.3)
    assert found[-1] < 1e-8


@pytest.mark.parametrize("direction", ["encoding", "sampling"])
@pytest.mark.parametrize(("control", "order"), [("heun", 3.0), ("ddim", 1.0), ("kutta3", 3.0)])
def test_others_do_not(problems, control, order, direction):
    """A method's own order, or that of what is odd in its error."""
    assert measured_order(reversal(problems["mixture"], control, direction, (24, 48, 96))) < order + 0.5


# -- rounding -----------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [TwoStep(), TwoStep(clock="log"), TwoStep(gamma=1.0), TwoStep(gamma=0.9)], ids=name)
@pytest.mark.parametrize("encoding", [True, False], ids=["encode", "sample"])
def test_growth_is_that_of_a_difference(solver, encoding):
    """With ε = 0 a pair that differs stays in its plane, and each difference to the next is what the run made of it."""
    field = EpsilonField.from_sigma(lambda x, s: torch.zeros_like(x), LINEAR)
    for nodes in (np.geomspace(0.1, 10.0, 12), np.linspace(1.0, 8.0, 9), np.array([1.0, 1.5, 3.0, 3.1, 3.4, 8.0])):
        grid = Grid.explicit(nodes if encoding else nodes[::-1], LINEAR)
        x = torch.zeros(1, 2, dtype=torch.float64)
        path = integrate(field, x, grid, solver, second=x + 1.0, trajectory=True).trajectory
        apart = (path[1:] - path[:-1])[:, 0, 0].abs().numpy()
        most = max(apart[n] / apart[m] for m in range(len(apart)) for n in range(m, len(apart)))
        assert solver.growth(grid) == pytest.approx(max(1.0, most), rel=1e-6)
    if solver == TwoStep():
        grid = Grid.explicit(np.geomspace(0.1, 10.0, 12)[:: 1 if encoding else -1], LINEAR)
        assert solver.growth(grid) == pytest.approx(100.0 ** (20 / 11) if encoding else 1.0)


def test_the_coupling_damps_on_the_way_up():
    """Two states that differ come together by ζ a step upwards, and apart downwards."""
    field = EpsilonField.from_sigma(lambda x, s: torch.zeros_like(x), LINEAR)
    solver, grid = McCallumFoster(get("ddim"), 0.8), Grid.explicit(np.linspace(1.0, 4.0, 11), LINEAR)
    x = torch.zeros(1, 2, dtype=torch.float64)
    up = integrate(field, x, grid, solver, second=x + 1.0)
    assert rms(up.x_bar - up.second) == pytest.approx(0.8**10)
    down = integrate(field, x, grid.reversed(), solver, second=x + 1.0)
    assert rms(down.x_bar - down.second) == pytest.approx(0.8**-10)


# -- cost ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [*NAMED, *OTHERS, get("mf-heun-edm")], ids=name)
def test_calls_are_counted(mixture, solver):
    field, images, latent = mixture
    for steps in (1, 2, 7):
        grid = Grid.make("quadratic", LINEAR, steps)
        field.nfe = 0
        down = sample(field, latent, grid=grid, solver=solver)
        assert down.nfe == field.nfe == solver.calls(grid) == len(solver.stages(grid))
        assert solver.calls(grid) == solver.nfe(steps)
        field.nfe = 0
        up = encode(field, images, grid=grid, solver=solver)
        assert up.nfe == field.nfe == solver.calls(grid.reversed())
        # Back by both states: a start is spared.
        field.nfe = 0
        back = sample(field, up.x, grid=grid, solver=solver, second=up.second)
        spared = 0 if isinstance(solver, McCallumFoster) else 1
        assert back.nfe == field.nfe == solver.calls(grid) - spared
        assert sample(field, latent, nfe=down.nfe, grid="quadratic", solver=solver).nfe <= down.nfe


def test_a_run_never_hands_back_what_it_was_given(mixture):
    field, images, latent = mixture
    for solver in NAMED:
        for steps in (1, 2):
            grid = Grid.make("quadratic", LINEAR, steps)
            for options in ({}, {"second": latent}):
                run = integrate(field, images, grid.reversed(), solver, **options)
                for out in (run.x_bar, run.second):
                    given = {x.data_ptr() for x in (images, *options.values())}
                    assert out.data_ptr() not in given, (solver.name, steps, list(options))
                assert run.x_bar.data_ptr() != run.second.data_ptr()


def test_the_second_state_costs_no_wait_on_a_device():
    grid = Grid.make("quadratic", LINEAR, 6)
    for solver in (*NAMED, *OTHERS):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x_bar, second = (torch.empty((2, *SHAPE), device="cuda", dtype=torch.float64) for _ in range(2))
            field = EpsilonField(lambda x, t: torch.sin(x) * t.reshape(-1, 1, 1, 1), LINEAR, dtype=torch.float32)
            run = integrate(field, x_bar, grid, solver, second=second)
            assert (run.x_bar.device.type, run.second.device.type) == ("cuda", "cuda")


def test_states_keep_their_dtype(mixture):
    field, images, _ = mixture
    for solver in NAMED:
        there = encode(field, images, nfe=10, solver=solver, dtype=torch.float32)
        assert (there.x.dtype, there.second.dtype) == (torch.float32, torch.float32)
        back = sample(field, there.x, solver=solver, grid=there.grid, second=there.second.double(), dtype=torch.float32)
        assert back.x.dtype == torch.float32


def test_gradients_flow_from_the_second_state(mixture):
    """By differences: the derivative of a run in its second state along one direction."""
    field, images, latent = mixture
    grid = Grid.explicit(np.linspace(2.0, 0.5, 6), LINEAR)
    for solver in NAMED:
        second = (images + 0.1).clone().requires_grad_(True)
        for options in ({"gradients": True}, {"checkpoint": True}):
            run = integrate(field, images, grid, solver, second=second, **options)
            (slope,) = torch.autograd.grad((run.x_bar * latent).sum(), second)
            step = 1e-5 * latent
            high, low = (
                integrate(field, images, grid, solver, second=second.detach() + sign * step).x_bar for sign in (1, -1)
            )
            assert float((slope * latent).sum()) == pytest.approx(float(((high - low) * latent).sum()) / 2e-5, rel=1e-5)


# -- what fails -----------------------------------------------------------------------------------
def spoiled(below):
    """ε, one by one, that is NaN for the sample that holds more than 5 anywhere, below a level (or above, if negative)."""

    def eps(x, sigma):
        out = torch.tanh(x) * (0.5 + 0.1 * math.cos(sigma))
        lost = (x[:, :1] > 5.0) & ((sigma < below) if below > 0.0 else (sigma > -below))
        return torch.where(lost, torch.nan, out)

    return EpsilonField.from_sigma(eps, LINEAR)


@pytest.mark.parametrize("with_second", [False, True], ids=["alone", "both"])
@pytest.mark.parametrize("solver", [*NAMED, *OTHERS], ids=name)
def test_one_that_fails_leaves_its_neighbours(solver, with_second):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] += 30.0
    second = {"second": x + 0.01} if with_second and not isinstance(solver, AsynchronousLeapfrog) else {}
    second |= {"second": torch.tanh(x)} if with_second and not second else {}
    grid = Grid.explicit(np.linspace(3.0, 0.5, 11), LINEAR)
    bad = integrate(spoiled(1.6), x, grid, solver, **second)
    good = integrate(spoiled(1e-9), x, grid, solver, **second)
    assert bad.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    assert good.success
    for a, b in ((bad.x_bar, good.x_bar), (bad.second, good.second)):
        bits(a[[0, 2]], b[[0, 2]])
    assert bool(bad.x_bar.isfinite().all())
    assert bool(bad.second.isfinite().all())
    # It holds a pair that was one: it goes back to where it began.
    assert 1.5 <= bad.sigma[1] < 3.0
    nodes = grid.sigmas[grid.sigmas >= bad.sigma[1] - 1e-9]
    field = spoiled(1e-9)
    back = integrate(field, bad.x_bar[1:2], nodes[::-1], solver, second=bad.second[1:2])
    torch.testing.assert_close(back.x_bar, x[1:2], rtol=0.0, atol=1e-9)


def test_one_that_fails_at_once_holds_what_it_was_given():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] += 30.0
    for solver in NAMED:
        run = integrate(spoiled(9.0), x, np.linspace(3.0, 0.5, 5), solver)
        assert run.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
        assert run.sigma[1] == 3.0
        bits(run.x_bar[1], x[1])


# -- what is refused --------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [0.0, -1.0, 1.5, math.nan, "1", True])
def test_bad_gammas(gamma):
    with pytest.raises(ValueError, match=r"gamma of BDIA must lie in \(0, 1\]"):
        TwoStep(gamma=gamma)


@pytest.mark.parametrize("zeta", [0.0, 1.0, -0.5, math.nan, None, True])
def test_bad_zetas(zeta):
    with pytest.raises(ValueError, match="zeta must lie between 0 and 1"):
        McCallumFoster(get("ddim"), zeta)


@pytest.mark.parametrize("base", ["ab2", "alf", "mf-ddim", "dopri5", "implicit-midpoint", "inverse-ddim", "ipndm"])
def test_bad_bases(base):
    with pytest.raises(ValueError, match=f"base must be a solver of fixed steps .* but got {base}"):
        McCallumFoster(get(base))
    with pytest.raises(ValueError, match="base must be a solver of fixed steps"):
        get(f"mf-{base}")


def test_bad_parts():
    with pytest.raises(ValueError, match=r"base must be a solver of fixed steps .* but got 'ddim'"):
        McCallumFoster("ddim")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear must be NOISE or a Flow"):
        AsynchronousLeapfrog(linear=ddim_ode.DATA)
    with pytest.raises(ValueError, match="c of a Flow must be a positive number"):
        AsynchronousLeapfrog(linear=Flow(-1.0))


@pytest.mark.parametrize("make", [TwoStep, AsynchronousLeapfrog])
def test_bad_clocks(mixture, make):
    """A name that there is not, one that falls, and one whose parts contradict each other: before any call."""
    field, _, latent = mixture
    falls = Clock("falls", lambda s: -s, lambda u: -u, lambda s: -np.ones_like(s))
    wrong = Clock("wrong", lambda s: 2.0 * s, lambda u: 0.5 * u, np.ones_like)
    for clock, said in ((falls, "must rise strictly"), (wrong, "contradicts itself"), ("tan", "unknown clock 'tan'")):
        field.nfe = 0
        with pytest.raises(ValueError, match=said):
            sample(field, latent, steps=5, solver=make(clock=clock))
        assert field.nfe == 0


def test_bad_second_states(mixture):
    field, images, latent = mixture
    grid = Grid.make("quadratic", LINEAR, 4)
    field.nfe = 0
    for run in (
        lambda **o: sample(field, latent, grid=grid, **o),
        lambda **o: encode(field, images, grid=grid, **o),
        lambda **o: integrate(field, latent, grid, **o),
    ):
        with pytest.raises(ValueError, match="second is for solvers that keep two states, and ddim keeps one"):
            run(solver="ddim", second=latent)
        with pytest.raises(ValueError, match=r"second must (be a tensor of|have) the shape of the state"):
            run(solver="alf", second=latent[:1])
        with pytest.raises(ValueError, match="second must be finite"):
            run(solver="alf", second=latent * torch.nan)
        with pytest.raises((TypeError, ValueError), match=r"second must be a (torch )?tensor"):
            run(solver="alf", second=[1.0])
    assert field.nfe == 0
    for solver in ("ddim", "rk4", "ab2"):
        with pytest.raises(TypeError, match=f"{solver} has no second state"):
            get(solver).begin(field, latent, latent, grid)


def test_names():
    assert [s.name for s in NAMED] == ["o-belm", "bdia", "mf-midpoint", "mf-rk4", "alf", "alf-flow"]
    assert TwoStep(clock=arctan(2.0)).name == "o-belm-arctan(2)"
    assert TwoStep(gamma=0.96).name == "bdia(0.96)"
    assert get("mf-ees25-arctan").base == get("ees25-arctan")
    assert McCallumFoster(RungeKutta(RK4), 0.9).name == "mf-rk4(0.9)"
    assert get("mf-rk4") == McCallumFoster(RungeKutta(RK4))
    assert all(s.states == 2 and s.differentiable and s.budgeted for s in NAMED)
    assert (LOW, HIGH) == (0.6, 1.5)  # what the orders of reversal above are measured between
