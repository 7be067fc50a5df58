"""The generative family, eqs. 10, 12 and 16: its ends, its marginals, its noise."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddim_ode import (
    Code,
    EpsilonField,
    Generative,
    Grid,
    Inverse,
    McCallumFoster,
    NoiseSchedule,
    Status,
    decode,
    encode,
    integrate,
    load_code,
    noise,
    round_trip,
    sample,
)
from ddim_ode.models.analytic import GaussianEpsilon, MixtureEpsilon
from ddim_ode.solvers import get

LINEAR = NoiseSchedule.linear()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
MIXTURE = MixtureEpsilon(
    torch.tensor([0.3, 0.7]), torch.tensor([[-0.8, 0.1, 0.4], [0.5, -0.3, 0.2]]),
    torch.stack([0.02 * torch.eye(3), torch.diag(torch.tensor([0.1, 0.01, 0.3]))]),
)  # fmt: skip
FIELD = EpsilonField.from_sigma(MIXTURE, LINEAR, shape=(3,))
FAMILY = {
    "eta=0.2": Generative(0.2),
    "eta=1": Generative(),
    "sigma-hat": Generative(sigma_hat=True),
    "free": Generative(deviations=(0.9, 0.5, 0.1, 0.01, 0.01)),
}
family = pytest.mark.parametrize("member", FAMILY.values(), ids=FAMILY)


def by_the_letter(alpha, before, x, eps, deviation, z, own=None):
    """Eq. 12: from α_t to α_{t−1} = `before`; `own` stands for σ_t in the middle term where that is another's."""
    own = deviation if own is None else own
    predicted = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    towards = math.sqrt(max(1 - before - own**2, 0.0)) if before < 1 else 0.0
    return math.sqrt(before) * predicted + towards * eps + deviation * z


def sixteen(eta, alpha, before):
    return eta * math.sqrt((1 - before) / (1 - alpha)) * math.sqrt(1 - alpha / before)


# -- the ends ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", ["quadratic", "linear", "karras", "flow"])
@pytest.mark.parametrize("device", DEVICES)
def test_without_noise_it_is_ddim(grid, device):
    latent = noise((3,), 4, 0).to(device)
    still, ode = (sample(FIELD, latent, steps=13, grid=grid, **how) for how in ({"eta": 0.0}, {"solver": "ddim"}))
    torch.testing.assert_close(still.x, ode.x, rtol=1e-13, atol=1e-14)
    assert (still.nfe, still.solver) == (13, "ddim-eta0")


@family
def test_a_step_is_eq_12(member):
    grid = Grid.from_tau((2, 40, 300, 700, 1000), LINEAR)
    latent = noise((3,), 2, 4)
    run = sample(FIELD, latent, grid=grid, solver=member, seed=9, trajectory=True)
    x = latent
    for n, (high, low) in enumerate(zip(grid.sigmas[:-1], grid.sigmas[1:], strict=True)):
        alpha, before = 1 / (1 + high**2), 1 / (1 + low**2)
        z = torch.stack([torch.from_numpy(keyed(9, i, n).standard_normal(3)) for i in range(2)])
        own = sixteen(member.eta, alpha, before)
        deviation = math.sqrt(1 - alpha / before) if member.sigma_hat else own
        if member.deviations is not None:
            own = deviation = member.deviations[n]
        eps = FIELD(x * math.sqrt(1 + high**2), float(high))
        x = by_the_letter(alpha, before, x, eps, deviation, z, own)
        torch.testing.assert_close(run.trajectory[n + 1] / math.sqrt(1 + low**2), x, rtol=1e-9, atol=1e-11)


def keyed(seed, image, step):
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, image], dtype=np.uint64), counter=[0, 0, 0, step + 1])
    )


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.tensor([[0.6, 0.2, 0.0], [-0.3, 0.5, 0.2], [0.1, 0.0, 0.9]]))

    def forward(self, x, t):
        return torch.tanh(x @ self.mix) + 1e-3 * t.reshape(-1, 1) * torch.cos(x)


