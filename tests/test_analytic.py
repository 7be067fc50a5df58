"""The exact ε-models: how every solver is judged, so they are judged here."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ddim_ode.models.analytic import EmpiricalEpsilon, GaussianEpsilon, MixtureEpsilon

RANDOM = torch.Generator().manual_seed(0)
D = 5
A = torch.randn(3, D, D, generator=RANDOM, dtype=torch.float64)
COVARIANCES = A @ A.transpose(1, 2) / D + 0.05 * torch.eye(D, dtype=torch.float64)
MEANS = torch.randn(3, D, generator=RANDOM, dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
X = torch.randn(4, D, generator=RANDOM, dtype=torch.float64)


def epsilon_by_autograd(log_density, sigma):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(x).sum(), x)
    return -sigma * gradient


def gaussian_log_density(mean, covariance, sigma):
    total = covariance + sigma**2 * torch.eye(D, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(mean, total).log_prob


@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
def test_gaussian_is_minus_sigma_times_the_score(sigma):
    exact = GaussianEpsilon(MEANS[0], COVARIANCES[0])
    by_hand = epsilon_by_autograd(gaussian_log_density(MEANS[0], COVARIANCES[0], sigma), sigma)
    torch.testing.assert_close(exact(X, sigma), by_hand, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
def test_mixture_is_minus_sigma_times_the_score(sigma):
    exact = MixtureEpsilon(WEIGHTS, MEANS, COVARIANCES)
    parts = [gaussian_log_density(m, c, sigma) for m, c in zip(MEANS, COVARIANCES, strict=True)]

    def log_density(x):
        return torch.logsumexp(torch.stack([w.log() + p(x) for w, p in zip(WEIGHTS, parts, strict=True)]), dim=0)

    torch.testing.assert_close(exact(X, sigma), epsilon_by_autograd(log_density, sigma), rtol=1e-10, atol=1e-12)


def test_gaussian_solution_solves_its_equation():
    exact = GaussianEpsilon(MEANS[0], COVARIANCES[0])
    sigma, h = 0.8, 1e-5
    slope = (exact.solution(X, sigma, sigma + h) - exact.solution(X, sigma, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, exact(X, sigma), rtol=1e-8, atol=1e-9)
    there = exact.solution(X, 0.0, 157.0)
    torch.testing.assert_close(exact.solution(there, 157.0, 0.0), X, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 30.0])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_empirical_is_the_mixture_of_its_points(sigma, chunk):
    data = torch.randn(50, D, generator=RANDOM, dtype=torch.float64)
    exact = EmpiricalEpsilon(data, chunk=chunk)
    mixture = MixtureEpsilon(torch.ones(50), data, torch.zeros(50, D, D))
    torch.testing.assert_close(exact(X, sigma), mixture(X, sigma), rtol=1e-9, atol=1e-10)


def test_empirical_takes_uint8_images_and_ends_on_them():
    images = torch.randint(0, 256, (20, 1, 3, 3), generator=RANDOM, dtype=torch.uint8)
    exact = EmpiricalEpsilon(images)
    x0 = images[:4].double() / 127.5 - 1.0
    x_bar = x0 + 1e-3 * torch.randn(4, 1, 3, 3, generator=RANDOM, dtype=torch.float64)
    torch.testing.assert_close(x_bar - 1e-3 * exact(x_bar, 1e-3), x0, rtol=0, atol=1e-9)
    assert exact.shape == (1, 3, 3)
    assert not exact(x0, 0.0).any()


def test_at_sigma_zero_the_field_vanishes_on_the_data():
    assert not GaussianEpsilon(MEANS[0], COVARIANCES[0])(X, 0.0).any()
    assert not MixtureEpsilon(WEIGHTS, MEANS, COVARIANCES)(X, 0.0).any()
    flat = MixtureEpsilon(WEIGHTS, MEANS, torch.zeros(3, D, D))
    assert not flat(X, 0.0).any()
    # Directions without variance too: their data all lie on the mean.
    assert not GaussianEpsilon(torch.zeros(D), torch.tensor([1.0, 0, 0, 0, 0]))(X, 0.0).any()


def test_shapes_and_dtypes_are_the_states():
    exact = GaussianEpsilon(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    assert exact.shape == (1, 2, 3)
    out = exact(torch.ones(7, 1, 2, 3), 1.0)
    assert out.shape == (7, 1, 2, 3)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("make", [GaussianEpsilon, lambda m, c: MixtureEpsilon(torch.ones(1), m[None], c[None])])
def test_nothing_of_an_inference_run_is_kept(make):
    exact = make(MEANS[0], COVARIANCES[0])
    with torch.inference_mode():
        exact(X, 0.5)
    x = X.clone().requires_grad_()
    exact(x, 0.5).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_mixture_samples_have_its_moments():
    mixture = MixtureEpsilon(WEIGHTS, MEANS, COVARIANCES)
    drawn = mixture.sample(40_000, torch.Generator().manual_seed(1))
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    second = sum(w * (c + torch.outer(m, m)) for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True))
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(drawn.T), second - torch.outer(mean, mean), rtol=0, atol=0.06)


def test_a_mixture_is_read_from_a_file(tmp_path):
    np.savez(tmp_path / "m.npz", weights=WEIGHTS.numpy(), means=MEANS.numpy(), covariances=COVARIANCES.numpy())
    torch.testing.assert_close(
        MixtureEpsilon.load(tmp_path / "m.npz")(X, 0.5), MixtureEpsilon(WEIGHTS, MEANS, COVARIANCES)(X, 0.5)
    )


def test_sixty_thousand_images_need_one_chunk_of_memory():
    images = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=RANDOM)
    exact = EmpiricalEpsilon(images, chunk=4096)
    x_bar = images[[7, 59_999]].double() / 127.5 - 1.0 + 0.01
    # Random images lie far apart: the nearest one is all there is.
    torch.testing.assert_close(exact(x_bar, 0.1), torch.full_like(x_bar, 0.1), rtol=1e-9, atol=0)

    # The peak of a process of its own, in KiB: all images at once would be 376 MB in float64, and copies of them.
    script = """
