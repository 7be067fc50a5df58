"""The inference family, eqs. 6 to 8: its marginals, its two factorisations, its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from ddim_ode import EpsilonField, Grid, NoiseSchedule, noise, sample
from ddim_ode.diffusion.inference import Inference
from ddim_ode.diffusion.objective import l_gamma

LINEAR = NoiseSchedule.linear()
TAU = (1, 4, 30, 200, 600, 1000)
GRID = Grid.from_tau(TAU, LINEAR)
ALPHA = np.array([float(LINEAR.alphas_cumprod[t - 1]) for t in TAU])[::-1]  # from τ_S down
#: Any deviations below what there is will do.
FREE = (0.9, 0.2, 0.1, 0.0, 0.005)
MEMBERS = {
    "eta=0": Inference(GRID, 0.0),
    "eta=0.3": Inference(GRID, 0.3),
    "eta=1": Inference(GRID, 1.0),
    "free": Inference(GRID, deviations=FREE),
}
members = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)


def deviations(eta):
    """Eq. 16 in the paper's letters."""
    after, before = ALPHA[1:], ALPHA[:-1]
    return eta * np.sqrt((1 - after) / (1 - before)) * np.sqrt(1 - before / after)


def covariance(member):
    """Of x at all levels given x_0, by eq. 7 in the paper's letters."""
    own = deviations(member.eta) if member.deviations is None else np.array(member.deviations)
    out = np.zeros((len(ALPHA), len(ALPHA)))
    out[0, 0] = 1 - ALPHA[0]
    for n in range(1, len(ALPHA)):
        factor = math.sqrt(max(1 - ALPHA[n] - own[n - 1] ** 2, 0.0) / (1 - ALPHA[n - 1]))
        out[n, :n] = out[:n, n] = factor * out[n - 1, :n]
        out[n, n] = factor**2 * out[n - 1, n - 1] + own[n - 1] ** 2
    return out


# -- marginals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
    "member", [*MEMBERS.values(), *(Inference(Grid.make("quadratic", LINEAR, 100), eta) for eta in (0.1, 1.0))]
)
def test_marginals_are_kept_by_the_numbers(member, forward):
    """The error of x̄ at each level, propagated exactly by the package's conditionals, has the variance σ²."""
    variance, rows = 0.0, member._conditionals(forward)
    assert sorted(n for n, *_ in rows) == list(range(len(member.levels)))
    for n, stretch, mean, spread in rows:
        variance = mean**2 * variance + spread**2
        assert variance == pytest.approx(member.levels[n] ** 2, rel=1e-11)
        assert stretch == pytest.approx(math.hypot(1.0, member.levels[n]), rel=1e-15)


@members
@pytest.mark.parametrize("forward", [False, True])
def test_draws_have_the_joint_distribution(member, forward):
    """Means √α x_0 and the whole covariance over τ, whose diagonal is 1 − α; 1 in 30,000 would be off so far by chance."""
    clean = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).repeat_interleave(40).reshape(200, 1).expand(200, 1000)
    x = member.sample(clean, seed=3, forward=forward)
    assert x.shape == (len(TAU), 200, 1000)
    error = (x - torch.from_numpy(np.sqrt(ALPHA)).reshape(-1, 1, 1) * clean).flatten(1)
    count, wanted = error.shape[1], covariance(member)
    found = (error @ error.T / count).numpy()
    # An entry of a sampled covariance has variance (c_ii c_jj + c_ij²)/count; 36 of them and the six means below.
    spread = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / count)
    assert np.abs((found - wanted) / spread).max() < 4.9
    assert np.abs(error.mean(dim=1).numpy() / np.sqrt((1 - ALPHA) / count)).max() < 4.9
    # And what is left has nothing to do with x_0.
    slope = (error * clean.flatten()).sum(1) / (clean.flatten() ** 2).sum()
    assert np.abs(slope.numpy() * math.sqrt(float((clean**2).sum())) / np.sqrt(1 - ALPHA)).max() < 4.9


