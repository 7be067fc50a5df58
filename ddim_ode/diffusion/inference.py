r"""The inference family, eqs. 6 to 8: how x at the levels of a grid hangs together, given x_0.

Every member has the same marginals, :math:`q(x_\tau | x_0) = N(\sqrt{\alpha_\tau} x_0, (1 - \alpha_\tau) I)`. They differ in
the noise σ_τ (standard deviations in x; here `deviations`, for σ is the noise level) that a step between two levels adds. In
:math:`\bar x = x / \sqrt\alpha` with noise levels σ > σ' and :math:`s = \sigma_\tau / \sqrt{\alpha'}` eq. 7 is

.. math:: \bar x' = x_0 + \frac{\sqrt{\sigma'^2 - s^2}}{\sigma} (\bar x - x_0) + s z,

eq. 16 is :math:`s = \eta \frac{\sigma'}{\sigma} \sqrt{\sigma^2 - \sigma'^2}`, and eq. 8, the other way,

.. math:: \bar x = x_0 + \frac{\sigma \sqrt{\sigma'^2 - s^2}}{\sigma'^2} (\bar x' - x_0) + \frac{\sigma s}{\sigma'} z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.integrate import check_state
from ddim_ode.noise import INFERENCE, check_seed, draw
from ddim_ode.schedule import as_numbers, is_number, whole

__all__ = ["Inference", "check_noise", "check_spreads", "split"]

Array = NDArray[np.float64]


def check_noise(eta: Any, deviations: Any) -> tuple[float, tuple[float, ...] | None]:
    """η, a number that is not negative, and the deviations that may stand in its place, as plain floats."""
    if not is_number(eta) or not 0.0 <= eta < math.inf:
        raise ValueError(f"eta must be a number of at least 0, 0 for no noise and 1 for DDPM's, but got {eta!r}")
    if deviations is None:
        return float(eta), None
    if eta != 1.0:
        raise ValueError(f"deviations stand in place of eta, but got both, and eta = {eta:g}: leave one of them out")
    numbers = as_numbers(deviations)
    if numbers.ndim != 1 or not np.all(np.isfinite(numbers) & (numbers >= 0.0)):
        raise ValueError(f"deviations must be finite numbers of at least 0, one a step, but got {deviations!r}")
    return 1.0, tuple(numbers.tolist())


def split(sigmas: Array, eta: float, deviations: Sequence[float] | None = None) -> tuple[Array, Array]:
    r"""What the steps between the falling levels `sigmas` make of σ': :math:`\sqrt{\sigma'^2 - s^2}` towards x and s of noise, (S,) each.

    s is eq. 16's, or that of `deviations`, the σ_τ themselves. A last level of 0 is eq. 10's case t = 1: nothing points towards
    x there, and any deviation will do.

    Raises
    ------
    ValueError
        If the variance :math:`1 - \alpha' - \sigma_\tau^2` that is left for x is negative in some step, with the step.
    """
    high, low = sigmas[:-1], sigmas[1:]
    if deviations is None:
        said = f"eta = {eta:g}"
        spread = eta * low / high * np.sqrt((high - low) * (high + low))
        # Not σ'² − s², which loses the digits of a long step's.
        left = low**2 * ((1.0 - eta) * (1.0 + eta) + (eta * low / high) ** 2)
    else:
        said, given = "deviations", np.asarray(deviations, dtype=np.float64)
        if given.shape != low.shape:
            raise ValueError(
                f"deviations must be {low.size} finite numbers of at least 0, one a step, from sigma = {sigmas[0]:.6g} down, "
                f"but got {given.size}"
            )
        spread = given * np.sqrt(1.0 + low**2)
        left = np.where(low > 0.0, (low - spread) * (low + spread), 0.0)
        left[np.abs(left) < 1e-12 * low**2] = 0.0  # a deviation of all that there is, rounded
    if np.any(left < 0.0):
        n, stretch = int(np.argmin(left / (1.0 + low**2))), 1.0 + low**2
        raise ValueError(
            f"{said} makes the variance 1 - alpha - deviation² negative in {int((left < 0.0).sum())} of {low.size} steps, worst in "
            f"step {n + 1}, from sigma = {high[n]:.6g} to {low[n]:.6g}, where it is {left[n] / stretch[n]:.3g}: the deviation is "
            f"{spread[n] / math.sqrt(stretch[n]):.6g} and may be at most {low[n] / math.sqrt(stretch[n]):.6g}"
        )
    return np.sqrt(left), spread


@dataclass(frozen=True)
class Inference:
    r"""One member q_σ of the inference family, over the levels of a grid.

    Parameters
    ----------
    grid : Grid
        Falling, such as ``Grid.from_tau(tau, schedule)``; its levels above 0 are τ_S … τ_1.
    eta : float
        η of eq. 16: 0 is DDIM's, 1 the Markovian member, DDPM's.
    deviations : sequence of float, optional
        The σ of eq. 7 themselves, one a step between levels, from the highest down: S − 1 of them, instead of `eta`.

    Raises
    ------
    ValueError, TypeError
        If a variance is negative: the step, and by how much. Or if an argument cannot be used, such as `deviations` beside an
        `eta`.

    Notes
    -----
    σ̂ is no member: it changes the generative process alone (:class:`ddim_ode.diffusion.generative.Generative`).
    """

    grid: Grid
    eta: float = 1.0
    deviations: Sequence[float] | None = None

    def __post_init__(self) -> None:
        eta, deviations = check_noise(self.eta, self.deviations)
        object.__setattr__(self, "eta", eta)
        object.__setattr__(self, "deviations", deviations)
        if not isinstance(self.grid, Grid):
            raise TypeError(
                f"grid must be a Grid, but got {type(self.grid).__name__}: use Grid.from_tau, Grid.make or Grid.explicit"
            )
        if self.grid.encoding:
            raise ValueError(
                f"grid must fall, from the latent's level down, but got {self.grid!r}: use grid.reversed()"
            )
        split(self.levels, self.eta, self.deviations)

    @property
    def levels(self) -> Array:
        """The noise levels above 0, falling: (S,)."""
        return self.grid.sigmas[self.grid.sigmas > 0.0]

    def sample(self, x_0: Tensor, *, seed: int = 0, first: int = 0, forward: bool = False) -> Tensor:
        r"""Draw x at all levels.

        Parameters
        ----------
        x_0 : Tensor
            Images (B, \*d).
        seed, first : int
            Image i draws by (`seed`, `first` + i) and the level, whatever the batch. Generation by the same seed draws other
            noise.
        forward : bool
            Draw by eq. 8, from x_{τ_1} up, not by eq. 6, from x_{τ_S} down. The two have one distribution.

        Returns
        -------
        Tensor
            (S, B, \*d), float64, x at :attr:`levels`.

        Raises
        ------
        ValueError, TypeError
            If an argument cannot be used, such as images that hold NaN.
        """
        seed, first = check_seed(seed), whole(first, "first", 0)
        check_state(None, x_0, "x_0")
        clean, images = x_0.double(), range(first, first + x_0.shape[0])
        chain: list[Tensor] = [clean] * len(self.levels)
        error = torch.zeros_like(clean)
        for n, stretch, mean, spread in self._conditionals(forward):
            z = draw(tuple(x_0.shape[1:]), images, seed, n + 1, INFERENCE).to(clean.device)
            error = mean * error + spread * z
            chain[n] = (clean + error) / stretch
        return torch.stack(chain)

    def _conditionals(self, forward: bool) -> list[tuple[int, float, float, float]]:
        """Level by level in the order of the draws: its place, √(1 + σ²), and the conditional of the error x̄ − x_0 there.

        That has for its mean a multiple of the error at the level before, 0 for the first, and a spread.
        """
        sigmas = self.levels
        towards, spread = split(sigmas, self.eta, self.deviations)
        if forward:
            high, low = sigmas[:-1], sigmas[1:]
            means, spreads = np.append(high * towards / low**2, 0.0), np.append(high * spread / low, sigmas[-1])
        else:
            means, spreads = np.append(0.0, towards / sigmas[:-1]), np.append(sigmas[0], spread)
        columns = (np.sqrt(1.0 + sigmas**2), means, spreads)
        rows = list(zip(range(sigmas.size), *(column.tolist() for column in columns), strict=True))
        return rows[::-1] if forward else rows

    def log_density(self, x_0: Tensor, x: Tensor, *, forward: bool = False) -> Tensor:
        r"""Log q_σ(x_{τ_1 … τ_S} | x_0), by eq. 6 or, `forward`, as the product of eq. 8's conditionals.

        Parameters
        ----------
        x_0 : Tensor
            Images (B, \*d).
        x : Tensor
            x at :attr:`levels`, (S, B, \*d).
        forward : bool
            By which factorisation; the two agree.

        Returns
        -------
        Tensor
            (B,), float64, in nats.

        Raises
        ------
        ValueError, TypeError
            If a step adds no noise, as all do for η = 0: there is no density then. Or if an argument cannot be used.
        """
        check_state(None, x_0, "x_0")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"x must be a tensor of floats, but got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
            )
        clean, count = x_0.double(), len(self.levels)
        if x.shape != (count, *x_0.shape):
            raise ValueError(
                f"x must hold all {count} levels, shape {(count, *x_0.shape)}, but its shape is {tuple(x.shape)}"
            )
        if x.device != x_0.device:
            raise ValueError(f"x is on {x.device}, but x_0 is on {x_0.device}: move one of them with .to(...)")
        check_spreads(self, "q has no density")
        total = torch.zeros(x_0.shape[0], dtype=torch.float64, device=clean.device)
        before = torch.zeros_like(clean)
        for n, stretch, mean, spread in self._conditionals(forward):
            error = x[n].double() * stretch - clean
            off = (error - mean * before).flatten(1)
            # In x, a density of x̄ is multiplied by the stretch.
            height = off.shape[1] * math.log(spread / stretch * math.sqrt(2.0 * math.pi))
            total = total - 0.5 * (off / spread).square().sum(1) - height
            before = error
        return total


def check_spreads(member: Inference, without: str) -> None:
    """Refuse a member with a step that adds no noise; `without` says what there is not then."""
    sigmas = member.levels
    still = np.flatnonzero(split(sigmas, member.eta, member.deviations)[1] == 0.0)
    if still.size:
        n = int(still[0])
        cure = "take eta > 0" if member.deviations is None else f"take deviations[{n}] > 0"
        raise ValueError(
            f"{without}, for the step from sigma = {sigmas[n]:.6g} to {sigmas[n + 1]:.6g} adds no noise: {cure}"
        )
