"""Distances between images, against computations that share nothing with them."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from ddim_ode.data import as_tensor, bundled_images, to_uint8
from ddim_ode.metrics import mse, psnr, rms, ssim


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


@pytest.mark.parametrize("shape", [(2, 1, 5, 8), (2, 8, 8)])
def test_what_has_no_similarity_is_refused(shape):
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), 6 pixels at least each way"):
        ssim(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("distance", [mse, psnr, rms, ssim])
def test_other_shapes_are_refused_not_spread(distance):
    one = torch.zeros(1, 1, 8, 8)
    for a, b in ((one.expand(2, 1, 8, 8), one), (one, one.expand(1, 3, 8, 8)), (one[0, 0, 0], one[0, 0, 0])):
        with pytest.raises(ValueError, match=r"one shape \(B, \*d\), but have \("):
            distance(a, b)
    with pytest.raises(TypeError, match="b must be a tensor"):
        distance(one, one.numpy())


@pytest.mark.parametrize("distance", [mse, psnr, ssim])
def test_ranges_are_ranges_and_whole_numbers_are_told_theirs(distance, pictures):
    a, b = pictures
    for wrong in ((1.0, 1.0), (1.0, -1.0), (0.0, math.inf), (0.0, math.nan), 255.0, (0.0, 1.0, 2.0)):
        with pytest.raises(ValueError, match="data_range must be two numbers, the lower first"):
            distance(a, b, wrong)
    levels = [torch.from_numpy(to_uint8(x)) for x in (a, b)]
    for pair in (levels, (a, levels[1])):
        with pytest.raises(ValueError, match=r"torch.uint8: give data_range=\(0, 255\)"):
            distance(*pair)
    torch.testing.assert_close(
        distance(*levels, data_range=(0, 255)), distance(*(as_tensor(x.numpy()) for x in levels))
    )


def test_root_mean_squares_are_on_no_scale():
    a = torch.zeros(2, 3, 2)
    assert rms(a, a + 5.0).tolist() == [5.0, 5.0]
    assert rms(a.to(torch.uint8), a.to(torch.uint8) + 200).tolist() == [200.0, 200.0]
    assert rms(torch.full((1, 2), math.nan), torch.zeros(1, 2)).isnan().all()


def test_a_missing_package_is_named(monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match=r"pip install ddim_ode\[metrics\]"):
        ssim(*pictures)
