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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import whole
from ddim_ode.solvers.base import Clock, Field, Solver, clock
from ddim_ode.solvers.runge_kutta import KUTTA3, MIDPOINT, RungeKutta, _Stages, combine, run_stages

__all__ = ["DATA", "Gaussian", "Linear", "Multistep", "NOISE"]

Array = NDArray[np.float64]


# -- linear parts -------------------------------------------------------------------------------
class Linear(ABC):
    r"""A linear part of eq. 14 that is solved exactly: :math:`\epsilon = a(\sigma)(\bar x - \mu) + \text{rest}`.

    A run stores one tensor z an evaluation, with rest = h(σ) z; for all parts but :data:`DATA`, h = 1.
    """

    name: str
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

    def propagator(self, s: Array, to: float) -> Array:
        return np.ones_like(s)

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return eps

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        return combine(x_bar, weights, stored)


class _Data(Linear):
    r"""a = 1/σ, P = σ'/s: exact where x̂₀ = x̄ − σε stands still. z = x̂₀."""

    name = "data"
    singular = True

    def propagator(self, s: Array, to: float) -> Array:
        return to / s

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        return x_bar.add(eps, alpha=-sigma)

    def h(self, sigma: float) -> float:
        return -1.0 / sigma

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        moved = x_bar * propagator
        for weight, z in zip(weights, stored, strict=True):
            moved.add_(z, alpha=weight)
        return moved


NOISE: Linear = _Noise()
DATA: Linear = _Data()


