r"""Methods whose step is an equation: the implicit midpoint rule, and the inverse of an explicit step.

The equation y = G(y) is solved by Anderson's acceleration of the fixed-point iteration [1]_, each sample by itself: the next
iterate is the combination of the last few G(y) that would have the least residual if G were affine. It needs calls of the field
and nothing else. A sample is done when its residual, G(y) − y as a root mean square in the units of data, is at most the
tolerance; one that does not get there goes on from the best iterate, and its status says so.

References
----------
.. [1] Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49, 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import is_number, whole
from ddim_ode.solution import Outcome, Status
from ddim_ode.solvers.base import Clock, Field, Solver, check_named, check_one_step, clock, clock_over, named_in

__all__ = ["ImplicitMidpoint", "Inverse"]

Array = NDArray[Any]

#: A sample is given up after so many iterations that have not lessened its residual.
_PATIENCE = 20
#: How many tolerances an encoding's residuals may grow to along the decoder's steps before its status says so.
_RETURN = 10.0


# -- the iteration ------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Solved:
    """What became of an equation, a sample each."""

    y: Tensor
    residual: Array  # of y; NaN where no iterate was finite
    contraction: Array  # the largest ratio |G(y) − G(y')| / |y − y'| that was seen; NaN with fewer than two iterates
    calls: Array  # evaluations of G until the sample was done


def _anderson(
    g: Callable[[Tensor], Tensor], start: Tensor, tol: float, iterations: int, memory: int, alive: Array
) -> _Solved:
    """Solve y = g(y) from `start`; tol is of the residual's root mean square."""
    count = start.shape[0]
    best, least, since = start, np.full(count, np.nan), np.zeros(count, dtype=np.int64)
    contraction, calls = np.full(count, np.nan), np.zeros(count, dtype=np.int64)
    active = alive.copy()
    y, shape = start, (-1, *(1,) * (start.ndim - 1))
    steps: list[Tensor] = []  # differences of successive iterates, (B, D)
    falls: list[Tensor] = []  # and of their residuals
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(iterations):
        value = g(y)
        flat, residual = y.flatten(1), (value - y).flatten(1)
        calls[active] += 1
        if last is not None:
            steps.append(flat - last[0])
            falls.append(residual - last[1])
            steps, falls = steps[-memory:], falls[-memory:]
        # One wait for the device an iteration: the residual, and how far apart the last two values lay for their iterates.
        size = residual.square().mean(dim=1).sqrt()
        ratio = torch.full_like(size, math.nan)
        if last is not None:
            ratio = (steps[-1] + falls[-1]).norm(dim=1) / steps[-1].norm(dim=1)
        found, seen = torch.stack((size, ratio)).double().cpu().numpy()
        better = active & np.isfinite(found) & ~(found >= least)
        least, since = np.where(better, found, least), np.where(better, 0, since + 1)
        # A ratio of differences that are themselves rounding says nothing.
        telling = active & np.isfinite(seen) & (found > 10.0 * tol)
        contraction = np.where(telling, np.fmax(contraction, seen), contraction)
        keep = torch.from_numpy(better).to(start.device).reshape(shape)
        best = torch.where(keep, y, best)
        active &= np.isfinite(found) & (found > tol) & (since < _PATIENCE)
        if not active.any():
            break
        last = (flat, residual)
        move = residual
        if falls:
            move = residual - _mix(steps, falls, residual)
        go = torch.from_numpy(active).to(start.device).reshape(shape)
        # Samples that are done stand still: what they hold must not hang on their neighbours.
        y = torch.where(go, y + move.reshape(y.shape), best)
    return _Solved(best, least, contraction, calls)


def _mix(steps: list[Tensor], falls: list[Tensor], residual: Tensor) -> Tensor:
    """What Anderson's combination takes off the plain step, (B, D)."""
    moves, changes = torch.stack(steps, dim=2), torch.stack(falls, dim=2)  # (B, D, m)
    size = changes.norm(dim=1, keepdim=True).clamp(min=torch.finfo(changes.dtype).tiny)
    changes, moves = changes / size, moves / size
    # Normal equations of columns of unit length, held off singular: the residual they leave is worked down by the iteration.
    gram = changes.mT @ changes
    least = max(1e-12, 10.0 * torch.finfo(gram.dtype).eps)
    gram = gram + least * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gram = torch.nan_to_num(gram)  # a sample that is not finite has been left, and must not stop the others
    weights = torch.linalg.solve_ex(gram, torch.nan_to_num(changes.mT @ residual.unsqueeze(2))).result
    return ((moves + changes) @ weights).squeeze(2)


# -- what both share ----------------------------------------------------------------------------
@dataclass(frozen=True)
class _State:
    plan: Any
    sigma: Array  # where each sample is
    status: Array
    nfe: Array
    steps: Array
    residual: Array
    contraction: Array


