"""The objectives, eqs. 5 and 11, and Theorem 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ddim_ode
from ddim_ode import EpsilonField, Generative, Grid, NoiseSchedule, Status
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.diffusion.inference import Inference
from ddim_ode.diffusion.objective import constant, gamma, l_gamma, variational_bound
from ddim_ode.models.analytic import MixtureEpsilon

LINEAR = NoiseSchedule.linear()
TAU = (1, 20, 150, 600, 1000)
GRID = Grid.from_tau(TAU, LINEAR)
ALPHA = np.array([float(LINEAR.alphas_cumprod[t - 1]) for t in TAU])  # τ_1 first, as the paper counts
MEMBERS = {
    "eta=0.1": Inference(GRID, 0.1),
    "eta=1": Inference(GRID),
    "free": Inference(GRID, deviations=(0.3, 0.4, 0.05, 0.005)),
}
members = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
MIXTURE = MixtureEpsilon(
    torch.tensor([0.3, 0.7]), torch.tensor([[-0.8, 0.1], [0.5, -0.3]]), 0.05 * torch.eye(2).expand(2, 2, 2)
)
DATA = MIXTURE.sample(400, torch.Generator().manual_seed(0))
#: ε-functions that have nothing to do with each other.
FIELDS = {
    "exact": EpsilonField.from_sigma(MIXTURE, LINEAR, shape=(2,)),
    "zero": EpsilonField.from_sigma(lambda x, s: torch.zeros_like(x), LINEAR, shape=(2,)),
    "odd": EpsilonField.from_sigma(lambda x, s: torch.cos(x.flip(1)) - 0.1 * x / (1.0 + s), LINEAR, shape=(2,)),
}


def deviations(member):
    """σ_{τ_2} … σ_{τ_S}, in the paper's letters."""
    if member.deviations is not None:
        return np.array(member.deviations)[::-1]
    return member.eta * np.sqrt((1 - ALPHA[:-1]) / (1 - ALPHA[1:])) * np.sqrt(1 - ALPHA[1:] / ALPHA[:-1])


@members
def test_gamma_is_the_exact_one(member):
    own, last = deviations(member), 0.02
    bracket = np.sqrt(ALPHA[:-1]) - np.sqrt(np.maximum(1 - ALPHA[:-1] - own**2, 0) * ALPHA[1:] / (1 - ALPHA[1:]))
    wanted = np.append(
        (1 - ALPHA[0]) / (2 * last**2 * ALPHA[0]), (1 - ALPHA[1:]) / (2 * own**2 * ALPHA[1:]) * bracket**2
    )
    np.testing.assert_allclose(gamma(member, last)[::-1], wanted, rtol=1e-9)
    assert np.all(gamma(member, last) > 0.0)


# -- Theorem 1 ------------------------------------------------------------------------------------
def closed_form(member, last, variance, slopes):
    r"""J_σ of data N(0, `variance`), one dimension, and ε_θ(x) = slopes x at each level, by entropies and a log-density's mean.

    The chain x_{τ_S}, …, x_{τ_1} given x_0 is Gaussian, so that E log q is minus its entropy; log p_θ is a quadratic form.
    """
    own = deviations(member)
    sigma = np.sqrt((1 - ALPHA) / ALPHA)
    S = len(TAU)
    # Everything as a linear map of independent unit normals: x_0, then the noises from τ_S down.
    x_0 = np.zeros(S + 1)
    x_0[0] = math.sqrt(variance)
    x, entropy = [None] * S, 0.0
    for i in range(S - 1, -1, -1):
        noise = np.zeros(S + 1)
        noise[S - i] = 1.0
        if i == S - 1:
            spread = math.sqrt(1 - ALPHA[i])
            x[i] = math.sqrt(ALPHA[i]) * x_0 + spread * noise
        else:
            spread = own[i]
            towards = math.sqrt(max(1 - ALPHA[i] - spread**2, 0.0))
            x[i] = (
                math.sqrt(ALPHA[i]) * x_0
                + towards * (x[i + 1] - math.sqrt(ALPHA[i + 1]) * x_0) / math.sqrt(1 - ALPHA[i + 1])
                + spread * noise
            )
        entropy += 0.5 * math.log(2 * math.pi * math.e * spread**2)
    log_normal = lambda off, spread: -0.5 * (off @ off) / spread**2 - 0.5 * math.log(2 * math.pi * spread**2)
    model = log_normal(x[-1], 1.0)
    for i in range(S):
        eps = slopes[i] * x[i]
        estimate = (x[i] - math.sqrt(1 - ALPHA[i]) * eps) / math.sqrt(ALPHA[i])
        if i == 0:
            model += log_normal(x_0 - estimate, last)
        else:
            towards = math.sqrt(max(1 - ALPHA[i - 1] - own[i - 1] ** 2, 0.0))
            model += log_normal(x[i - 1] - math.sqrt(ALPHA[i - 1]) * estimate - towards * eps, own[i - 1])
    # L_γ's expectations: ‖a x − ε‖² with x = √α x_0 + √(1 − α) ε.
    a, scale = np.array(slopes), np.sqrt(1 - ALPHA)
    squares = a**2 * ALPHA * variance + (a * scale - 1) ** 2
    assert sigma.shape == squares.shape
    return -entropy - model, squares


