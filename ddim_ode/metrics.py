"""Distances between images, stated per image."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = ["mse", "psnr", "rms", "ssim"]


def mse(a: Tensor, b: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Mean squared error per dimension on [0, 1], for each image: the paper's Table 2.

    Parameters
    ----------
    a, b : Tensor
        Images (B, \*d).
    data_range : (float, float)
        The range that is mapped to [0, 1]; nothing is clamped. Of whole numbers 0…255 it is (0, 255).

    Returns
    -------
    Tensor
        (B,), float64.

    Raises
    ------
    ValueError, TypeError
        If the shapes differ, `data_range` is no range, or one of 2 or less and the images whole numbers.
    """
    low, high = _check(a, b, data_range)
    return ((a.double() - b.double()) / (high - low)).square().flatten(1).mean(dim=1)


def rms(a: Tensor, b: Tensor) -> Tensor:
    r"""Root mean squared difference per dimension, for each sample, as it is, on no scale: (B, \*d) to (B,), float64.

    Raises
    ------
    ValueError, TypeError
        If the shapes differ.
    """
    _check(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(dim=1).sqrt()


def psnr(a: Tensor, b: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Peak signal-to-noise ratio of each image in dB, :math:`-10 \log_{10}` of :func:`mse`: (B,), float64; infinite for equal images.

    Raises
    ------
    ValueError, TypeError
        As :func:`mse`.
    """
    return -10.0 * mse(a, b, data_range).log10()


def ssim(a: Tensor, b: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Structural similarity of each image, by torchmetrics: 1 for equal images.

    Windows are Gaussian, 11 pixels wide with σ = 1.5; constants are 0.01 and 0.03 of the range; windows at the edges see the image
    mirrored, and count. (Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004; scikit-image leaves the edges out.)

    Parameters
    ----------
    a, b : Tensor
        Images (B, C, H, W), of 6 × 6 pixels at least.
    data_range : (float, float)
        The range that is mapped to [0, 1]; nothing is clamped.

    Returns
    -------
    Tensor
        (B,), float64: the mean over channels and pixels.

    Raises
    ------
    ValueError, TypeError
        If the shapes differ, or are not those of images so large; and as :func:`mse`.
    ImportError
        If torchmetrics is not installed: ``pip install ddim_ode[metrics]``.
    """
    low, high = _check(a, b, data_range)
    if a.ndim != 4 or min(a.shape[2:]) < 6:
        raise ValueError(
            f"a and b must be images (B, C, H, W), 6 pixels at least each way, but have shape {tuple(a.shape)}"
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("ssim needs torchmetrics: pip install ddim_ode[metrics]") from error
    scaled = [(x.double() - low) / (high - low) for x in (a, b)]
    found = structural_similarity_index_measure(scaled[0], scaled[1], data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # it is a pair only where the whole map is asked for
    return found


def _check(a: Any, b: Any, data_range: tuple[float, float] | None = None) -> tuple[float, float]:
    """The range, if these can be compared in it; without one they are compared as they are."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor (B, *d), but got {type(x).__name__}")
    if a.shape != b.shape or a.ndim < 2:  # torch would spread one over the other
        raise ValueError(f"a and b must have one shape (B, *d), but have {tuple(a.shape)} and {tuple(b.shape)}")
    if data_range is None:
        return 0.0, 1.0
    try:
        low, high = (float(x) for x in data_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0.0 < high - low < math.inf:
        raise ValueError(f"data_range must be two numbers, the lower first, but got {data_range!r}")
    if high - low <= 2.0 and not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            f"a and b must be floats in data_range = ({low:g}, {high:g}), but are {a.dtype} and {b.dtype}: give "
            "data_range=(0, 255) for such images, or make floats of them (ddim_ode.data.as_tensor)"
        )
    return low, high
