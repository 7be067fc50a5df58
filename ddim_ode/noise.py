"""Gaussian noise keyed by (seed, image index): what else is sampled beside an image never changes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddim_ode.schedule import whole

__all__ = ["draw", "noise"]


def noise(shape: tuple[int, ...], n: int, seed: int, *, first: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Unit Gaussian latents keyed by (seed, image index): (n, \*shape), on the CPU.

    Image i is the same whatever `n`, the batch size, the dtype (up to rounding) or the device.

    Parameters
    ----------
    shape : tuple of int
        Shape \*d of one sample.
    n : int
        How many.
    seed : int
        0 ≤ seed < 2⁶⁴.
    first : int
        Index of the first image.
    dtype : torch.dtype
        Dtype of the result.
    """
    n, first = whole(n, "n"), whole(first, "first", 0)
    return draw(shape, range(first, first + n), check_seed(seed)).to(dtype)


def check_seed(seed: int) -> int:
    """The seed, refused if it is none."""
    seed = whole(seed, "seed", 0)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, but got {seed}")
    return seed


def draw(shape: tuple[int, ...], images: Sequence[int], seed: int, step: int = 0) -> Tensor:
    r"""Unit Gaussian noise for these images, (len(images), \*shape), float64, on the CPU.

    `step` keys streams that have nothing to do with each other: 0 is that of latents.
    """
    return torch.from_numpy(np.stack([stream(seed, i, 0, step).standard_normal(shape) for i in images]))


def stream(seed: int, image: int, third: int, fourth: int) -> np.random.Generator:
    """The generator of an image. Its counter's first two words count the numbers drawn; the others tell its streams apart."""
    key, counter = (np.array(words, dtype=np.uint64) for words in ((seed, image), (0, 0, third, fourth)))
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