@members
@pytest.mark.parametrize("last", [0.003, 0.0100005, 1.0])
def test_theorem_1_in_closed_form(member, last):
    """J_σ − L_γ is one number, that of `constant`, whatever ε is: for Gaussian data without any draw."""
    rng, variance = np.random.default_rng(0), 0.3
    wanted = constant(member, last, variance, 1)
    weights = gamma(member, last)[::-1]
    values = []
    for _ in range(5):
        slopes = rng.normal(size=len(TAU))
        bound, squares = closed_form(member, last, variance, slopes)
        values.append(bound)
        assert bound - weights @ squares == pytest.approx(wanted, rel=1e-8, abs=1e-8 * abs(bound))
    assert np.ptp(values) > 1.0


def by_the_divergences(field, clean, member, last, seed):
    """J_σ by torch's divergences: of eq. 7's normals from those about the means that the sampler steps to, (S,) rows and a prior.

    The draws are those that `variational_bound` asks the field about.
    """
    asked = []
    watched = EpsilonField.from_sigma(lambda x, s: asked.append((x, s)) or field(x, s), LINEAR, shape=(2,))
    variational_bound(watched, clean, member, last, seed=seed)
    free = None if member.deviations is None else (*member.deviations, 0.0)
    steps = Generative(member.eta, deviations=free).plan(GRID)
    own, rows = deviations(member), []
    prior = kl_divergence(Normal(math.sqrt(ALPHA[-1]) * clean, math.sqrt(1 - ALPHA[-1])), Normal(0.0, 1.0)).sum(1)
    for (x_bar, sigma), step, i in zip(asked, steps, range(len(TAU) - 1, -1, -1), strict=True):
        moved = x_bar + step.slope * field(x_bar, sigma)  # x̄ at the next level, but for noise
        if i == 0:
            rows.append(-Normal(moved, last).log_prob(clean).sum(1))
            continue
        towards = math.sqrt(max(1 - ALPHA[i - 1] - own[i - 1] ** 2, 0.0))
        away = (x_bar * math.sqrt(ALPHA[i]) - math.sqrt(ALPHA[i]) * clean) / math.sqrt(1 - ALPHA[i])
        mean = math.sqrt(ALPHA[i - 1]) * clean + towards * away
        rows.append(kl_divergence(Normal(mean, own[i - 1]), Normal(math.sqrt(ALPHA[i - 1]) * moved, own[i - 1])).sum(1))
    return torch.stack(rows).numpy(), prior.numpy()


@members
@pytest.mark.parametrize("name", FIELDS)
def test_theorem_1_draw_by_draw(member, name):
    """J_σ is eq. 11's divergences; and by the same draws its difference from L_γ is the constant, for each image, to rounding."""
    last = 0.02
    bound = variational_bound(FIELDS[name], DATA, member, last, seed=4)
    rows, prior = by_the_divergences(FIELDS[name], DATA.double(), member, last, 4)
    np.testing.assert_allclose(bound.terms, rows.mean(axis=1), rtol=1e-8)
    np.testing.assert_allclose(bound.each, rows.sum(axis=0) + prior, rtol=1e-8)
    assert bound.prior == pytest.approx(prior.mean(), rel=1e-8)
    simple = l_gamma(FIELDS[name], DATA, member.levels, gamma(member, last), seed=4)
    wanted = np.array([constant(member, last, float(x.square().sum()), 2) for x in DATA.double()])
    np.testing.assert_allclose(bound.each - simple.each, wanted, rtol=1e-8, atol=1e-9 * np.abs(bound.each).max())
    assert bound.prior + bound.terms.sum() == pytest.approx(bound.value, rel=1e-12)
    assert simple.value > 1.0


