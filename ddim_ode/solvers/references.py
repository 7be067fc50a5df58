"""Other people's adaptive solvers, behind the same contract: to compare with, and to check by.

They know one step size for a whole batch, measure their errors in x̄ and step in σ. If a batch fails, its samples are
run one by one, so that those that can finish do. Each step from node to node of the grid is a run of its own.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import scipy.integrate
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import whole
from ddim_ode.solution import Outcome, Status
from ddim_ode.solvers.adaptive import check_tolerances
from ddim_ode.solvers.base import Field, Solver
from ddim_ode.solvers.runge_kutta import DOP853, combine

__all__ = ["Scipy", "TorchDiffEq"]

Array = NDArray[Any]
Ask = Callable[[Tensor, float], Tensor]
#: σ and x̄ at a node that a run has accepted, and ε there, or whether it is worth asking for: it is not inside a step.
Node = tuple[float, Tensor, "Tensor | bool"]


@dataclass
class _Part:
    """A run of some samples over one interval: how it ended, and where."""

    x_bar: Tensor
    sigma: float
    status: Status = Status.SUCCESS
    accepted: int = 0
    rejected: int = 0
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class _State:
    nodes: Array
    sigma: Array
    status: Array
    nfe: Array
    accepted: Array
    rejected: Array


class _NonFinite(Exception):
    """The field returned NaN or infinity."""


class _Reference(Solver):
    """What the solvers of other packages share."""

    method: str
    rtol: float
    atol: float
    max_steps: int
    adaptive = True
    start = "chooses its first step"
    #: Order and calls a step of each method.
    _METHODS: ClassVar[dict[str, tuple[int, int]]]

    def _check(self) -> None:
        if self.method not in self._METHODS:
            raise ValueError(f"method must be one of {', '.join(self._METHODS)}, but got {self.method!r}")
        check_tolerances(self.rtol, self.atol)
        object.__setattr__(self, "max_steps", whole(self.max_steps, "max_steps"))

    @property
    def order(self) -> int:  # type: ignore[override]
        return self._METHODS[self.method][0]

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return self._METHODS[self.method][1]

    @abstractmethod
    def _solve(
        self, ask: Ask, x_bar: Tensor, sigma: float, to: float, dense: bool, params: tuple[Tensor, ...]
    ) -> _Part:
        """From `sigma` to `to`; where it fails, the last state it vouches for."""

    def stages(self, grid: Grid) -> Array:
        return np.empty(0)

    def outcome(self, state: _State) -> Outcome:
        status = tuple(map(Status, state.status.tolist()))
        rest = (state.sigma, state.nfe, state.accepted, state.rejected)
        return Outcome(status, *(tuple(x.tolist()) for x in rest))

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> _State:
        check_tolerances(self.rtol, self.atol, x_bar.dtype)
        count = x_bar.shape[0]
        none = np.zeros(count, dtype=np.int64)
        sigma = np.full(count, grid.sigmas[0])
        rows = torch.arange(count, device=x_bar.device)
        # A start at which the field is not finite sends both packages into loops without end.
        slope = field(x_bar, torch.from_numpy(sigma), rows)
        finite = slope.isfinite().flatten(1).all(dim=1).cpu().numpy()
        visit = getattr(field, "visit", None)
        if visit is not None:
            visit(rows, torch.from_numpy(sigma), x_bar, slope)
        status = np.where(finite, int(Status.SUCCESS), int(Status.NONFINITE))
        return _State(grid.sigmas, sigma, status, none + 1, none, none)

    def step(self, field: Field, x_bar: Tensor, n: int, state: _State) -> tuple[Tensor, _State, Tensor | None]:
        to, rows = float(state.nodes[n + 1]), np.flatnonzero(state.status == Status.SUCCESS)
        copies = {name: getattr(state, name).copy() for name in ("sigma", "status", "nfe", "accepted", "rejected")}
        state = replace(state, **copies)
        pending = [rows] if rows.size else []
        while pending:
            rows = pending.pop(0)
            part, calls = self._part(field, x_bar, rows, float(state.nodes[n]), to)
            state.nfe[rows] += calls
            if part.status is not Status.SUCCESS and rows.size > 1:
                pending += [rows[i : i + 1] for i in range(rows.size)]
                continue
            chosen = torch.from_numpy(rows).to(x_bar.device)
            x_bar = part.x_bar if rows.size == x_bar.shape[0] else x_bar.index_copy(0, chosen, part.x_bar)
            state.sigma[rows], state.status[rows] = part.sigma, part.status
            state.accepted[rows] += part.accepted
            state.rejected[rows] += part.rejected
            if getattr(field, "dense", False):
                self._visit(field, chosen, [*part.nodes, (part.sigma, part.x_bar, True)], float(state.nodes[n]))
        return x_bar, state, None

    def _part(self, field: Field, x_bar: Tensor, rows: Array, sigma: float, to: float) -> tuple[_Part, int]:
        chosen = torch.from_numpy(rows).to(x_bar.device)
        low, high, calls = min(sigma, to), max(sigma, to), 0

        def ask(x: Tensor, s: float) -> Tensor:
            nonlocal calls
            calls += 1
            # A probe may look past the end, where σ is negative or the schedule has ended.
            level = torch.full((rows.size,), min(max(s, low), high), dtype=torch.float64)
            eps = field(x, level, chosen)
            if not bool(eps.isfinite().all()):
                raise _NonFinite
            return eps

        start = x_bar if rows.size == x_bar.shape[0] else x_bar.index_select(0, chosen)
        dense = getattr(field, "dense", False)
        return self._solve(ask, start, sigma, to, dense, getattr(field, "parameters", ())), calls

    def _visit(self, field: Any, rows: Tensor, nodes: list[Node], start: float) -> None:
        """Tell of accepted nodes, with one call more for the slope at each where it is not known."""
        last = start
        for sigma, x_bar, sloped in nodes:
            if sigma == last:
                continue
            level = torch.full((len(rows),), sigma, dtype=torch.float64)
            slope = sloped if isinstance(sloped, Tensor) else field(x_bar, level, rows) if sloped else None
            field.visit(rows, level, x_bar, slope if slope is None or bool(slope.isfinite().all()) else None)
            last = sigma


@dataclass(frozen=True, repr=False)
class TorchDiffEq(_Reference):
    """The adaptive Runge–Kutta methods of torchdiffeq.

    Parameters
    ----------
    method : str
        ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"`` or ``"adaptive_heun"``.
    rtol, atol : float
        Its tolerances: of x̄, as a root mean square over the whole batch.
    adjoint : bool
        Gradients by solving the adjoint equation backwards, in memory that does not grow with the steps, to the
        tolerances given; otherwise through the steps taken.
    max_steps : int
        Attempts from node to node of the grid.

    Notes
    -----
    Its failures, assertions, become statuses. Dense output costs a call at each accepted step, with ``dopri8``, whose
    steps are too long for their ends to tell, fifteen, and one at each node of the grid that it starts from; with
    `adjoint` it carries no gradients.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", 2018.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    max_steps: int = 10_000

    source = "torchdiffeq, Chen et al. 2018"
    _METHODS: ClassVar = {
        "dopri5": (5, 6),
        "dopri8": (8, 13),
        "bosh3": (3, 3),
        "fehlberg2": (2, 2),
        "adaptive_heun": (2, 2),
    }

    def __post_init__(self) -> None:
        self._check()

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"torchdiffeq-{self.method}{'-adjoint' if self.adjoint else ''}"

    def _solve(
        self, ask: Ask, x_bar: Tensor, sigma: float, to: float, dense: bool, params: tuple[Tensor, ...]
    ) -> _Part:
        from torchdiffeq import odeint, odeint_adjoint

        followed = _Followed(ask, x_bar, sigma, dense)
        times = torch.tensor([sigma, to], dtype=torch.float64, device=x_bar.device)
        # Without a prescribed stop it steps past the end and interpolates back, and there is no field below σ = 0.
        options = {"max_num_steps": self.max_steps, "step_t": times[1:]}
        given: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": options}
        status = Status.SUCCESS
        try:
            if torch.is_grad_enabled() and not self.adjoint:
                # It would differentiate its first step too, and by half: our field takes σ as a number.
                given["options"] = {**options, "first_step": self._first_step(ask, x_bar, times, given)}
            if self.adjoint:
                given["adjoint_options"] = {**options, "step_t": times[:1]}
                end = odeint_adjoint(followed, x_bar, times, adjoint_params=params, **given)[-1]
            else:
                end = odeint(followed, x_bar, times, **given)[-1]
        except _NonFinite:
            status = Status.NONFINITE
        except AssertionError as error:
            known = [status for words, status in _ENDS.items() if words in str(error)]
            if not known:  # the model's own, say
                raise
            status = known[0]
        followed.over = True  # an adjoint comes back to it later
        nodes, counts = followed.nodes, (followed.accepted, followed.rejected)
        if status is not Status.SUCCESS:
            return _Part(followed.x_bar, followed.sigma, status, *counts, nodes)
        if dense and self.order > 5:
            # Where a stage meets NaN that torchdiffeq's own did not, the ends of the steps must do.
            with suppress(_NonFinite):
                ends = [(s, x, ask(x, s)) for s, x, _ in (*nodes, (to, end, True))]
                nodes = [node for a, b in pairwise(ends) for node in (a, *_inside(ask, a[1], (a[2], b[2]), a[0], b[0]))]
                nodes.append(ends[-1])
        return _Part(end, to, status, *counts, nodes)

    @staticmethod
    def _first_step(ask: Ask, x_bar: Tensor, times: Tensor, given: dict[str, Any]) -> float:
        """What it would choose, for two calls."""
        from torchdiffeq import odeint

        def stop(t: Tensor, x_bar: Tensor, dt: Tensor) -> None:
            raise _Chosen(float(dt))

        probe = _Followed(ask, x_bar, 0.0, False)
        probe.callback_step = stop  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                odeint(probe, x_bar, times, **given)
        except _Chosen as chosen:
            return float(chosen.args[0])
        raise AssertionError("torchdiffeq made no step")


