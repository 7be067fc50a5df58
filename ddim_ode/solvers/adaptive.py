r"""Runge–Kutta pairs that choose their steps, sample by sample.

A pair has two solutions of different orders in the same stages, and their difference estimates what a step has done
wrong. In a clock u, with :math:`k_i` the slopes and :math:`e = b - \hat b` the tableau's row of error,

.. math:: \delta = h \sum_i e_i\, \sigma'(u_i)\, k_i, \qquad
          r = \Big\| \frac{\delta / \sqrt{1 + \sigma'^2}}{\mathrm{atol} + \mathrm{rtol} \cdot \max(|x|, |x'|)} \Big\|_\mathrm{RMS},

x = x̄/√(1 + σ²) being the state in the units of data. A step with r ≤ 1 is accepted, and its last slope is the first of the
next one. The next step is h times

.. math:: 0.9\; r_n^{-(k_P + k_I + k_D)/q}\; r_{n-1}^{(k_P + 2 k_D)/q}\; r_{n-2}^{-k_D/q},

q being the order at which r falls with h; after a rejected attempt it is 0.9 r^{−1/q}. Each sample of a batch has its own σ,
its own step and its own history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import is_number, whole
from ddim_ode.solution import Outcome, Status
from ddim_ode.solvers.base import Clock, Field, Solver, asinh, check_clock, check_named, clock
from ddim_ode.solvers.runge_kutta import DOPRI5, Tableau

__all__ = ["Adaptive", "check_tolerances"]

Array = NDArray[Any]

#: The clock that needed the fewest calls: benchmarks/adaptive.py.
CLOCK = asinh(0.1)
#: A step is aimed at this fraction of the one that would just be accepted, and changes by no more than these factors.
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
#: What a step into NaN or infinity is cut by, and how many such cuts a sample is given.
_CUT, _CUTS = 0.1, 30
#: Errors far below the tolerance say nothing of the next step's: how small one may look in the history.
_LEAST = 1e-4


def check_tolerances(rtol: float, atol: float, dtype: torch.dtype = torch.float64) -> None:
    """Refuse tolerances that no step in `dtype` could meet.

    Raises
    ------
    ValueError
        If one of them is not a number above the dtype's precision.
    """
    eps = torch.finfo(dtype).eps
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (is_number(value) and eps <= value < math.inf):
            raise ValueError(
                f"{name} must be a number of at least {eps:.2g}, what a {dtype} state resolves, but got {value!r}"
            )


@dataclass(frozen=True)
class _Run:
    """A run at one moment: one entry a sample in every array, all on the host but the slopes."""

    clock: Clock
    nodes: Array
    slope: Tensor  # ε where each sample is, (B, *d)
    sigma: Array
    h: Array  # the next step, in the clock, positive
    ratios: Array  # r of the last two accepted steps, (2, B)
    held: Array  # whether the last attempt was rejected: 1, or 2 if it was not finite
    cuts: Array  # attempts that were not finite, since the sample last got past where one led
    met: Array  # σ that the last such attempt led to, or NaN
    status: Array
    accepted: Array
    rejected: Array
    nfe: Array

    def copy(self) -> _Run:
        own = ("sigma", "h", "ratios", "held", "cuts", "met", "status", "accepted", "rejected", "nfe")
        return replace(self, **{name: getattr(self, name).copy() for name in own})


@dataclass(frozen=True, repr=False)
class Adaptive(Solver):
    r"""An embedded Runge–Kutta pair that chooses its steps by its own estimate of the error, each sample for itself.

    It steps from node to node of the grid in as many steps as it needs, and lands on each node exactly; with no grid
    given, ``sample`` and ``encode`` hand it the two ends. Samples that are done leave the batch, and a sample that fails
    keeps its last good state and a status: ``MAX_STEPS``, ``STALLED`` or ``NONFINITE``. Neither slows or stops the others.

    Parameters
    ----------
    tableau : Tableau
        With an ``error`` part: ``BS32``, ``DOPRI5``, ``DOP853`` of :mod:`ddim_ode.solvers.runge_kutta`, or your own.
    rtol, atol : float
        Tolerances of a step's error in x = x̄/√(1 + σ²), the units of data, as a root mean square over a sample's dimensions.
    clock : str or Clock
        The variable it steps in. It must be finite, with a finite slope, wherever the run goes: log σ and t are not at σ = 0.
    max_steps : int
        Attempts, accepted or not, that a sample may make over a run.
    first_step : float, optional
        The length of the first attempt, in σ; by default Hairer's choice [1]_, for one more call.
    pid : (float, float, float)
        k_P, k_I, k_D of the controller [2]_. (0, 1, 0) looks at the last error alone.

    Notes
    -----
    ``Solution.nfe`` is the number of batched calls, ``Solution.outcome`` holds each sample's own, and its steps. Step control
    runs on the host: each attempt waits for the device once.

    References
    ----------
    .. [1] Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, II.4.
    .. [2] Söderlind, "Automatic control and adaptive time-stepping", Numerical Algorithms 31, 2002.
    """

    tableau: Tableau = DOPRI5
    rtol: float = 1e-5
    atol: float = 1e-5
    clock: str | Clock = CLOCK
    max_steps: int = 10_000
    first_step: float | None = None
    pid: tuple[float, float, float] = (0.2, 0.7, 0.0)

    adaptive = True
    start = "chooses its first step"

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, Tableau) or not self.tableau.error:
            raise ValueError(
                f"tableau must have an embedded solution, its field `error`, but {self.tableau!r} has none"
            )
        check_tolerances(self.rtol, self.atol)
        check_named(self.clock)
        object.__setattr__(self, "max_steps", whole(self.max_steps, "max_steps"))
        first = self.first_step
        if first is not None and not (is_number(first) and 0.0 < first < math.inf):
            raise ValueError(f"first_step must be a positive length in sigma, but got {self.first_step!r}")
        pid = tuple(self.pid) if isinstance(self.pid, Iterable) else ()
        if len(pid) != 3 or not all(is_number(k) and math.isfinite(k) for k in pid) or not sum(pid) > 0.0:
            raise ValueError(f"pid must be three numbers (k_P, k_I, k_D) of positive sum, but got {self.pid!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        at = self.clock if isinstance(self.clock, str) else self.clock.name
        return self.tableau.name if at == CLOCK.name else f"{self.tableau.name}-{at}"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.tableau.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return len(self.tableau.b)

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.tableau.source

    @property
    def states(self) -> int:  # type: ignore[override]
        return len(self.tableau.b) + 2

    @property
    def _falls(self) -> int:
        """The order at which r falls with the step; two estimates are combined as r₁²/√(r₁² + r₂²/100)."""
        first, *second = (order + 1 for order in self.tableau.embedded_orders)
        return 2 * first - second[0] if second else first

    def stages(self, grid: Grid) -> Array:
        return np.empty(0)

    def outcome(self, state: _Run) -> Outcome:
        return Outcome(
            tuple(map(Status, state.status.tolist())),
            tuple(state.sigma.tolist()),
            tuple(state.nfe.tolist()),
            tuple(state.accepted.tolist()),
            tuple(state.rejected.tolist()),
        )

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _Run:
        check_tolerances(self.rtol, self.atol, x_bar.dtype)
        u = _usable(clock(self.clock, grid.schedule), grid)
        count, sigma = x_bar.shape[0], np.full(x_bar.shape[0], grid.sigmas[0])
        rows = torch.arange(count, device=x_bar.device)
        slope = field(x_bar, torch.from_numpy(sigma), rows)
        visit = getattr(field, "visit", None)
        if visit is not None:
            visit(rows, torch.from_numpy(sigma), x_bar, slope)
        none = np.zeros(count, dtype=np.int64)
        run = _Run(
            u, grid.sigmas, slope, sigma, np.zeros(count), np.ones((2, count)), none, none, np.full(count, np.nan), none,
            none, none, none + 1,
        ).copy()  # fmt: skip
        start, end = float(u.u(grid.sigmas[0])), float(u.u(grid.sigmas[-1]))
        with torch.no_grad():
            if self.first_step is None:
                run.h[:] = self._first(field, x_bar, slope, run, start, end, rows)
                run.nfe[:] += 1
            else:
                ahead = np.clip(grid.sigmas[0] + math.copysign(self.first_step, end - start), *_ends(grid.sigmas))
                run.h[:] = abs(float(u.u(ahead)) - start)
            finite = slope.isfinite().flatten(1).all(dim=1).cpu().numpy()
        run.status[~finite] = Status.NONFINITE
        return run

    def _first(
        self, field: Field, x_bar: Tensor, slope: Tensor, run: _Run, start: float, end: float, rows: Tensor
    ) -> Array:
        """Hairer's first step: a hundredth of what would change x by itself, then by the change of slope over that."""
        u, span = run.clock, abs(end - start)
        sigma = float(run.sigma[0])
        root = math.sqrt(1.0 + sigma * sigma)
        worth = float(u.slope(sigma)) / root
        scale = self.atol + self.rtol * x_bar.abs() / root
        sizes = torch.stack([_rms(x_bar / root / scale), _rms(worth * slope / scale)]).double().cpu().numpy()
        with np.errstate(all="ignore"):
            h0 = np.where((sizes > 1e-5).all(axis=0), 0.01 * sizes[0] / sizes[1], 1e-6 * span)
        h0 = np.clip(np.nan_to_num(h0, nan=1e-6 * span), 1e-6 * span, 1e-2 * span)
        ahead = np.clip(u.sigma(start + math.copysign(1.0, end - start) * h0), *_ends(run.nodes))
        moved = x_bar + _columns((ahead - sigma)[None], x_bar)[0] * slope
        there = field(moved, torch.from_numpy(ahead), rows)
        change = _columns((np.asarray(u.slope(ahead)) / root)[None], x_bar)[0] * there - worth * slope
        bend = _rms(change / scale).double().cpu().numpy() / h0
        with np.errstate(all="ignore"):
            most = np.fmax(sizes[1], bend)
            h1 = np.where(most > 1e-15, (0.01 / most) ** (1.0 / self._falls), np.maximum(1e-6 * span, 1e-3 * h0))
        # Where the first probe already meets NaN there is nothing to go by but caution.
        return np.where(np.isfinite(bend), np.minimum(100.0 * h0, h1), h0)

    def step(self, field: Field, x_bar: Tensor, n: int, state: _Run) -> tuple[Tensor, _Run, Tensor | None]:
        run, to = state.copy(), float(state.nodes[n + 1])
        visit = getattr(field, "visit", None)
        while True:
            rows = np.flatnonzero((run.status == Status.SUCCESS) & (run.sigma != to))
            if not rows.size:
                return x_bar, run, None
            plan = self._plan(run, rows, to)
            if plan is None:
                continue
            chosen = torch.from_numpy(rows).to(x_bar.device)
            everyone = rows.size == x_bar.shape[0]
            x, first = (x_bar, run.slope) if everyone else (y.index_select(0, chosen) for y in (x_bar, run.slope))
            moved, last, slopes, ratio = self._try(field, x, first, chosen, plan)
            good = ratio <= 1.0
            self._account(run, rows, plan, ratio)
            if not good.any():
                continue
            if torch.is_grad_enabled() and not np.isfinite(ratio).all():
                # A gradient of zero into NaN is NaN: what is kept must come from calls that have met none.
                kept = torch.from_numpy(np.flatnonzero(np.isfinite(ratio))).to(x_bar.device)
                x, first, chosen = (y.index_select(0, kept) for y in (x, first, chosen))
                plan = plan.of(np.isfinite(ratio))
                moved, last, slopes, _ = self._try(field, x, first, chosen, plan)
                run.nfe[rows[np.isfinite(ratio)]] += self.nfe_per_step
                good = good[np.isfinite(ratio)]
            if not good.all():
                kept = torch.from_numpy(np.flatnonzero(good)).to(x_bar.device)
                moved, last, chosen, x, *slopes = (y.index_select(0, kept) for y in (moved, last, chosen, x, *slopes))
                plan = plan.of(good)
            if everyone and len(moved) == x_bar.shape[0]:
                x_bar, slope = moved, last
            else:
                x_bar, slope = x_bar.index_copy(0, chosen, moved), run.slope.index_copy(0, chosen, last)
            run = replace(run, slope=slope)
            if visit is not None:
                if getattr(field, "dense", False) and self.tableau.inside is not None:
                    self._visit_inside(field, x, slopes, chosen, plan, run)
                visit(chosen, torch.from_numpy(plan.at[:, -1]), moved, last)

    def _visit_inside(self, field: Any, x: Tensor, scaled: list[Tensor], rows: Tensor, plan: _Plan, run: _Run) -> None:
        """States inside an accepted step, for dense output: some calls more."""
        inside, u = self.tableau.inside, run.clock
        assert inside is not None
        ends = plan.at[:, [0, -1]]
        start, end = np.asarray(u.u(ends[:, 0])), np.asarray(u.u(ends[:, 1]))
        c = np.array([*inside.c, *(theta for theta, _ in inside.b)])
        at = np.clip(u.sigma(start[:, None] + (end - start)[:, None] * c), ends.min(1)[:, None], ends.max(1)[:, None])
        worth = _columns(((end - start)[:, None] * np.asarray(u.slope(at))).T, x)
        sigmas = torch.from_numpy(at).unbind(1)
        for sigma, row, value in zip(sigmas, inside.a, worth, strict=False):
            scaled = [*scaled, value * field(_sum(row, scaled, x), sigma, rows)]
        for sigma, (_, row) in zip(sigmas[len(inside.a) :], inside.b, strict=True):
            field.visit(rows, sigma, _sum(row, scaled, x), None)
        run.nfe[rows.cpu().numpy()] += len(inside.a)

    def _plan(self, run: _Run, rows: Array, to: float) -> _Plan | None:
        """The next attempt of each of `rows`; None, after settling their status, if some must stop here."""
        u, sigma = run.clock, run.sigma[rows]
        start, end = np.asarray(u.u(sigma), dtype=np.float64), float(u.u(to))
        left, sign = np.abs(end - start), math.copysign(1.0, to - float(run.nodes[0]))
        wanted = run.h[rows]
        lands = wanted >= left * (1.0 - 1e-10)
        # Two even steps to the node in place of one and a sliver.
        h = np.where(lands, left, np.where(2.0 * wanted > left, 0.5 * left, wanted))
        low, high = min(to, float(sigma.min())), max(to, float(sigma.max()))
        ahead = np.where(lands, to, np.clip(u.sigma(start + sign * h), low, high))
        spent = run.accepted[rows] + run.rejected[rows] >= self.max_steps
        stuck = ~lands & (np.abs(ahead - sigma) <= 8.0 * np.finfo(np.float64).eps * np.maximum(sigma, to))
        lost = run.cuts[rows] > _CUTS
        if (spent | stuck | lost).any():
            run.status[rows[spent]] = Status.MAX_STEPS
            run.status[rows[stuck]] = np.where(run.held[rows[stuck]] == 2, Status.NONFINITE, Status.STALLED)
            run.status[rows[lost]] = Status.NONFINITE
            return None
        c = np.append(self.tableau.c, 1.0)
        h = np.where(lands, end, np.asarray(u.u(ahead))) - start  # signed, as the σ it leads to are
        at = np.clip(u.sigma(start[:, None] + h[:, None] * c), low, high)
        at = np.where(c == 0.0, sigma[:, None], np.where(c == 1.0, ahead[:, None], at))
        return _Plan(
            at, h[:, None] * np.asarray(u.slope(at)), np.abs(h), np.where(lands | (2.0 * wanted > left), wanted, 0.0)
        )

    def _try(
        self, field: Field, x: Tensor, first: Tensor, rows: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, list[Tensor], Array]:
        """One attempt: the new states, ε there, all slopes times h, and r of each sample, NaN where anything was not finite."""
        tableau = self.tableau
        asked = torch.from_numpy(plan.at).unbind(1)
        roots = np.sqrt(1.0 + plan.at[:, [0, -1]] ** 2).T
        root, root_next, *worth = _columns(np.concatenate((roots, plan.worth.T)), x)
        scaled = [worth[0] * first]
        for sigma, row, value in zip(asked[1:-1], tableau.a[1:], worth[1:-1], strict=True):
            scaled.append(value * field(_sum(row, scaled, x), sigma, rows))
        moved = _sum(tableau.b, scaled, x)
        last = field(moved, asked[-1], rows)
        scaled.append(worth[-1] * last)
        with torch.no_grad():
            scale = self.atol + self.rtol * torch.maximum(x.abs() / root, moved.abs() / root_next)
            found = [_rms(_sum(row, scaled) / root_next / scale) for row in tableau.error]
            finite = (moved + last).isfinite().flatten(1).all(dim=1)
            *sizes, whole_ = torch.stack([*found, finite.to(found[0].dtype)]).double().cpu().numpy()
        with np.errstate(all="ignore"):
            ratio = sizes[0]
            if len(sizes) == 2:
                ratio = np.where(sizes[0] > 0.0, sizes[0] ** 2 / np.sqrt(sizes[0] ** 2 + 0.01 * sizes[1] ** 2), 0.0)
                ratio = np.where(np.isfinite(sizes[0] + sizes[1]), ratio, np.nan)
        return moved, last, scaled, np.where((whole_ > 0.0) & np.isfinite(ratio), ratio, np.nan)

    def _account(self, run: _Run, rows: Array, plan: _Plan, ratio: Array) -> None:
        """Book an attempt: counts, where each sample is now, and how far it goes next."""
        p, i, d = self.pid
        order = self._falls
        finite, good = np.isfinite(ratio), ratio <= 1.0
        size = np.maximum(np.where(finite, ratio, 1.0), 1e-10)
        before, earlier = run.ratios[:, rows]
        steady = size ** (-(p + i + d) / order) * before ** ((p + 2.0 * d) / order) * earlier ** (-d / order)
        # Once rejected, a step does not grow at once.
        steady = np.clip(_SAFETY * steady, _SHRINK, np.where(run.held[rows] > 0, 1.0, _GROW))
        back = np.where(finite, np.clip(_SAFETY * size ** (-1.0 / order), _SHRINK, 1.0), _CUT)
        h = plan.h * np.where(good, steady, back)
        # A step that only a node cut short says little against the one that was wanted.
        run.h[rows] = np.where(good, np.maximum(h, plan.uncut), h)
        run.ratios[:, rows] = np.where(good, np.stack((np.maximum(size, _LEAST), before)), (before, earlier))
        began, led = plan.at[:, 0], plan.at[:, -1]
        run.sigma[rows] = np.where(good, led, run.sigma[rows])
        run.held[rows] = np.where(good, 0, np.where(finite, 1, 2))
        # An accepted step alone forgives nothing: short of a level where ε is NaN there is always room for one more.
        past = good & ((led - run.met[rows]) * np.sign(led - began) >= 0.0)
        run.cuts[rows] = np.where(past, 0, run.cuts[rows] + ~finite)
        run.met[rows] = np.where(finite, run.met[rows], led)
        run.accepted[rows] += good
        run.rejected[rows] += ~good
        run.nfe[rows] += self.nfe_per_step


