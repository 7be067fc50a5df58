r"""One multistep formula for most samplers in use.

Solve a linear part of eq. 14 exactly (propagator P), interpolate a quantity y by the polynomial through its
last k evaluations in a clock u(σ), and integrate that polynomial exactly against a known kernel K:

.. math:: \bar x(\sigma') = P(\sigma, \sigma')\,\bar x(\sigma)
          + \sum_j y_{n-j} \int_\sigma^{\sigma'} K(s, \sigma')\, \ell_j(u(s))\, ds

With :math:`\epsilon = a(\sigma)(\bar x - \mu) + g(\sigma)\, y` the pieces are :math:`\partial_{\sigma'} P = a P` and
:math:`K = P g`. The linear part fixes a, the quantity fixes g, and the two are free of each other. The weights
depend on the grid alone; they are worked out once, in float64, by a double-exponential quadrature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import whole
from ddim_ode.solvers.base import Clock, Field, Solver, check_clock, check_named, clock
from ddim_ode.solvers.runge_kutta import KUTTA3, MIDPOINT, RK4, RungeKutta, _Stages, combine, run_stages

__all__ = ["DATA", "Flow", "Gaussian", "Linear", "Multistep", "NOISE", "fit_gaussian"]

Array = NDArray[np.float64]


# -- linear parts -------------------------------------------------------------------------------
class Linear(ABC):
    r"""A linear part of eq. 14 that is solved exactly: :math:`\epsilon = a(\sigma)(\bar x - \mu) + \text{rest}`.

    A run stores one tensor z an evaluation, with rest = h(σ) z; for all parts but :data:`DATA`, h = 1.
    """

    name: str
    #: What a step of any length solves without error, by the part's own quantity.
    exact: str = "a constant rest"
    #: Whether a(0) is infinite, so that a step cannot leave σ = 0 by the formula.
    singular: bool = False
    #: Whether propagators and weights are arrays over directions, not numbers.
    directed: bool = False

    @abstractmethod
    def propagator(self, s: Array, to: float) -> Array:
        """P(s, to), of shape ``s.shape + (directions or nothing)``."""

    @abstractmethod
    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        """What is kept of an evaluation: z."""

    def h(self, sigma: float) -> float:
        """Rest = h(σ) z."""
        return 1.0

    def scale(self, s: Array) -> Array:
        """G of the quantity that is this part's own, rest = g y; of the shape of :meth:`propagator`."""
        return np.ones_like(s)

    @abstractmethod
    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        """P x̄ + Σ w_j z_j."""

    def check(self, x_bar: Tensor) -> None:  # noqa: B027  (most fit all)
        """Refuse states that this part does not fit, before any model call."""

    def place(self, value: Array, like: Tensor) -> Any:
        """A propagator or weight over directions, as a tensor."""
        return torch.from_numpy(np.ascontiguousarray(value)).to(like.device, like.dtype)


class _Noise(Linear):
    """No linear part: P = 1, a = 0."""

    name = "noise"
    exact = "constant ε"

    def __reduce__(self) -> str:
        return "NOISE"  # there is one, here and in every process

    def propagator(self, s: Array, to: float) -> Array:
        return np.ones_like(s)

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return eps

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        return combine(x_bar, weights, stored)


class _Data(Linear):
    r"""a = 1/σ, P = σ'/s: exact where x̂₀ = x̄ − σε stands still. z = x̂₀."""

    name = "data"
    exact = "constant x̂₀"
    singular = True

    def __reduce__(self) -> str:
        return "DATA"

    def propagator(self, s: Array, to: float) -> Array:
        return to / s

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return x_bar.add(eps, alpha=-sigma)

    def h(self, sigma: float) -> float:
        return -1.0 / sigma

    def scale(self, s: Array) -> Array:
        return -1.0 / s

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        return _scaled_sum(x_bar, propagator, weights, stored)


def _scaled_sum(x_bar: Tensor, propagator: float, weights: tuple[float, ...], stored: tuple[Tensor, ...]) -> Tensor:
    moved = x_bar * propagator
    for weight, z in zip(weights, stored, strict=True):
        moved.add_(z, alpha=weight)
    return moved