#: What torchdiffeq asserts, and what has happened when it does not hold.
_ENDS = {
    "max_num_steps": Status.MAX_STEPS,
    "underflow in dt": Status.STALLED,
    "non-finite values in state": Status.NONFINITE,
}


class _Chosen(Exception):
    """The first step that torchdiffeq chose."""


class _Followed:
    """The field as torchdiffeq sees it, and what it says of its steps on the way."""

    def __init__(self, ask: Ask, x_bar: Tensor, sigma: float, dense: bool) -> None:
        self.ask, self.x_bar, self.sigma, self.dense = ask, x_bar, sigma, dense
        self.accepted, self.rejected, self.over = 0, 0, False
        self.nodes: list[Node] = []

    def __call__(self, t: Tensor, x_bar: Tensor) -> Tensor:
        return self.ask(x_bar, float(t.detach()))

    def callback_step(self, t: Tensor, x_bar: Tensor, dt: Tensor) -> None:
        self.sigma, self.x_bar = float(t.detach()), x_bar

    def callback_accept_step(self, t: Tensor, x_bar: Tensor, dt: Tensor) -> None:
        self.accepted += 1
        if self.dense and not self.over:
            self.nodes.append((float(t.detach()), x_bar, True))

    def callback_reject_step(self, t: Tensor, x_bar: Tensor, dt: Tensor) -> None:
        self.rejected += 1