@dataclass(frozen=True, eq=False)
class Gaussian(Linear):
    r"""The linear part that is exact for data N(μ, U diag(λ) Uᵀ).

    a = σ/(λ + σ²) and :math:`P = \sqrt{(\lambda + \sigma'^2)/(\lambda + s^2)}` along each direction.

    Parameters
    ----------
    mean : Tensor
        μ, (\*d) or a scalar.
    variance : Tensor
        λ > 0: a scalar (isotropic), (\*d) (diagonal), or (D,) with a basis, D the product of d.
    basis : Tensor, optional
        U, (D, D) orthogonal, columns the directions.
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None = None
    name = "gaussian"

    def __post_init__(self) -> None:
        variance = torch.as_tensor(self.variance, dtype=torch.float64)
        if not bool((variance > 0.0).all()):
            raise ValueError(
                f"variance must be positive in every direction, but the smallest is {float(variance.min()):.4g}"
            )
        object.__setattr__(self, "mean", torch.as_tensor(self.mean, dtype=torch.float64))
        object.__setattr__(self, "variance", variance)
        object.__setattr__(self, "_host", variance.numpy(force=True))  # the weights are worked out on the host
        object.__setattr__(self, "_placed", {})
        if self.basis is not None:
            basis = torch.as_tensor(self.basis, dtype=torch.float64)
            size = basis.shape[0]
            if basis.shape != (size, size) or variance.shape != (size,):
                raise ValueError(
                    "basis must be (D, D) with variance (D,), but their shapes are "
                    f"{tuple(basis.shape)} and {tuple(variance.shape)}"
                )
            if float((basis.T @ basis - torch.eye(size, dtype=torch.float64, device=basis.device)).abs().max()) > 1e-6:
                raise ValueError("basis must be orthogonal, but its columns are not (to 1e-6)")
            object.__setattr__(self, "basis", basis)

    def propagator(self, s: Array, to: float) -> Array:
        variance = self._host  # type: ignore[attr-defined]
        s = s.reshape(s.shape + (1,) * variance.ndim)
        return np.sqrt((variance + to * to) / (variance + s * s))

    @property
    def directed(self) -> bool:  # type: ignore[override]
        return self.variance.ndim > 0

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        key = (like.device, like.dtype)
        if key in self._placed:  # type: ignore[attr-defined]
            return self._placed[key]  # type: ignore[attr-defined]
        placed = tuple(
            None if x is None else x.to(like.device, like.dtype) for x in (self.mean, self.variance, self.basis)
        )
        # Fake tensors must not outlive their mode, nor inference tensors theirs.
        if not any(isinstance(x, FakeTensor) for x in placed) and not torch.is_inference_mode_enabled():
            self._placed[key] = placed  # type: ignore[attr-defined]
        return placed  # type: ignore[return-value]

    def _turn(self, x: Tensor, basis: Tensor | None) -> Tensor:
        return x if basis is None else x.flatten(1) @ basis

    def stored(self, x_bar: Tensor, eps: Tensor, sigma: float) -> Tensor:
        mean, variance, basis = self._constants(x_bar)
        pull = sigma / (variance + sigma * sigma)
        return self._turn(eps, basis) - pull * self._turn(x_bar - mean, basis)

    def check(self, x_bar: Tensor) -> None:
        shape, size = x_bar.shape[1:], math.prod(x_bar.shape[1:])
        whole = self.mean.ndim == 0 or self.mean.shape == shape
        if self.basis is None:
            whole = whole and (self.variance.ndim == 0 or self.variance.shape == shape)
        else:
            whole = whole and self.basis.shape[0] == size
        if not whole:
            raise ValueError(
                f"the Gaussian part must fit samples of shape {tuple(shape)}, but its mean is {tuple(self.mean.shape)} and its "
                f"variance {tuple(self.variance.shape)}"
            )

    def advance(self, x_bar: Tensor, propagator: Any, weights: tuple[Any, ...], stored: tuple[Tensor, ...]) -> Tensor:
        mean, _, basis = self._constants(x_bar)
        moved = propagator * self._turn(x_bar - mean, basis)
        for weight, z in zip(weights, stored, strict=True):
            moved = moved + weight * z
        return mean + (moved if basis is None else (moved @ basis.T).reshape(x_bar.shape))


# -- interpolated quantities: ε − a(x̄ − μ) = g(σ) y -----------------------------------------------
_QUANTITIES = {
    "noise": lambda s: np.ones_like(s),  # y = ε less its linear part
    "data": lambda s: -1.0 / s,  # y = x̂₀ under DATA, x̂₀ − x̄ under NOISE
    "score": lambda s: s,  # y = ε/σ, minus the score
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


class _Step(NamedTuple):
    """One step, as numbers. `propagator` None: x̄ + weights[0] ε (eq. 13). `weights` None: stay."""

    sigma: float
    propagator: Any
    weights: tuple[Any, ...] | None


class _State(NamedTuple):
    plan: tuple[_Step | _Stages, ...]
    history: tuple[Tensor, ...]  # newest first


@dataclass(frozen=True, repr=False)
class Multistep(Solver):
    r"""A member of the multistep family: linear part × quantity × clock × order.

    Parameters
    ----------
    k : int
        Evaluations the polynomial goes through, 1–4: the order once started.
    clock : str or Clock
        The variable of the polynomial: ``"sigma"``, ``"t"``, ``"log"``, ``"arctan"``, …; see
        :func:`ddim_ode.solvers.base.clock`.
    linear : Linear
        The part solved exactly: :data:`NOISE` (none), :data:`DATA`, or a :class:`Gaussian`.
    quantity : {"noise", "data", "score"}
        What is interpolated: ε (less its linear part), x̂₀, or ε/σ. By default noise, and data under DATA.
    start : {"ramp", "rk"}
        How the first k − 1 steps are made. ``"ramp"``: with the evaluations there are, one call a step; the
        first step is Euler's, so the order is at most 2. ``"rk"``: by a Runge–Kutta method of order k − 1 in
        the clock σ, which keeps order k and costs k − 1 calls a step.
    label : str, optional
        The name, where it has one in the field.

    Notes
    -----
    The order is that of grids whose σ stay away from 0. A step that touches σ = 0 uses order 1 where its clock is
    infinite there (log σ), and eq. 13 where the integral would diverge; and in a clock that is not smooth there (t: ε
    starts like √t) the steps next to 0 are of lower order too: docs/solvers.md has the measured orders. ``score`` cannot
    leave σ = 0: ε/σ does not exist there, so an encoding run starts at the first σ above it, from the data as it is, and
    that step costs no call. Under :data:`DATA` the quantities ``noise`` and ``score`` are infinite at σ = 0, and grids
    that touch it are refused.
    """

    k: int = 1
    clock: str | Clock = "sigma"
    linear: Linear = NOISE
    quantity: str | None = None
    start: Literal["ramp", "rk"] = "ramp"
    label: str = ""
    source: str = "the multistep family, docs/solvers.md"

    def __post_init__(self) -> None:
        k = whole(self.k, "k, the order of a multistep member,")
        if k > 4:
            raise ValueError(f"k, the order of a multistep member, must be 1, 2, 3 or 4, but got {self.k!r}")
        object.__setattr__(self, "k", k)
        if not isinstance(self.linear, Linear):
            raise TypeError(f"linear must be NOISE, DATA, a Gaussian or a Linear of your own, but got {self.linear!r}")
        if self.start not in ("ramp", "rk"):
            raise ValueError(f'start must be "ramp" or "rk", but got {self.start!r}')
        if self.quantity is None:
            object.__setattr__(self, "quantity", "data" if self.linear is DATA else "noise")
        if self.quantity not in _QUANTITIES:
            raise ValueError(f"unknown quantity {self.quantity!r}: known are {', '.join(_QUANTITIES)}")

    @property
    def name(self) -> str:  # type: ignore[override]
        at = self.clock if isinstance(self.clock, str) else self.clock.name
        name = self.label or f"multistep{self.k}-{self.linear.name}-{self.quantity}-{at}"
        return name if self.start == "ramp" else f"{name}-rk"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.k if self.start == "rk" else min(self.k, 2)

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return 1

    @property
    def _starter(self) -> RungeKutta | None:
        """The Runge–Kutta method of order k − 1 that starts an ``rk`` run; Euler's needs no other code."""
        return {3: RungeKutta(MIDPOINT), 4: RungeKutta(KUTTA3)}.get(self.k) if self.start == "rk" else None

    def nfe(self, steps: int) -> int:
        starter = self._starter
        extra = 0 if starter is None else min(steps, self.k - 1) * (starter.nfe_per_step - 1)
        return steps + extra

    def with_start(self, start: Literal["ramp", "rk"]) -> Multistep:
        """The same member with another start."""
        return replace(self, start=start)

    def stages(self, grid: Grid) -> Array:
        return np.array(
            [s for step in self.plan(grid) for s in (step.sigmas if isinstance(step, _Stages) else (step.sigma,))]
        )

    def plan(self, grid: Grid) -> tuple[_Step | _Stages, ...]:
        """Propagators and weights of every step of `grid`, as float64 numbers."""
        return _plan(self, grid)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _State:
        self.linear.check(x_bar)
        plan = self.plan(grid)
        if self.linear.directed:
            place = partial(self.linear.place, like=x_bar)
            plan = tuple(
                step
                if isinstance(step, _Stages) or step.propagator is None or step.weights is None
                else _Step(step.sigma, place(step.propagator), tuple(map(place, step.weights)))
                for step in plan
            )
        return _State(plan, ())

    def step(self, field: Field, x_bar: Tensor, n: int, state: _State) -> tuple[Tensor, _State, Tensor | None]:
        plan, history = state
        step = plan[n]
        if isinstance(step, _Stages):
            moved, eps = run_stages(field, x_bar, step)
            z = self.linear.stored(x_bar, eps, step.sigmas[0])
            return moved, _State(plan, (z, *history)[: self.k - 1]), None
        sigma, propagator, weights = step
        if weights is None:
            return x_bar, state, None
        eps = field(x_bar, sigma)
        z = self.linear.stored(x_bar, eps, sigma)
        history = (z, *history)
        if propagator is None:
            moved = x_bar.add(eps, alpha=weights[0])
        else:
            moved = self.linear.advance(x_bar, propagator, weights, history[: len(weights)])
        return moved, _State(plan, history[: self.k - 1]), None