NOISE: Linear = _Noise()
DATA: Linear = _Data()


@dataclass(frozen=True)
class Flow(Linear):
    r"""a = 1/(c + σ), P = (c + σ')/(c + s): between :data:`DATA` (c → 0) and :data:`NOISE` (c → ∞), and finite at σ = 0.

    Its own quantity is the velocity :math:`y = z = (c + \sigma)\epsilon - \bar x = c\epsilon - \hat x_0`, with rest =
    y/(c + σ): for c = 1 that of rectified flow (Liu, Gong & Liu 2023), whose equation for :math:`\bar x/(1 + \sigma)` in
    the time σ/(1 + σ) is eq. 14.

    Parameters
    ----------
    c : float
        A noise level, c > 0.
    """

    c: float = 1.0
    name = "flow"
    exact = "constant cε − x̂₀"

    def __post_init__(self) -> None:
        if not isinstance(self.c, Real) or not 0.0 < float(self.c) < math.inf:
            raise ValueError(f"c of a Flow must be a positive number, but got {self.c!r}")

    def propagator(self, s: Array, to: float) -> Array:
        return (self.c + to) / (self.c + s)

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return (eps * (self.c + sigma)).sub_(x_bar)

    def h(self, sigma: float) -> float:
        return 1.0 / (self.c + sigma)

    def scale(self, s: Array) -> Array:
        return 1.0 / (self.c + s)

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        return _scaled_sum(x_bar, propagator, weights, stored)


