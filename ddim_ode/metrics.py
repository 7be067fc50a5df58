"""Distances between images, stated per image."""

from __future__ import annotations

from torch import Tensor

__all__ = ["mse", "rms"]


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