@lru_cache(maxsize=64)
def _plan(member: Multistep, grid: Grid) -> tuple[_Step | _Stages, ...]:
    sigmas = grid.sigmas
    if member.linear.singular and member.quantity != "data" and sigmas.min() == 0.0:
        raise ValueError(
            f"{member.name} cannot touch sigma = 0: the rest of eq. 14 without its {member.linear.name} part, as "
            f'{member.quantity!r}, is infinite there and no polynomial follows it; use quantity="data", or a grid that stays above 0'
        )
    u = clock(member.clock, grid.schedule)
    with np.errstate(divide="ignore"):
        ticks = np.asarray(u.u(sigmas), dtype=np.float64)
    moves = np.diff(ticks[np.isfinite(ticks)])
    if np.isnan(ticks).any() or not (np.all(moves > 0.0) or np.all(moves < 0.0)):
        raise ValueError(f"clock {u.name!r} is not strictly monotone over the grid {grid!r}")
    # All quadrature nodes at once: a clock may be costly to read (t inverts a spline).
    nodes = sigmas[:-1, None] * _REST + sigmas[1:, None] * _X
    with np.errstate(divide="ignore"):
        clocks = np.asarray(u.u(nodes), dtype=np.float64) if member.k > 1 else nodes
    starter = member._starter
    started = () if starter is None else starter.plan(grid)
    out: list[_Step | _Stages] = []
    for n in range(grid.steps):
        if n < min(member.k - 1, len(started)):
            out.append(started[n])
            continue
        past = [n - j for j in range(min(member.k, n + 1))]
        out.append(
            _weigh(member, sigmas[past], ticks[past], float(sigmas[n + 1]), float(ticks[n + 1]), nodes[n], clocks[n])
        )
    return tuple(out)


