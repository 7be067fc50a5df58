r"""Methods that undo their own steps exactly, at the price of a second state.

Each carries a pair from step to step, and its step from one pair to the next can be solved for the first by hand, with the
same evaluations of ε: run over the same nodes the other way, from the pair, it returns to where it began up to rounding.
With the second state thrown away that is lost, and nothing is gained: a pair is two numbers a dimension, and a round trip
through both says nothing of whether the latent is right. docs/inversion.md has measurements.

In a clock u, with :math:`f = \sigma'(u)\,\epsilon` and h the step in u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import is_number
from ddim_ode.solvers.base import Clock, Field, Solver, check_named, check_one_step, clock, clock_over, named_in
from ddim_ode.solvers.multistep import NOISE, Flow, Linear

__all__ = ["AsynchronousLeapfrog", "McCallumFoster", "TwoStep"]

Array = NDArray[np.float64]


def _worst(factors: Array) -> float:
    """The largest product of neighbouring factors, 1 if all are below."""
    worst = running = 1.0
    for factor in factors.tolist():
        running = max(running, 1.0) * factor
        worst = max(worst, running)
    return worst


# -- two steps back -----------------------------------------------------------------------------
class _Relation(NamedTuple):
    """Three nodes: the next state is moved · x̄ + kept · (the one before) + weight · ε at `sigma`."""

    sigma: float
    moved: float
    kept: float
    weight: float


class _Pair(NamedTuple):
    plan: tuple[_Relation, ...]
    other: Tensor | None  # the state one node back
    known: bool = False  # whether it is that of the node ahead, left by a run the other way


@dataclass(frozen=True, repr=False)
class TwoStep(Solver):
    r"""Two-step methods whose only slope is in the middle: O-BELM [1]_ and BDIA [2]_.

    .. math:: \bar x_{n+1} = \bar x_n + h f_n + \kappa_n\, (\bar x_{n-1} - \bar x_n + h_{n-1} f_n)

    The second state is :math:`\bar x_{n-1}`, and the relation solved for it is the same relation, with
    :math:`1/\kappa_n`. A run with no second state begins with Euler's step.

    Parameters
    ----------
    gamma : float or None
        None: :math:`\kappa_n = (h_n/h_{n-1})^2`, O-BELM, of order 2 on any grid. Else BDIA's γ in (0, 1]:
        :math:`\kappa_n = \gamma s_{n-1}/s_{n+1}` when sampling, where :math:`s = 1/\sqrt{1 + \sigma^2}` takes x̄ to the
        variance-preserving x that BDIA is defined in, and :math:`s_{n-1}/(\gamma s_{n+1})` when encoding. The order is 1,
        but for γ = 1 and steps that change smoothly, or in a pattern that repeats, it is 2; γ → 0 is DDIM. With γ below 1
        encoding multiplies its own errors by 1/γ in each step.
    clock : str or Clock
        The variable it steps in; see :func:`ddim_ode.solvers.base.clock`. Three nodes of which it is infinite at one, or
        singular in the middle, are taken in σ.

    Notes
    -----
    A rounding error of the difference between the two states is multiplied by :math:`-\kappa_n` in each step:
    :meth:`growth` says what that comes to.

    References
    ----------
    .. [1] Wang et al., "BELM: bidirectional explicit linear multi-step sampler for exact inversion in diffusion models",
       NeurIPS 2024, arXiv:2410.07273.
    .. [2] Zhang, Lewis, Kleijn, "Exact diffusion inversion via bidirectional integration approximation", ECCV 2024,
       arXiv:2307.10829. γ as in the paper and the authors' code; their README has 1 − γ in its place.
    """

    gamma: float | None = None
    clock: str | Clock = "sigma"
    nfe_per_step = 1
    paired = True
    states = 2
    start = "Euler's step"

    def __post_init__(self) -> None:
        check_named(self.clock)
        if self.gamma is not None and not (is_number(self.gamma) and 0.0 < self.gamma <= 1.0):
            raise ValueError(
                f"gamma of BDIA must lie in (0, 1], or be None for O-BELM, but got {self.gamma!r}: 0 is DDIM, which is not exact"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        kind = "o-belm" if self.gamma is None else "bdia" + ("" if self.gamma == 1.0 else f"({self.gamma:g})")
        return named_in(kind, self.clock)

    @property
    def order(self) -> int:  # type: ignore[override]
        return 2 if self.gamma in (None, 1.0) else 1

    @property
    def source(self) -> str:  # type: ignore[override]
        return "O-BELM, Wang et al. 2024" if self.gamma is None else "BDIA, Zhang, Lewis & Kleijn 2024"

    def plan(self, grid: Grid) -> tuple[_Relation, ...]:
        """One relation a step; the first is Euler's."""
        return _plan_two_step(self, grid)

    def stages(self, grid: Grid) -> Array:
        return np.array([step.sigma for step in self.plan(grid)])

    def growth(self, grid: Grid) -> float:
        """The factor by which a difference of the two states may grow over `grid` where ε does not answer to it."""
        return _worst(np.array([step.kept for step in self.plan(grid)[1:]]))

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _Pair:
        return _Pair(self.plan(grid), None)

    def begin(self, field: Field, x_bar: Tensor, second: Tensor, grid: Grid) -> _Pair:
        return _Pair(self.plan(grid), second, known=True)

    def second(self, state: _Pair) -> Tensor | None:
        return state.other

    def step(self, field: Field, x_bar: Tensor, n: int, state: _Pair) -> tuple[Tensor, _Pair, Tensor | None]:
        if state.known:
            assert state.other is not None
            # Where the run before came from is where this one goes first.
            return state.other, _Pair(state.plan, x_bar), None
        at = state.plan[n]
        eps = field(x_bar, at.sigma)
        if state.other is None:
            return x_bar.add(eps, alpha=at.weight), _Pair(state.plan, x_bar), None
        moved = (at.moved * x_bar).add_(state.other, alpha=at.kept).add_(eps, alpha=at.weight)
        return moved, _Pair(state.plan, x_bar), None


