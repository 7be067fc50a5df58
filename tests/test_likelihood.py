"""Log-densities: against exact ones, closed forms, and Jacobians by finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_ode
from benchmarks.convergence import mixture
from benchmarks.problems import digits_mixture
from ddim_ode import (
    Adaptive,
    EpsilonField,
    Gaussian,
    Grid,
    Multistep,
    NoiseSchedule,
    Scipy,
    Status,
    TorchDiffEq,
    log_density,
)  # fmt: skip
from ddim_ode.likelihood import DEFAULT
from ddim_ode.models.analytic import EmpiricalEpsilon, GaussianEpsilon, MixtureEpsilon
from ddim_ode.solvers import get
from ddim_ode.solvers.runge_kutta import DOP853, DOPRI5

LINEAR = NoiseSchedule.linear()
LOW = LINEAR.sigma_min
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64)
GAUSSIAN = GaussianEpsilon(torch.tensor([0.3, -1.0, 0.4, 0.0]), A @ A.T / 4 + 0.1 * torch.eye(4, dtype=torch.float64))
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def field_of(eps):
    return EpsilonField.from_sigma(eps, LINEAR, shape=eps.shape)


def noised(eps, n, sigma=LOW, seed=0):
    """Draws of x at `sigma`, and their exact log-density."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(eps, MixtureEpsilon):
        clean = eps.sample(n, draw)
    else:
        unit = torch.randn(n, len(eps.mean), generator=draw, dtype=torch.float64)
        clean = (eps.mean + (unit * eps.variance.sqrt()) @ eps.basis.T).reshape(n, *eps.shape)
    x_bar = clean + sigma * torch.randn(clean.shape, generator=draw, dtype=torch.float64)
    volume = 0.5 * clean[0].numel() * math.log1p(sigma * sigma)
    return x_bar / math.sqrt(1.0 + sigma * sigma), eps.log_density(x_bar, sigma) + volume


class Net(nn.Module):
    """Three numbers, felt through two layers and the label."""

    shape = (3,)

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        weights = [0.8 * torch.randn(size, generator=draw, dtype=torch.float64) for size in ((3, 8), (8,), (8, 3))]
        self.into, self.bias, self.out = map(nn.Parameter, weights)

    def forward(self, x, t):
        return torch.tanh(x @ self.into + self.bias + 0.002 * t.unsqueeze(1)) @ (0.2 * self.out) + 0.9 * x


# -- exact densities ----------------------------------------------------------------------------
SOLVERS = {
    "dopri5": (Adaptive(DOPRI5, **TIGHT), {}),
    "dop853": (Adaptive(DOP853, **TIGHT), {}),
    "scipy-dop853": (Scipy("DOP853", rtol=1e-10, atol=1e-10), {}),
    "torchdiffeq-dopri8": (TorchDiffEq("dopri8", rtol=1e-10, atol=1e-10), {}),
    "rk4": (get("rk4"), {"steps": 700, "grid": "asinh"}),
    "ab4-rk": (get("ab4-rk"), {"steps": 1200, "grid": "asinh"}),
    "flowdown5": (get("flowdown5"), {"steps": 200, "grid": "flow"}),
    "default": (None, {"nfe": 350}),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("eps", [GAUSSIAN, mixture().eps], ids=["gaussian", "mixture"])
def test_exact_traces_give_exact_densities(eps, name):
    solver, options = SOLVERS[name]
    x, exact = noised(eps, 4)
    found = log_density(field_of(eps), x, solver=solver, prior=eps.log_density, **options)
    torch.testing.assert_close(found.log_density, exact, rtol=0.0, atol=1e-6)
    assert found.trace == "exact"
    assert not found.trace_error.any()
    assert found.vjps == found.nfe * x.shape[1]
    assert found.bits is None


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_they_do_so_at_any_level(sigma):
    for eps in (GAUSSIAN, mixture().eps):
        x, exact = noised(eps, 3, sigma)
        found = log_density(field_of(eps), x, sigma=sigma, solver=Adaptive(DOP853, **TIGHT), prior=eps.log_density)
        torch.testing.assert_close(found.log_density, exact, rtol=0.0, atol=1e-6)
        assert found.encoding.grid.sigmas[0] == sigma


def test_in_64_dimensions():
    eps = digits_mixture()
    x, exact = noised(eps, 2, 0.3)
    found = log_density(field_of(eps), x, sigma=0.3, solver=Adaptive(DOP853, **TIGHT), prior=eps.log_density)
    torch.testing.assert_close(found.log_density, exact, rtol=0.0, atol=1e-6)
    assert found.trace == "exact"


def test_a_finite_data_set():
    """From σ = 0.5 on it is as smooth as any mixture."""
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eps = EmpiricalEpsilon(data)
    x_bar = data[:4] + 0.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = eps.log_density(x_bar, 0.5) + 1.5 * math.log1p(0.25)
    solver = Adaptive(DOP853, **TIGHT)
    found = log_density(field_of(eps), x_bar / math.sqrt(1.25), sigma=0.5, solver=solver, prior=eps.log_density)
    torch.testing.assert_close(found.log_density, exact, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, LOW, 0.5])