@members
@pytest.mark.parametrize("name", FIELDS)
def test_the_bound_is_eq_11(member, name):
    """Against log-densities of whole chains, drawn by the inference family and judged by eq. 10's normals."""
    last, field, clean = 0.02, FIELDS[name], DATA.double()
    x = member.sample(clean, seed=8)
    log_q = member.log_density(clean, x)
    own, levels = deviations(member), 1 / np.sqrt(ALPHA)
    normal = lambda value, mean, spread: torch.distributions.Normal(mean, spread).log_prob(value).sum(1)
    log_p = normal(x[0], torch.zeros_like(clean), 1.0)
    for i in range(len(TAU) - 1, -1, -1):
        here = x[len(TAU) - 1 - i]
        eps = field(here * levels[i], math.sqrt(1 - ALPHA[i]) * levels[i])
        estimate = (here - math.sqrt(1 - ALPHA[i]) * eps) / math.sqrt(ALPHA[i])
        if i == 0:
            log_p = log_p + normal(clean, estimate, last)
        else:
            towards = math.sqrt(max(1 - ALPHA[i - 1] - own[i - 1] ** 2, 0.0))
            log_p = log_p + normal(x[len(TAU) - i], math.sqrt(ALPHA[i - 1]) * estimate + towards * eps, own[i - 1])
    raw = (log_q - log_p).numpy()
    found = variational_bound(field, clean, member, last, seed=1)
    spread = math.hypot(raw.std(ddof=1) / math.sqrt(raw.size), found.standard_error)
    assert abs(raw.mean() - found.value) < 4.0 * spread
    assert found.standard_error < 0.2 * abs(found.value)


def test_the_bound_bounds():
    """−log p of the data's own density is less than J_σ, and the exact ε has the least."""
    member = Inference(Grid.make("log", LINEAR, 400))
    truth = -float(MIXTURE.log_density(DATA.double(), 0.0).mean())
    last = float(member.levels[-1])
    found = {name: variational_bound(f, DATA, member, last) for name, f in FIELDS.items()}
    assert truth < found["exact"].value + 3.0 * found["exact"].standard_error
    assert found["exact"].value < truth + 0.3
    assert found["exact"].value < min(found["zero"].value, found["odd"].value)


# -- estimates --------------------------------------------------------------------------------------
def test_what_training_minimises():
    """γ = 1: the mean over levels is the loss of a network that always says 0, D."""
    levels = np.geomspace(0.01, 100.0, 30)
    found = l_gamma(FIELDS["zero"], DATA, levels)
    assert abs(found.value / 30 - 2.0) < 4.0 * found.standard_error / 30
    np.testing.assert_allclose(found.terms, 2.0, atol=5.0 * found.standard_errors.max())
    half = l_gamma(FIELDS["zero"], DATA, levels, 0.5)
    np.testing.assert_allclose(half.each, 0.5 * found.each)


def test_standard_errors_are_the_spread_between_seeds():
    runs = [l_gamma(FIELDS["odd"], DATA[:1].expand(100, 2), [0.3, 3.0], seed=s) for s in range(40)]
    values = np.array([run.value for run in runs])
    assert 0.7 < values.std(ddof=1) / np.mean([run.standard_error for run in runs]) < 1.35
    terms = np.stack([run.terms for run in runs]).std(axis=0, ddof=1)
    ratio = terms / np.mean([run.standard_errors for run in runs], axis=0)
    assert np.all((ratio > 0.7) & (ratio < 1.35))
    assert math.isnan(l_gamma(FIELDS["odd"], DATA[:1], [0.3]).standard_error)


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failed_image_leaves_the_others_their_objective(value, batch_size):
    """What is said of the others is what is said of them alone."""
    member, lost = MEMBERS["eta=1"], [3, 17]
    keep = np.setdiff1d(np.arange(40), lost)
    data = DATA[:40].clone()
    data[lost] = 50.0

    def field(wrong):
        def eps(x, sigma):
            out = torch.cos(x.flip(1))
            if sigma < 1.0:
                out[x.abs().amax(dim=1) > 30.0] *= wrong
            return out

        return EpsilonField.from_sigma(eps, LINEAR, shape=(2,))

    for measure in (
        lambda f, x, **options: variational_bound(f, x, member, 0.02, **options),
        lambda f, x, **options: l_gamma(f, x, member.levels, [0.0, 0.5, 2.0, 0.0, 1.0], **options),
    ):
        found, clean = measure(field(value), data, batch_size=batch_size), measure(field(1.0), data)
        assert [i for i, status in enumerate(found.status) if status is Status.NONFINITE] == lost
        assert (found.success, clean.success) == (False, True)
        assert np.isnan(found.each[lost]).all()
        np.testing.assert_allclose(found.each[keep], clean.each[keep], rtol=1e-12)
        assert found.value == pytest.approx(clean.each[keep].mean(), rel=1e-12)
        assert found.standard_error == pytest.approx(clean.each[keep].std(ddof=1) / math.sqrt(38), rel=1e-12)
        assert found.prior + found.terms.sum() == pytest.approx(found.value, rel=1e-12)
        assert np.isfinite(found.standard_errors).all()
        # With none left there is no mean, and it says so.
        none = measure(field(value), data[lost])
        assert none.status == (Status.NONFINITE,) * 2
        assert np.isnan([none.value, none.standard_error, none.prior, *none.terms, *none.standard_errors]).all()