@lru_cache(maxsize=64)
def _plan_two_step(method: TwoStep, grid: Grid) -> tuple[_Relation, ...]:
    s = grid.sigmas
    u = clock_over(method.clock, grid)
    with np.errstate(all="ignore"):
        ticks, slopes = np.asarray(u.u(s), dtype=np.float64), np.asarray(u.slope(s), dtype=np.float64)
    if ticks.shape != s.shape:
        raise ValueError(f"clock {u.name!r} must work on arrays")
    scale = 1.0 / np.sqrt(1.0 + s * s)
    out = [_Relation(float(s[0]), 1.0, 0.0, float(s[1] - s[0]))]
    for n in range(1, grid.steps):
        before, h, slope = ticks[n] - ticks[n - 1], ticks[n + 1] - ticks[n], slopes[n]
        if not (np.isfinite(before) and np.isfinite(h) and np.isfinite(slope) and slope > 0.0):
            before, h, slope = s[n] - s[n - 1], s[n + 1] - s[n], 1.0
        if method.gamma is None:
            kept = (h / before) ** 2
        else:
            kept = scale[n - 1] / scale[n + 1] * (1.0 / method.gamma if grid.encoding else method.gamma)
        out.append(_Relation(float(s[n]), float(1.0 - kept), float(kept), float((h + kept * before) * slope)))
    return tuple(out)


# -- any one-step method, coupled with itself -----------------------------------------------------
class _Coupled(NamedTuple):
    up: tuple[Any, ...]  # the base method's own plans, from each lower node to the next
    down: tuple[Any, ...]
    other: Tensor
    encoding: bool