def in_float64(scheduler):
    """A scheduler of diffusers with its tables, which it makes in float32, in float64."""
    scheduler.alphas_cumprod = torch.tensor(LINEAR.alphas_cumprod)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


clipped = pytest.mark.parametrize("clip", [None, 1.0])


@clipped
@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers_ancestral_sampling_given_the_same_noise(monkeypatch, steps, kind, clip):
    """The last step too: from t = 0 it adds nothing, and from any other what its variance says."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    scheduler = in_float64(
        diffusers.DDPMScheduler(
            clip_sample=clip is not None,
            variance_type=kind,
            timestep_spacing="trailing" if steps < 1000 else "leading",
        )
    )
    scheduler.set_timesteps(steps)
    model, latent = Network().double(), noise((3,), 2, 1)
    field = EpsilonField(model, LINEAR, shape=(3,), clip=clip)
    times = scheduler.timesteps.tolist()
    grid = Grid.from_tau([t + 1 for t in reversed(times)], LINEAR)
    now = 0

    def same_noise(shape, **_):
        return torch.from_numpy(np.stack([keyed(3, i, now).standard_normal(shape[1:]) for i in range(shape[0])]))

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", same_noise)
    theirs = [latent]
    with torch.no_grad():
        for now, t in enumerate(times):  # noqa: B007  (the noise's key)
            eps = model(theirs[-1], torch.full((2,), float(t), dtype=torch.float64))
            theirs.append(scheduler.step(eps, t, theirs[-1]).prev_sample)
    run = sample(field, latent, grid=grid, eta=1.0, sigma_hat=kind == "fixed_large", seed=3, trajectory=True)
    ours = run.trajectory / torch.from_numpy(np.sqrt(1 + grid.sigmas**2)).reshape(-1, 1, 1)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-9)


@clipped
@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_between_the_ends_it_is_diffusers_ddim_with_eta(eta, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = in_float64(diffusers.DDIMScheduler(clip_sample=clip is not None, timestep_spacing="trailing"))
    scheduler.set_timesteps(20)
    model, latent = Network().double(), noise((3,), 2, 1)
    times = scheduler.timesteps.tolist()
    x = latent
    with torch.no_grad():
        for n, t in enumerate(times):
            z = torch.from_numpy(np.stack([keyed(0, i, n).standard_normal(3) for i in range(2)]))
            eps = model(x, torch.full((2,), float(t), dtype=torch.float64))
            # Clipped data have another ε, which we go on with.
            x = scheduler.step(
                eps, t, x, eta=eta, variance_noise=z, use_clipped_model_output=clip is not None
            ).prev_sample
    run = sample(
        EpsilonField(model, LINEAR, shape=(3,), clip=clip),
        latent,
        grid=Grid.from_tau([t + 1 for t in reversed(times)], LINEAR),
        eta=eta,
    )
    torch.testing.assert_close(run.x, x, rtol=1e-9, atol=1e-9)


# -- the distribution ---------------------------------------------------------------------------------
VARIANCES = np.array([1e-3, 0.05, 0.6])
MEAN = np.array([0.3, -0.5, 0.0])


def end(grid, eta, hat=False):
    """Mean and variances of x_0 drawn with the exact ε of N(MEAN, diag VARIANCES), by eq. 12 in the paper's letters."""
    mean, variance = np.zeros(3), np.ones(3)
    for high, low in zip(grid.sigmas[:-1], grid.sigmas[1:], strict=True):
        alpha, before = 1 / (1 + high**2), 1 / (1 + low**2)
        deviation = sixteen(eta, alpha, before)
        gain = math.sqrt(1 - alpha) / (alpha * VARIANCES + 1 - alpha)  # ε = gain (x − √α μ)
        along = math.sqrt(max(1 - before - deviation**2, 0)) - math.sqrt(before / alpha) * math.sqrt(1 - alpha)  # of ε
        slope = math.sqrt(before / alpha) + along * gain
        bias = -along * gain * math.sqrt(alpha) * MEAN
        added = math.sqrt(1 - alpha / before) if hat and not (low == 0.0 and high <= LINEAR.sigma_min) else deviation
        mean, variance = slope * mean + bias, slope**2 * variance + added**2
    return mean, variance