@dataclass(frozen=True, repr=False, kw_only=True)
class _Implicit(Solver):
    """A solver that iterates; what its subclasses share."""

    tol: float = 1e-7
    max_iterations: int = 200
    memory: int = 5

    iterative = True
    differentiable = False

    def __post_init__(self) -> None:
        if not (is_number(self.tol) and 0.0 < self.tol < math.inf):
            raise ValueError(f"tol must be a positive number, in the units of data, but got {self.tol!r}")
        object.__setattr__(self, "max_iterations", whole(self.max_iterations, "max_iterations", 2))
        object.__setattr__(self, "memory", whole(self.memory, "memory"))

    def _empty(self, plan: Any, x_bar: Tensor, grid: Grid) -> _State:
        count = x_bar.shape[0]
        zeros = lambda: np.zeros(count, dtype=np.int64)
        return _State(
            plan, np.full(count, float(grid.sigmas[0])), zeros(), zeros(), zeros(), np.zeros(count), np.zeros(count)
        )

    def _solve(
        self,
        g: Callable[[Tensor], Tensor],
        x_bar: Tensor,
        start: Tensor,
        ends: tuple[float, float],
        state: _State,
        cost: int,
    ) -> tuple[Tensor, _State]:
        """One step between `ends`: the equation solved, and every sample's account."""
        alive = state.status != Status.NONFINITE
        # In the units of data where they are the finer.
        unit = math.sqrt(1.0 + min(ends) ** 2)
        solved = _anderson(g, start, self.tol * unit, self.max_iterations, self.memory, alive)
        lost = alive & ~np.isfinite(solved.residual)
        residual = np.where(alive & ~lost, solved.residual / unit, 0.0)
        status = np.where((residual > self.tol) & (state.status == 0), Status.UNCONVERGED, state.status)
        status = np.where(lost, Status.NONFINITE, status)
        there = status != Status.NONFINITE
        keep = torch.from_numpy(there).to(x_bar.device).reshape(-1, *(1,) * (x_bar.ndim - 1))
        moved = torch.where(keep, solved.y, x_bar)
        return moved, replace(
            state,
            sigma=np.where(there, ends[1], state.sigma),
            status=status,
            nfe=state.nfe + cost * solved.calls,
            steps=state.steps + there,
            residual=np.fmax(state.residual, residual),
            contraction=np.fmax(state.contraction, np.where(alive, solved.contraction, 0.0)),
        )

    def _account(self, state: _State) -> Outcome:
        numbers = lambda values: tuple(values.tolist())
        return Outcome(
            tuple(Status(s) for s in state.status.tolist()),
            numbers(state.sigma),
            numbers(state.nfe),
            numbers(state.steps),
            (0,) * len(state.steps),
            numbers(state.residual),
            numbers(state.contraction),
        )


# -- the implicit midpoint rule -------------------------------------------------------------------
class _Middle(NamedTuple):
    sigma: float
    weight: float  # h dσ/du


@dataclass(frozen=True, repr=False)
class ImplicitMidpoint(_Implicit):
    r"""The implicit midpoint rule: symmetric, so that its own step back undoes it, with one state.

    .. math:: \bar x' = \bar x + h f\big(\tfrac12 (\bar x + \bar x'),\ u + \tfrac h2\big)

    Parameters
    ----------
    tol : float
        What a step's residual may be, as a root mean square in the units of data. A network in float32 repeats itself to about
        1e-7 of its output, and no tolerance below that is met.
    max_iterations : int
        Evaluations of the equation that a step may take, at least 2.
    memory : int
        Earlier iterates that Anderson's acceleration combines.
    clock : str or Clock
        The variable it steps in; a step where it is singular is taken in σ.

    Notes
    -----
    It takes no budget of calls: say ``steps``. Each iteration waits for the device once. Steps too large for the data's
    structure have several solutions, or the iteration finds none: ``Solution.outcome`` tells the residual and the contraction
    that was seen, sample by sample.
    """

    clock: str | Clock = "sigma"
    order = 2
    nfe_per_step = 5  # a typical number: see Outcome.nfe
    source = "implicit midpoint rule, Hairer, Lubich & Wanner 2006; Anderson acceleration, Walker & Ni 2011"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_named(self.clock)

    @property
    def name(self) -> str:  # type: ignore[override]
        return named_in("implicit-midpoint", self.clock)

    def plan(self, grid: Grid) -> tuple[_Middle, ...]:
        """The middle of every step, and what ε is worth there."""
        return _plan_middles(self, grid)

    def stages(self, grid: Grid) -> Array:
        return np.array([step.sigma for step in self.plan(grid)])

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[_State, tuple[float, ...]]:
        return self._empty(self.plan(grid), x_bar, grid), tuple(grid.sigmas.tolist())

    def outcome(self, state: Any) -> Outcome:
        return self._account(state[0])

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        own, nodes = state
        at = own.plan[n]
        g = lambda y: x_bar.add(field((x_bar + y).mul_(0.5), at.sigma), alpha=at.weight)
        moved, own = self._solve(g, x_bar, x_bar, (nodes[n], nodes[n + 1]), own, 1)
        return moved, (own, nodes), None