def test_with_the_prior_that_sampling_starts_from_a_gaussian_has_a_closed_form(sigma):
    """The flow of N(μ, Σ) is linear, so what N(0, (1 + σ_T²) I) is carried to is Gaussian too."""
    top, eye = LINEAR.sigma_max, torch.eye(4, dtype=torch.float64)
    origin = torch.zeros(1, 4, dtype=torch.float64)
    mean = GAUSSIAN.solution(origin, top, sigma)
    root = GAUSSIAN.solution(eye, top, sigma) - mean  # its rows: where the directions go
    scale = (1.0 + top * top) / (1.0 + sigma * sigma)
    pushed = torch.distributions.MultivariateNormal(mean[0] / math.sqrt(1.0 + sigma * sigma), root.T @ root * scale)
    x, _ = noised(GAUSSIAN, 5, sigma)
    found = log_density(field_of(GAUSSIAN), x, sigma=sigma, solver=Adaptive(DOP853, rtol=1e-10, atol=1e-10))
    torch.testing.assert_close(found.log_density, pushed.log_prob(x), rtol=0.0, atol=1e-6)


def test_tolerances_are_nats_per_dimension():
    """The error follows the tolerance over six decades, in 64 dimensions as in 3."""
    for eps, n, sigma, tolerances in (
        (mixture().eps, 4, LOW, (1e-3, 1e-6, 1e-9)),
        (digits_mixture(), 1, 0.3, (1e-3, 1e-6)),
    ):
        x, exact = noised(eps, n, sigma)
        for tolerance in tolerances:
            solver = Adaptive(DOP853, rtol=tolerance, atol=tolerance)
            found = log_density(field_of(eps), x, sigma=sigma, solver=solver, prior=eps.log_density)
            error = float((found.log_density - exact).abs().max()) / x[0].numel()
            assert 1e-3 * tolerance < error < 10.0 * tolerance


@pytest.mark.parametrize("name", ["bs32", "dopri5", "dop853"])
def test_of_many_dimensions_too_where_nothing_else_asks_for_steps(name):
    """At the mean of a Gaussian x̄ stays where it is: one number among hundreds decides the steps."""
    eps, tolerance = GaussianEpsilon(torch.zeros(400), torch.full((400,), 0.3)), 1e-4
    solver = replace(get(name), rtol=tolerance, atol=tolerance)
    x = torch.zeros(1, 400, dtype=torch.float64)
    found = log_density(
        field_of(eps), x, solver=solver, probes=1, prior=eps.log_density
    )  # of a diagonal one probe is enough
    exact = eps.log_density(x, LOW) + 200.0 * math.log1p(LOW**2)
    error = float((found.log_density - exact).abs().max()) / 400
    assert error < {"bs32": 20.0, "dopri5": 10.0, "dop853": 1.0}[name] * tolerance


