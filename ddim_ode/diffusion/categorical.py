r"""Discrete data, the paper's appendix A: a family of diffusions over K classes with the same marginals.

Per dimension, with x as one-hot vectors and :math:`1/K` the uniform distribution,

.. math:: q(x_t | x_0) &= \mathrm{Cat}(\alpha_t x_0 + (1 - \alpha_t) / K), \\
          q(x_s | x_t, x_0) &= \mathrm{Cat}(\sigma_t x_t + (\alpha_s - \sigma_t \alpha_t) x_0
          + ((1 - \alpha_s) - (1 - \alpha_t) \sigma_t) / K), \qquad s < t,

for every σ_t that leaves no weight negative: :math:`0 \le \sigma_t \le (1 - \alpha_s) / (1 - \alpha_t)`. The largest is the least
stochastic member, whose uniform part vanishes: a pixel stays as it is or jumps to x_0. At σ_t = 0 x_s does not depend on x_t. A
generative step puts a predicted distribution in the place of x_0, for each dimension by itself. σ_t here is a probability and
no noise level; α_t is ``alphas_cumprod``, α_0 = 1.

States are class indices (B, \*d) in int64; distributions over them are (B, K, \*d) in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.grid import Grid, check_tau
from ddim_ode.noise import check_seed, stream
from ddim_ode.schedule import NoiseSchedule, is_number, whole

__all__ = ["Chain", "marginal", "noised", "one_hot", "posterior"]

Array = NDArray[np.float64]

#: The last word of the counter of uniform draws: Gaussian ones with the same key count elsewhere.
_UNIFORM = 2**63
#: How far the sum of a distribution that a user gives may be from 1: float32's rounding over many classes.
_SUM = 1e-5
#: How far σ may be out of its range, which in the step to t = 0 is 0 alone: a probability's own rounding, float64.
_ROUNDING = 1e-12


# -- the family ---------------------------------------------------------------------------------
def one_hot(x: Tensor, classes: int) -> Tensor:
    r"""Classes (B, \*d) as distributions without doubt, (B, K, \*d), float64.

    Raises
    ------
    ValueError, TypeError
        If they are not whole numbers from 0 to K − 1.
    """
    return indicators(check_classes(x, whole(classes, "classes", 2), "x"), classes)


def marginal(x_0: Tensor, alpha: float | Tensor) -> Tensor:
    r"""The distribution q(x_t | x_0), :math:`\alpha_t x_0 + (1 - \alpha_t) / K`.

    Parameters
    ----------
    x_0 : Tensor
        Distributions (B, K, \*d); of known classes, :func:`one_hot`.
    alpha : float or Tensor
        α_t in [0, 1], one for all or (B,).

    Returns
    -------
    Tensor
        (B, K, \*d).
    """
    return fade(_distribution(x_0, "x_0"), _alpha(alpha, x_0))


def noised(x_0: Tensor, alpha: float | Tensor, classes: int, *, seed: int = 0, first: int = 0) -> Tensor:
    r"""A draw of x_t from q(x_t | x_0), classes (B, \*d), int64; image i depends on (`seed`, `first` + i) alone.

    Parameters
    ----------
    x_0 : Tensor
        Classes (B, \*d).
    alpha : float or Tensor
        α_t in [0, 1], one for all or (B,).
    classes : int
        K.
    seed, first : int
        Key of the draws: the seed, and the index of the first image.
    """
    x_0 = check_classes(x_0, whole(classes, "classes", 2), "x_0")
    clean, keys = indicators(x_0, classes), image_keys(first, x_0.shape[0])
    return draw(fade(clean, _alpha(alpha, clean)), uniform(x_0, keys, check_seed(seed), 0))


def posterior(x_t: Tensor, x_0: Tensor, alpha_t: float, alpha_s: float, sigma: float) -> Tensor:
    r"""The distribution q(x_s | x_t, x_0), or with a predicted distribution for x_0 the generative step's.

    Parameters
    ----------
    x_t, x_0 : Tensor
        Distributions (B, K, \*d); of known classes, :func:`one_hot`.
    alpha_t, alpha_s : float
        α at the step's start t and at its end s < t: alpha_t < alpha_s ≤ 1.
    sigma : float
        σ_t, from 0 to (1 − α_s)/(1 − α_t).

    Returns
    -------
    Tensor
        (B, K, \*d).

    Raises
    ------
    ValueError
        If one is no distribution, and where and by how much, or σ_t is not admissible.
    """
    if not 0.0 <= alpha_t < alpha_s <= 1.0:
        raise ValueError(f"a step needs 0 <= alpha_t < alpha_s <= 1, but got alpha_t = {alpha_t}, alpha_s = {alpha_s}")
    x_t, x_0 = _distribution(x_t, "x_t"), _distribution(x_0, "x_0")
    if x_t.shape != x_0.shape:
        raise ValueError(f"x_t and x_0 must have one shape, but have {tuple(x_t.shape)} and {tuple(x_0.shape)}")
    sigmas = np.array([sigma], dtype=np.float64)
    return mix(x_t, x_0, _weights(np.array([alpha_s, alpha_t]), sigmas, lambda i: "sigma")[0])


def _largest(alphas: Array) -> Array:
    """σ of the least stochastic steps between neighbours of α_{τ_0} > α_{τ_1} > …."""
    return (1.0 - alphas[:-1]) / (1.0 - alphas[1:])


def _weights(alphas: Array, sigmas: Array, name: Callable[[int], str]) -> Array:
    """What a step makes of x_t, x_0 and the uniform distribution, (S, 3); refused if a weight would be negative."""
    largest = _largest(alphas)
    over = np.maximum(sigmas - largest, -sigmas)
    if not np.all(over <= _ROUNDING):
        i = int(np.argmax(np.where(np.isnan(over), np.inf, over)))
        raise ValueError(
            f"{name(i)} must lie in [0, {largest[i]:.10g}], (1 - alpha_s)/(1 - alpha_t), but is {sigmas[i]:.10g}: outside by {over[i]:.3g}"
        )
    sigmas = np.clip(sigmas, 0.0, largest)
    # The last as a product: it is 0 to the bit where the member is the least stochastic.
    return np.stack((sigmas, alphas[:-1] - sigmas * alphas[1:], (1.0 - alphas[1:]) * (largest - sigmas)), axis=1)


@dataclass(frozen=True, eq=False)
class Chain:
    r"""One member of the family on times τ_1 < … < τ_S out of 1…T, with τ_0 = 0.

    Attributes
    ----------
    schedule : NoiseSchedule
        A discrete schedule.
    tau : ndarray
        int64 (S,), rising.
    sigmas : ndarray
        float64 (S,): σ of the step that leaves τ_i for τ_{i−1}. The first can only be 0: given x_0, nothing is left to chance.

    Raises
    ------
    ValueError
        If τ does not rise or leaves 1…T, or a σ is not admissible: in which step, its range, and by how much.
    """

    schedule: NoiseSchedule
    tau: NDArray[np.int64]
    sigmas: Array

    def __post_init__(self) -> None:
        check_discrete(self.schedule)
        tau, sigmas = check_tau(self.tau, self.schedule), np.asarray(self.sigmas, dtype=np.float64)
        if sigmas.shape != tau.shape:
            raise ValueError(
                f"sigmas must be {tau.size} numbers, one for each of tau, but their shape is {sigmas.shape}"
            )
        object.__setattr__(self, "tau", tau)
        before = np.concatenate(([0], tau))
        weights = _weights(self.alphas, sigmas, lambda i: f"sigmas[{i}], of the step from t = {tau[i]} to {before[i]},")
        object.__setattr__(self, "sigmas", weights[:, 0])

    @staticmethod
    def make(
        schedule: NoiseSchedule,
        steps: int | None = None,
        *,
        tau: str | Sequence[int] = "linear",
        eta: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Chain:
        r"""A chain by a rule for τ and one number for the stochasticity.

        Parameters
        ----------
        schedule : NoiseSchedule
            A discrete schedule.
        steps : int, optional
            S, where τ is a rule; by default 50, or T if that is less.
        tau : str or sequence of int
            ``"linear"`` or ``"quadratic"`` (the paper's D.2, see :meth:`ddim_ode.Grid.make`), or the times, rising.
        eta : float, optional
            From 0, the least stochastic member and the default, to 1, σ = 0: σ_t = (1 − η)(1 − α_s)/(1 − α_t).
        sigmas : sequence of float, optional
            The σ themselves, aligned with τ, instead of `eta`.
        """
        check_discrete(schedule)
        if isinstance(tau, str):
            if tau not in ("linear", "quadratic"):
                raise ValueError(f'tau must be "linear", "quadratic" or the times themselves, but got {tau!r}')
            steps = min(50, int(schedule.T)) if steps is None else whole(steps, "steps")
            grid = Grid.make(tau, schedule, steps)
            times = np.rint(schedule.t(grid.sigmas[-2::-1])).astype(np.int64)
        else:
            times = np.asarray(tau)
            if steps is not None and steps != times.size:
                raise ValueError(f"steps = {steps} contradicts the {times.size} times of tau: leave it out")
        if eta is not None and sigmas is not None:
            raise ValueError("eta and sigmas both say how stochastic the steps are: give one of them")
        eta = 0.0 if eta is None else eta
        if not is_number(eta) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be a number from 0, the least stochastic member, to 1, but got {eta!r}")
        if sigmas is None:
            least = Chain(schedule, times, np.zeros(times.shape))
            return Chain(schedule, times, (1.0 - eta) * least.largest)
        return Chain(schedule, times, np.asarray(sigmas))

    @property
    def alphas(self) -> Array:
        """α at τ_0 = 0, where it is 1, and at τ: (S + 1,)."""
        return np.concatenate(([1.0], self.schedule.alphas_cumprod[self.tau - 1]))

    @property
    def largest(self) -> Array:
        """The largest admissible σ of each step, (S,)."""
        return _largest(self.alphas)

    @property
    def weights(self) -> Array:
        """What the step that leaves τ_i makes of x_t, of x_0 and of the uniform distribution: (S, 3), rows that sum to 1."""
        return _weights(self.alphas, self.sigmas, str)


# -- parts, which check nothing -----------------------------------------------------------------
def indicators(x: Tensor, classes: int) -> Tensor:
    k = torch.arange(classes, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    return (x.unsqueeze(1) == k).double()


def fade(x_0: Tensor, alpha: Any) -> Tensor:
    return alpha * x_0 + (1.0 - alpha) / x_0.shape[1]


def mix(x_t: Tensor, x_0: Tensor, weights: Any) -> Tensor:
    """A row of :attr:`Chain.weights` at work."""
    stay, jump, anywhere = weights
    return stay * x_t + jump * x_0 + anywhere / x_t.shape[1]


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Classes from distributions (B, K, *d), by u uniform on [0, 1): a class of probability 0 is never drawn."""
    total = p.cumsum(dim=1)
    below, whole_ = total.split((p.shape[1] - 1, 1), dim=1)
    return (below <= u.unsqueeze(1) * whole_).sum(dim=1)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """Summands of KL(q ‖ p), none of them negative: q log(q/p) − q + p."""
    return (torch.xlogy(q, q) - torch.xlogy(q, p) - q + p).clamp(min=0.0)


def uniform(like: Tensor, keys: Sequence[int], seed: int, t: int) -> Tensor:
    """Uniform on [0, 1), float64, of the samples' shape, for images `keys` at time `t`; 0 is that of latents."""
    drawn = [stream(seed, i, t, _UNIFORM).random(tuple(like.shape[1:])) for i in keys]
    return torch.from_numpy(np.stack(drawn)).to(like.device)


# -- checks -------------------------------------------------------------------------------------
def image_keys(first: int, n: int) -> range:
    first = whole(first, "first", 0)
    return range(first, first + n)


def check_discrete(schedule: NoiseSchedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, but got {type(schedule).__name__}")
    if not schedule.discrete:
        raise ValueError(f"discrete data need the trained steps 1 to T of a discrete schedule, but got {schedule!r}")


def _alpha(alpha: Any, like: Tensor) -> Tensor:
    """α as one number or a column beside a batch."""
    values = torch.as_tensor(alpha, dtype=torch.float64, device=like.device)
    if values.shape not in ((), like.shape[:1]):
        raise ValueError(f"alpha must be one number or ({like.shape[0]},), but has shape {tuple(values.shape)}")
    if not isinstance(values, FakeTensor) and not bool(((values >= 0.0) & (values <= 1.0)).all()):
        raise ValueError(f"alpha must lie in [0, 1], but got {alpha!r}")
    return values if values.ndim == 0 else values.reshape(-1, *(1,) * (like.ndim - 1))


def check_classes(x: Any, classes: int, name: str) -> Tensor:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of classes, whole numbers from 0 to {classes - 1}, but got {got}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, *d) with B >= 1, but its shape is {tuple(x.shape)}")
    x = x.long()
    if not isinstance(x, FakeTensor) and not bool((wrong := (x < 0) | (x >= classes)).logical_not().all()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name} must hold classes from 0 to {classes - 1}, but {name}{list(at)} is {int(x[at])}")
    return x


def _distribution(p: Any, name: str) -> Tensor:
    if not isinstance(p, Tensor) or not p.is_floating_point():
        got = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise TypeError(f"{name} must be a tensor of probabilities, but got {got}: of classes, one_hot(x, K)")
    if p.ndim < 3 or p.numel() == 0 or p.shape[1] < 2:
        raise ValueError(f"{name} must have shape (B, K, *d) with K >= 2, but its shape is {tuple(p.shape)}")
    if isinstance(p, FakeTensor):
        return p.double()
    p = p.double()
    if not bool((good := p >= 0.0).all()):
        at = tuple(good.logical_not().nonzero()[0].tolist())
        raise ValueError(f"{name} must hold probabilities, but {name}{list(at)} is {float(p[at]):.6g}")
    off = p.sum(dim=1) - 1.0
    if not bool((off.abs() <= _SUM).all()):
        b, *d = np.unravel_index(int(off.abs().argmax()), tuple(off.shape))
        place = ", ".join(map(str, (b, ":", *d)))
        raise ValueError(
            f"{name} must sum to 1 over its classes, but {name}[{place}] is off by {float(off[(b, *d)]):+.3g}"
        )
    return p
