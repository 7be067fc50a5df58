"""Fields of other libraries' wrappers, against those libraries' own code on the same network; and the study beside them."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ddim_ode
from benchmarks import contenders, peers, released
from benchmarks.problems import problem
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
    azula = released.azula()
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
    k_diffusion = released.k_diffusion()
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


# -- the study of accuracy per call -----------------------------------------------------------------
#: A setting of each kind of adapter, and the most its error may be at `calls` calls; the first order ones converge slowly.
CONVERGING = [
    ("diffusers", "DDIMScheduler: timestep_spacing=trailing set_alpha_to_one=True", 500, 4e-3),
    ("diffusers", "EulerDiscreteScheduler: final_sigmas_type=zero use_karras_sigmas=True", 500, 4e-3),
    ("diffusers", "HeunDiscreteScheduler: timesteps=asinh", 300, 2e-3),
    ("diffusers", "KDPM2DiscreteScheduler: use_karras_sigmas=True", 400, 2e-3),
    ("diffusers", "LMSDiscreteScheduler: step={'order': 4} use_karras_sigmas=True", 200, 2e-3),
    ("diffusers", "PNDMScheduler: skip_prk_steps=True timestep_spacing=trailing set_alpha_to_one=True", 251, 8e-3),
    ("diffusers", "TCDScheduler: step={'eta': 0.0} original_inference_steps=1000", 500, 8e-3),
    ("diffusers", "IPNDMScheduler: trained_betas=quadratic", 300, 2e-3),
    ("diffusers", "EDMEulerScheduler: sigma_schedule=karras rho=3 sigma_min=0.01 sigma_max=157.4", 500, 8e-3),
    (
        "diffusers",
        "DPMSolverSinglestepScheduler: algorithm_type=dpmsolver++ solver_order=2 solver_type=midpoint lower_order_final=True "
        "final_sigmas_type=zero use_karras_sigmas=True",
        300,
        2e-3,
    ),
    (
        "diffusers",
        "DPMSolverMultistepScheduler: algorithm_type=dpmsolver++ solver_order=3 solver_type=midpoint lower_order_final=True "
        "final_sigmas_type=zero use_flow_sigmas=True flow_shift=0.1576",
        300,
        2e-3,
    ),
    (
        "diffusers",
        "DEISMultistepScheduler: solver_order=3 lower_order_final=True denoised=True use_flow_sigmas=True",
        300,
        2e-3,
    ),
    (
        "diffusers",
        "UniPCMultistepScheduler: predict_x0=True solver_type=bh2 solver_order=2 lower_order_final=True disable_corrector=[] "
        "final_sigmas_type=zero use_karras_sigmas=True",
        300,
        2e-3,
    ),
    ("k-diffusion", "lms: order=3 karras rho=5 sigma_min=0.01", 200, 2e-3),
    ("k-diffusion", "dpmpp_3m_sde: eta=0 karras rho=7 sigma_min=0.01", 300, 2e-3),
    ("k-diffusion", "heun: vp eps_s=0.001", 300, 2e-3),
    ("k-diffusion", "dpm_fast: sigma_min=0.01 denoised", 300, 2e-3),
    ("k-diffusion", "dpm_adaptive: order=3 h_init=0.05 sigma_min=0.01 denoised, tolerance to fit", 300, 4e-3),
    ("azula", "DDIMSampler: eta=0 VPSchedule sigma_min=0.001", 500, 8e-3),
    ("azula", "HeunSampler: RectifiedSchedule sigma_min=0.001", 300, 2e-3),
    ("azula", "vABSampler: order=3 RectifiedSchedule sigma_min=0.001", 200, 1e-3),
    ("azula", "zABSampler: order=3 model's own schedule sigma_min=0.001", 300, 2e-3),
    ("azula", "xEABSampler: order=3 VESchedule sigma_min=0.01 denoised", 300, 2e-3),
    ("torchdiffeq", "rk4: c=0.05 grid=asinh", 300, 1e-3),
    ("torchdiffeq", "heun3: rho=5 grid=karras", 300, 1e-3),
]


# Looked for now: once imported, k-diffusion stands there without the whole of itself.
INSTALLED = {name for name in contenders.PACKAGES if find_spec(name.replace("-", "_")) is not None}


@pytest.fixture(scope="module")
def digits():
    return problem("digits", 3, 5)


@pytest.mark.parametrize(("package", "name", "calls", "most"), CONVERGING)
def test_settings_of_peers_converge(digits, package, name, calls, most):
    """Coordinates, σ, starts and ends of each adapter: with many calls its samples are the reference's."""
    # `make test` installs all; what an installed one lacks to be imported is a failure, and no reason to skip.
    if package not in INSTALLED:
        pytest.skip(f"needs {package}: make .venv/peers")
    settings = {s.name.removeprefix(f"{package}/"): s for s in contenders.PACKAGES[package](digits.field.schedule)}
    setting = settings.get(name) or next(s for told, s in settings.items() if told.startswith(name))
    found = peers.measure(setting.run, contenders.Task(digits.field, digits.latent), digits.exact, calls)
    assert found.get("failed") is None
    assert 0 < found["calls"] <= calls
    assert found["rms"] < most


def test_every_scheduler_of_diffusers_competes_or_is_left_out_with_a_reason():
    pytest.importorskip("diffusers")
    from benchmarks import contenders_diffusers

    assert not [name for name, why in contenders_diffusers.left_out().items() if why.startswith("not looked at")]


def test_what_a_peer_refuses_or_overspends_is_a_row(digits):
    task = contenders.Task(digits.field, digits.latent)

    def refuses(task, budget):
        raise NotImplementedError("no such order")

    def overspends(task, budget):
        for _ in range(budget + 1):
            x = task.eps(task.latent, 1.0)
        return x

    for run, why in (
        (refuses, "no such order"),
        (overspends, "more calls"),
        (lambda *_: torch.full_like(task.latent, math.nan), "finite"),
    ):
        found = peers.measure(run, task, digits.exact, 5)
        assert math.isnan(found["rms"])
        assert why in found["failed"]


def test_a_missing_package_or_data_set_is_a_row(digits, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'azula'")

    monkeypatch.setitem(contenders.PACKAGES, "azula", missing)
    assert "azula" in peers.contest("azula", digits, lambda *_: True)["missing"]
    monkeypatch.setattr(peers, "problem", missing)
    assert "azula" in peers.study("digits", 0, {})["missing"]


def test_the_page_shows_the_record():
    root = Path(peers.__file__).resolve().parents[1]
    record = json.loads((root / "benchmarks/results/peers.json").read_text("utf-8"))
    assert peers.table(record) in (root / "docs/peers.md").read_text("utf-8")
    titles = [axes.get_title() for axes in peers.figure(record).axes]
    assert [title.split(",")[0] for title in titles if title] == [
        n for n, p in record["problems"].items() if "missing" not in p
    ]