@lru_cache(maxsize=64)
def _plan_middles(method: ImplicitMidpoint, grid: Grid) -> tuple[_Middle, ...]:
    u, plain = clock_over(method.clock, grid), clock("sigma", grid.schedule)
    ends = zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True)
    return tuple(_middle(u, *step) or _middle(plain, *step) for step in ends)  # type: ignore[misc]


def _middle(u: Clock, sigma: float, sigma_next: float) -> _Middle | None:
    # From the lower end, so that both directions ask at the same level to the bit.
    low, high = min(sigma, sigma_next), max(sigma, sigma_next)
    with np.errstate(all="ignore"):
        start, h = float(u.u(low)), float(u.u(high)) - float(u.u(low))
        middle = float(u.sigma(start + 0.5 * h))
        weight = math.copysign(h, sigma_next - sigma) * float(u.slope(np.float64(middle)))
    return _Middle(middle, weight) if math.isfinite(weight) and math.isfinite(middle) else None


# -- the inverse of an explicit step ----------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class Inverse(_Implicit):
    r"""Encoding as the exact inverse of an explicit method's sampling: a standard decoder then returns the image.

    With Φ the step of `base` from the upper level to the lower, encoding solves :math:`\Phi(\bar x') = \bar x` for x̄' by
    iterating :math:`\bar x' \leftarrow \bar x' + \bar x - \Phi(\bar x')`. Sampling is the base method itself:
    :func:`ddim_ode.sample` runs that.

    Parameters
    ----------
    base : Solver
        A method that keeps nothing from step to step: ``ddim``, Runge–Kutta, single-step.
    tol, max_iterations, memory
        As for :class:`ImplicitMidpoint`. Here the residual is what the decoder's step misses the state before by.

    Notes
    -----
    What steps leave below `tol` may add up, and a decoder may multiply it. So the last step of an encoding is followed by a
    decoding, counted among its calls: an image that does not come back within ten times `tol` has the status
    ``UNCONVERGED``, and its residual is what it comes back with if that is more than its steps' residuals.

    The step of ``ddim`` is :math:`\frac{\sigma'}{\sigma} \bar x + (1 - \frac{\sigma'}{\sigma}) E[x_0 | \bar x]`. For an exact
    ε both parts are gradients of convex functions, so that no two states are sent to one, whatever the contraction; those of
    a network or of other methods may have several solutions. There may be none, for an image that no latent leads to, and
    where the data's spread is far below σ the equation is nearly singular. ``Solution.outcome`` tells the residual and the
    contraction, sample by sample.
    """

    base: Solver

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_step(self.base)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"inverse-{self.base.name}"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.base.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return 5 * self.base.nfe_per_step  # a typical number: see Outcome.nfe

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"fixed point of {self.base.name}'s decoding step; Anderson acceleration, Walker & Ni 2011"

    def _steps(self, grid: Grid) -> tuple[Grid, ...]:
        """Each step of an encoding run, turned round."""
        nodes = zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True)
        return tuple(Grid(np.array([high, low]), grid.schedule) for low, high in nodes)

    def stages(self, grid: Grid) -> Array:
        if not grid.encoding:
            return self.base.stages(grid)
        return np.concatenate([self.base.stages(step) for step in self._steps(grid)])

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> Any:
        if not grid.encoding:
            return self.base.init(field, x_bar, grid), None, None
        # A step down to σ = 0 may cost less than others.
        plans = tuple((self.base.init(field, x_bar, step), self.base.calls(step)) for step in self._steps(grid))
        return self._empty(plans, x_bar, grid), tuple(grid.sigmas.tolist()), x_bar

    def outcome(self, state: Any) -> Outcome | None:
        return None if state[1] is None else self._account(state[0])

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        own, nodes, start = state
        if nodes is None:
            moved, own, error = self.base.step(field, x_bar, n, own)
            return moved, (own, None, None), error
        plan, cost = own.plan[n]
        g = lambda y: y + (x_bar - self.base.step(field, y, 0, plan)[0])
        moved, own = self._solve(g, x_bar, x_bar, (nodes[n], nodes[n + 1]), own, cost)
        if n + 1 == len(own.plan):
            own = self._returned(field, moved, start, nodes[0], own)
        return moved, (own, nodes, start), None

    def _returned(self, field: Field, latent: Tensor, start: Tensor, sigma: float, state: _State) -> _State:
        """The account after a decoding, which must lead back to where the encoding began."""
        back = latent
        for plan, _ in reversed(state.plan):
            back = self.base.step(field, back, 0, plan)[0]
        missed = (back - start).flatten(1).square().mean(dim=1).sqrt().double().cpu().numpy() / math.sqrt(
            1.0 + sigma**2
        )
        there = state.status != Status.NONFINITE
        astray = ~(missed <= _RETURN * self.tol) & (state.status == 0)
        return replace(
            state,
            status=np.where(astray, Status.UNCONVERGED, state.status),
            nfe=state.nfe + there * sum(cost for _, cost in state.plan),
            residual=np.where(there, np.fmax(state.residual, missed), state.residual),
        )