@dataclass(frozen=True, eq=False)
class Gaussian(Linear):
    r"""The linear part that is exact for data N(μ, U diag(λ) Uᵀ); :func:`fit_gaussian` takes it from data.

    a = σ/(λ + σ²) and :math:`P = \sqrt{(\lambda + \sigma'^2)/(\lambda + s^2)}` along each direction.

    Parameters
    ----------
    mean : Tensor
        μ, (\*d) or a scalar.
    variance : Tensor
        λ > 0: a scalar (isotropic), (\*d) (diagonal), or (r,) with a basis.
    basis : Tensor, optional
        U, (D, r) with orthonormal columns, the directions; D is the product of d.
    rest : float, optional
        λ of all directions that `basis` leaves out, if r < D.
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None = None
    rest: float | None = None
    name = "gaussian"
    exact = "its Gaussian"

    def __post_init__(self) -> None:
        # Copies: plans are kept by the part, and their weights are numbers, without gradients.
        variance = torch.as_tensor(self.variance, dtype=torch.float64).detach().clone()
        if not bool(((variance > 0.0) & variance.isfinite()).all()) or not variance.numel():
            raise ValueError(
                f"variance must be positive and finite in every direction, but {int((~(variance > 0.0) | ~variance.isfinite()).sum())} "
                f"of {variance.numel()} are not"
            )
        object.__setattr__(self, "mean", torch.as_tensor(self.mean, dtype=torch.float64).detach().clone())
        if not bool(self.mean.isfinite().all()):
            raise ValueError("mean must be finite, but there is NaN or infinity in it")
        object.__setattr__(self, "variance", variance)
        host = variance.numpy(force=True)  # the weights are worked out on the host
        object.__setattr__(self, "_placed", {})
        if self.basis is None:
            if self.rest is not None:
                raise ValueError("rest is the variance outside a basis, but no basis is given")
        else:
            basis = torch.as_tensor(self.basis, dtype=torch.float64).detach().clone()
            if basis.ndim != 2 or basis.shape[1] > basis.shape[0] or variance.shape != (basis.shape[1],):
                raise ValueError(
                    "basis must be (D, r), r <= D, with variance (r,), but their shapes are "
                    f"{tuple(basis.shape)} and {tuple(variance.shape)}"
                )
            size, rank = basis.shape
            given = isinstance(self.rest, Real) and 0.0 < float(self.rest) < math.inf
            if (rank < size) != (self.rest is not None) or (self.rest is not None and not given):
                raise ValueError(
                    f"rest must be the positive variance of the {size - rank} directions outside the basis, and None if there "
                    f"are none, but got {self.rest!r}"
                )
            if float((basis.T @ basis - torch.eye(rank, dtype=torch.float64, device=basis.device)).abs().max()) > 1e-6:
                raise ValueError("basis must be orthogonal, but its columns are not orthonormal (to 1e-6)")
            object.__setattr__(self, "basis", basis)
            host = host if self.rest is None else np.append(host, self.rest)
        object.__setattr__(self, "_host", host)

    def _over(self, s: Array) -> Array:
        """λ + s², over the directions, that of the rest last."""
        variance = self._host  # type: ignore[attr-defined]
        return variance + (s * s).reshape(s.shape + (1,) * variance.ndim)

    def propagator(self, s: Array, to: float) -> Array:
        return np.sqrt(self._over(np.array(to)) / self._over(s))

    def scale(self, s: Array) -> Array:
        return 1.0 / np.sqrt(self._over(s))

    @property
    def directed(self) -> bool:  # type: ignore[override]
        return self.variance.ndim > 0

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        key = (like.device, like.dtype)
        if key in self._placed:  # type: ignore[attr-defined]
            return self._placed[key]  # type: ignore[attr-defined]
        spread = self.variance if self.rest is None else torch.as_tensor(self._host)  # type: ignore[attr-defined]
        placed = tuple(None if x is None else x.to(like.device, like.dtype) for x in (self.mean, spread, self.basis))
        # Fake tensors must not outlive their mode, nor inference tensors theirs.
        if not any(isinstance(x, FakeTensor) for x in placed) and not torch.is_inference_mode_enabled():
            self._placed[key] = placed  # type: ignore[attr-defined]
        return placed  # type: ignore[return-value]

    def _apply(self, values: Any, x: Tensor, basis: Tensor | None) -> Tensor:
        """Multiply x by `values` along each direction."""
        if basis is None:
            return values * x
        flat = x.flatten(1)
        if self.rest is None:
            return ((values * (flat @ basis)) @ basis.T).reshape(x.shape)
        inside, rest = values.split((basis.shape[1], 1))
        return (rest * flat + ((inside - rest) * (flat @ basis)) @ basis.T).reshape(x.shape)

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        mean, variance, basis = self._constants(x_bar)
        return eps - self._apply(sigma / (variance + sigma * sigma), x_bar - mean, basis)

    def check(self, x_bar: Tensor) -> None:
        shape, size = x_bar.shape[1:], math.prod(x_bar.shape[1:])
        fits = self.mean.ndim == 0 or self.mean.shape == shape
        if self.basis is None:
            fits = fits and (self.variance.ndim == 0 or self.variance.shape == shape)
        else:
            fits = fits and self.basis.shape[0] == size
        if not fits:
            raise ValueError(
                f"the Gaussian part must fit samples of shape {tuple(shape)}, but its mean is {tuple(self.mean.shape)} and its "
                f"variance {tuple(self.variance.shape)}"
            )

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        mean, _, basis = self._constants(x_bar)
        moved = mean + self._apply(propagator, x_bar - mean, basis)
        for weight, z in zip(weights, stored, strict=True):
            moved = moved + self._apply(weight, z, basis)
        return moved


def fit_gaussian(
    images: Tensor, kind: Literal["isotropic", "diagonal", "low-rank"] = "low-rank", rank: int = 64
) -> Gaussian:
    r"""The :class:`Gaussian` of a set of images, by maximum likelihood.

    Parameters
    ----------
    images : Tensor
        (N, \*d), N ≥ 2, floats as the model knows them (pictures in [−1, 1]).
    kind : {"isotropic", "diagonal", "low-rank"}
        One variance for all; one a pixel; or the covariance's leading `rank` directions with the variance of each, and one
        variance for all others (probabilistic principal components, Tipping & Bishop 1999).
    rank : int
        Directions kept, less than N.

    Returns
    -------
    Gaussian
        To be used as ``Multistep(k, linear=...)``. Variances are kept at or above 1e-6 of their mean: a pixel that never
        changes has none.

    Raises
    ------
    ValueError, TypeError
        If the images are not finite floats, too few, or all alike, or the rank does not fit.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of floats, such as x / 127.5 - 1, but got {got}")
    if images.ndim < 2 or images.shape[0] < 2:
        raise ValueError(f"images must be (N, *d) with N >= 2, but their shape is {tuple(images.shape)}")
    if kind not in ("isotropic", "diagonal", "low-rank"):
        raise ValueError(f'kind must be "isotropic", "diagonal" or "low-rank", but got {kind!r}')
    data = images.detach().double()
    if not bool(data.isfinite().all()):
        raise ValueError("images must be finite, but there is NaN or infinity among them")
    mean = data.mean(dim=0)
    centred = (data - mean).flatten(1)
    spread = centred.square().mean(dim=0)
    average = float(spread.mean())
    if average == 0.0:
        raise ValueError("images must differ from each other, but all are the same")
    least = 1e-6 * average
    if kind == "isotropic":
        return Gaussian(mean, torch.tensor(average, dtype=torch.float64))
    if kind == "diagonal":
        return Gaussian(mean, spread.clamp(min=least).reshape(mean.shape))
    count, size = centred.shape
    rank = whole(rank, "rank")
    if rank >= count or rank > size:
        raise ValueError(f"rank must be less than the {count} images and at most {size}, but got {rank}")
    if size <= count:
        values, vectors = torch.linalg.eigh(centred.T @ centred / count)
        basis = vectors[:, -rank:].flip(1)
    else:  # fewer images than dimensions: the same directions by way of the images
        values, vectors = torch.linalg.eigh(centred @ centred.T / count)
        basis = torch.linalg.qr(centred.T @ vectors[:, -rank:].flip(1)).Q
    kept = values[-rank:].flip(0).clamp(min=least)
    if rank == size:
        return Gaussian(mean, kept, basis)
    rest = max((float(spread.sum()) - float(values[-rank:].sum())) / (size - rank), least)
    return Gaussian(mean, kept, basis, rest)