def test_batches_change_nothing():
    member = MEMBERS["eta=1"]
    whole = variational_bound(FIELDS["odd"], DATA, member, 0.02, seed=2)
    parts = variational_bound(FIELDS["odd"], DATA, member, 0.02, seed=2, batch_size=37)
    np.testing.assert_allclose(parts.each, whole.each, rtol=1e-12)
    few = variational_bound(FIELDS["odd"], DATA[:5], member, 0.02, seed=2)
    np.testing.assert_allclose(few.each, whole.each[:5], rtol=1e-12)


def test_on_a_network():
    """Theorem 1 for the bundled network."""
    field = ddim_ode.load("fashion-mnist")
    images = as_tensor(bundled_images()[:3])
    member = Inference(Grid.make("asinh", field.schedule, 6))
    last = float(member.levels[-1])
    bound = variational_bound(field, images, member, last)
    simple = l_gamma(field, images, member.levels, gamma(member, last))
    wanted = constant(member, last, float(images.double().square().flatten(1).sum(1).mean()), 784)
    assert bound.value - simple.value == pytest.approx(wanted, rel=1e-6)


# -- what cannot be ---------------------------------------------------------------------------------
def test_bad_input():
    field = FIELDS["odd"]
    field.nfe = 0
    still = Inference(GRID, deviations=(0.3, 0.4, 0.0, 0.005))
    for member, said in (
        (Inference(GRID, 0.0), r"157\.4\d* to 6\.1\d* adds no noise: take eta > 0"),
        (still, r"0\.518\d* to 0\.076\d* adds no noise: take deviations\[2\] > 0"),
    ):
        with pytest.raises(ValueError, match=rf"the objective is infinite, for the step from sigma = {said}"):
            variational_bound(field, DATA, member, 0.02)
    for act in (
        lambda: variational_bound(field, DATA, None, 0.02),
        lambda: gamma(None, 0.02),
        lambda: constant(None, 0.02, 1.0, 2),
    ):
        with pytest.raises(TypeError, match="member must be an Inference, but got NoneType"):
            act()
    for moment, size, said in ((-3.0, 2, "second_moment must be"), (1.0, -1, "size must be")):
        with pytest.raises(ValueError, match=said):
            constant(MEMBERS["eta=1"], 0.02, moment, size)
    other = Inference(Grid.make("linear", NoiseSchedule.cosine(), 5))
    with pytest.raises(ValueError, match=r"the member's grid was made for .*cosine.*, but the field has .*linear"):
        variational_bound(field, DATA, other, 0.02)
    for measure in (
        lambda f, x, **options: l_gamma(f, x, [1.0], **options),
        lambda f, x, **options: variational_bound(f, x, MEMBERS["eta=1"], 0.02, **options),
    ):
        with pytest.raises(TypeError, match="x_0 must be a torch tensor, but got list"):
            measure(field, [[1.0, 2.0]])
        with pytest.raises(TypeError, match="field must be an EpsilonField, but got function"):
            measure(lambda x, t: x, DATA)
        for options, said in (({"seed": -1}, "seed must be"), ({"batch_size": 0}, "batch_size must be")):
            with pytest.raises(ValueError, match=said):
                measure(field, DATA, **options)
    for last in (0.0, -1.0, math.nan, None):
        with pytest.raises(ValueError, match="last, the deviation of the last step, must be a positive number"):
            variational_bound(field, DATA, MEMBERS["eta=1"], last)
    for sigmas in (
        [],
        [0.0, 1.0],
        [[1.0]],
        [math.inf],
        [math.nan],
        [1.0, 157.5],
        ["1"],
        [[1.0], [1.0, 2.0]],
        None,
        1.0,
    ):
        with pytest.raises(ValueError, match=r"sigmas must be noise levels above 0 and up to 157\.407"):
            l_gamma(field, DATA, sigmas)
    for weights in ([1.0, 2.0], -1.0, [1.0, -1.0, 1.0], "a", math.nan, math.inf, None):
        with pytest.raises(ValueError, match="weights must be one number of at least 0, or one for each of 3 levels"):
            l_gamma(field, DATA, [1.0, 2.0, 3.0], weights)
    with pytest.raises(ValueError, match="x_0 must have shape"):
        l_gamma(field, torch.zeros(2, 5), [1.0])
    with pytest.raises(ValueError, match="x_0 must be finite"):
        l_gamma(field, torch.full((2, 2), math.nan), [1.0])
    assert field.nfe == 0
    # The schedule's last level in float32 is that level.
    assert l_gamma(field, DATA, [float(np.nextafter(np.float32(LINEAR.sigma_max), np.float32(200.0)))]).success