@dataclass(frozen=True, repr=False)
class McCallumFoster(Solver):
    r"""Any one-step method made reversible by a second copy of the state [1]_.

    With :math:`\Psi_h(x)` what the base method adds to x in a step from σ to σ', and :math:`\Psi_{-h}` the same from σ' to σ,
    encoding goes by

    .. math:: y' = \zeta y + (1 - \zeta) z + \Psi_h(z), \qquad z' = z - \Psi_{-h}(y')

    and sampling by the same two, solved for y and z. Both states begin as the given one; y is the state that a run returns and z
    the second. It has the base method's order, at twice its calls.

    Parameters
    ----------
    base : Solver
        A method that keeps nothing from step to step: Runge–Kutta, single-step, or ``ddim``.
    zeta : float
        ζ in (0, 1), the coupling: on small steps the difference of the two states is damped by it in each step of encoding,
        and grows by 1/ζ in each of sampling; on large ones it grows by much more.

    References
    ----------
    .. [1] McCallum, Foster, "Efficient, accurate and stable gradients for neural ODEs", 2024, arXiv:2410.11648.
    """

    base: Solver
    zeta: float = 0.999
    paired = True
    states = 2
    start = "both states alike"

    def __post_init__(self) -> None:
        check_one_step(self.base)
        if not (is_number(self.zeta) and 0.0 < self.zeta < 1.0):
            raise ValueError(f"zeta must lie between 0 and 1, such as 0.999, but got {self.zeta!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"mf-{self.base.name}" + ("" if self.zeta == 0.999 else f"({self.zeta:g})")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.base.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return 2 * self.base.nfe_per_step

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"McCallum & Foster 2024, over {self.base.name}"

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return self.base.differentiable

    def _grids(self, grid: Grid) -> tuple[tuple[Grid, ...], tuple[Grid, ...]]:
        """Each step as a grid of its own, upwards and downwards, in the order of the run."""
        nodes = zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True)
        up = tuple(Grid(np.array(sorted(ends)), grid.schedule) for ends in nodes)
        return up, tuple(step.reversed() for step in up)

    def stages(self, grid: Grid) -> Array:
        pairs = zip(*self._grids(grid), strict=True)
        # In the order of the run.
        return np.concatenate([self.base.stages(g) for pair in pairs for g in (pair if grid.encoding else pair[::-1])])

    def calls(self, grid: Grid) -> int:
        up, down = self._grids(grid)
        return sum(self.base.calls(step) for step in (*up, *down))

    def nfe(self, steps: int) -> int:
        return 2 * self.base.nfe(steps)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _Coupled:
        return self.begin(field, x_bar, x_bar, grid)

    def begin(self, field: Field, x_bar: Tensor, second: Tensor, grid: Grid) -> _Coupled:
        up, down = self._grids(grid)
        up_plans, down_plans = (tuple(self.base.init(field, x_bar, step) for step in way) for way in (up, down))
        return _Coupled(up_plans, down_plans, second, grid.encoding)

    def second(self, state: _Coupled) -> Tensor:
        return state.other

    def step(self, field: Field, x_bar: Tensor, n: int, state: _Coupled) -> tuple[Tensor, _Coupled, Tensor | None]:
        y, z, zeta = x_bar, state.other, self.zeta
        if state.encoding:
            # y' = ζ(y − z) + Φ(z), for z + Ψ(z) is the base method's own step.
            y = (y - z).mul_(zeta).add_(self._move(field, z, state.up[n]))
            z = z + (y - self._move(field, y, state.down[n]))
        else:
            z = z + (self._move(field, y, state.down[n]) - y)
            y = z + (y - self._move(field, z, state.up[n])).mul_(1.0 / zeta)
        return y, state._replace(other=z), None

    def _move(self, field: Field, x_bar: Tensor, plan: Any) -> Tensor:
        return self.base.step(field, x_bar, 0, plan)[0]


# -- the slope as the second state ----------------------------------------------------------------
class _Half(NamedTuple):
    """A step in numbers: what half of it in the clock is worth in y by the slope at its beginning, middle and end."""

    sigma: float
    scale: float  # y, as a multiple of x̄
    rate: float  # v, as a multiple of the slope in terms of ε
    half: float  # h/2
    middle: float  # x̄ in the middle, as a multiple of y
    twice: float  # 2 dy/du in the middle, as a multiple of the slope there
    end: float  # the new x̄, as a multiple of y
    kept: float  # and the new slope, of v
    fine: float  # y and v are kept to whole multiples of 1/fine


class _Slope(NamedTuple):
    plan: tuple[_Half, ...]
    slope: Tensor