# -- interpolated quantities: ε − a(x̄ − μ) = g(σ) y -----------------------------------------------
_QUANTITIES: dict[str, Callable[[Linear, Array], Array]] = {
    "noise": lambda linear, s: np.ones_like(s),  # y = ε less its linear part
    "data": lambda linear, s: -1.0 / s,  # y = x̂₀ under DATA, x̂₀ − x̄ under NOISE
    "score": lambda linear, s: s,  # y = ε/σ, minus the score
    "own": lambda linear, s: linear.scale(s),  # what the linear part leaves most nearly constant
}


# -- weights ------------------------------------------------------------------------------------
def _double_exponential() -> tuple[Array, Array, Array]:
    """Nodes x, 1 − x and weights on [0, 1]; both distances are accurate to the last place near the ends."""
    tau = np.arange(-88, 89) / 24.0
    e = np.exp(-np.pi * np.sinh(tau))
    x, rest = 1.0 / (1.0 + e), e / (1.0 + e)
    weights = np.cosh(tau) * x * rest
    return x, rest, weights / weights.sum()


_X, _REST, _WEIGHTS = _double_exponential()


def _lagrange(nodes: Array, u: Array) -> Array:
    """ℓ_j(u) through `nodes`, (k, *u.shape)."""
    out = np.ones((nodes.size, *np.shape(u)))
    for j, own in enumerate(nodes):
        for i, other in enumerate(nodes):
            if i != j:
                out[j] *= (u - other) / (own - other)
    return out


class Weights(NamedTuple):
    """One step, as numbers. `propagator` None: x̄ + weights[0] ε (eq. 13). `weights` None: stay."""

    sigma: float
    propagator: Any
    weights: tuple[Any, ...] | None


class _Corrected(NamedTuple):
    """A step of a member with a corrector. `correct` None: the formula does not hold on its interval, and nothing is done.

    Under ``"free"`` it is the correction of the step before, whose end is where this one begins; under ``"pece"`` this
    step's own.
    """

    predict: Weights
    correct: Weights | None


class _State(NamedTuple):
    plan: tuple[Weights | _Corrected | _Stages, ...]
    history: tuple[Tensor, ...]  # newest first
    anchor: Tensor | None = None  # where the step before began, for the free corrector


