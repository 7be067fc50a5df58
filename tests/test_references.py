"""torchdiffeq and scipy behind the contract: as right as their tolerance, and no failure without a status."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.convergence import by_dop853
from ddim_ode import EpsilonField, NoiseSchedule, Scipy, Status, TorchDiffEq, encode, integrate, noise, sample
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.solvers import get

LINEAR = NoiseSchedule.linear()
TOP = LINEAR.sigma_max
SOLVERS = [
    TorchDiffEq("dopri5"),
    TorchDiffEq("dopri8"),
    TorchDiffEq("bosh3"),
    Scipy("DOP853"),
    Scipy("LSODA"),
    Scipy("RK45"),
]
EXACT = GaussianEpsilon(torch.zeros(2, 3), torch.full((2, 3), 0.5))
FIELD = EpsilonField.from_sigma(EXACT, LINEAR, shape=(2, 3))
X = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
by_name = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)


@by_name
@pytest.mark.parametrize("nodes", [[TOP, 0.0], [0.0, 0.4, TOP]], ids=["sampling", "encoding"])
def test_the_error_is_of_the_size_of_the_tolerance(solver, nodes):
    found = []
    for tolerance in (1e-4, 1e-7):
        field = EpsilonField.from_sigma(EXACT, LINEAR)
        run = integrate(field, X, nodes, replace(solver, rtol=tolerance, atol=tolerance))
        assert run.success
        assert run.sigma == (nodes[-1],) * 4
        assert run.nfe == field.nfe == run.outcome.nfe[0]
        assert run.outcome.accepted[0] > 3
        end = EXACT.solution(X, nodes[0], nodes[-1])
        found.append(float((run.x_bar - end).square().mean().sqrt() / np.sqrt(1.0 + nodes[-1] ** 2)))
        assert found[-1] < 100.0 * tolerance
    assert found[1] < 0.1 * found[0]


@by_name
def test_dense_output_is_right_to_the_tolerance(problems, solver):
    eps, low = problems["mixture"].eps, problems["mixture"].low
    field = EpsilonField.from_sigma(eps, LINEAR)
    levels = [0.05, 0.4, 2.0, 15.0, 80.0]
    run = integrate(field, low, [0.0, 1.0, TOP], replace(solver, rtol=1e-6, atol=1e-6), save_at=levels)
    state, sigma = low, 0.0
    for level, saved in zip(levels, run.saved, strict=True):
        state, sigma = by_dop853(eps, state, sigma, level), level
        assert float((saved - state).square().mean().sqrt()) < 1e-4 * np.sqrt(1.0 + level**2)


@pytest.mark.parametrize(
    ("solver", "each", "begun"),
    [
        (TorchDiffEq("dopri5"), 1, 0),
        (TorchDiffEq("dopri8"), 15, 2),
        (Scipy("DOP853"), 4, 0),
        (Scipy("RK45"), 1, 0),
        (Scipy("LSODA"), 1, 0),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_what_dense_output_costs(solver, each, begun):
    """Calls at each accepted step, and, over the two nodes that a run starts anew from, those at them."""
    plain, dense = (integrate(FIELD, X, [3.0, 1.0, 0.0], solver, dense=kept) for kept in (False, True))
    assert dense.outcome.accepted == plain.outcome.accepted
    assert dense.nfe - plain.nfe == each * plain.outcome.accepted[0] + begun
    torch.testing.assert_close(dense.x_bar, plain.x_bar, rtol=0, atol=0)


def test_an_assertion_of_the_models_own_passes_through():
    def eps(x_bar, sigma):
        assert float(sigma.min()) > 1.0, "the model's own"
        return EXACT(x_bar, sigma)

    with pytest.raises(AssertionError, match="the model's own"):
        integrate(EpsilonField.from_sigma(eps, LINEAR), X, [3.0, 0.0], "torchdiffeq-dopri5")


def wall(below):
    """A field that is NaN below a σ, for one sample."""

    def eps(x_bar, sigma):
        bad = (x_bar[:, :1, :1].abs() > 50.0) & (sigma * torch.ones_like(x_bar[:, :1, :1]) < below)
        return torch.where(bad, torch.nan, EXACT(x_bar, sigma))

    start = X.clone()
    start[2, 0, 0] = 1000.0
    return EpsilonField.from_sigma(eps, LINEAR), start


@by_name
@pytest.mark.parametrize("below", [0.7, 10.0], ids=["midway", "at the start"])
def test_a_sample_that_meets_nan_does_not_take_its_neighbours_along(solver, below):
    field, start = wall(below)
    run = integrate(field, start, [4.0, 1.0, 0.0], solver, trajectory=True)
    assert run.status == (Status.SUCCESS, Status.SUCCESS, Status.NONFINITE, Status.SUCCESS)
    assert 0.7 <= run.sigma[2] <= (1.0 if below < 1.0 else 4.0)
    assert bool(run.x_bar.isfinite().all())
    torch.testing.assert_close(run.x_bar[2:3], EXACT.solution(start[2:3], 4.0, run.sigma[2]), rtol=1e-3, atol=1e-2)
    others = [0, 1, 3]
    torch.testing.assert_close(run.x_bar[others], EXACT.solution(start[others], 4.0, 0.0), rtol=0, atol=1e-3)
    assert bool(run.trajectory[-1, 2].isnan().all())


@by_name
def test_attempts_are_limited(solver):
    run = integrate(FIELD, X, [TOP, 0.0], replace(solver, rtol=1e-9, atol=1e-9, max_steps=12))
    assert set(run.status) == {Status.MAX_STEPS}
    assert all(0.0 < s < TOP for s in run.sigma)
    for i, sigma in enumerate(run.sigma):
        end = EXACT.solution(X[i : i + 1], TOP, sigma)
        torch.testing.assert_close(run.x_bar[i : i + 1], end, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [TorchDiffEq("dopri5"), Scipy("RK45")], ids=lambda s: s.name)
def test_a_singularity_stalls(solver):
    field = EpsilonField.from_sigma(lambda x, s: (0.0 * x + s - 1.0).abs() ** -1.5, LINEAR)
    run = integrate(field, torch.ones(1, 2).double(), [3.0, 0.0], solver)
    assert set(run.status) == {Status.STALLED}
    assert 1.0 <= run.sigma[0] < 1.001


@by_name
def test_the_field_is_never_asked_outside_the_run(solver):
    seen = []

    def eps(x_bar, sigma):
        seen.append(float(sigma.min()))
        seen.append(float(sigma.max()))
        return EXACT(x_bar, sigma)

    field = EpsilonField.from_sigma(eps, LINEAR)
    integrate(field, X, [2.0, 0.01, 0.0], solver)
    integrate(field, X, [0.0, 0.01, 2.0], solver)
    assert min(seen) >= 0.0
    assert max(seen) <= 2.0


class Network(nn.Module):
    """A small ε_θ with two parameters, in float64."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.8, 0.3], dtype=torch.float64))

    def forward(self, x, t):
        return self.scale[0] * torch.tanh(x) + self.scale[1] * x * torch.cos(t / 300.0)[:, None]