@dataclass(frozen=True)
class _Plan:
    """An attempt of some samples: σ of their stages and end (A, s + 1), h dσ/du there, |h|, and the h that a node cut short, or 0."""

    at: Array
    worth: Array
    h: Array
    uncut: Array

    def of(self, kept: Array) -> _Plan:
        return _Plan(self.at[kept], self.worth[kept], self.h[kept], self.uncut[kept])


def _ends(nodes: Array) -> tuple[float, float]:
    return float(nodes.min()), float(nodes.max())


def _usable(u: Clock, grid: Grid) -> Clock:
    """The clock, if it can be stepped in wherever `grid` goes."""
    low, high = _ends(grid.sigmas)
    with np.errstate(all="ignore"):
        singular = not all(np.isfinite(f(np.array([low]))).all() for f in (u.u, u.slope))
    if singular:
        raise ValueError(
            f"clock {u.name!r} is singular at sigma = {low:g}, and an adaptive solver cannot step in it there: use another, "
            f"such as {CLOCK.name}, or a run that stays above"
        )
    check_clock(u, low, high)
    return u


def _rms(x: Tensor) -> Tensor:
    """Of each sample, (B,)."""
    return x.flatten(1).square().mean(dim=1).sqrt()


def _columns(values: Array, like: Tensor) -> tuple[Tensor, ...]:
    """Rows of numbers (n, A), each as a tensor (A, 1, …, 1) beside the state; one copy to the device."""
    placed = torch.from_numpy(values).to(like.device, like.dtype)
    return placed.reshape(*placed.shape, *(1,) * (like.ndim - 1)).unbind()


def _sum(weights: tuple[float, ...], terms: list[Tensor], start: Tensor | None = None) -> Tensor:
    """Start + Σ w_i y_i, skipping zeros, and in place nowhere: gradients may be recorded."""
    total = start
    for weight, term in zip(weights, terms, strict=True):
        if weight != 0.0:
            total = weight * term if total is None else total.add(term, alpha=weight)
    assert total is not None
    return total