# -- independent checks -------------------------------------------------------------------------
def test_the_jacobian_of_the_encoding_by_finite_differences():
    """Log p(x) = log N(x_T; 0, I) + log |det ∂x_T/∂x|, whatever integrates the divergence; for a network, by the same solver."""
    field, solver = EpsilonField(Net(), LINEAR), Adaptive(DOP853, rtol=1e-10, atol=1e-10)
    x = torch.tensor([[0.2, -0.7, 0.5], [1.0, 0.1, -0.4]], dtype=torch.float64)
    ends, h = [LOW, LINEAR.sigma_max], 1e-4

    def encoded(x):
        return ddim_ode.encode(field, x, grid=ends, solver=solver).x

    columns = []
    for i in range(3):
        e = torch.zeros(1, 3, dtype=torch.float64)
        e[0, i] = h
        near, far = encoded(x + e) - encoded(x - e), encoded(x + 2 * e) - encoded(x - 2 * e)
        columns.append((8.0 * near - far) / (12.0 * h))
    volume = torch.linalg.slogdet(torch.stack(columns, dim=2)).logabsdet
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(encoded(x)).sum(dim=1)
    found = log_density(field, x, solver=solver)
    torch.testing.assert_close(found.log_density, normal + volume, rtol=0.0, atol=1e-6)
    assert volume.abs().max() > 0.5
    torch.testing.assert_close(found.latent, encoded(x), rtol=0.0, atol=1e-8)


def test_the_density_integrates_to_one():
    """Of two Gaussians, on a fine mesh, with the prior that sampling starts from."""
    means = torch.tensor([[0.6, 0.2], [-0.5, -0.3]])
    covariances = torch.tensor([[[0.1, 0.04], [0.04, 0.05]], [[0.08, -0.03], [-0.03, 0.12]]])
    eps = MixtureEpsilon(torch.tensor([0.4, 0.6]), means, covariances)
    axis = torch.linspace(-2.4, 2.4, 60, dtype=torch.float64)
    mesh = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    found = log_density(field_of(eps), mesh, sigma=0.1, nfe=120)
    assert float(found.log_density.exp().sum()) * cell == pytest.approx(1.0, abs=2e-5)


# -- the estimate -------------------------------------------------------------------------------
def test_two_standard_errors_cover_as_often_as_they_should():
    """Of 400 samples with 8 probes, about 92 per cent: what Student's t with 7 degrees of freedom says."""
    eps = mixture().eps
    draw = torch.Generator().manual_seed(5)
    x = eps.sample(400, draw)
    options = {"sigma": 0.3, "nfe": 30}
    exact = log_density(field_of(eps), x, **options)
    found = log_density(field_of(eps), x, probes=8, seed=3, **options)
    assert found.trace == "hutchinson"
    assert found.vjps == found.nfe * 8
    off = (found.log_density - exact.log_density) / found.trace_error
    covered = float((off.abs() <= 2.0).double().mean())
    assert 0.88 < covered < 0.96
    # The mean's own error bar, and that it shrinks as more are asked for.
    mean, truth = found.mean_log_density, exact.mean_log_density
    assert abs(mean.value - truth.value) < 3.0 * mean.trace_error
    assert (truth.trace_error, truth.n) == (0.0, 400)
    more = log_density(field_of(eps), x, probes=32, seed=3, **options)
    assert 1.7 < mean.trace_error / more.mean_log_density.trace_error < 2.3


def test_probes_are_of_image_and_number_alone():
    eps = mixture().eps
    field, x = field_of(eps), eps.sample(5, torch.Generator().manual_seed(6))
    options = {"sigma": 0.3, "nfe": 12}
    whole = log_density(field, x, probes=3, seed=4, **options)
    for size in (1, 2):
        parts = log_density(field, x, probes=3, seed=4, batch_size=size, **options)
        torch.testing.assert_close(parts.log_density, whole.log_density, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.trace_error, whole.trace_error, rtol=1e-9, atol=1e-12)
    rest = log_density(field, x[2:], probes=3, seed=4, first=2, **options)
    torch.testing.assert_close(rest.log_density, whole.log_density[2:], rtol=1e-12, atol=1e-12)
    # The first of three is the one of one: 3 m₃ = m₁ + the other two, and so for their second moment.
    one = log_density(field, x, probes=1, seed=4, **options)
    two = log_density(field, x, probes=2, seed=4, **options)
    assert one.trace_error.isnan().all()
    torch.testing.assert_close((2.0 * two.log_density - 2.0 * one.log_density).abs() / 2.0, two.trace_error)
    other = log_density(field, x, probes=3, seed=5, **options)
    assert (other.log_density != whole.log_density).sum() >= 3  # of so few signs some agree


