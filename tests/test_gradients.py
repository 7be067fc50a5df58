"""Gradients through a run: to the latents, the images and the network, against finite differences and formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import ddim_ode
from benchmarks.convergence import cases
from ddim_ode import EpsilonField, Gaussian, Multistep, NoiseSchedule, Status, integrate, solvers
from ddim_ode.models.analytic import GaussianEpsilon

LINEAR = NoiseSchedule.linear()
CASES = {name: solver for name, solver in cases().items() if solver.differentiable and solver.budgeted}
NAMES = [name for name in CASES if name in {s.name for s in solvers()} or name.endswith("-rk")]
SIGMAS = np.linspace(3.0, 0.5, 6)


class Net(nn.Module):
    """A few parameters, all of them felt, and the time."""

    shape = (3,)

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(0.6 * torch.randn(3, 3, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(0.3 * torch.randn(3, generator=draw, dtype=torch.float64))
        self.recorded = []

    def forward(self, x, t):
        self.recorded.append(torch.is_grad_enabled())
        return torch.tanh(x @ self.weight + self.bias) * (1.0 + 0.2 * torch.sin(0.01 * t)).unsqueeze(1)


LATENT = ddim_ode.noise((3,), 2, 0)
OPTIONS = {"sample": {"steps": 5, "grid": "quadratic"}, "encode": {"steps": 5, "grid": "asinh"}}


def loss_of(direction, field, start, name, **options):
    run = getattr(ddim_ode, direction)(field, start, solver=CASES[name], **OPTIONS[direction], **options)
    weights = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64).reshape(2, 3)
    return (weights * run.x + 0.1 * run.x.square()).sum()


@pytest.mark.parametrize("direction", ["sample", "encode"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_finite_differences(direction, name):
    """Along a random direction of the start and of all parameters at once; and checkpointing gives the same."""
    net = Net()
    field, start = EpsilonField(net, LINEAR), LATENT.clone().requires_grad_()
    leaves = [start, net.weight, net.bias]
    draw = torch.Generator().manual_seed(2)
    along = [torch.randn(leaf.shape, generator=draw, dtype=torch.float64) for leaf in leaves]
    found = torch.autograd.grad(loss_of(direction, field, start, name, gradients=True), leaves)
    again = torch.autograd.grad(loss_of(direction, field, start, name, checkpoint=True), leaves)
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)

    def moved(h):
        with torch.no_grad():
            for leaf, way in zip(leaves, along, strict=True):
                leaf.add_(way, alpha=h)
            value = float(loss_of(direction, field, start, name))
            for leaf, way in zip(leaves, along, strict=True):
                leaf.sub_(way, alpha=h)
        return value

    for i in (None, 0, 1, 2):  # all, then each by itself, so that none hides behind another
        if i is not None:
            along = [torch.zeros_like(leaf) for leaf in leaves]
            along[i] = torch.randn(leaves[i].shape, generator=draw, dtype=torch.float64)
        slope = sum(float((g * way).sum()) for g, way in zip(found, along, strict=True))
        # Four points: an error of h⁴, below rounding, which for the leapfrog's lattice is 1e-12.
        h = 1e-3 if "alf" in name else 1e-5
        differences = (8.0 * (moved(h) - moved(-h)) - moved(2 * h) + moved(-2 * h)) / (12.0 * h)
        assert abs(slope) > 1e-6
        assert slope == pytest.approx(differences, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["ddim", "ab3-rk", "dpmpp2m", "heun"])
def test_second_derivatives(name, checkpoint):
    net = Net()
    field = EpsilonField(net, LINEAR)
    option = {"checkpoint": True} if checkpoint else {"gradients": True}

    def end(x, bias):
        with torch.no_grad():
            net.bias.copy_(bias)
        return integrate(field, x, [2.0, 1.0, 0.3], name, **option).x_bar

    x = LATENT[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: end(x, net.bias.detach()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: end(x, net.bias.detach()), (x,))


# -- formulas -----------------------------------------------------------------------------------
TURN = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
VARIANCE = torch.tensor([0.2, 0.7, 1.6], dtype=torch.float64)
MEAN = torch.tensor([0.3, -1.0, 0.4], dtype=torch.float64)


def jacobian_of(solver, sigmas=SIGMAS, **option):
    field = EpsilonField.from_sigma(GaussianEpsilon(MEAN, TURN @ torch.diag(VARIANCE) @ TURN.T), LINEAR)
    x = LATENT[:1].clone().requires_grad_()
    run = integrate(field, x, sigmas, solver, **(option or {"gradients": True}))
    return torch.stack([torch.autograd.grad(run.x_bar[0, i], x, retain_graph=True)[0][0] for i in range(3)])


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[::-1]], ids=["down", "up"])
def test_of_an_exact_solver_they_are_those_of_the_solution(sigmas):
    """x̄' = μ + U √((λ + σ'²)/(λ + σ²)) Uᵀ (x̄ − μ), so the Jacobian is known, whatever the steps."""
    scale = ((VARIANCE + sigmas[-1] ** 2) / (VARIANCE + sigmas[0] ** 2)).sqrt()
    exact = TURN @ torch.diag(scale) @ TURN.T
    solver = Multistep(2, linear=Gaussian(MEAN, VARIANCE, TURN))
    torch.testing.assert_close(jacobian_of(solver, sigmas.copy()), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian_of(solver, sigmas.copy(), checkpoint=True), exact, rtol=1e-12, atol=1e-12)


def test_of_ddim_they_are_the_product_of_its_steps():
    factors = [1.0 + (b - a) * a / (VARIANCE + a * a) for a, b in itertools.pairwise(SIGMAS)]
    exact = TURN @ torch.diag(torch.stack(factors).prod(dim=0)) @ TURN.T
    torch.testing.assert_close(jacobian_of("ddim"), exact, rtol=1e-13, atol=1e-13)


# -- what is recorded ---------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_nothing_is_recorded_unless_asked_for(direction):
    net = Net()
    start = LATENT.clone().requires_grad_()
    run = getattr(ddim_ode, direction)(
        EpsilonField(net, LINEAR), start, steps=4, dense=True, save_at=[1.0], trajectory=True, batch_size=1
    )
    assert not any(net.recorded)
    for result in (run.x, run.x_bar, run.saved, run.trajectory, run.out(2.0), run.dense[0].slopes[0]):
        assert not result.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("option", ["gradients", "checkpoint"])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_they_flow_under_no_grad_and_leave_it_as_it_was(direction, option):
    net, start = Net(), LATENT.clone().requires_grad_()
    field = EpsilonField(net, LINEAR)
    expected = torch.autograd.grad(loss_of(direction, field, start, "ab3", gradients=True), [start, net.weight])
    with torch.no_grad():
        run = getattr(ddim_ode, direction)(
            field, start, solver="ab3", **OPTIONS[direction], **{option: True}, save_at=[1.0], dense=True, batch_size=1
        )
        results = [run.x, run.x_bar, run.saved, run.out(1.0)]
        assert not torch.is_grad_enabled()
    assert all(x.requires_grad for x in results)
    weights = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64).reshape(2, 3)
    loss = (weights * results[0] + 0.1 * results[0].square()).sum()
    for found, wanted in zip(torch.autograd.grad(loss, [start, net.weight]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_chosen_dtype_lets_them_through():
    start = LATENT.clone().requires_grad_()
    with torch.no_grad():
        run = integrate(EpsilonField(Net(), LINEAR), start, SIGMAS, dtype=torch.float32, gradients=True)
    run.x.sum().backward()
    assert start.grad.dtype == torch.float64
    assert bool((start.grad != 0.0).all())


def test_interpolation_passes_them_to_both_ends():
    a, b = (x.clone().requires_grad_() for x in ddim_ode.noise((3,), 2, 3).split(1))
    with torch.no_grad():
        run = ddim_ode.interpolate(EpsilonField(Net(), LINEAR), a, b, 3, steps=4, gradients=True)
    for i, (from_a, from_b) in enumerate([(True, False), (True, True), (False, True)]):
        found = torch.autograd.grad(run.x[i].sum(), [a, b], retain_graph=True)
        assert [bool((g.abs() > 1e-12).any()) for g in found] == [from_a, from_b]


def test_inference_mode_is_refused_before_any_call():
    field = EpsilonField(Net(), LINEAR)
    for option in ("gradients", "checkpoint"):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*no_grad"):
            ddim_ode.sample(field, LATENT, steps=3, **{option: True})
    assert field.nfe == 0


def test_a_solver_that_gives_none_refuses_before_any_call():
    class Outside(Multistep):
        differentiable = False

    field = EpsilonField(Net(), LINEAR)
    for option in ("gradients", "checkpoint"):
        with pytest.raises(ValueError, match="gradients do not flow through outside: use another solver"):
            ddim_ode.sample(field, LATENT, steps=3, solver=Outside(1, label="outside"), **{option: True})
    assert field.nfe == 0
    assert ddim_ode.sample(field, LATENT, steps=3, solver=Outside(1)).success


# -- together with the rest ---------------------------------------------------------------------
@pytest.mark.parametrize("option", ["gradients", "checkpoint"])
def test_batches_have_the_gradients_of_the_whole(option):
    net, start = Net(), LATENT.clone().requires_grad_()
    field = EpsilonField(net, LINEAR)
    whole, parts = (
        torch.autograd.grad(
            loss_of("sample", field, start, "deis3", batch_size=size, **{option: True}), [start, net.weight]
        )
        for size in (None, 1)
    )
    for found, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("option", ["gradients", "checkpoint"])
@pytest.mark.parametrize("name", ["ab3-rk", "dpmpp2m", "heun"])
def test_states_in_between_have_gradients_too(name, option):
    """Through saved levels, dense output and the trajectory, slopes included."""
    net = Net()
    field = EpsilonField(net, LINEAR)

    def value(x, **options):
        run = integrate(field, x, SIGMAS, name, save_at=[2.2, 0.6], dense=True, trajectory=True, **options)
        return run.saved.square().sum() + run.out(1.3).sum() + run.trajectory[2].prod()

    start = LATENT.clone().requires_grad_()
    found = torch.autograd.grad(value(start, **{option: True}), [start, net.bias])
    way, h = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 1e-5
    with torch.no_grad():
        slope = (value(start + h * way) - value(start - h * way)) / (2.0 * h)
        assert float((found[0] * way).sum()) == pytest.approx(float(slope), rel=1e-6)
        net.bias[0] += h
        above = value(start)
        net.bias[0] -= 2.0 * h
        slope = (above - value(start)) / (2.0 * h)
    assert float(found[1][0]) == pytest.approx(float(slope), rel=1e-6)


def test_a_stopped_run_has_the_gradients_of_its_part():
    field, start = EpsilonField(Net(), LINEAR), LATENT.clone().requires_grad_()
    for option in ("gradients", "checkpoint"):
        stopped = integrate(field, start, SIGMAS, "ab2", callback=lambda s: s.index == 2, **{option: True})
        part = integrate(field, start, SIGMAS[:4], "ab2", gradients=True)
        assert set(stopped.status) == {Status.STOPPED}
        found, wanted = (torch.autograd.grad(run.x.sum(), start)[0] for run in (stopped, part))
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("option", ["gradients", "checkpoint"])
def test_a_failed_samples_neighbours_keep_theirs(option):
    def eps(x, sigma):
        return torch.where((x[:, :1] > 100.0) & (sigma < 2.0), torch.nan, torch.sin(x))

    start = torch.cat((LATENT, torch.full((1, 3), 1000.0), LATENT))
    start = start.double().requires_grad_()
    field = EpsilonField.from_sigma(eps, LINEAR)
    run = integrate(field, start, SIGMAS, "ab2", **{option: True})
    assert [bool(s) for s in run.status] == [False, False, True, False, False]
    (found,) = torch.autograd.grad(run.x.square().sum(), start)
    alone = start.detach()[:2].requires_grad_()
    (wanted,) = torch.autograd.grad(integrate(field, alone, SIGMAS, "ab2", gradients=True).x.square().sum(), alone)
    torch.testing.assert_close(found[:2], wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[3:], wanted, rtol=1e-13, atol=1e-13)


def test_calls_are_those_of_the_forward_pass():
    for name in ("ab3-rk", "heun"):
        field, start = EpsilonField(Net(), LINEAR), LATENT.clone().requires_grad_()
        plain = integrate(field, start, SIGMAS, name)
        run = integrate(field, start, SIGMAS, name, checkpoint=True)
        field.nfe = 0
        run.x.sum().backward()
        assert run.nfe == plain.nfe
        assert field.nfe == plain.nfe  # each step once more


@pytest.mark.parametrize("name", ["ddim", "ab3-rk", "rk4"])
def test_checkpointing_keeps_nothing_of_the_network(name):
    """What a run saves for its backward pass: with checkpoint=True nothing but a state a step."""

    def kept(steps, **option):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run = integrate(EpsilonField(Net(), LINEAR), LATENT, np.linspace(3.0, 0.5, steps + 1), name, **option)
        assert run.x_bar.requires_grad
        return sum(sizes)

    few, many = (kept(steps, gradients=True) for steps in (4, 16))
    assert many > 3 * few
    for steps in (4, 16):
        assert kept(steps, checkpoint=True) == steps * LATENT.numel() + 1  # and one mark of torch's own


def test_dropout_is_drawn_alike_in_the_second_pass():
    class Noisy(Net):
        def forward(self, x, t):
            return super().forward(x, t) * (torch.rand(x.shape, dtype=x.dtype) < 0.7)

    net, found = Noisy(), []
    for option in ("gradients", "checkpoint"):
        torch.manual_seed(0)
        start = LATENT.clone().requires_grad_()
        run = integrate(EpsilonField(net, LINEAR), start, SIGMAS, "ab2", **{option: True})
        found.append(torch.autograd.grad(run.x.sum(), start)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


def test_through_a_real_network():
    """The bundled one, float32 under a float64 state: its gradient points up, by as much as it says."""
    field = ddim_ode.load("fashion-mnist")
    start = ddim_ode.noise(field.shape, 1, 0).requires_grad_()
    loss = lambda run: run.x.square().mean()
    run = ddim_ode.sample(field, start, steps=3, gradients=True)
    (found,) = torch.autograd.grad(loss(run), start)
    (again,) = torch.autograd.grad(loss(ddim_ode.sample(field, start, steps=3, checkpoint=True)), start)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-9)
    h = 1e-2 / float(found.norm())
    ahead, behind = (float(loss(ddim_ode.sample(field, start + s * h * found, steps=3))) for s in (1, -1))
    assert (ahead - behind) / (2.0 * h) == pytest.approx(float(found.square().sum()), rel=0.05)


def test_guidance_and_clipping_let_them_through():
    """A clipped sample does not answer to its latent where all of it is clipped; one within the bounds does."""
    exact = GaussianEpsilon(torch.zeros(3), torch.full((3,), 4.0))
    for options in ({"clip": 0.5}, {"threshold": 1.0, "clip": 0.5}):
        field = EpsilonField.from_sigma(exact, LINEAR, **options)
        start = torch.tensor([[0.05, -0.1, 0.02], [3.0, -3.0, 3.0]], dtype=torch.float64).requires_grad_()
        run = ddim_ode.sample(field, start, solver="ddim", steps=4, gradients=True)
        jacobian = torch.autograd.grad(run.x.sum(), start)[0]
        assert bool((jacobian[0] > 0.1).all())
        assert float(jacobian[1].abs().max()) < (1e-12 if "threshold" not in options else math.inf)
    given, null = torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    given.requires_grad_()
    field = EpsilonField(
        lambda x, t, c: torch.sin(x) + c[:, None],
        LINEAR, condition=given, null_condition=null, guidance_scale=2.0,
    )  # fmt: skip
    run = integrate(field, LATENT, [2.0, 1.0], gradients=True)
    # One step: x̄' = x̄ − ε, and ε = sin + 2c.
    torch.testing.assert_close(torch.autograd.grad(run.x_bar.sum(), given)[0], torch.full((2,), -6.0).double())