# -- densities ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "member", [Inference(GRID, 0.3), Inference(GRID, 1.0), Inference(GRID, deviations=(0.9, 0.2, 0.1, 0.02, 0.005))]
)
def test_both_factorisations_are_the_joint_density(member):
    clean = torch.tensor([[0.3, -1.0], [0.0, 0.7]], dtype=torch.float64)
    x = member.sample(clean, seed=1) + 0.1 * torch.randn(
        len(TAU), 2, 2, dtype=torch.float64, generator=torch.manual_seed(0)
    )
    by_six, by_eight = member.log_density(clean, x), member.log_density(clean, x, forward=True)
    joint = multivariate_normal(np.zeros(len(TAU)), covariance(member), allow_singular=True)
    centred = x.numpy() - np.sqrt(ALPHA)[:, None, None] * clean.numpy()
    wanted = joint.logpdf(np.moveaxis(centred, 0, -1)).sum(axis=1)
    np.testing.assert_allclose(by_six, wanted, rtol=1e-6)  # scipy's, which inverts a covariance of condition 1e8
    torch.testing.assert_close(by_six, by_eight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "member", [Inference(Grid.make("linear", LINEAR, 1000), 1.0), Inference(Grid.make("quadratic", LINEAR, 100), 0.1)]
)
def test_factorisations_agree_over_many_levels(member):
    clean = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0)) * 2.0 - 1.0
    x = member.sample(clean, seed=5, forward=True)
    torch.testing.assert_close(
        member.log_density(clean, x), member.log_density(clean, x, forward=True), rtol=1e-10, atol=1e-10
    )


def test_without_noise_there_is_no_density():
    clean = torch.zeros(1, 2)
    for forward in (False, True):
        with pytest.raises(
            ValueError,
            match=r"q has no density, for the step from sigma = 157\.4\d* to 6\.1\d* adds no noise: take eta > 0",
        ):
            MEMBERS["eta=0"].log_density(clean, MEMBERS["eta=0"].sample(clean), forward=forward)
        with pytest.raises(
            ValueError,
            match=r"no density, for the step from sigma = 0\.108\d* to 0\.022\d* adds no noise: take deviations\[3\] > 0",
        ):
            MEMBERS["free"].log_density(clean, MEMBERS["free"].sample(clean), forward=forward)