def test_adaptive_steps_follow_their_samples():
    """Rows leave the batch as they finish: probes, conditions and noise levels must go with them."""
    condition = torch.tensor([[0.0], [30.0], [5.0]], dtype=torch.float64)
    net = lambda x, t, c: torch.tanh(2.0 * c * x) + 0.1 * x * torch.roll(x, 1, dims=1)
    x = torch.tensor([[0.1, 0.2, 0.3], [2.0, -1.0, 0.4], [-0.6, 0.7, 1.1]], dtype=torch.float64)
    options = {"solver": Adaptive(DOPRI5, rtol=1e-6, atol=1e-6), "probes": 2}
    whole = log_density(EpsilonField(net, LINEAR, condition=condition), x, **options)
    assert len(set(whole.encoding.outcome.nfe)) > 1
    for i in range(3):
        field = EpsilonField(net, LINEAR, condition=condition[i : i + 1])
        alone = log_density(field, x[i : i + 1], first=i, **options)
        torch.testing.assert_close(alone.log_density, whole.log_density[i : i + 1], rtol=1e-10, atol=1e-10)


def test_a_float32_network_in_a_float64_state():
    double, single = Net(), Net().float()
    x = torch.tensor([[0.2, -0.7, 0.5], [1.0, 0.1, -0.4]], dtype=torch.float64)
    precise, plain = (log_density(EpsilonField(net, LINEAR), x, nfe=40) for net in (double, single))
    assert plain.log_density.dtype == torch.float64
    error = (plain.log_density - precise.log_density).abs().max()
    assert 0.0 < error < 1e-4
    rough = log_density(EpsilonField(double, LINEAR), x, nfe=40, dtype=torch.float32)
    assert rough.log_density.dtype == torch.float64
    assert 0.0 < (rough.log_density - precise.log_density).abs().max() < 1e-3
    assert all(p.grad is None for p in double.parameters())