@dataclass(frozen=True, repr=False)
class Multistep(Solver):
    r"""A member of the multistep family: linear part × quantity × clock × order.

    Parameters
    ----------
    k : int
        Evaluations the polynomial goes through, 1–4: the order once started, without a corrector.
    clock : str or Clock
        The variable of the polynomial: ``"sigma"``, ``"t"``, ``"log"``, ``"arctan"``, …; see
        :func:`ddim_ode.solvers.base.clock`.
    linear : Linear
        The part solved exactly: :data:`NOISE` (none), :data:`DATA`, a :class:`Flow`, or a :class:`Gaussian`.
    quantity : {"noise", "data", "score", "own"}
        What is interpolated: ε (less its linear part), x̂₀, ε/σ, or the linear part's own: ε under NOISE, x̂₀ under DATA,
        the velocity under a Flow, the rest times √(λ + σ²) under a Gaussian, and what the ``scale`` of a part of your own
        says. By default the own one, but for a Gaussian ``"noise"``.
    start : {"ramp", "rk"}
        How the first k − 1 steps are made. ``"ramp"``: with the evaluations there are, one call a step; the
        first step is Euler's, so the order is at most 2, or 3 with a corrector. ``"rk"``: by Runge–Kutta in the clock σ,
        one order below the member's, which keeps the order and costs more calls a step.
    corrector : {None, "free", "pece"}
        Adams–Bashforth–Moulton: the step is made again by the polynomial that goes through its end too, of one order
        more. ``"free"`` takes for its end the evaluation that the next step makes anyway, at the predicted state, as
        UniPC does (Zhao et al. 2023); the last step, which has none, stays as predicted. ``"pece"`` evaluates at the
        predicted state for the correction and at the corrected one for what follows: two calls a step.
    label : str, optional
        The name, where it has one in the field.

    Notes
    -----
    The order is that of grids whose σ stay away from 0. A step that touches σ = 0 uses order 1 where its clock is
    infinite there (log σ), and eq. 13 where the integral would diverge; and in a clock that is not smooth there (t: ε
    starts like √t) the steps next to 0 are of lower order too: docs/solvers.md has the measured orders. ``score`` cannot
    leave σ = 0: ε/σ does not exist there, so an encoding run starts at the first σ above it, from the data as it is, and
    that step costs no call. Under :data:`DATA` the quantities ``noise`` and ``score`` are infinite at σ = 0, and grids
    that touch it are refused. Steps on which a formula would be singular are not corrected.
    """

    k: int = 1
    clock: str | Clock = "sigma"
    linear: Linear = NOISE
    quantity: str | None = None
    start: Literal["ramp", "rk"] = "ramp"
    corrector: Literal["free", "pece"] | None = None
    label: str = ""
    source: str = "the multistep family, docs/solvers.md"

    def __post_init__(self) -> None:
        k = whole(self.k, "k, the order of a multistep member,")
        if k > 4:
            raise ValueError(f"k, the order of a multistep member, must be 1, 2, 3 or 4, but got {self.k!r}")
        object.__setattr__(self, "k", k)
        check_named(self.clock)
        if not isinstance(self.linear, Linear):
            raise TypeError(
                f"linear must be NOISE, DATA, a Flow, a Gaussian or a Linear of your own, but got {self.linear!r}"
            )
        if self.start not in ("ramp", "rk"):
            raise ValueError(f'start must be "ramp" or "rk", but got {self.start!r}')
        if self.corrector not in (None, "free", "pece"):
            raise ValueError(f'corrector must be None, "free" or "pece", but got {self.corrector!r}')
        # The own quantity of these two has a name.
        named = {NOISE: "noise", DATA: "data"}.get(self.linear)
        if self.quantity is None:
            object.__setattr__(self, "quantity", named or ("noise" if isinstance(self.linear, Gaussian) else "own"))
        elif self.quantity == "own" and named:
            object.__setattr__(self, "quantity", named)
        if self.quantity not in _QUANTITIES:
            raise ValueError(f"unknown quantity {self.quantity!r}: known are {', '.join(_QUANTITIES)}")

    @property
    def name(self) -> str:  # type: ignore[override]
        at = self.clock if isinstance(self.clock, str) else self.clock.name
        name = self.label or f"multistep{self.k}-{self.linear.name}-{self.quantity}-{at}"
        if self.corrector and not self.label:
            name += f"-{self.corrector}"
        return name if self.start == "ramp" else f"{name}-rk"

    @property
    def full_order(self) -> int:
        """The order once started."""
        return self.k + (self.corrector is not None)

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.full_order if self.start == "rk" else min(self.full_order, 2 if self.corrector is None else 3)

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return 2 if self.corrector == "pece" else 1

    @property
    def exact(self) -> str:  # type: ignore[override]
        natural = self.quantity == "own" or self.linear is DATA or isinstance(self.linear, Gaussian)
        if natural or (self.linear is NOISE and self.quantity == "noise"):
            return self.linear.exact if self.quantity != "score" else "constant score"
        return {"noise": "a constant rest", "data": "a rest like 1/σ", "score": "constant score"}[str(self.quantity)]

    @property
    def states(self) -> int:  # type: ignore[override]
        return self._kept + (2 if self.corrector == "free" else 1)

    @property
    def _kept(self) -> int:
        """Evaluations that are kept from step to step."""
        return self.k if self.corrector == "free" else self.k - 1

    @property
    def _starter(self) -> RungeKutta | None:
        """The Runge–Kutta method, of one order less, that starts an ``rk`` run; Euler's needs no other code."""
        if self.start == "ramp" or self.k == 1:
            return None
        return {3: RungeKutta(MIDPOINT), 4: RungeKutta(KUTTA3), 5: RungeKutta(RK4)}.get(self.full_order)

    def nfe(self, steps: int) -> int:
        starter = self._starter
        started = 0 if starter is None else min(steps, self.k - 1)
        calls = started * starter.nfe_per_step if starter is not None else 0
        calls += (steps - started) * self.nfe_per_step
        # The step to σ = 0 is not corrected where the formula is singular there.
        singular = self.linear.singular or self.quantity in ("data", "score") or self.clock == "log"
        return calls - (self.corrector == "pece" and singular and steps > started)

    def with_start(self, start: Literal["ramp", "rk"]) -> Multistep:
        """The same member with another start."""
        return replace(self, start=start)

    def stages(self, grid: Grid) -> Array:
        asked: list[float] = []
        for n, step in enumerate(self.plan(grid)):
            if isinstance(step, _Stages):
                asked += step.sigmas
            elif isinstance(step, _Corrected):
                if step.predict.weights is not None:
                    asked.append(step.predict.sigma)
                if self.corrector == "pece" and step.correct is not None:
                    asked.append(float(grid.sigmas[n + 1]))
            elif step.weights is not None:
                asked.append(step.sigma)
        return np.array(asked)

    def calls(self, grid: Grid) -> int:
        return self.stages(grid).size

    def plan(self, grid: Grid) -> tuple[Weights | _Corrected | _Stages, ...]:
        """Propagators and weights of every step of `grid`, as float64 numbers."""
        # Arrays over directions may be large, and the part itself: they are not kept.
        return _plan.__wrapped__(self, grid) if self.linear.directed else _plan(self, grid)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _State:
        self.linear.check(x_bar)
        plan = self.plan(grid)
        if self.linear.directed:
            plan = tuple(_placed(step, self.linear, x_bar) for step in plan)
        return _State(plan, ())

    def step(self, field: Field, x_bar: Tensor, n: int, state: _State) -> tuple[Tensor, _State, Tensor | None]:
        plan, history, anchor = state
        step = plan[n]
        if isinstance(step, _Stages):
            moved, eps = run_stages(field, x_bar, step)
            z = self.linear.stored(x_bar, eps, step.sigmas[0])
            return moved, _State(plan, (z, *history)[: self._kept]), None
        predict, correct = step if isinstance(step, _Corrected) else (step, None)
        if predict.weights is None:
            return x_bar, state, None
        eps = field(x_bar, predict.sigma)
        history = (self.linear.stored(x_bar, eps, predict.sigma), *history)
        if correct is not None and anchor is not None:
            x_bar = self._advance(anchor, correct, history)
        if predict.propagator is None:
            moved = x_bar.add(eps, alpha=predict.weights[0])
        else:
            moved = self._advance(x_bar, predict, history)
        if self.corrector is None:
            return moved, _State(plan, history[: self._kept]), None
        if self.corrector == "free":
            return moved, _State(plan, history[: self._kept], x_bar), None
        if correct is not None:
            z = self.linear.stored(moved, field(moved, correct.sigma), correct.sigma)
            moved = self._advance(x_bar, correct, (z, *history))
        return moved, _State(plan, history[: self._kept]), None

    def _advance(self, x_bar: Tensor, step: Weights, history: tuple[Tensor, ...]) -> Tensor:
        assert step.weights is not None
        return self.linear.advance(x_bar, step.propagator, step.weights, history[: len(step.weights)])


