"""What one does with latents x_T: move an image's along an attribute, and judge whether they are draws of N(0, I)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddim_ode.sampling import LatentWarning

__all__ = ["Gaussianity", "Moment", "attribute_direction", "gaussianity", "move_latent"]

#: Standard errors beyond which a moment is called off: what that costs in false alarms is measured in docs/latents.md.
LIMIT = 6.0

#: The map of correlations goes this many pixels each way.
_REACH = 4


# -- attributes ---------------------------------------------------------------------------------
def attribute_direction(latents: Tensor, labels: ArrayLike, of: int, against: int) -> Tensor:
    r"""The direction between two classes: the mean latent of one less that of the other.

    .. math:: d = \frac{1}{|A|} \sum_{i \in A} x_T^{(i)} - \frac{1}{|B|} \sum_{i \in B} x_T^{(i)}

    A holds the latents labelled `of`, B those labelled `against`: one unit of d leads from class to class. It is the
    vector arithmetic of Radford, Metz and Chintala (2016, §6.3.2) on encoded images.

    Parameters
    ----------
    latents : Tensor
        x_T of images, (N, \*d). Those that are not finite are named in a warning and left out.
    labels : array_like of int
        The class of each, (N,).
    of, against : int
        The class that the direction leads to, and the one it leads from.

    Returns
    -------
    Tensor
        (\*d), on the latents' device and in their dtype; the means are taken in float64.

    Raises
    ------
    ValueError, TypeError
        If shapes do not agree, or a class has no latent.

    Warns
    -----
    LatentWarning
        If latents were left out.
    """
    _check(latents)
    classes = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if classes.ndim != 1 or classes.dtype.kind not in "iub":
        raise ValueError(
            f"labels must be whole numbers (N,), one a latent, but have shape {classes.shape} and dtype {classes.dtype}"
        )
    if len(classes) != len(latents):
        raise ValueError(f"labels must be one a latent, but there are {len(classes)} for {len(latents)} latents")
    if of == against:
        raise ValueError(f"of and against must be two classes, but both are {of}: no direction leads to where one is")
    good, left_out = _finite(latents)
    if left_out:
        warnings.warn(f"latents {_listed(left_out)} are not finite: left out", LatentWarning, stacklevel=2)
    known = torch.from_numpy(classes.astype(np.int64)).to(latents.device)
    means = []
    for name, which in (("of", of), ("against", against)):
        members = good & (known == which)
        if not bool(members.any()):
            there = ", ".join(f"{c} ({n})" for c, n in zip(*np.unique(classes, return_counts=True), strict=True))
            raise ValueError(
                f"{name} = {which}, but no finite latent has that label: there are {there}"
                + (f", of which {len(left_out)} are not finite" if left_out else "")
            )
        means.append(latents.detach()[members].double().mean(dim=0))
    return (means[0] - means[1]).to(latents.dtype)


def move_latent(latent: Tensor, direction: Tensor, strength: float) -> Tensor:
    r"""Move latents along a direction, and keep their norms.

    .. math:: x_T' = \|x_T\| \frac{x_T + s\, d}{\|x_T + s\, d\|}

    The norm of a latent is nearly the same for all draws of N(0, I), and it is what an image's own latent makes of its
    flat parts (docs/reconstruction.md): moving along d alone would change it too.

    Parameters
    ----------
    latent : Tensor
        x_T, (B, \*d).
    direction : Tensor
        d, (\*d), as :func:`attribute_direction` makes it.
    strength : float
        s: 0 changes nothing, 1 moves as far as the class means are apart, less than 0 the other way.

    Returns
    -------
    Tensor
        (B, \*d), in the latents' dtype.

    Raises
    ------
    ValueError, TypeError
        If shapes or devices do not agree, or `strength` is not a finite number.
    """
    _check(latent, "latent")
    if not isinstance(direction, Tensor) or direction.shape != latent.shape[1:]:
        came = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(f"direction must have the shape of one latent, {tuple(latent.shape[1:])}, but got {came}")
    if direction.device != latent.device:
        raise ValueError(f"direction is on {direction.device}, but latent on {latent.device}: move one of them")
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, but got {strength!r}")
    flat = latent.double().flatten(1)
    moved = flat + strength * direction.double().flatten()
    # A latent that the move takes to 0 has no direction to keep its norm along: it stays 0.
    length = moved.norm(dim=1, keepdim=True)
    return (
        (moved * (flat.norm(dim=1, keepdim=True) / length.masked_fill(length == 0.0, 1.0)))
        .reshape(latent.shape)
        .to(latent.dtype)
    )


# -- are they draws of N(0, I)? -----------------------------------------------------------------
@dataclass(frozen=True)
class Moment:
    """One number of a set of latents, beside what draws of N(0, I) make of it.

    Attributes
    ----------
    over : str
        What it was taken over.
    name : str
        What it is.
    found : float
        Its value.
    expected, error : float
        Mean and standard deviation of that value over sets of as many draws of N(0, I) in as many dimensions: exact.
    """

    over: str
    name: str
    found: float
    expected: float
    error: float

    @property
    def z(self) -> float:
        """How many standard errors `found` is off."""
        return (self.found - self.expected) / self.error


@dataclass(frozen=True, eq=False)
class Gaussianity:
    r"""What :func:`gaussianity` found; ``print`` shows it.

    Attributes
    ----------
    shape : tuple of int
        Shape \*d of one latent; D is its size.
    n : int
        Latents used.
    left_out : tuple of int
        Indices of those that are not finite.
    moments : tuple of Moment
        What the verdict rests on.
    skipped : dict
        What could not be measured, and why.
    dimension : dict
        ``mean``, ``variance``, ``skewness`` and ``kurtosis`` (excess) of each dimension over the latents, (\*d); without those
        that need more latents. The variance is the unbiased one.
    image : dict
        The same of each latent over its dimensions, (n,).
    norm : Tensor
        ‖x_T‖²/D of each latent, (n,): a draw's is distributed as χ²_D/D, of mean 1 and standard deviation √(2/D).
    correlations : Tensor or None
        For latents (C, H, W): correlations about 0 of pixels that lie (i − I, j − J) apart, down and across, over images
        and channels, (2I + 1, 2J + 1), 1 in the middle.
    limit : float
        Standard errors beyond which a moment is off.
    """

    shape: tuple[int, ...]
    n: int
    left_out: tuple[int, ...]
    moments: tuple[Moment, ...]
    skipped: dict[str, str]
    dimension: dict[str, Tensor]
    image: dict[str, Tensor]
    norm: Tensor
    correlations: Tensor | None
    limit: float = LIMIT

    @property
    def off(self) -> tuple[Moment, ...]:
        """The moments that are off by more than `limit` standard errors."""
        return tuple(m for m in self.moments if not abs(m.z) <= self.limit)

    @property
    def ok(self) -> bool:
        """Whether nothing is off: whether they may be draws of N(0, I)."""
        return not self.off

    def record(self) -> dict[str, Any]:
        """All of it as plain data."""
        plain = lambda named: {name: values.tolist() for name, values in named.items()}
        return {
            "shape": list(self.shape),
            "n": self.n,
            "left_out": list(self.left_out),
            "ok": self.ok,
            "limit": self.limit,
            "moments": [
                {"over": m.over, "name": m.name, "found": m.found, "expected": m.expected, "error": m.error, "z": m.z}
                for m in self.moments
            ],
            "skipped": self.skipped,
            "norm": self.norm.tolist(),
            "image": plain(self.image),
            "dimension": plain(self.dimension),
            "correlations": None if self.correlations is None else self.correlations.tolist(),
        }

    def __str__(self) -> str:
        size = math.prod(self.shape)
        lines = [f"{self.n} latents of shape {self.shape}, beside as many draws of N(0, I)"]
        if self.left_out:
            lines.append(f"left out, as they are not finite: {_listed(self.left_out)}")
        low, high = float(self.norm.min()), float(self.norm.max())
        lines.append(
            f"norm²/D of each: {low:.4g}{'' if self.n == 1 else f' … {high:.4g}'}; a draw's is 1 ± {math.sqrt(2 / size):.2g}"
        )
        wide = max(len(m.name) for m in self.moments)
        over = None
        for m in self.moments:
            if m.over != over:
                lines.append(f"\n{m.over:<{wide + 2}}{'found':>12}{'expected':>12}{'± error':>11}{'off by':>9}")
                over = m.over
            mark = "" if abs(m.z) <= self.limit else "  off"
            lines.append(f"  {m.name:<{wide}}{m.found:>12.4g}{m.expected:>12.4g}{m.error:>11.2g}{m.z:>+9.1f}{mark}")
        lines += [f"\nnot measured: {name}: {why}" for name, why in self.skipped.items()]
        verdict = (
            f"nothing is off by more than {self.limit:g} standard errors: they may be draws of N(0, I)"
            if self.ok
            else f"{len(self.off)} of {len(self.moments)} are off by more than {self.limit:g} standard errors: not draws of N(0, I)"
        )
        return "\n".join([*lines, "", verdict])


def gaussianity(latents: Tensor) -> Gaussianity:
    r"""Judge whether latents are draws of N(0, I), as images' are where the model fits them and the solver is accurate.

    Moments are compared with those of as many draws in as many dimensions. Their expectations and standard errors are
    exact at any N and D: those of skewness and kurtosis are Fisher's (1930), and ratios to the norm, which for draws is
    independent of the direction, have a sphere's.

    Parameters
    ----------
    latents : Tensor
        x_T, (N, \*d). Those that are not finite are named in the report and left out.

    Returns
    -------
    Gaussianity
        Over each dimension and over each latent: the mean's square, the variance, its spread (the mean square of its distance
        from 1), skewness, its square, and excess kurtosis, each averaged; of all: the mean, the norm, its spread; the correlation of
        neighbours along each axis of a latent; and between latents the squared cosine of their angle times D, which sees
        any correlation of any two dimensions, and means that all latents share.

    Raises
    ------
    ValueError, TypeError
        If `latents` is not (N, \*d) of floats, or none is finite.
    """
    _check(latents)
    good, left_out = _finite(latents)
    if len(left_out) == len(latents):
        raise ValueError(f"latents must hold at least one that is finite, but all {len(latents)} are not")
    z = latents.detach()[good].double()
    flat = z.flatten(1)
    n, size = flat.shape
    skipped: dict[str, str] = {}
    norm = flat.square().mean(dim=1)
    moments = [
        Moment("all numbers", "mean", float(flat.mean()), 0.0, (n * size) ** -0.5),
        Moment("all numbers", "norm²/D", float(norm.mean()), 1.0, math.sqrt(2 / (n * size))),
    ]
    if n > 1:
        # norm² ~ χ²_D: the variance of an unbiased variance by its fourth central moment
        fourth, second = (12 * size**2 + 48 * size) / size**4, 2 / size
        error = math.sqrt((fourth - second**2 * (n - 3) / (n - 1)) / n)
        moments.append(Moment("all numbers", "norm²/D, variance", float(norm.var()), second, error))
    else:
        skipped["variance of norm²/D"] = "needs 2 latents, there is 1"
    dimension, rows = _moments(flat.T, "each dimension, over the latents", "latents", skipped)
    image, more = _moments(flat, "each latent, over its dimensions", "dimensions", skipped)
    moments += [*rows, *more, *_neighbours(z)]
    if n > 1 and size > 1:
        unit = flat / flat.norm(dim=1, keepdim=True)
        squares = (unit @ unit.T).square()
        pairs = n * (n - 1) / 2
        overlap = float(size * (squares.sum() - squares.diagonal().sum()) / (2 * pairs))
        error = math.sqrt(2 * (size - 1) / (size + 2) / pairs)
        moments.append(Moment("pairs of latents", "D cos² of their angle", overlap, 1.0, error))
    else:
        skipped["angles between latents"] = f"need 2 latents of 2 dimensions, there are {n} of {size}"
    shape = tuple(latents.shape[1:])
    shaped = {name: values.reshape(shape).cpu() for name, values in dimension.items()}
    image = {name: values.cpu() for name, values in image.items()}
    return Gaussianity(
        shape,
        n,
        left_out,
        tuple(moments),
        skipped,
        shaped,
        image,
        norm.cpu(),
        _correlations(z) if z.ndim == 4 else None,
    )


def _moments(values: Tensor, over: str, what: str, skipped: dict[str, str]) -> tuple[dict[str, Tensor], list[Moment]]:
    """Moments of each row of (K, n), and what their averages over the K rows are for unit Gaussian draws."""
    k, n = values.shape
    mean = values.mean(dim=1)
    found = {"mean": mean}
    rows = [Moment(over, "mean, squared", float(mean.square().mean()), 1 / n, math.sqrt(2 / k) / n)]
    centred = values - mean[:, None]
    square = centred.square()
    spread = square.mean(dim=1)

    def ratio(power: int) -> Tensor:
        # NaN where all values of a row are one number, which then has no shape
        return (centred * square if power == 3 else square * square).mean(dim=1) / spread ** (power / 2)

    def variance() -> Iterator[Moment]:
        f = n - 1  # degrees of freedom
        found["variance"] = v = spread * (n / f)
        yield Moment(over, "variance", float(v.mean()), 1.0, math.sqrt(2 / (f * k)))
        error = math.sqrt(((12 * f**2 + 48 * f) / f**4 - 4 / f**2) / k)
        yield Moment(over, "(variance − 1)²", float((v - 1.0).square().mean()), 2 / f, error)

    def skewness() -> Iterator[Moment]:
        found["skewness"] = g = ratio(3)
        k = int(g.isfinite().sum())
        if k:
            second = 6 * (n - 2) / ((n + 1) * (n + 3))
            beta = 3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
            yield Moment(over, "skewness", float(g.nanmean()), 0.0, math.sqrt(second / k))
            yield Moment(
                over, "skewness, squared", float(g.square().nanmean()), second, second * math.sqrt((beta - 1) / k)
            )

    def kurtosis() -> Iterator[Moment]:
        found["kurtosis"] = g = ratio(4) - 3.0
        k = int(g.isfinite().sum())
        if k:
            second = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
            yield Moment(over, "excess kurtosis", float(g.nanmean()), -6 / (n + 1), math.sqrt(second / k))

    parts: tuple[tuple[int, Callable[[], Iterator[Moment]]], ...] = ((2, variance), (3, skewness), (4, kurtosis))
    for needed, part in parts:
        if n < needed:
            skipped[f"{part.__name__} of {over}"] = f"needs {needed} {what}, there {'is 1' if n == 1 else f'are {n}'}"
        else:
            rows += part()
    return found, rows


def _correlation(z: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Correlation about 0 of the pairs (a, b) of numbers of z, and its standard error for draws."""
    total, pairs = z.numel(), a.numel()
    found = float((a * b).mean() / z.square().mean())
    # Σab over ‖z‖² is a quadratic form on the sphere: variance pairs / (total (total + 2))
    return found, math.sqrt(total / (pairs * (total + 2)))