# -- the two ends of the family -------------------------------------------------------------------
def test_ddpm_is_the_markov_chain():
    """Eq. 3: x_t given x_{t−1} has mean √(α_t/α_{t−1}) x_{t−1}, whatever x_0, and variance 1 − α_t/α_{t−1}."""
    for other in (0.0, 5.0):
        clean = torch.full((1, 4), other, dtype=torch.float64)
        x = torch.zeros(len(TAU), 1, 4, dtype=torch.float64)
        for n in range(len(TAU) - 1):
            here = x.clone()
            here[n + 1], here[n] = 1.3, 1.3 * math.sqrt(ALPHA[n] / ALPHA[n + 1])
            moved = here.clone()
            moved[n] += math.sqrt(1 - ALPHA[n] / ALPHA[n + 1])
            # One deviation off the mean costs half a nat a dimension in that conditional; what lies above n hangs on x[n]
            # too, and is taken out by looking at the two top levels alone.
            pair = Inference(Grid.from_tau(sorted((TAU[len(TAU) - 1 - n], TAU[len(TAU) - 2 - n])), LINEAR), 1.0)
            lost = pair.log_density(clean, moved[n : n + 2], forward=True) - pair.log_density(
                clean, here[n : n + 2], forward=True
            )
            torch.testing.assert_close(lost, torch.full((1,), -2.0, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_ddim_is_fixed_by_the_image_and_one_level():
    """η = 0: the errors x̄ − x_0 at all levels are one draw, σ times it."""
    clean = torch.rand(3, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    for forward in (False, True):
        x = MEMBERS["eta=0"].sample(clean, seed=2, forward=forward)
        sigmas = torch.from_numpy(MEMBERS["eta=0"].levels.copy()).reshape(-1, 1, 1)
        z = (x * (1.0 + sigmas**2).sqrt() - clean) / sigmas
        torch.testing.assert_close(z, z[:1].expand_as(z), rtol=1e-9, atol=1e-9)


def test_an_image_does_not_hang_on_its_batch():
    clean = torch.rand(5, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    whole = MEMBERS["eta=1"].sample(clean, seed=7)
    assert torch.equal(MEMBERS["eta=1"].sample(clean[3:], seed=7, first=3), whole[:, 3:])
    assert not torch.equal(MEMBERS["eta=1"].sample(clean, seed=8), whole)


def test_equal_seeds_draw_other_noise_elsewhere():
    """Of inference, generation and objectives: else what made x_T would be added again on the way down."""
    count, zero = 4000, EpsilonField.from_sigma(lambda x, s: torch.zeros_like(x), LINEAR, shape=(1,))
    clean, levels = torch.zeros(count, 1, dtype=torch.float64), torch.from_numpy(GRID.sigmas[:-1].copy())
    # Where ε is 0, what a step of generation adds to x̄ is its noise.
    down = sample(zero, torch.zeros_like(clean), grid=GRID, eta=1.0, trajectory=True).trajectory.diff(dim=0)[:-1]
    x_bar = MEMBERS["eta=1"].sample(clean) * (1.0 + levels**2).sqrt().reshape(-1, 1, 1)
    conditionals = MEMBERS["eta=1"]._conditionals(False)
    own = [x_bar[0], *(x_bar[n] - mean * x_bar[n - 1] for n, _, mean, _ in conditionals[1:])]
    asked = []
    watched = EpsilonField.from_sigma(lambda x, s: asked.append(x) or torch.zeros_like(x), LINEAR, shape=(1,))
    l_gamma(watched, clean, levels)
    rows = torch.cat([noise((1,), count, 0)[None], down, torch.stack(own), torch.stack(asked)]).squeeze(-1)
    assert rows.shape == (1 + 5 + 6 + 6, count)
    off = torch.corrcoef(rows).fill_diagonal_(0.0).abs()
    assert float(off.max()) < 5.0 / math.sqrt(count)


# -- what cannot be ---------------------------------------------------------------------------------
def test_bad_input():
    with pytest.raises(ValueError, match=r"eta must be a number of at least 0.*got -0\.5"):
        Inference(GRID, -0.5)
    for bad in (math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="eta must be a number"):
            Inference(GRID, bad)
    # The largest that fits, and a little more.
    most = np.sqrt(1 - ALPHA[1:])
    Inference(GRID, deviations=most)
    over = most.copy()
    over[2] *= 1.01
    lost = (1 - ALPHA[3]) * 0.0201
    with pytest.raises(
        ValueError,
        match=rf"negative in 1 of 5 steps, worst in step 3, .* where it is -{lost:.3g}: .* at most {most[2]:.6g}",
    ):
        Inference(GRID, deviations=over)
    with pytest.raises(
        ValueError,
        match=r"eta = 1\.5 makes the variance 1 - alpha - deviation² negative in 5 of 5 steps, worst in step 1",
    ):
        Inference(GRID, 1.5)
    with pytest.raises(ValueError, match=r"deviations must be 5 finite numbers of at least 0, .* but got 2"):
        Inference(GRID, deviations=(0.1, 0.2))
    for bad in ((0.1, 0.1, 0.1, 0.1, -0.1), (0.1, 0.1, math.nan, 0.1, 0.1), 0.1, ("a", 1), [[0.1], [0.1, 0.2]]):
        with pytest.raises(ValueError, match="deviations must be finite numbers of at least 0, one a step, but got"):
            Inference(GRID, deviations=bad)
    with pytest.raises(ValueError, match=r"deviations stand in place of eta, but got both, and eta = 0\.3"):
        Inference(GRID, 0.3, deviations=most)
    with pytest.raises(TypeError, match="grid must be a Grid, but got list"):
        Inference([1.0, 0.0])
    with pytest.raises(ValueError, match="grid must fall"):
        Inference(GRID.reversed())
    member, images = MEMBERS["eta=1"], torch.zeros(2, 3)
    lost = torch.tensor([[0.0, 1.0, 2.0], [0.0, math.nan, 1.0]])
    for act in (member.sample, lambda x_0: member.log_density(x_0, torch.zeros(6, 2, 3))):
        with pytest.raises(TypeError, match="x_0 must hold floats"):
            act(images.long())
        with pytest.raises(TypeError, match="x_0 must be a torch tensor"):
            act(images.tolist())
        with pytest.raises(ValueError, match="x_0 must be finite, but sample 1 hold NaN"):
            act(lost)
    with pytest.raises(ValueError, match=r"x must hold all 6 levels, shape \(6, 2, 3\), but its shape is \(2, 3\)"):
        member.log_density(images, images)
    for bad, said in (([[1.0]], "list"), (torch.zeros(6, 2, 3, dtype=torch.int64), r"torch\.int64")):
        with pytest.raises(TypeError, match=f"x must be a tensor of floats, but got {said}"):
            member.log_density(images, bad)
    with pytest.raises(ValueError, match="x is on meta, but x_0 is on cpu"):
        member.log_density(images, torch.zeros(6, 2, 3, device="meta"))


def test_tau():
    np.testing.assert_array_equal(GRID.sigmas[:-1], LINEAR.sigma(np.array(TAU[::-1], dtype=np.float64)))
    assert GRID.sigmas[-1] == 0.0
    assert Grid.from_tau(range(1, 1001), LINEAR) == Grid.make("linear", LINEAR, 1000)
    for tau, said in (
        ([1, 5, 5], r"tau must rise strictly, but tau\[1\] = 5 is followed by 5"),
        ([5, 1], r"tau\[0\] = 5 is followed by 1"),
        ([0, 5], "tau must lie in 1 to 1000, but spans 0 to 5"),
        ([5, 1001], "but spans 5 to 1001"),
        ([1.5, 3.0], "whole numbers out of 1 to 1000"),
        ([], "whole numbers"),
        (7, "whole numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            Grid.from_tau(tau, LINEAR)
    with pytest.raises(ValueError, match="this schedule is continuous"):
        Grid.from_tau([1, 2], NoiseSchedule.flow())
