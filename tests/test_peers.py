"""Fields of other libraries' wrappers, against those libraries' own code on the same network."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import ddim_ode
from benchmarks import peers
from ddim_ode import EpsilonField, NoiseSchedule
from ddim_ode.models.unet import UNet
from ddim_ode.solvers import get

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Backbone(nn.Module):
    """A network with random weights that takes labels of any scale, one for all or one a sample."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = UNet(3, 16, 16, (1, 2), attention=(8,), groups=4), scale
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))

    def forward(self, x, t, **_):
        label = (self.scale * torch.as_tensor(t, dtype=torch.float32)).expand(len(x))
        return self.inner(x.float(), label).to(x.dtype)


def of_azula(denoiser, schedule):
    """The recipe of docs/models.md: x̄ = x_t/α at σ = σ_t/α_t, and a table for t(σ)."""
    times = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    alphas, sigmas = schedule(times)
    levels = (sigmas / alphas).log().numpy()

    def at_sigma(x_bar, sigma):
        t = torch.as_tensor(np.interp(float(sigma[0].log()), levels, times.numpy())).float()
        return denoiser(x_bar * schedule(t)[0], t).mean

    low, high = math.exp(levels[0]), math.exp(levels[-1])
    return EpsilonField.from_denoiser(at_sigma, NoiseSchedule.edm(low, high), dtype=torch.float32, shape=X.shape[1:])


@pytest.mark.skipif(find_spec("azula") is None, reason="needs azula: make .venv/peers")
@pytest.mark.parametrize("name", ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule"])
@pytest.mark.parametrize("kind", ["KarrasDenoiser", "SimpleDenoiser"])
def test_azulas_denoisers_and_ddim(name, kind):
    azula = peers.azula()
    schedule = getattr(azula.noise, name)()
    denoiser = getattr(azula.denoise, kind)(Backbone(1000.0 if kind == "SimpleDenoiser" else 100.0), schedule).eval()
    field = of_azula(denoiser, schedule)
    for time in (0.9, 0.5, 0.1):
        t = torch.tensor(time)
        alpha, sigma = schedule(t)
        with torch.no_grad():
            mean = denoiser(X * alpha, t).mean
        # ε is that of their mean: they agree to float32's rounding of the mean, which a small σ magnifies in ε.
        level = float(sigma / alpha)
        ours, scale = X - level * field(X, level), float(mean.abs().max())
        torch.testing.assert_close(ours / scale, mean / scale, rtol=0, atol=1e-5)
    # Their DDIM on their times is our Euler on the same nodes.
    sampler = azula.sample.DDIMSampler(denoiser, steps=8, silent=True, dtype=torch.float64)
    alphas, sigmas = schedule(torch.linspace(1.0, 0.0, 9, dtype=torch.float64))
    nodes = sigmas / alphas
    with torch.no_grad():
        theirs = sampler(X.double() * sigmas[0])
    start = X.double() * sigmas[0] / alphas[0]
    ours = ddim_ode.integrate(field, start, nodes.tolist(), get("ddim")).x * alphas[-1]
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-4)


# `make test` installs both; what either lacks to be imported is a failure, and no reason to skip.
@pytest.mark.skipif(find_spec("k_diffusion") is None, reason="needs k-diffusion: make .venv/peers")
@pytest.mark.parametrize("kind", ["DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser"])
def test_k_diffusions_wrappers_and_samplers(kind):
    k_diffusion = peers.k_diffusion()
    network, schedule = Backbone().eval(), NoiseSchedule.linear()
    table = torch.tensor(schedule.alphas_cumprod).float()
    wrapper = getattr(k_diffusion.external, kind)(network, table, quantize=False)
    field = EpsilonField(network, schedule, "epsilon" if "Eps" in kind else "v_prediction")
    levels = NoiseSchedule.edm(float(wrapper.sigma_min), float(wrapper.sigma_max))
    wrapped = EpsilonField.from_denoiser(wrapper, levels, dtype=torch.float32, shape=X.shape[1:])
    for label in (5, 300, 990):
        sigma = float(schedule.sigma(label + 1.0))
        with torch.no_grad():
            wanted = (X - wrapper(X, torch.full((3,), sigma))) / sigma
        scale = float(wanted.abs().max())
        for ours in (wrapped, field):
            torch.testing.assert_close(ours(X, sigma) / scale, wanted / scale, rtol=0, atol=1e-3)
        torch.testing.assert_close(wrapped(X, sigma), wanted, rtol=1e-4, atol=1e-4 * scale)
    # Their Euler and Heun on the same nodes, which end at 0.
    nodes = torch.tensor([*np.geomspace(float(wrapper.sigma_max), 0.02, 8), 0.0])
    for name in ("euler", "heun"):
        with torch.no_grad():
            theirs = getattr(k_diffusion.sampling, f"sample_{name}")(
                wrapper, X.double() * nodes[0], nodes, disable=True
            )
        solver = get("ddim" if name == "euler" else "heun")
        if name == "heun":  # theirs ends by Euler's step
            middle = ddim_ode.integrate(wrapped, X.double() * nodes[0], nodes[:-1].tolist(), solver).x_bar
            ours = ddim_ode.integrate(wrapped, middle, nodes[-2:].tolist(), get("ddim")).x
        else:
            ours = ddim_ode.integrate(wrapped, X.double() * nodes[0], nodes.tolist(), solver).x
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-4)