def _inside(ask: Ask, x_bar: Tensor, known: tuple[Tensor, Tensor], sigma: float, to: float) -> list[Node]:
    """States inside a step, by the interpolant of DOP853 over it; the slopes at its ends are known."""
    inside, h = DOP853.inside, to - sigma
    assert inside is not None
    slopes, last = [known[0]], len(DOP853.b)
    rows, c = (*DOP853.a, DOP853.b, *inside.a), (*DOP853.c, 1.0, *inside.c)
    for i in range(1, len(rows)):
        if i == last:
            slopes.append(known[1])
        else:
            slopes.append(ask(combine(x_bar, tuple(h * a for a in rows[i]), slopes), sigma + c[i] * h))
    return [(sigma + theta * h, combine(x_bar, tuple(h * b for b in row), slopes), False) for theta, row in inside.b]


@dataclass(frozen=True, repr=False)
class Scipy(_Reference):
    """The adaptive solvers of scipy, on the host, in float64. No gradients.

    Parameters
    ----------
    method : str
        ``"RK23"``, ``"RK45"``, ``"DOP853"``, ``"Radau"``, ``"BDF"`` or ``"LSODA"``.
    rtol, atol : float
        Its tolerances: of x̄, over the whole batch. scipy would silently raise an `rtol` below 2.2e-14.
    max_steps : int
        Accepted steps from node to node of the grid.

    Notes
    -----
    It does not tell of rejected attempts: ``Outcome.rejected`` is 0. ``Radau`` and ``BDF`` form a matrix of the size of the
    whole batch, squared. Dense output is its own, and a call more at each accepted step, four with ``DOP853``.
    """

    method: str = "DOP853"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 100_000

    differentiable = False
    _METHODS: ClassVar = {
        "RK23": (3, 3),
        "RK45": (5, 6),
        "DOP853": (8, 12),
        "Radau": (5, 3),
        "BDF": (5, 1),
        "LSODA": (5, 1),
    }

    def __post_init__(self) -> None:
        self._check()
        least = 100.0 * float(np.finfo(np.float64).eps)
        if self.rtol < least:
            raise ValueError(f"rtol must be a number of at least {least:.2g}, scipy's own bound, but got {self.rtol!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"scipy-{self.method.lower()}"

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"scipy.integrate.{self.method}"

    def _solve(
        self, ask: Ask, x_bar: Tensor, sigma: float, to: float, dense: bool, params: tuple[Tensor, ...]
    ) -> _Part:
        def place(flat: Array) -> Tensor:
            return torch.from_numpy(flat.copy()).reshape(x_bar.shape).to(x_bar.device, x_bar.dtype)

        def slope(s: float, flat: Array) -> Array:
            return ask(place(flat), float(s)).detach().cpu().double().numpy().ravel()

        flat = x_bar.detach().cpu().double().numpy().ravel()
        nodes: list[Node] = [(sigma, x_bar, True)]
        accepted, run = 0, None
        try:
            make = getattr(scipy.integrate, self.method)
            run = make(slope, sigma, flat, to, rtol=self.rtol, atol=self.atol)
            while run.status == "running":
                if accepted >= self.max_steps:
                    return _Part(place(run.y), float(run.t), Status.MAX_STEPS, accepted, 0, nodes)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # LSODA warns of what its status says
                    run.step()
                if run.status == "failed":
                    return _Part(place(run.y), float(run.t), Status.STALLED, accepted, 0, nodes)
                accepted += 1
                if dense:
                    between, at = run.dense_output(), np.linspace(run.t_old, run.t, 5)[1:-1].tolist()
                    nodes += [(s, place(between(s)), False) for s in at]
                    nodes.append((float(run.t), place(run.y), True))
        except _NonFinite:
            good, at = (flat, sigma) if run is None else (run.y, float(run.t))
            return _Part(place(good), at, Status.NONFINITE, accepted, 0, nodes)
        return _Part(place(run.y), to, Status.SUCCESS, accepted, 0, nodes)
