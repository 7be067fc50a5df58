"""Distances between images, against computations that share nothing with them."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.metrics import mse, psnr, ssim


@pytest.fixture(scope="module")
def pictures():
    a = as_tensor(bundled_images()[:4], torch.float64)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a, (a + 0.3 * torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1) * noise).clamp(
        -1, 1
    )


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 13 of Wang et al. (2004), pixel by pixel, of two images (H, W) in [0, 1]."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    blur = lambda z: correlate1d(correlate1d(z, window, 0, mode="mirror"), window, 1, mode="mirror")
    mx, my = blur(x), blur(y)
    vx, vy, c = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    found = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    return float(found.mean())


def test_similarity_is_that_of_its_equation(pictures):
    a, b = pictures
    expected = [similarity(x, y) for x, y in zip(((a[:, 0] + 1) / 2).numpy(), ((b[:, 0] + 1) / 2).numpy(), strict=True)]
    torch.testing.assert_close(ssim(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert ssim(a, a + 0.3 * (b - a)).gt(ssim(a, b)).all()  # the less noise, the more alike
    torch.testing.assert_close(ssim(a.float(), b.float()), ssim(a, b), rtol=0, atol=1e-5)
    torch.testing.assert_close(ssim((a + 1) / 2, (b + 1) / 2, data_range=(0.0, 1.0)), ssim(a, b))
    torch.testing.assert_close(ssim(a, a), torch.ones(4, dtype=torch.float64))


def test_channels_are_averaged(pictures):
    a, b = (x.expand(-1, 3, -1, -1).clone() for x in pictures)
    a[:, 1:], b[:, 1:] = 0.5, 0.5
    torch.testing.assert_close(ssim(a, b), (ssim(a[:, :1], b[:, :1]) + 2.0) / 3.0)


def test_the_ratio_is_that_of_torchmetrics(pictures):
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = pictures
    expected = peak_signal_noise_ratio((a + 1) / 2, (b + 1) / 2, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b), expected)
    assert psnr(a, a).tolist() == [math.inf] * 4
    assert psnr(a[:1], a[:1] + 0.02).item() == pytest.approx(40.0)  # a hundredth of the range
    torch.testing.assert_close(psnr(a, b, data_range=(0.0, 1.0)), -10 * torch.log10(4 * mse(a, b)))


@pytest.mark.parametrize("shapes", [((2, 1, 8, 8), (2, 1, 8, 9)), ((2, 1, 5, 8), (2, 1, 5, 8)), ((2, 8, 8), (2, 8, 8))])
def test_what_has_no_similarity_is_refused(shapes):
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\) of one shape and 6 pixels at least"):
        ssim(*(torch.zeros(shape) for shape in shapes))


def test_a_missing_package_is_named(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"pip install ddim_ode\[metrics\]"):
        ssim(*pictures)