def _placed(step: Any, linear: Linear, like: Tensor) -> Any:
    """The step with its arrays over directions as tensors."""
    if isinstance(step, _Corrected):
        return _Corrected(*(_placed(part, linear, like) for part in step))
    if not isinstance(step, Weights) or step.propagator is None or step.weights is None:
        return step
    place = partial(linear.place, like=like)
    return Weights(step.sigma, place(step.propagator), tuple(map(place, step.weights)))


class _Over(NamedTuple):
    """What the weights of one step need: where it goes, and the quadrature on the way."""

    sigma: float
    to: float
    tick_to: float
    s: Array
    clocks: Array


def over(u: Clock, sigma: float, to: float) -> _Over:
    """The step from `sigma` to `to` in the clock `u`."""
    s = sigma * _REST + to * _X
    with np.errstate(divide="ignore"):
        return _Over(sigma, float(to), float(u.u(np.array(to))), s, np.asarray(u.u(s), dtype=np.float64))


def ticks_of(u: Clock, grid: Grid) -> Array:
    """The clock at the nodes of the grid.

    Raises
    ------
    ValueError
        If it is not strictly monotone there.
    """
    with np.errstate(divide="ignore"):
        ticks = np.asarray(u.u(grid.sigmas), dtype=np.float64)
    moves = np.diff(ticks[np.isfinite(ticks)])
    if np.isnan(ticks).any() or not (np.all(moves > 0.0) or np.all(moves < 0.0)):
        raise ValueError(f"clock {u.name!r} is not strictly monotone over the grid {grid!r}")
    return ticks