def _weigh(member: Multistep, sigmas: Array, ticks: Array, to: float, tick_to: float, s: Array, clocks: Array) -> _Step:
    """P and the weights on the stored z of the step from sigmas[0] to `to`.

    `sigmas` and `ticks` are the past nodes, newest first; `s` and `clocks` are the quadrature's.
    """
    linear, quantity = member.linear, str(member.quantity)
    sigma = float(sigmas[0])
    euler = _Step(sigma, None, (to - sigma,))
    if sigma == 0.0 and quantity == "score":
        return _Step(sigma, None, None)
    if sigma == 0.0 and (linear.singular or quantity == "data"):
        return euler
    # At σ = 0 the stored z says nothing of y where h/g is infinite.
    blind = quantity == "score" or (linear.singular and quantity == "noise")
    usable = np.isfinite(ticks) & ((sigmas > 0.0) | (not blind))
    # The polynomial runs through the unbroken newest stretch; an infinite clock at either end leaves one point.
    count = 1 if not (usable[0] and np.isfinite(tick_to)) else int(np.argmin(usable)) or usable.size
    if to == 0.0 and (linear.singular or quantity == "data"):
        if not (linear.singular and quantity == "data"):
            return euler
        # P → 0 and the kernel becomes a delta at σ = 0: x̄ is the polynomial's own value there.
        values = _lagrange(ticks[:count], np.array(tick_to)) if count > 1 else np.ones(1)
        return _Step(sigma, 0.0, tuple(map(float, values)))
    basis = _lagrange(ticks[:count], clocks) if count > 1 else np.ones((1, s.size))
    g = _QUANTITIES[quantity]
    kernel = linear.propagator(s, to)
    factor = (to - sigma) * _WEIGHTS * g(s) * basis
    integrals = np.tensordot(factor, kernel, axes=(1, 0))
    # y = h z / g at each past node. At σ = 0: x̂₀ is z itself under DATA, and vanishes from x̂₀ − x̄ under the others.
    at_zero = 0.0 if quantity == "data" and not linear.singular else 1.0
    turn = [linear.h(x) / float(g(np.array(x))) if x > 0.0 else at_zero for x in sigmas[:count].tolist()]
    weights = [integrals[j] * turn[j] for j in range(count)]
    propagator = linear.propagator(np.array(sigma), to)
    if linear.directed:
        return _Step(sigma, propagator, tuple(weights))
    return _Step(sigma, float(propagator), tuple(map(float, weights)))