def _neighbours(z: Tensor) -> Iterator[Moment]:
    names = ("channels", "down", "across") if z.ndim == 4 else tuple(f"axis {i}" for i in range(z.ndim - 1))
    for axis, name in enumerate(names, 1):
        length = z.shape[axis]
        if length > 1:
            found, error = _correlation(z, z.narrow(axis, 0, length - 1), z.narrow(axis, 1, length - 1))
            yield Moment("correlation of neighbours", name, found, 0.0, error)


def _correlations(z: Tensor) -> Tensor:
    height, width = z.shape[2:]
    down, across = min(_REACH, height - 1), min(_REACH, width - 1)
    out = torch.ones(2 * down + 1, 2 * across + 1, dtype=torch.float64)
    for i in range(down + 1):
        for j in range(-across, across + 1):
            upper = z[:, :, : height - i, max(0, -j) : width - max(0, j)]
            lower = z[:, :, i:, max(0, j) : width + min(0, j)]
            out[down + i, across + j] = out[down - i, across - j] = _correlation(z, upper, lower)[0]
    return out


# -- what they share ----------------------------------------------------------------------------
def _check(latents: Tensor, name: str = "latents") -> None:
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name} must be a tensor (N, *d), but got {type(latents).__name__}: use torch.as_tensor")
    if not latents.is_floating_point():
        raise TypeError(f"{name} must be floats, but the dtype is {latents.dtype}: are they images?")
    if latents.ndim < 2 or latents.numel() == 0:
        raise ValueError(f"{name} must have shape (N, *d) and hold something, but have shape {tuple(latents.shape)}")


def _finite(latents: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Which are finite, (N,), and the indices of the others."""
    good = latents.detach().flatten(1).isfinite().all(dim=1)
    return good, tuple(torch.nonzero(~good).flatten().tolist())


def _listed(which: tuple[int, ...], most: int = 8) -> str:
    return ", ".join(map(str, which[:most])) + (f" and {len(which) - most} more" if len(which) > most else "")