@lru_cache(maxsize=64)
def _plan(member: Multistep, grid: Grid) -> tuple[Weights | _Corrected | _Stages, ...]:
    sigmas = grid.sigmas
    linear, quantity = member.linear, str(member.quantity)
    if linear.singular and quantity != "data" and sigmas.min() == 0.0:
        raise ValueError(
            f"a grid for {member.name} cannot touch sigma = 0: what it interpolates, quantity="
            f'{quantity!r}, is infinite there and no polynomial follows it; use quantity="data", or a grid that stays above 0'
        )
    u = clock(member.clock, grid.schedule, grid.steps)
    ticks = ticks_of(u, grid)
    if isinstance(member.clock, Clock):  # read inside the steps too, but neither inverted nor asked for its slope
        check_clock(u, float(sigmas.min()), float(sigmas.max()), inverse=False, slope=False)
    # All quadrature nodes at once: a clock may be costly to read (t inverts a spline).
    nodes = sigmas[:-1, None] * _REST + sigmas[1:, None] * _X
    with np.errstate(divide="ignore"):
        clocks = np.asarray(u.u(nodes), dtype=np.float64) if member.full_order > 1 else nodes
    starter = member._starter
    started = () if starter is None else starter.plan(grid)
    steps = [
        _Over(float(sigmas[n]), float(sigmas[n + 1]), float(ticks[n + 1]), nodes[n], clocks[n])
        for n in range(grid.steps)
    ]
    out: list[Weights | _Corrected | _Stages] = []
    for n in range(grid.steps):
        if n < min(member.k - 1, len(started)):
            out.append(started[n])
            continue
        past = [n - j for j in range(min(member.k, n + 1))]
        predict = weigh(linear, quantity, steps[n], sigmas[past], ticks[past])
        if member.corrector is None:
            out.append(predict)
            continue
        # The step to be corrected: the one before, once its end is evaluated, or this one. Runge–Kutta's need none.
        m = n - 1 if member.corrector == "free" else n
        correct = None
        if m == n or (m >= 0 and not isinstance(out[m], _Stages)):
            through = [m + 1 - j for j in range(min(member.k + 1, m + 2))]
            correct = _correct(linear, quantity, steps[m], sigmas[through], ticks[through])
        out.append(_Corrected(predict, correct))
    return tuple(out)