def gradients(solver, **options):
    net, x = Network(), noise((2,), 3, 0).requires_grad_()
    run = integrate(EpsilonField(net, LINEAR), x, [3.0, 1.0, 0.0], solver, gradients=True, **options)
    return torch.autograd.grad(run.x_bar.square().sum(), (x, net.scale))


@pytest.mark.parametrize("adjoint", [False, True])
def test_gradients_to_the_state_and_the_parameters(adjoint):
    wanted = gradients(replace(get("dop853"), rtol=1e-9, atol=1e-9))
    found = gradients(TorchDiffEq("dopri5", 1e-8, 1e-8, adjoint=adjoint))
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_scipy_gives_none():
    with pytest.raises(ValueError, match="gradients do not flow through scipy-dop853"):
        integrate(FIELD, X, [1.0, 0.0], "scipy-dop853", gradients=True)


@pytest.mark.parametrize("name", ["torchdiffeq-dopri5", "torchdiffeq-dopri8", "scipy-dop853", "scipy-lsoda"])
def test_by_name_there_and_back(name):
    assert get(name).name == name
    there = encode(FIELD, X, solver=name, data_range=None)
    back = sample(FIELD, there.x, solver=name, batch_size=3)
    torch.testing.assert_close(back.x, X, rtol=0, atol=5e-3)
    assert len(back.outcome.nfe) == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TorchDiffEq("rk4"), "method must be one of dopri5"),
        (lambda: Scipy("dop853"), "method must be one of RK23"),
        (lambda: TorchDiffEq(rtol=0.0), "rtol"),
        (lambda: Scipy(atol=float("nan")), "atol"),
        (lambda: Scipy(max_steps=0), "max_steps"),
        (lambda: Scipy(rtol=1e-14), "rtol must be a number of at least 2.2e-14, scipy's own bound"),
    ],
)
def test_bad_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