@dataclass(frozen=True, repr=False)
class AsynchronousLeapfrog(Solver):
    r"""The asynchronous leapfrog of Mutze [1]_, which MALI runs backwards [2]_: the slope is the second state.

    With y what the linear part leaves to be solved (x̄ itself under NOISE, :math:`\bar x/(c + \sigma)` under a Flow) and
    v its slope dy/du,

    .. math:: v' = 2 \frac{dy}{du}\Big(y + \tfrac h2 v,\ u + \tfrac h2\Big) - v, \qquad y' = y + \tfrac h2 (v + v').

    The second state is the slope in terms of ε: ε itself under NOISE, the velocity :math:`(c + \sigma)\epsilon - \bar x` under
    a Flow; it does not depend on the clock. A run without one begins with the slope where it is, for one more call.

    Parameters
    ----------
    clock : str or Clock
        The variable it steps in; a step at one of whose ends it is infinite, or its slope is 0 or infinite, is taken in σ.
    linear : Linear
        :data:`NOISE` or a :class:`Flow`. With a Flow and the clock ``flow`` of the same c it is the method applied to
        rectified flow.
    label : str, optional
        The name, where it has one.

    Notes
    -----
    In a float64 state y and v are kept to multiples of a power of 2, about 1e-12 where x̄ is of σ_T's size and 1e-14 under a
    Flow. Sums of such numbers are exact, while v is not much larger than y: then a step back asks the network for the very
    bits that the step there did, and undoes it to the bit, whatever the network's precision. A network that answers other
    bits in a batch of another size undoes it to its own rounding.

    Of order 2 where steps change smoothly, or in a pattern that repeats; the error of the slope alternates and is not damped.
    Under NOISE, clocks in which v grows from step to step (arctan σ, t: dσ/du rises like σ²) make it useless on few steps.

    References
    ----------
    .. [1] Mutze, "An asynchronous leapfrog method II", 2013, arXiv:1311.6602.
    .. [2] Zhuang et al., "MALI: a memory efficient and reverse accurate integrator for neural ODEs", ICLR 2021,
       arXiv:2102.04668.
    """

    clock: str | Clock = "sigma"
    linear: Linear = NOISE
    label: str = ""
    source: str = "Mutze 2013; MALI, Zhuang et al. 2021"
    order = 2
    nfe_per_step = 1
    paired = True
    states = 2
    start = "the slope there"

    def __post_init__(self) -> None:
        check_named(self.clock)
        if self.linear is not NOISE and not isinstance(self.linear, Flow):
            raise ValueError(f"linear must be NOISE or a Flow, but got {self.linear!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label or named_in("alf" if self.linear is NOISE else f"alf-{self.linear.name}", self.clock)

    @property
    def exact(self) -> str:  # type: ignore[override]
        return self.linear.exact

    def nfe(self, steps: int) -> int:
        return steps + 1

    def calls(self, grid: Grid) -> int:
        return self.nfe(grid.steps)

    def plan(self, grid: Grid) -> tuple[_Half, ...]:
        """The numbers of every step."""
        return _plan_halves(self, grid)

    def stages(self, grid: Grid) -> Array:
        return np.array([float(grid.sigmas[0]), *(step.sigma for step in self.plan(grid))])

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _Slope:
        sigma = float(grid.sigmas[0])
        return _Slope(self.plan(grid), self.linear.stored(x_bar, field(x_bar, sigma), sigma))

    def begin(self, field: Field, x_bar: Tensor, second: Tensor, grid: Grid) -> _Slope:
        return _Slope(self.plan(grid), second)

    def second(self, state: _Slope) -> Tensor:
        return state.slope

    def step(self, field: Field, x_bar: Tensor, n: int, state: _Slope) -> tuple[Tensor, _Slope, Tensor | None]:
        at = state.plan[n]
        v = _rounded(state.slope * at.rate, at.fine)
        y = _rounded(x_bar * at.scale, at.fine) + _rounded(v * at.half, at.fine)
        middle = y * at.middle
        z = self.linear.stored(middle, field(middle, at.sigma), at.sigma)
        v = _rounded(z * at.twice, at.fine) - v
        y = y + _rounded(v * at.half, at.fine)
        return y * at.end, _Slope(state.plan, v * at.kept), None


def _rounded(x: Tensor, fine: float) -> Tensor:
    """The nearest multiples of 1/`fine`, a power of 2, in float64 states; gradients pass.

    Sums of such numbers are exact, so that a step is undone to the bit, and the network is asked about the same bits. Without,
    rounding may move a state across a border of the network's float32, 1e-16 become 1e-8, and the steps after it make more of it.
    """
    if x.dtype != torch.float64:
        return x  # float32 has no digits to spare for it
    still = x.detach()
    return x + (still.mul(fine).round_().div_(fine) - still)


@lru_cache(maxsize=64)
def _plan_halves(method: AsynchronousLeapfrog, grid: Grid) -> tuple[_Half, ...]:
    u, plain = clock_over(method.clock, grid), clock("sigma", grid.schedule)
    # Eight deviations of y anywhere in the run, with two bits to spare for what is multiplied back and forth between the steps.
    largest = max(8.0 * method.linear.h(s) * math.hypot(1.0, s) for s in grid.sigmas.tolist())
    fine = 2.0 ** (51 - math.ceil(math.log2(largest)))
    return tuple(
        _half(method.linear, u, a, b, fine) or _half(method.linear, plain, a, b, fine)  # type: ignore[misc]
        for a, b in zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True)
    )


def _half(linear: Linear, u: Clock, sigma: float, sigma_next: float, fine: float) -> _Half | None:
    # The middle is worked out from the lower end, so that both directions ask at the same level to the bit.
    low, high = min(sigma, sigma_next), max(sigma, sigma_next)
    with np.errstate(all="ignore"):
        start, end = float(u.u(low)), float(u.u(high))
        middle = float(u.sigma(start + 0.5 * (end - start)))
        # y = x̄ h under NOISE and Flow alike, h = 1 and 1/(c + σ), and dy/dσ = h² z.
        h = [linear.h(s) for s in (sigma, middle, sigma_next)]
        slopes = [float(u.slope(np.float64(s))) * f * f for s, f in zip((sigma, middle, sigma_next), h, strict=True)]
    if not all(0.0 < s < math.inf for s in slopes) or not math.isfinite(end - start):
        return None
    half = math.copysign(0.5 * (end - start), sigma_next - sigma)
    return _Half(middle, h[0], slopes[0], half, 1.0 / h[1], 2.0 * slopes[1], 1.0 / h[2], 1.0 / slopes[2], fine)
