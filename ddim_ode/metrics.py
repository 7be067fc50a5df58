"""Distances between images, stated per image."""

from __future__ import annotations

from torch import Tensor

__all__ = ["mse", "psnr", "rms", "ssim"]


def mse(a: Tensor, b: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Mean squared error per dimension on [0, 1], for each image: the paper's Table 2.

    Parameters
    ----------
    a, b : Tensor
        Images (B, \*d).
    data_range : (float, float)
        The range that is mapped to [0, 1].

    Returns
    -------
    Tensor
        (B,), float64.
    """
    low, high = data_range
    return ((a.double() - b.double()) / (high - low)).square().flatten(1).mean(dim=1)


def rms(a: Tensor, b: Tensor) -> Tensor:
    r"""Root mean squared difference per dimension, for each sample: (B, \*d) to (B,), float64."""
    return (a.double() - b.double()).square().flatten(1).mean(dim=1).sqrt()


def psnr(a: Tensor, b: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Peak signal-to-noise ratio of each image in dB, :math:`-10 \log_{10}` of :func:`mse`: (B,), float64; infinite for equal images."""
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
    ValueError
        If the shapes differ, or are not those of images so large.
    ImportError
        If torchmetrics is not installed: ``pip install ddim_ode[metrics]``.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < 6:
        raise ValueError(
            f"a and b must be images (B, C, H, W) of one shape and 6 pixels at least each way, but have {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("ssim needs torchmetrics: pip install ddim_ode[metrics]") from error
    low, high = data_range
    scaled = [(x.double() - low) / (high - low) for x in (a, b)]
    found = structural_similarity_index_measure(scaled[0], scaled[1], data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # it is a pair only where the whole map is asked for
    return found
