"""Fixed-grid loops on CUDA, and under fake CUDA tensors where there is none: no sync, no mixed devices."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_ode
from ddim_ode import DATA, EpsilonField, Gaussian, Grid, Multistep, NoiseSchedule, RungeKutta, solvers
from ddim_ode.models.unet import GaussianResidual, UNet
from ddim_ode.solvers.runge_kutta import HEUN

LINEAR = NoiseSchedule.linear()
SHAPE = (1, 8, 8)
METHODS = [
    *(s for s in solvers() if s.budgeted),  # the others read values by design: each attempt waits for its error
    Multistep(3, start="rk"),
    Multistep(4, clock="t", start="rk"),
    Multistep(2, clock="arctan", linear=DATA),
    Multistep(3, linear=Gaussian(torch.zeros(SHAPE), torch.tensor(0.3))),
    Multistep(3, linear=Gaussian(torch.zeros(SHAPE), torch.rand(SHAPE) + 0.1)),
    Multistep(2, linear=Gaussian(torch.zeros(SHAPE), torch.rand(64) + 0.1, torch.linalg.qr(torch.randn(64, 64)).Q)),
    RungeKutta(HEUN, "log"),
]


def network():
    net = UNet(1, 8, 8, (1, 2), 1, (4,), 4, in_channels=2)
    gaussian = torch.zeros(SHAPE), torch.ones(5), torch.linalg.qr(torch.randn(64, 5)).Q, 0.1
    return GaussianResidual(net, LINEAR, *gaussian).eval().requires_grad_(False)


def on_fake_cuda(module):
    """The module with every tensor in it replaced by a fake one on CUDA (initialisers cannot run there)."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(fake, False) if tensors is part._parameters else fake
    return module


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("encoding", [False, True], ids=["sample", "encode"])
def test_fake_cuda(method, encoding):
    grid = Grid.make("quadratic", LINEAR, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x_bar = torch.empty((2, *SHAPE), device="cuda", dtype=torch.float64)
        field = EpsilonField(lambda x, t: torch.sin(x) * t.reshape(-1, 1, 1, 1), LINEAR, dtype=torch.float32)
        run = ddim_ode.integrate(field, x_bar, grid.reversed() if encoding else grid, method)
        assert run.x.device.type == "cuda"
        assert run.x.dtype == torch.float64
        assert run.x.shape == x_bar.shape


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score", "flow"])
def test_fake_cuda_through_a_real_network(prediction):
    net = network()
    with FakeTensorMode():
        field = EpsilonField(on_fake_cuda(net), LINEAR, prediction, shape=SHAPE)
        latent = torch.empty((2, *SHAPE), device="cuda")
        assert ddim_ode.sample(field, latent, nfe=6, solver="ab3").x.device.type == "cuda"
        assert ddim_ode.round_trip(field, latent, nfe=6, data_range=None).latent.device.type == "cuda"


def test_fake_cuda_guidance():
    with FakeTensorMode():
        condition, null = torch.empty((2, 1, 1, 1), device="cuda"), torch.empty((1, 1, 1, 1), device="cuda")
        options = {"condition": condition, "null_condition": null, "guidance_scale": 3.0}
        field = EpsilonField(lambda x, t, c: x * c, LINEAR, **options)
        latent = torch.empty((2, *SHAPE), device="cuda")
        assert ddim_ode.sample(field, latent, nfe=6).x.device.type == "cuda"


BOUNDS = [{"clip": 1.0}, {"threshold": 0.995}]


@pytest.mark.parametrize("bounds", BOUNDS, ids=["clip", "threshold"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_fake_cuda_with_all_that_may_be_asked(method, bounds):
    """Dense output, saved levels, a trajectory, bounds and a callback that stops one batch: no sync."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        latent = torch.empty((3, *SHAPE), device="cuda", dtype=torch.float64)
        model = lambda x, t: torch.sin(x) * t.reshape(-1, 1, 1, 1)
        field = EpsilonField(model, LINEAR, dtype=torch.float32, **bounds)
        run = ddim_ode.sample(
            field, latent, steps=6, solver=method, batch_size=2, dense=True, save_at=[100.0, 0.5], trajectory=True,
            callback=lambda step: step.index == 4 and step.rows == slice(0, 2),
        )  # fmt: skip
        assert run.saved.shape == (2, 3, *SHAPE)
        assert run.trajectory.shape == (7, 3, *SHAPE)
        assert {x.device.type for x in (run.x, run.out(1.0), run.saved, run.trajectory)} == {"cuda"}
        assert run.out(1.0).dtype == torch.float64


@pytest.mark.parametrize("option", ["gradients", "checkpoint"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_gradients_read_no_value(method, option):
    """Without CUDA torch cannot record on fake CUDA tensors; fake ones on the CPU have no values to read either."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        latent = torch.empty((2, *SHAPE), dtype=torch.float64).requires_grad_()
        model = lambda x, t: torch.sin(x) * t.reshape(-1, 1, 1, 1)
        field = EpsilonField(model, LINEAR, dtype=torch.float32, threshold=0.99)
        run = ddim_ode.sample(field, latent, steps=6, solver=method, dense=True, save_at=[100.0], **{option: True})
        (gradient,) = torch.autograd.grad(run.x.sum() + run.saved.sum(), latent)
        assert gradient.shape == latent.shape


def test_a_sync_would_be_caught():
    with FakeTensorMode():
        field = EpsilonField(lambda x, t: x * float(t.mean()), LINEAR)
        latent = torch.empty((2, *SHAPE), device="cuda")
        ddim_ode.sample(EpsilonField(lambda x, t: x * t.mean(), LINEAR), latent, nfe=2)
        with pytest.raises(Exception, match=r"(?i)data.?dependent|item|scalar|cuda"):
            ddim_ode.sample(field, latent, nfe=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_cuda_agrees_with_cpu(method):
    latent = ddim_ode.noise(SHAPE, 2, 0)
    torch.manual_seed(0)
    net = network().double()
    there = ddim_ode.sample(EpsilonField(net, LINEAR), latent, steps=6, solver=method).x
    field = EpsilonField(net.cuda(), LINEAR)
    here = ddim_ode.sample(field, latent.cuda(), steps=6, solver=method).x
    torch.testing.assert_close(here.cpu(), there, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_cuda_gradients_agree_with_cpu(method):
    torch.manual_seed(0)
    net, found = network().double(), []
    for device in ("cpu", "cuda"):
        field = EpsilonField(net.to(device), LINEAR, clip=2.0)
        for option in ("gradients", "checkpoint"):
            latent = ddim_ode.noise(SHAPE, 2, 0).to(device).requires_grad_()
            run = ddim_ode.sample(field, latent, steps=6, solver=method, save_at=[10.0], **{option: True})
            found.append(torch.autograd.grad(run.x.sum() + run.saved.sum(), latent)[0].cpu())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-7)
