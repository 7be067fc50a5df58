"""Gaussian noise keyed by (seed, image index): what else is sampled beside an image never changes it.

The draws of one seed and image are told apart by the last two words of the generator's counter:

| words | whose |
|---|---|
| 0, 0 | latents |
| 0, n | step n of generation, from 1 |
| :data:`INFERENCE`, n | level n of the inference family, from 1 |
| :data:`OBJECTIVE`, n | level n of an objective, from 1 |
| :data:`POPULATION`, 0 | latents of the samples that a calibration takes a Gaussian from |
| t, 2⁶³ | uniform draws for data over classes, at time t |
| k, 1 and 0, 2 | the likelihood's probe k, from 0, and dequantisation |

Two of the likelihood's, (0, 1) and (0, 2), read the bits of generation's first two steps, from which they make signs and uniform
numbers. No correlation shows, but only another seed makes them independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddim_ode.schedule import whole

__all__ = ["INFERENCE", "OBJECTIVE", "POPULATION", "draw", "noise"]

#: Whose draws: the third word of the counter, far from the small numbers that count probes and times.
INFERENCE, OBJECTIVE, POPULATION = 2**63, 2**63 + 1, 2**63 + 2


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


def draw(shape: tuple[int, ...], images: Sequence[int], seed: int, step: int = 0, whose: int = 0) -> Tensor:
    r"""Unit Gaussian noise for these images, (len(images), \*shape), float64, on the CPU.

    `step` and `whose` key streams of their own: latents have 0 and 0, and generation 0 with its steps from 1.
    """
    return torch.from_numpy(np.stack([stream(seed, i, whose, step).standard_normal(shape) for i in images]))


def stream(seed: int, image: int, third: int, fourth: int) -> np.random.Generator:
    """The generator of an image. Its counter's first two words count the numbers drawn; the others tell its streams apart."""
    key, counter = (np.array(words, dtype=np.uint64) for words in ((seed, image), (0, 0, third, fourth)))
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