def propagated(grid, eta, hat=False):
    """The same by the steps that the package takes, in x̄, where ε = σ (x̄ − μ)/(λ + σ²)."""
    mean, variance = np.zeros(3), np.full(3, 1.0 + grid.sigmas[0] ** 2)
    for sigma, slope, spread in Generative(eta, hat).plan(grid):
        gain = slope * sigma / (VARIANCES + sigma**2)
        mean, variance = mean + gain * (mean - MEAN), (1.0 + gain) ** 2 * variance + spread**2
    return mean, variance


GAUSSIAN = EpsilonField.from_sigma(
    GaussianEpsilon(torch.from_numpy(MEAN), torch.from_numpy(VARIANCES)), LINEAR, shape=(3,)
)


kinds = pytest.mark.parametrize(("eta", "hat"), [(0.0, False), (0.2, False), (0.5, False), (1.0, False), (1.0, True)])


@kinds
def test_the_data_come_back_as_steps_grow(eta, hat):
    """Mean and covariance of Gaussian data, by the package's steps: the error falls at order 1 on a grid that goes down to 0 evenly."""
    errors = []
    for steps in (500, 1000, 2000):
        mean, variance = propagated(Grid.make("asinh", LINEAR, steps), eta, hat)
        errors.append([np.abs(mean - MEAN).max(), np.abs(variance / VARIANCES - 1).max()])
    mean_off, variance_off = np.array(errors).T
    assert variance_off[-1] < 0.01
    np.testing.assert_allclose(np.log2(variance_off[:-1] / variance_off[1:]), 1.0, atol=0.05)
    # A latent of N(0, I), whatever the data's mean, has 1/160 of it too little, and noise forgets that.
    assert mean_off.max() < 1e-3


@kinds
@pytest.mark.parametrize("rule", ["linear", "quadratic", "karras", "asinh"])
def test_what_is_drawn_is_what_the_paper_draws(rule, eta, hat):
    grid = Grid.make(rule, LINEAR, 20)
    np.testing.assert_allclose(propagated(grid, eta, hat), end(grid, eta, hat), rtol=1e-9)


@pytest.mark.parametrize("how", [{"eta": 0.5}, {"eta": 1.0}, {"eta": 1.0, "sigma_hat": True}], ids=str)
def test_samples_have_that_distribution(how):
    count, grid = 6000, Grid.make("quadratic", LINEAR, 12)
    run = sample(GAUSSIAN, n=count, seed=5, grid=grid, **how)
    mean, variance = end(grid, how["eta"], how.get("sigma_hat", False))
    x = run.x.numpy()
    assert np.abs((x.mean(0) - mean) / np.sqrt(variance / count)).max() < 4.5
    found = np.cov(x.T)
    spread = np.sqrt((np.outer(variance, variance) + np.diag(variance**2)) / count)
    assert np.abs((found - np.diag(variance)) / spread).max() < 4.5