def weigh(linear: Linear, quantity: str, step: _Over, sigmas: Array, ticks: Array) -> Weights:
    """P and the weights on the stored z at `sigmas` (with their `ticks`) of the `step`.

    They are nodes of a run, newest first, or evaluations inside a step; what lies at σ = 0 is as docs/solvers.md says.
    """
    sigma, to, tick_to, _, _ = step
    newest = float(sigmas[0])
    euler = Weights(newest, None, (to - sigma,))
    if sigma == 0.0 and quantity == "score":
        return Weights(newest, None, None)
    if sigma == 0.0 and (linear.singular or quantity == "data"):
        return euler
    usable = _usable(linear, quantity, sigmas, ticks)
    # The polynomial runs through the unbroken newest stretch; an infinite clock at either end leaves one point.
    count = 1 if not (usable[0] and np.isfinite(tick_to)) else int(np.argmin(usable)) or usable.size
    if to == 0.0 and (linear.singular or quantity == "data"):
        if not (linear.singular and quantity == "data"):
            return euler
        # P → 0 and the kernel becomes a delta at σ = 0: x̄ is the polynomial's own value there.
        values = _lagrange(ticks[:count], np.array(tick_to)) if count > 1 else np.ones(1)
        return Weights(newest, 0.0, tuple(map(float, values)))
    return _integrate(linear, quantity, step, sigmas[:count], ticks[:count])


def _correct(linear: Linear, quantity: str, step: _Over, sigmas: Array, ticks: Array) -> Weights | None:
    """The weights of the `step` with its end, ``sigmas[0]``, among the nodes; None where they would be singular."""
    singular = linear.singular or quantity in ("data", "score")
    if singular and min(step.sigma, step.to) == 0.0:
        return None
    usable = _usable(linear, quantity, sigmas, ticks)
    if not usable[:2].all():
        return None
    count = int(np.argmin(usable)) or usable.size
    return _integrate(linear, quantity, step, sigmas[:count], ticks[:count])


def _usable(linear: Linear, quantity: str, sigmas: Array, ticks: Array) -> NDArray[np.bool_]:
    """Which stored z say something of y: not those at σ = 0 where h/g is infinite, nor where the clock is."""
    blind = quantity == "score" or (linear.singular and quantity == "noise")
    return np.isfinite(ticks) & ((sigmas > 0.0) | (not blind))


def _integrate(linear: Linear, quantity: str, step: _Over, sigmas: Array, ticks: Array) -> Weights:
    """The formula itself: the integral of each cardinal polynomial against the kernel."""
    sigma, to, _, s, clocks = step
    basis = _lagrange(ticks, clocks) if sigmas.size > 1 else np.ones((1, s.size))
    g = partial(_QUANTITIES[quantity], linear)
    kernel, scale = linear.propagator(s, to), g(s)
    kernel = kernel * scale.reshape(scale.shape + (1,) * (kernel.ndim - scale.ndim))
    integrals = np.tensordot((to - sigma) * _WEIGHTS * basis, kernel, axes=(1, 0))
    # y = h z / g at each past node. At σ = 0: x̂₀ is z itself under DATA, and vanishes from x̂₀ − x̄ under the others.
    zero = 0.0 if quantity == "data" and not linear.singular else 1.0
    infinite = quantity in ("data", "score")
    turn = [zero if infinite and x == 0.0 else linear.h(x) / g(np.array(x)) for x in sigmas.tolist()]
    weights = [integral * t for integral, t in zip(integrals, turn, strict=True)]
    propagator = linear.propagator(np.array(sigma), to)
    if linear.directed:
        return Weights(float(sigmas[0]), propagator, tuple(weights))
    return Weights(float(sigmas[0]), float(propagator), tuple(map(float, weights)))