# -- failures -----------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["flowup4", "rk4", Adaptive(DOPRI5), Scipy("DOP853")], ids=str)
def test_a_failed_sample_keeps_its_status_and_its_neighbours(solver):
    def net(x, t):
        bad = (x.detach().select(1, 0) > 50.0).unsqueeze(1)
        return torch.where(bad, torch.full_like(x, math.nan), torch.sin(x) + x)

    x = torch.tensor([[0.1, 0.2, 0.3], [60.0, -1.0, 0.4], [-0.6, 0.7, 1.1]], dtype=torch.float64)
    options = {"solver": solver} if isinstance(solver, (Adaptive, Scipy)) else {"solver": solver, "nfe": 20}
    near = 1e-4 if isinstance(solver, Scipy) else 1e-9  # a batch of its has one step size
    field = EpsilonField(net, LINEAR)
    found = log_density(field, x, probes=2, **options)
    assert found.status == (Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    assert found.log_density.isnan().tolist() == found.trace_error.isnan().tolist() == [False, True, False]
    assert found.mean_log_density.n == 2
    for i in (0, 2):
        alone = log_density(field, x[i : i + 1], first=i, probes=2, **options)
        torch.testing.assert_close(alone.log_density, found.log_density[i : i + 1], rtol=0.0, atol=near)
    # In batches, where rows are counted from elsewhere, too.
    parts = log_density(field, x, probes=2, batch_size=2, **options)
    torch.testing.assert_close(parts.log_density, found.log_density, rtol=0.0, atol=near, equal_nan=True)


def test_steps_that_run_out():
    eps = mixture().eps
    found = log_density(field_of(eps), noised(eps, 2)[0], solver=Adaptive(DOPRI5, max_steps=3))
    assert set(found.status) == {Status.MAX_STEPS}
    assert found.log_density.isnan().all()
    mean = found.mean_log_density
    assert math.isnan(mean.value)
    assert mean.n == 0


# -- images -------------------------------------------------------------------------------------
PIXELS = torch.randint(0, 256, (6, 1, 3, 3), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


def dequantised(images, seed, first=0, **options):
    """The images as the field is first shown them."""
    shown = []
    eps = GaussianEpsilon(torch.zeros(1, 3, 3), 0.2 * torch.ones(1, 3, 3))

    def look(x_bar, sigma):
        shown.append(x_bar.detach().clone())
        return eps(x_bar, sigma)

    log_density(field_of_shape(look, (1, 3, 3)), images, sigma=0.0, seed=seed, first=first, nfe=4, **options)
    return shown


def field_of_shape(eps, shape):
    return EpsilonField.from_sigma(eps, LINEAR, shape=shape)


def test_uint8_images_are_dequantised_by_seed_and_index():
    (x, *_) = dequantised(PIXELS, 0)
    u = (x + 1.0) * 127.5 - PIXELS + 0.5
    assert float(u.min()) > -1e-9
    assert float(u.max()) < 1.0 + 1e-9
    assert float(u.std()) == pytest.approx(12**-0.5, rel=0.25)
    assert len(u.flatten().unique()) == u.numel()
    assert not torch.equal(dequantised(PIXELS, 1)[0], x)
    assert torch.equal(dequantised(PIXELS[2:], 0, first=2)[0], x[2:])
    assert torch.equal(dequantised(PIXELS, 0, batch_size=4)[0], x[:4])
    # Nor are they the latents' draws, nor the probes'.
    latent = ddim_ode.noise((1, 3, 3), 6, 0)
    assert abs(float(torch.corrcoef(torch.stack((latent.flatten(), u.flatten())))[0, 1])) < 0.5


def test_bits_per_dimension_of_a_gaussian_are_what_its_density_says():
    """Bits are those of the integer pixels: −∫ p over a pixel's cell ≤ that of the dequantised density (Jensen), and near it."""
    eps = GaussianEpsilon(torch.zeros(1, 3, 3), 0.2 * torch.ones(1, 3, 3))
    top, draws = LINEAR.sigma_max, 64
    images = PIXELS[:1].expand(draws, 1, 3, 3)  # of one image many dequantisations
    found = log_density(field_of(eps), images, sigma=0.0, solver=Adaptive(DOP853, **TIGHT))
    variance = 0.2 * (1.0 + top * top) / (0.2 + top * top)  # of what N(0, (1 + σ_T²) I) is carried to
    normal = torch.distributions.Normal(0.0, math.sqrt(variance))
    k = PIXELS[0].double()
    cells = normal.cdf((k + 0.5) / 127.5 - 1.0) - normal.cdf((k - 0.5) / 127.5 - 1.0)
    discrete = float(-cells.log2().mean())
    mean = found.mean_bits
    assert mean.value == pytest.approx(discrete, abs=4.0 * mean.error)
    assert 0.0 < mean.error < 0.01
    assert mean.trace_error == 0.0
    torch.testing.assert_close(found.bits, math.log2(127.5) - found.log_density / (9 * math.log(2.0)))
    assert not found.bits_error.any()


def test_bits_carry_the_error_of_the_trace():
    field = EpsilonField(lambda x, t: torch.tanh(x + 0.3 * torch.roll(x, 1, dims=3)), LINEAR, shape=(1, 3, 3))
    found = log_density(field, PIXELS, probes=3, nfe=10)
    torch.testing.assert_close(found.bits_error, found.trace_error / (9 * math.log(2.0)))
    mean = found.mean_bits
    assert mean.value == pytest.approx(float(found.bits.mean()))
    assert mean.error == pytest.approx(float(found.bits.std()) / math.sqrt(6))
    assert mean.trace_error == pytest.approx(float(found.bits_error.square().sum().sqrt()) / 6)
    floats = log_density(field, PIXELS.double() / 127.5 - 1.0, probes=3, nfe=10)
    assert floats.bits is None
    assert floats.mean_bits is None
    assert floats.bits_error is None


# -- calls, budgets, devices --------------------------------------------------------------------
@pytest.mark.parametrize("solver", [None, "heun", "dpm3s", "ab4-rk", "heun-edm"])
@pytest.mark.parametrize("sigma", [0.0, LOW, 0.5])
def test_calls_are_counted_and_stay_within_the_budget(solver, sigma):
    field = EpsilonField(Net(), LINEAR)
    found = log_density(field, torch.zeros(2, 3), solver=solver, sigma=sigma, nfe=31)
    assert 27 <= found.nfe <= 31
    assert field.nfe == found.nfe
    assert found.vjps == 3 * found.nfe
    assert found.encoding.grid.sigmas[0] == sigma
    assert found.encoding.grid.sigmas[-1] == LINEAR.sigma_max


def test_a_grid_of_nodes_says_where_it_begins():
    field, x = EpsilonField(Net(), LINEAR), torch.zeros(1, 3)
    nodes = [100.0, 10.0, 1.0, 0.2]
    for grid in (nodes, nodes[::-1], Grid.explicit(nodes, LINEAR)):
        assert log_density(field, x, grid=grid).encoding.grid.sigmas.tolist() == nodes[::-1]
        with pytest.raises(ValueError, match=r"sigma = 0.1 contradicts the grid given, which begins at 0.2"):
            log_density(field, x, grid=grid, sigma=0.1)
    assert log_density(field, x, grid="log", steps=7).encoding.grid.steps == 7


def test_nothing_is_recorded_and_no_grad_is_left_as_it_was():
    field, x = EpsilonField(Net(), LINEAR), torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        found = log_density(field, x, nfe=6)
        assert not torch.is_grad_enabled()
    again = log_density(field, x, nfe=6)
    assert torch.is_grad_enabled()
    assert torch.equal(found.log_density, again.log_density)
    assert not any(y.requires_grad for y in (again.log_density, again.latent, again.trace_error))


@pytest.mark.parametrize("solver", ["flowup4", "ab3", "rk4", "dpmpp2m"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_nothing_waits_inside_the_loop(solver, trace):
    """Fake tensors have no values: any look at one fails; but on the CPU: backward passes need CUDA itself."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        field = EpsilonField(lambda x, t: torch.sin(x) * t.reshape(-1, 1), LINEAR, dtype=torch.float32)
        augmented = ddim_ode.likelihood._Augmented(field, (5,), trace, 5 if trace == "exact" else 2, 0, 0, False)
        state = torch.empty((3, augmented.shape[0]), dtype=torch.float64)
        run = ddim_ode.integrate(augmented, state, Grid.make("quadratic", LINEAR, 6).reversed(), solver)
        assert run.x_bar.shape == state.shape


# -- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trace": "full"}, 'trace must be "exact" or "hutchinson", but got \'full\''),
        ({"trace": "exact", "probes": 2}, "probes are those of an estimated trace"),
        ({"probes": 0}, "probes must be a whole number"),
        ({"sigma": -0.1}, "sigma must be a noise level in"),
        ({"sigma": 1e9}, "sigma must be a noise level in"),
        ({"sigma": math.nan}, "sigma must be a noise level in"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be below"),
        ({"first": -1}, "first must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"solver": "abb3"}, "did you mean ab3"),
        ({"solver": "dopri5", "nfe": 20}, "no budget of steps or nfe"),
        ({"x": torch.zeros(2, 4)}, r"x must have shape \(B, 3\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, r"x in uint8 must be images \(B, C, H, W\)"),
        ({"x": torch.full((2, 3), math.nan)}, "x must be finite"),
        ({"solver": Multistep(2, linear=Gaussian(torch.zeros(3), torch.ones(3)))}, "Gaussian part must fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_call(options, says):
    field = EpsilonField(Net(), LINEAR)
    x = options.pop("x", torch.zeros(2, 3)) if "x" in options else torch.zeros(2, 3)
    with pytest.raises(ValueError, match=says):
        log_density(field, x, **options)
    assert field.nfe == 0


def test_more_refusals():
    field, x = EpsilonField(Net(), LINEAR), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="prior must be callable"):
        log_density(field, x, prior=1.0)
    with pytest.raises(TypeError, match="field must be an EpsilonField"):
        log_density(Net(), x)
    with pytest.raises(ValueError, match="clips or thresholds the predicted data has no density"):
        log_density(EpsilonField(Net(), LINEAR, clip=1.0), x)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        log_density(field, x)
    with pytest.raises(ValueError, match=r"condition has 3 rows, but the batch has 2"):
        log_density(EpsilonField(lambda x, t, c: x * c, LINEAR, condition=torch.zeros(3, 1)), x, batch_size=1)
    with pytest.raises(ValueError, match=r"prior must return one log-density a sample, shape \(2,\)"):
        log_density(field, x, nfe=4, prior=lambda x_bar, sigma: x_bar)
    assert field.nfe == 4


@pytest.mark.parametrize(
    "model",
    [torch.no_grad()(lambda x, t: torch.sin(x)), lambda x, t: torch.sin(x.detach()), lambda x, t: torch.ones_like(x)],
    ids=["no_grad", "detached", "constant"],
)
def test_a_model_that_hides_from_autograd_is_told_so(model):
    with pytest.raises(ValueError, match="autograd finds no way"):
        log_density(EpsilonField(model, LINEAR), torch.zeros(2, 3), nfe=4)


def test_detached_behind_parameters_too():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="autograd finds no way"):
        log_density(EpsilonField(lambda x, t: x.detach() * weight, LINEAR), torch.zeros(2, 3), nfe=4)


def test_an_exact_trace_of_many_dimensions_says_what_it_takes():
    field = EpsilonField(lambda x, t: torch.sin(x), LINEAR)
    x = torch.zeros(1, 65)
    assert log_density(field, x, nfe=2).trace == "hutchinson"
    with pytest.warns(UserWarning, match="takes 65 vector-Jacobian products"):
        found = log_density(field, x, nfe=2, trace="exact")
    assert found.vjps == 65 * found.nfe
    assert log_density(field, x[:, :64], nfe=2).trace == "exact"


# -- the exact models' own ----------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [0.0, 0.7, 30.0])
def test_exact_models_know_their_density(sigma):
    eps = mixture().eps
    x = eps.sample(5, torch.Generator().manual_seed(9))
    covariances = eps.bases @ torch.diag_embed(eps.variances) @ eps.bases.transpose(1, 2)
    total = covariances + sigma**2 * torch.eye(3, dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(eps.means, total)
    both = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(eps.weights), parts)
    torch.testing.assert_close(eps.log_density(x, sigma), both.log_prob(x), rtol=1e-10, atol=1e-10)
    one = GaussianEpsilon(eps.means[0], covariances[0])
    alone = torch.distributions.MultivariateNormal(eps.means[0], total[0])
    torch.testing.assert_close(one.log_density(x, sigma), alone.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_so_does_a_data_set(sigma, chunk):
    data = torch.randint(0, 256, (40, 1, 2, 2), generator=torch.Generator().manual_seed(10), dtype=torch.uint8)
    points = data.double() / 127.5 - 1.0
    x = points[:4] + sigma * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    found = EmpiricalEpsilon(data, chunk=chunk).log_density(x, sigma)
    parts = torch.distributions.Normal(points, sigma).log_prob(x.unsqueeze(1)).flatten(2).sum(dim=2)
    torch.testing.assert_close(found, parts.logsumexp(dim=1) - math.log(40), rtol=1e-10, atol=1e-10)


def test_where_there_is_no_density_it_is_refused():
    flat = GaussianEpsilon(torch.zeros(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="leaves a direction without variance"):
        flat.log_density(torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="above 0"):
        EmpiricalEpsilon(torch.zeros(3, 2)).log_density(torch.zeros(1, 2), 0.0)


def test_a_record_of_the_run_is_the_encoding():
    """The state without its last columns is what ``encode`` gives, solver by solver."""
    field, x = EpsilonField(Net(), LINEAR), torch.tensor([[0.2, -0.7, 0.5]], dtype=torch.float64)
    solver, grid, options = DEFAULT
    nodes = Grid.make(grid, LINEAR, 20, **options).reversed()
    found = log_density(field, x, nfe=20, sigma=0.0)
    run = ddim_ode.encode(field, x, solver=solver, grid=nodes)
    torch.testing.assert_close(found.latent, run.x, rtol=1e-12, atol=1e-12)
    assert found.encoding.grid == run.grid
    assert np.array_equal(found.status, run.status)
    assert replace(found.encoding, x_bar=run.x_bar).success


def test_a_sample_that_is_not_finite_fails_alone():
    field, x = EpsilonField(Net(), LINEAR), torch.tensor([[0.2, -0.7, 0.5], [0.1, 0.1, 0.1]], dtype=torch.float64)
    well, spoilt = log_density(field, x, nfe=8), x.clone()
    spoilt[1, 2] = math.nan
    found = log_density(field, spoilt, nfe=8)
    assert found.status == (Status.SUCCESS, Status.NONFINITE)
    assert found.log_density[0] == well.log_density[0]
    assert found.log_density[1].isnan()
    assert found.mean_log_density.n == 1