import resource, torch
from ddim_ode.models.analytic import EmpiricalEpsilon
exact = EmpiricalEpsilon(torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8), chunk={chunk})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exact(torch.zeros(2, 1, 28, 28, dtype=torch.float64), 20.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = [sys.executable, "-c", script.format(chunk=4096)]
    assert int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) < 250_000


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: GaussianEpsilon(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            "covariance must be symmetric",
        ),
        (lambda: GaussianEpsilon(torch.zeros(2), torch.tensor([1.0, -1.0])), "eigenvalue -1"),
        (lambda: GaussianEpsilon(torch.zeros(2), torch.eye(3)), r"\(D, D\)"),
        (lambda: MixtureEpsilon(torch.ones(2), MEANS, COVARIANCES), "agree on K"),
        (lambda: MixtureEpsilon(torch.tensor([1.0, 0.0, 1.0]), MEANS, COVARIANCES), "weights must be positive"),
        (lambda: EmpiricalEpsilon(torch.zeros(3)), "shape"),
        (lambda: EmpiricalEpsilon(torch.zeros(3, 4, dtype=torch.int64)), "int64"),
    ],
)
def test_bad_parameters_are_refused(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


@pytest.mark.parametrize(
    "exact",
    [
        GaussianEpsilon(MEANS[0], COVARIANCES[0]),
        GaussianEpsilon(torch.zeros(D), torch.tensor([1.0, 0, 0, 0, 0])),
        MixtureEpsilon(WEIGHTS, MEANS, COVARIANCES),
        MixtureEpsilon(WEIGHTS, MEANS, torch.zeros(3, D, D)),
        EmpiricalEpsilon(MEANS, chunk=2),
    ],
    ids=["gaussian", "flat gaussian", "mixture", "points", "empirical"],
)
def test_a_noise_level_for_each_sample(exact):
    """Samples at 0 among them, whose gradients must be finite too."""
    levels = [0.0, 0.05, 0.7, 30.0]
    column = torch.tensor(levels, dtype=torch.float64)[:, None]
    x = X.clone().requires_grad_()
    found = exact(x, column)
    wanted = torch.cat([exact(X[i : i + 1], s) for i, s in enumerate(levels)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert bool(gradient.isfinite().all())