def test_what_sigma_hat_leaves():
    """The noise in images, by the first τ, as docs/paper.md says."""
    left = lambda rule, steps: Generative(sigma_hat=True).plan(Grid.make(rule, LINEAR, steps))[-1].spread
    assert [round(left("linear", S), 2) for S in (10, 20, 50, 100)] == [0.32, 0.17, 0.08, 0.04]
    assert left("quadratic", 10) == pytest.approx(left("linear", 100), rel=1e-12)
    assert left("quadratic", 22) > 0.0
    assert left("linear", 1000) == left("quadratic", 23) == 0.0
    for S in (10, 20, 50, 100):
        assert Generative(sigma_hat=True).plan(Grid.from_tau(range(1, 1001, 1000 // S), LINEAR))[-1].spread == 0.0


# -- the noise ----------------------------------------------------------------------------------------
@family
def test_an_image_hangs_on_seed_and_index_alone(member):
    options = {"grid": Grid.from_tau((2, 40, 300, 700, 1000), LINEAR), "solver": member}
    whole = sample(FIELD, n=7, seed=3, **options).x
    assert torch.equal(sample(FIELD, n=7, seed=3, batch_size=2, **options).x, whole)
    assert torch.equal(sample(FIELD, n=2, seed=3, first=4, **options).x, whole[4:6])
    latent = noise((3,), 7, 3)
    assert torch.equal(sample(FIELD, latent, seed=3, **options).x, whole)
    assert torch.equal(sample(FIELD, latent[4:6], seed=3, first=4, **options).x, whole[4:6])
    other = sample(FIELD, latent, seed=4, **options).x
    assert float((other - whole).abs().min()) > 0.0
    # The noise of a step is neither the latent's nor another step's.
    steps = [torch.from_numpy(keyed(3, 0, n - 1).standard_normal(500)) for n in range(4)]
    assert float(torch.corrcoef(torch.stack(steps)).fill_diagonal_(0.0).abs().max()) < 0.25
    assert torch.equal(steps[0], noise((500,), 1, 3)[0])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_failed_sample_leaves_its_neighbours_their_noise(batch_size):
    def broken(x, sigma):
        eps = MIXTURE(x, sigma).clone()
        if sigma < 0.5:
            eps[(x - marked).abs().amax(dim=1) < 1e-9] = math.nan
        return eps

    options = {"steps": 9, "eta": 1.0, "seed": 6, "batch_size": batch_size}
    whole = sample(FIELD, n=5, trajectory=True, **options)
    node = int(np.argmax(whole.grid.sigmas < 0.5))
    marked = whole.trajectory[node, 3]
    run = sample(EpsilonField.from_sigma(broken, LINEAR, shape=(3,)), n=5, **options)
    assert run.status == (Status.SUCCESS,) * 3 + (Status.NONFINITE, Status.SUCCESS)
    others = [0, 1, 2, 4]
    assert torch.equal(run.x[others], whole.x[others])
    # The second run, which finds the last finite state, must draw what the first drew.
    assert run.sigma[3] == whole.grid.sigmas[node]
    assert torch.equal(run.x_bar[3], marked)


def test_the_last_step_is_clean_unless_told():
    """σ̂ of τ_1 is √(1 − α); leaving the first trained level nothing is added, as in the authors' code."""
    grid = Grid.from_tau((1, 500, 1000), LINEAR)
    for how in ({"eta": 1.0}, {"eta": 1.0, "sigma_hat": True}, {"eta": 0.3}):
        run = sample(FIELD, n=2, grid=grid, trajectory=True, **how)
        x_bar = run.trajectory[-2]
        torch.testing.assert_close(run.x, x_bar - grid.sigmas[-2] * FIELD(x_bar, float(grid.sigmas[-2])))
    last = lambda tau: Generative(sigma_hat=True).plan(Grid.explicit(np.append(tau, 0.0), LINEAR))[-1].spread
    for tau in (1.0, 0.5):
        assert last(LINEAR.sigma(np.array([500.0, tau]))) == 0.0
    assert last(LINEAR.sigma(np.array([500.0, 1.0])).astype(np.float32)) == 0.0
    for tau in (2.0, 20.0, 100.0):
        assert last(LINEAR.sigma(np.array([500.0, tau]))) == pytest.approx(math.sqrt(1.0 - LINEAR.alpha(tau)), rel=1e-9)
    # Other steps add some wherever they are, and a run that stops above 0 has no last one.
    assert all(step.spread > 0.0 for step in Generative(sigma_hat=True).plan(Grid.make("asinh", LINEAR, 500))[:-1])
    assert Generative(sigma_hat=True).plan(Grid.explicit([1.0, 0.01, 0.005], LINEAR))[-1].spread > 0.0
    clean = sample(FIELD, n=300, grid=grid, solver=Generative(deviations=(0.5, 0.01, 0.0)))
    noisy = sample(FIELD, n=300, grid=grid, solver=Generative(deviations=(0.5, 0.01, 3.0)))
    assert abs(float((noisy.x - clean.x).std()) / 3.0 - 1.0) < 0.1


def test_gradients_flow_past_the_noise():
    latent = noise((3,), 2, 0).requires_grad_()
    grads = []
    for how in ({"gradients": True}, {"checkpoint": True}):
        run = sample(FIELD, latent, steps=6, eta=1.0, seed=2, **how)
        grads.append(torch.autograd.grad(run.x.square().sum(), latent)[0])
    torch.testing.assert_close(*grads, rtol=0.0, atol=0.0)
    step = 1e-6
    moved = [sample(FIELD, latent.detach() + k * step, steps=6, eta=1.0, seed=2).x.square().sum() for k in (-1, 1)]
    torch.testing.assert_close((moved[1] - moved[0]) / (2 * step), grads[0].sum(), rtol=1e-5, atol=1e-7)


def test_no_sync_inside_the_loop():
    field = EpsilonField(lambda x, t: torch.sin(x) * t.reshape(-1, 1), LINEAR, shape=(3,), dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = sample(field, torch.empty(4, 3, device="cuda", dtype=torch.float64), steps=5, eta=1.0)
    assert (run.x.device.type, run.x.dtype, run.nfe) == ("cuda", torch.float64, 5)


# -- without noise ------------------------------------------------------------------------------------
@pytest.mark.parametrize("still", [Generative(0.0), Generative(deviations=(0.0,) * 9)], ids=["eta=0", "deviations"])
def test_without_noise_it_does_all_that_ddim_does(still, tmp_path):
    assert not still.stochastic
    grid, latent, close = Grid.make("karras", LINEAR, 9), noise((3,), 4, 0), {"rtol": 1e-13, "atol": 1e-13}
    runs = [
        sample(FIELD, latent, grid=grid, solver=s, dense=True, save_at=[20.0, 0.5], trajectory=True)
        for s in (still, "ddim")
    ]
    for part in ("x", "saved", "trajectory"):
        torch.testing.assert_close(*(getattr(run, part) for run in runs), **close)
    torch.testing.assert_close(*(run.out(3.0) for run in runs), **close)
    data = runs[0].x
    codes = [encode(FIELD, data, grid=grid, solver=s, dense=True) for s in (still, "ddim")]
    torch.testing.assert_close(*(run.x for run in codes), **close)
    torch.testing.assert_close(*(run.out(3.0) for run in codes), **close)
    torch.testing.assert_close(*(round_trip(FIELD, data, grid=grid, solver=s).mse for s in (still, "ddim")), **close)
    Code.of(FIELD, codes[0]).save(tmp_path / "code.npz")
    code = load_code(tmp_path / "code.npz")
    assert code.solver == still
    torch.testing.assert_close(decode(FIELD, code).x, sample(FIELD, codes[1].x, grid=grid, solver="ddim").x, **close)


@pytest.mark.parametrize("wrap", [McCallumFoster, Inverse])
def test_without_noise_it_is_a_base_for_others(wrap):
    data = sample(FIELD, noise((3,), 4, 0), nfe=20).x
    runs = [round_trip(FIELD, data, steps=6, solver=wrap(base)) for base in (Generative(0.0), get("ddim"))]
    torch.testing.assert_close(*(run.latent for run in runs), rtol=1e-6, atol=1e-6)  # an iteration's tolerance is 1e-7
    torch.testing.assert_close(*(run.reconstruction for run in runs), rtol=1e-6, atol=1e-6)


# -- what cannot be -----------------------------------------------------------------------------------
def test_bad_input():
    FIELD.nfe = 0
    latent = noise((3,), 2, 0)
    for options, said in (
        ({"eta": -0.1}, "eta must be a number of at least 0"),
        ({"eta": math.nan}, "eta must be a number of at least 0"),
        ({"eta": 2.0}, r"eta = 2 makes the variance .* negative in 4 of 5 steps, worst in step 1, from sigma = 157"),
        ({"eta": 0.5, "sigma_hat": True}, "sigma_hat is the larger noise of DDPM: it goes with eta = 1"),
        ({"eta": 0.5, "solver": "ddim"}, "leave solver out"),
        ({"sigma_hat": True, "solver": "ddim"}, "leave solver out"),
        ({"eta": 1.0, "dense": True}, "ddpm may add noise at each step, and has no path between them"),
        ({"eta": 1.0, "save_at": [1.0]}, "has no path between them"),
        ({"eta": 1.0, "first": -1}, "first must be"),
        ({"eta": 1.0, "seed": -1}, "seed must be"),
        (
            {"solver": Generative(deviations=(0.1, 0.1))},
            "deviations must be 5 finite numbers of at least 0, one a step, from sigma = 157.407 down, but got 2",
        ),
        ({"solver": Generative(deviations=(0.1, 0.1, 0.1, 9.0, 0.1))}, "worst in step 4"),
    ):
        with pytest.raises(ValueError, match=said):
            sample(FIELD, latent, steps=5, **options)
    images = torch.zeros(2, 3)
    for run in (encode, round_trip):
        with pytest.raises(ValueError, match=r"ddpm samples only, .* encode by ddim"):
            run(FIELD, images, steps=5, solver=Generative())
    with pytest.raises(ValueError, match=r"ddpm samples only, .* encode by ddim"):
        integrate(FIELD, images, [0.0, 1.0], Generative())
    for wrap in (McCallumFoster, Inverse):
        with pytest.raises(ValueError, match="base must be a solver of fixed steps"):
            wrap(Generative())
    with pytest.raises(ValueError, match="it goes with eta = 1 and without deviations"):
        Generative(sigma_hat=True, deviations=(0.1,))
    for eta in (0.0, 0.3):
        with pytest.raises(ValueError, match=f"deviations stand in place of eta, but got both, and eta = {eta:g}"):
            Generative(eta, deviations=(0.1,))
    for bad in (
        0.1,
        "abc",
        ("a", 1, 2),
        ("0.1", "0.1"),
        (0.1, None),
        [[0.1], [0.1, 0.2]],
        (0.1, math.nan),
        (-0.1,),
        (True,),
    ):
        with pytest.raises(ValueError, match="deviations must be finite numbers of at least 0, one a step, but got"):
            Generative(deviations=bad)
    # Whatever holds numbers will do.
    for given in (
        np.array([0.5, 0.25]),
        torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True),
        [0.5, 0.25],
    ):
        assert Generative(deviations=given) == Generative(deviations=(0.5, 0.25))
    for name in ("ddpm", "ddpm-sigma-hat", "ddim-eta0.3", "ddim-deviations"):
        with pytest.raises(
            ValueError, match=rf"unknown solver '{name}': .* chosen by eta=, .* sigma_hat=True"
        ) as refused:
            sample(FIELD, latent, solver=name)
        assert "dpm3s" not in str(refused.value)
    assert FIELD.nfe == 0


def test_members_are_values():
    assert Generative(0.5) == Generative(0.5).keyed(3, [1, 2])
    assert pickle.loads(pickle.dumps(Generative(deviations=[0.1]))) == Generative(deviations=(0.1,))
    names = [member.name for member in (*FAMILY.values(), Generative(0.0))]
    assert names == ["ddim-eta0.2", "ddpm", "ddpm-sigma-hat", "ddim-deviations", "ddim-eta0"]


def test_the_last_step_of_the_quadratic_grid_leaves_what_it_leaves():
    """From σ = 0.01, however many steps: of the variance along a direction of 0.001, as docs/paper.md says."""
    grid = Grid.make("quadratic", LINEAR, 1000)
    off = {eta: np.abs(propagated(grid, eta)[1] / VARIANCES - 1).max() for eta in (0.0, 1.0)}
    assert off[0.0] == pytest.approx(0.144, abs=1e-3)
    assert off[1.0] == pytest.approx(0.221, abs=1e-3)
