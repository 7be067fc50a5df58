r"""The objectives, eqs. 5 and 11, and what Theorem 1 says of them.

With f_θ of eq. 9 every term of eq. 11 but the prior's is a divergence of two Gaussians of one variance, whose means differ by a
multiple of ε_θ − ε. So :math:`J_\sigma = L_\gamma + C`, draw by draw, with

.. math:: \gamma_i = \frac{\big(\sigma_i - \sqrt{\sigma_{i-1}^2 - s_i^2}\big)^2}{2 s_i^2}, \qquad \gamma_1 = \frac{\sigma_1^2}{2 s_1^2}
          = \frac{1 - \alpha_1}{2 \alpha_1 d^2}

in noise levels σ = √((1 − α)/α), s the deviation of step i in x̄ (inference.py), and d that of eq. 10's last step. In α the first is

.. math:: \gamma_i = \frac{1 - \alpha_i}{2 \sigma_\tau^2 \alpha_i} \Big[\sqrt{\alpha_{i-1}} - \sqrt{1 - \alpha_{i-1} - \sigma_\tau^2}
          \sqrt{\tfrac{\alpha_i}{1 - \alpha_i}}\Big]^2.

Printed proofs leave the bracket out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.diffusion.inference import Inference, check_spreads, split
from ddim_ode.field import EpsilonField, check_field
from ddim_ode.integrate import check_state
from ddim_ode.noise import OBJECTIVE, check_seed, draw
from ddim_ode.schedule import as_numbers, is_number, whole
from ddim_ode.solution import Status

__all__ = ["Objective", "constant", "gamma", "l_gamma", "variational_bound"]

Array = NDArray[np.float64]


def gamma(member: Inference, last: float) -> Array:
    r"""The γ of Theorem 1, for which L_γ is J_σ up to a constant.

    Parameters
    ----------
    member : Inference
        q_σ; every step of it must add noise.
    last : float
        σ_1 of eq. 10, the standard deviation of x_0 about its estimate in the last step, positive. The paper leaves it open;
        ``member.levels[-1]`` is a natural one, √((1 − α_1)/α_1).

    Returns
    -------
    ndarray
        (S,), at ``member.levels``, falling noise levels: γ_{τ_S} first.

    Raises
    ------
    ValueError
        If a step adds no noise, or `last` is not positive: J_σ is infinite then.
    """
    if not isinstance(member, Inference):
        raise TypeError(f"member must be an Inference, but got {type(member).__name__}: make one over a grid's levels")
    sigmas = member.levels
    if not is_number(last) or not 0.0 < last < math.inf:
        raise ValueError(f"last, the deviation of the last step, must be a positive number, but got {last!r}")
    check_spreads(member, "the objective is infinite")
    towards, spread = split(sigmas, member.eta, member.deviations)
    return np.append((sigmas[:-1] - towards) ** 2 / (2.0 * spread**2), sigmas[-1] ** 2 / (2.0 * last**2))


def constant(member: Inference, last: float, second_moment: float, size: int) -> float:
    r"""The C of Theorem 1, :math:`J_\sigma - L_\gamma`, which no ε enters.

    .. math:: C = \tfrac12\big[\alpha_T E\|x_0\|^2 - D \alpha_T - D \log(1 - \alpha_T)\big] + \tfrac D2 \log(2 \pi d^2)

    The first part is what the highest level still tells of x_0, the second what the last step's Gaussian costs at its best.

    Parameters
    ----------
    member : Inference
        q_σ.
    last : float
        As for :func:`gamma`.
    second_moment : float
        E‖x_0‖², the sum over all D = `size` dimensions.
    size : int
        D.
    """
    gamma(member, last)  # refuses what would be infinite
    if not is_number(second_moment) or not 0.0 <= second_moment < math.inf:
        raise ValueError(f"second_moment must be a number of at least 0, but got {second_moment!r}")
    size = whole(size, "size")
    alpha = 1.0 / (1.0 + float(member.levels[0]) ** 2)
    left = alpha * second_moment - size * alpha - size * math.log1p(-alpha)
    return 0.5 * left + 0.5 * size * math.log(2.0 * math.pi * last**2)


@dataclass(frozen=True)
class Objective:
    r"""An estimate of an objective over images, term by term, in nats.

    Attributes
    ----------
    sigmas : ndarray
        (S,), falling: the level that ε was asked at in each term.
    terms : ndarray
        (S,), means over the images that did not fail; their sum, with `prior`, is the objective. NaN if all failed.
    standard_errors : ndarray
        (S,), of the terms as means over these images and draws.
    prior : float
        What is not a term of ε: the divergence at the highest level, and 0 in L_γ.
    each : ndarray
        (B,), the objective of each image, NaN for one that failed.
    """

    sigmas: Array
    terms: Array
    standard_errors: Array
    prior: float
    each: Array

    @property
    def value(self) -> float:
        """The objective, the mean over the images that did not fail; NaN if all did."""
        return _mean(self.each[self._good])

    @property
    def standard_error(self) -> float:
        """Of :attr:`value`, from the spread over these images."""
        return _error(self.each[self._good])

    @property
    def status(self) -> tuple[Status, ...]:
        """One an image: NONFINITE where what the field returned made its objective NaN or infinite."""
        return tuple(Status.SUCCESS if good else Status.NONFINITE for good in self._good)

    @property
    def success(self) -> bool:
        """Whether every image has an objective."""
        return bool(self._good.all())

    @property
    def _good(self) -> NDArray[np.bool_]:
        return np.isfinite(self.each)


def l_gamma(
    field: EpsilonField, x_0: Tensor, sigmas: Any, weights: Any = 1.0, *, seed: int = 0, batch_size: int | None = None
) -> Objective:
    r"""L_γ, eq. 5: :math:`\sum_t \gamma_t E \|\epsilon_\theta(\sqrt{\alpha_t} x_0 + \sqrt{1 - \alpha_t} \epsilon) - \epsilon\|^2`.

    Parameters
    ----------
    field : EpsilonField
        ε_θ.
    x_0 : Tensor
        Images (B, \*d).
    sigmas : sequence of float
        Noise levels √((1 − α_t)/α_t) of the terms, above 0 and up to the schedule's last, such as ``Inference(grid).levels``.
    weights : float or sequence of float
        γ, one for all or one a level: 1 as Ho et al. and the paper train, or :func:`gamma`.
    seed : int
        Image i draws by (`seed`, i) and the level; generation and inference by the same seed draw other noise.
    batch_size : int, optional
        Images at once.

    Returns
    -------
    Objective
        An image for which the field returns NaN or infinity fails, and the others are measured.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call.
    """
    seed, size = _check(field, x_0, seed, batch_size)
    levels, end = as_numbers(sigmas), field.schedule.sigma_max
    # σ_T in float32 is σ_T, as for a grid.
    if levels.ndim != 1 or not levels.size or not np.all((levels > 0.0) & (levels <= end * (1.0 + 1e-6))):
        raise ValueError(
            f"sigmas must be noise levels above 0 and up to {end:.10g}, the schedule's last, but got {sigmas!r}"
        )
    levels = np.minimum(levels, end)
    given = as_numbers(weights)
    if given.shape not in ((), levels.shape) or not np.all(np.isfinite(given) & (given >= 0.0)):
        raise ValueError(
            f"weights must be one number of at least 0, or one for each of {levels.size} levels, but got {weights!r}"
        )
    found = np.empty((levels.size, x_0.shape[0]))
    for n, rows, _, z, eps in _asked(field, x_0, levels, seed, size):
        found[n, rows] = _squares(eps - z)
    with np.errstate(invalid="ignore", over="ignore"):  # of a failed image
        found *= np.broadcast_to(given, levels.shape)[:, None]
    return _objective(levels, found, np.zeros(found.shape[1]))


def variational_bound(
    field: EpsilonField, x_0: Tensor, member: Inference, last: float, *, seed: int = 0, batch_size: int | None = None
) -> Objective:
    r"""J_σ, eq. 11, in nats: minus the bound on log p_θ(x_0) that training maximises.

    Each term is the divergence of q_σ's step from p_θ's at a draw of x, in closed form; the last, −log p(x_0 | x_1); `prior` the
    divergence of q(x_{τ_S} | x_0) from N(0, I).

    Parameters
    ----------
    field, x_0, seed, batch_size
        As for :func:`l_gamma`.
    member : Inference
        q_σ, and with it the generative process of eq. 10.
    last : float
        σ_1 of eq. 10, as for :func:`gamma`.

    Returns
    -------
    Objective
        As for :func:`l_gamma`.

    Raises
    ------
    ValueError, TypeError
        If a step of q_σ adds no noise, its levels are not the schedule's, or another argument cannot be used, before any model
        call.
    """
    seed, batch = _check(field, x_0, seed, batch_size)
    gamma(member, last)  # refuses what would be infinite
    sigmas, own = member.levels, member.grid.schedule
    if own is not field.schedule and own.config != field.schedule.config:
        raise ValueError(
            f"the member's grid was made for {own!r}, but the field has {field.schedule!r}: make it for that one"
        )
    towards, spread = split(sigmas, member.eta, member.deviations)
    towards, spread = np.append(towards, 0.0), np.append(spread, last)
    found, size = np.empty((sigmas.size, x_0.shape[0])), math.prod(x_0.shape[1:])
    for n, rows, clean, z, eps in _asked(field, x_0, sigmas, seed, batch):
        estimate = clean + sigmas[n] * (z - eps)  # of x_0, eq. 9
        # Means in x̄; in the last step that of q is x_0 itself.
        off = clean - estimate + towards[n] * (z - eps)
        found[n, rows] = _squares(off) / (2.0 * spread[n] ** 2)
    found[-1] += 0.5 * size * math.log(2.0 * math.pi * last**2)
    alpha = 1.0 / (1.0 + float(sigmas[0]) ** 2)
    prior = 0.5 * (alpha * _squares(x_0.detach().double()) - size * alpha - size * math.log1p(-alpha))
    return _objective(sigmas, found, prior)


def _asked(
    field: EpsilonField, x_0: Tensor, sigmas: Array, seed: int, size: int
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """At each level, for each batch: the level's place, the images' rows, x_0, ε drawn, and ε_θ of x̄ = x_0 + σε."""
    for start in range(0, x_0.shape[0], size):
        rows = slice(start, min(start + size, x_0.shape[0]))
        clean, images = x_0[rows].detach().double(), range(rows.start, rows.stop)
        ask = field.bind(clean, sigmas, rows)
        for n, sigma in enumerate(sigmas.tolist()):
            z = draw(tuple(x_0.shape[1:]), images, seed, n + 1, OBJECTIVE).to(clean.device)
            with torch.no_grad():
                yield n, rows, clean, z, ask(clean + sigma * z, sigma).double()


def _squares(x: Tensor) -> Array:
    """The squared norm of each sample, (B,)."""
    return x.square().flatten(1).sum(1).cpu().numpy()


def _check(field: EpsilonField, x_0: Tensor, seed: int, batch_size: int | None) -> tuple[int, int]:
    """The seed, and how many images at once."""
    check_field(field)
    check_state(field, x_0, "x_0")
    field.check_conditions(x_0.shape[0])
    return check_seed(seed), x_0.shape[0] if batch_size is None else whole(batch_size, "batch_size")


def _objective(sigmas: Array, found: Array, prior: Array) -> Objective:
    """Of each level's and image's value, (S, B), and each image's prior; an image with one that is not finite fails."""
    with np.errstate(over="ignore"):
        each = found.sum(axis=0) + prior
    good = np.isfinite(each)
    terms, errors = (np.array([number(row) for row in found[:, good]]) for number in (_mean, _error))
    return Objective(sigmas, terms, errors, _mean(prior[good]), np.where(good, each, np.nan))


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else math.nan


def _error(values: Array) -> float:
    """Of a mean, by the spread of what it is of."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
