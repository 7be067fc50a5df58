r"""The generative family, eqs. 10, 12 and 16: steps that may add noise.

In :math:`\bar x = x / \sqrt\alpha`, from σ down to σ', eq. 12 is

.. math:: \bar x' = \bar x + \big(\sqrt{\sigma'^2 - s^2} - \sigma\big)\, \epsilon(\bar x, \sigma) + s z, \qquad
          s = \eta \frac{\sigma'}{\sigma} \sqrt{\sigma^2 - \sigma'^2},

which for η = 0 is eq. 13, Euler's step on the ODE, and for η = 1 the ancestral step of DDPM. It is one more step that the loop
can take: a solver, which a noise is drawn for by (seed, image, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ddim_ode.diffusion.inference import check_noise, split
from ddim_ode.grid import Grid
from ddim_ode.noise import draw
from ddim_ode.solvers.base import Field, Solver

__all__ = ["Generative"]


class _Step(NamedTuple):
    sigma: float
    slope: float  # what ε is multiplied by
    spread: float  # and z


@dataclass(frozen=True, repr=False)
class Generative(Solver):
    r"""Sampling with noise: DDIM for η = 0, DDPM for η = 1, and what lies between.

    Parameters
    ----------
    eta : float
        η of eq. 16.
    sigma_hat : bool
        DDPM's larger noise, :math:`\hat\sigma_\tau = \sqrt{1 - \alpha_\tau / \alpha_{\tau'}}`, about the mean of η = 1. So the step from
        τ_1 to σ = 0 adds :math:`\sqrt{1 - \alpha_{\tau_1}}`, but none where it leaves the first trained level, τ_1 = 1, or one below:
        there the authors' code, whose τ all begin with 1, adds none either.
    deviations : sequence of float, optional
        The σ_τ of eq. 12 themselves, standard deviations in x, one a step from σ_T down, instead of `eta`. The last, of the step to
        σ = 0, is eq. 10's σ_1, and may be anything; eq. 16 has 0 there.

    Attributes
    ----------
    stochastic : bool
        Whether any noise is added. With η = 0 this is ``ddim``, with all that it can do.

    Notes
    -----
    Its order, 1, is that of the distribution, not of a path: where ε is exact, means and covariances are off by O(step).
    What adds noise has no encoding and no dense output. Noise is drawn on the CPU, image by image, and copied to the state's
    device in each step.
    """

    eta: float = 1.0
    sigma_hat: bool = False
    deviations: Sequence[float] | None = None
    _seed: int = field(default=0, compare=False)
    _images: Sequence[int] | None = field(default=None, compare=False)
    order = 1
    nfe_per_step = 1
    source = "eqs. 12 and 16, Song, Meng & Ermon 2020"

    def __post_init__(self) -> None:
        eta, deviations = check_noise(self.eta, self.deviations)
        object.__setattr__(self, "eta", eta)
        object.__setattr__(self, "deviations", deviations)
        if self.sigma_hat and (eta != 1.0 or deviations is not None):
            raise ValueError("sigma_hat is the larger noise of DDPM: it goes with eta = 1 and without deviations")

    @property
    def name(self) -> str:  # type: ignore[override]
        if self.deviations is not None:
            return "ddim-deviations"
        if self.sigma_hat:
            return "ddpm-sigma-hat"
        return "ddpm" if self.eta == 1.0 else f"ddim-eta{self.eta:g}"

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0.0 if self.deviations is None else any(self.deviations)

    def keyed(self, seed: int, images: Sequence[int]) -> Generative:
        return replace(self, _seed=seed, _images=images)

    def plan(self, grid: Grid) -> tuple[_Step, ...]:
        """Every step's numbers; refused if a variance is negative."""
        return _plan(self, grid)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[_Step, ...]:
        return self.plan(grid)

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        at = state[n]
        moved = x_bar.add(field(x_bar, at.sigma), alpha=at.slope)
        if at.spread > 0.0:
            images = range(x_bar.shape[0]) if self._images is None else self._images
            z = draw(tuple(x_bar.shape[1:]), images, self._seed, n + 1)
            moved = moved.add(z.to(moved.device, moved.dtype), alpha=at.spread)
        return moved, state, None


@lru_cache(maxsize=64)
def _plan(method: Generative, grid: Grid) -> tuple[_Step, ...]:
    if grid.encoding and method.stochastic:
        raise ValueError(
            f"{method.name} samples only, for noise that is added has no way back: encode by ddim, which is eta = 0"
        )
    # Without noise either direction will do.
    sigmas = grid.sigmas[::-1] if grid.encoding else grid.sigmas
    high, low = sigmas[:-1], sigmas[1:]
    towards, added = split(sigmas, method.eta, method.deviations)
    if not method.stochastic:
        ends = zip(grid.sigmas.tolist(), grid.sigmas[1:].tolist(), strict=False)
        return tuple(_Step(a, b - a, 0.0) for a, b in ends)
    if method.sigma_hat:
        added = np.sqrt((high - low) * (high + low) * (1.0 + low**2) / (1.0 + high**2))
        if low[-1] == 0.0 and high[-1] <= grid.schedule.sigma_min * (1.0 + 1e-6):  # in float32 it is the same level
            added[-1] = 0.0
    return tuple(_Step(float(a), float(b - a), float(s)) for a, b, s in zip(high, towards, added, strict=True))
