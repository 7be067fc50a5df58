"""The contract every solver fulfils, and the clocks they step in."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import NoiseSchedule, whole
from ddim_ode.solution import Outcome

__all__ = [
    "Clock", "Field", "Solver", "arctan", "asinh", "check_clock", "check_named", "check_one_step", "clock", "clock_over", "flow",
    "named_in", "paced",
]  # fmt: skip

Array = NDArray[np.float64]


#: What a solver is given to ask for ε: ``field(x_bar, sigma)``, one float σ for the whole batch. An adaptive solver asks
#: ``field(x_bar, sigma, rows)`` for the samples `rows` (A,) of the batch, x̄ (A, \*d), each at its own σ (A,), float64.
Field = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Clock:
    r"""A strictly increasing change of variable u(σ), in which a method's polynomials or stages are laid out.

    Attributes
    ----------
    name : str
        For records.
    u : callable
        u(σ), on float64 arrays. It may be −∞ at σ = 0.
    sigma : callable
        Its inverse, σ(u).
    slope : callable
        dσ/du, as a function of σ.
    """

    name: str
    u: Callable[[Any], Any]
    sigma: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    #: The function and the number that made it: what two clocks are compared by, and what goes to another process.
    origin: tuple[Callable[[float], Clock], float] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clock) or self.origin is None or other.origin is None:
            return self is other
        return self.origin == other.origin

    def __hash__(self) -> int:
        return id(self) if self.origin is None else hash(self.origin)

    def __reduce__(self) -> Any:
        if self.origin is None:
            return Clock, (self.name, self.u, self.sigma, self.slope)
        make, number = self.origin
        return make, (number,)


def _level(c: float, name: str) -> float:
    if not 0.0 < c < math.inf:
        raise ValueError(f"c of the clock {name} must be a positive noise level, but got {c!r}")
    return float(c)


def arctan(c: float = 1.0) -> Clock:
    """The clock arctan(σ/c): like σ below c, like −1/σ above it, where ε stops changing."""
    c = _level(c, "arctan")
    return Clock(
        f"arctan({c:g})", lambda s: np.arctan(s / c), lambda u: c * np.tan(u), lambda s: c + s * s / c, (arctan, c)
    )


def asinh(c: float = 0.05) -> Clock:
    """The clock asinh(σ/c): log σ above c, σ/c below it."""
    c = _level(c, "asinh")
    return Clock(
        f"asinh({c:g})", lambda s: np.arcsinh(s / c), lambda u: c * np.sinh(u), lambda s: np.hypot(s, c), (asinh, c)
    )


def flow(c: float = 1.0) -> Clock:
    """The clock σ/(c + σ): rectified flow's time for c = 1. Like σ/c below c; above it what is left to 1 is c/σ."""
    c = _level(c, "flow")
    return Clock(
        f"flow({c:g})", lambda s: s / (c + s), lambda u: c * u / (1.0 - u), lambda s: (c + s) ** 2 / c, (flow, c)
    )


def paced(steps: int) -> Clock:
    """The clock arctan(σ/c), c = 400/steps² but between 1/2 and 4: sharper where the grid is finer, and a polynomial can follow."""
    return arctan(min(max(0.5, 400.0 / whole(steps, "steps") ** 2), 4.0))


_CLOCKS: dict[str, Callable[[], Clock]] = {
    "sigma": lambda: Clock("sigma", lambda s: s, lambda u: u, np.ones_like),
    "log": lambda: Clock("log", np.log, np.exp, lambda s: s),
    "variance": lambda: Clock("variance", lambda s: 0.5 * s * s, lambda u: np.sqrt(2.0 * u), lambda s: 1.0 / s),
    "arctan": arctan,
    "asinh": asinh,
    "flow": flow,
}


def clock(name: str | Clock, schedule: NoiseSchedule, steps: int | None = None) -> Clock:
    """A clock by name, for one schedule.

    Parameters
    ----------
    name : str or Clock
        ``"sigma"``, ``"log"`` (log σ), ``"t"`` (the schedule's time), ``"variance"`` (σ²/2), ``"arctan"``
        (:func:`arctan`), ``"asinh"`` (:func:`asinh`), ``"flow"`` (:func:`flow`), ``"paced"`` (:func:`paced`), or a
        clock, which is returned as it is.
    schedule : NoiseSchedule
        What ``"t"`` refers to.
    steps : int, optional
        What ``"paced"`` refers to.
    """
    if isinstance(name, Clock):
        return name
    if name == "t":
        return Clock("t", schedule.t, schedule.sigma, lambda s: schedule.slope(schedule.t(s)))
    if name == "paced":
        if steps is None:
            raise ValueError(
                'clock "paced" goes by the number of steps, which is not known here: use "arctan", or arctan(c)'
            )
        return paced(steps)
    check_named(name)
    return _CLOCKS[name]()


def check_named(name: str | Clock) -> None:
    """Refuse what is neither a clock nor the name of one."""
    if not isinstance(name, Clock) and name not in (*_CLOCKS, "t", "paced"):
        raise ValueError(
            f"unknown clock {name!r}: known are {', '.join((*_CLOCKS, 't', 'paced'))}, or a Clock of your own"
        )


@cache
def _orders() -> dict[str, Any]:
    return json.loads(files("ddim_ode.solvers").joinpath("orders.json").read_text("utf-8"))


def check_clock(u: Clock, low: float, high: float, *, inverse: bool = True, slope: bool = True) -> None:
    """Refuse a clock that does not rise between two noise levels, or whose parts contradict each other there.

    Its inverse and dσ/du are looked at where they are needed. At σ = 0 a clock may be infinite.

    Raises
    ------
    ValueError
        With the levels at which it does, and for a contradiction what it says there and what it would have to say.
    """
    probe = np.union1d(np.linspace(low, high, 65), np.geomspace(max(low, 1e-4 * high), high, 65))
    # Levels closer than this may share a tick by rounding.
    probe = probe[np.append(np.diff(probe) > 1e-9 * high, True)]
    levels = np.geomspace(max(low, 1e-3 * high), high, 9)[1:]
    with np.errstate(all="ignore"):
        ticks = np.asarray(u.u(probe), dtype=np.float64)
        if low == 0.0 and ticks.shape == probe.shape and not np.isfinite(ticks[0]):
            ticks = ticks[1:]
        if not (np.all(np.isfinite(ticks)) and np.all(np.diff(ticks) > 0.0)):
            raise ValueError(f"clock {u.name!r} must rise strictly over the run, from sigma = {low:g} to {high:g}")
        parts = []
        if inverse:
            parts.append(("sigma(u(σ))", np.asarray(u.sigma(u.u(levels)), dtype=np.float64) / levels, 1.0))
        if slope:
            # Backwards, to second order: above the last level there may be no clock.
            step = 1e-5 * levels
            here, back, further = (np.asarray(u.u(levels - i * step)) for i in range(3))
            rise = (3.0 * here - 4.0 * back + further) / (2.0 * step)
            parts.append(("slope(σ) du/dσ", np.asarray(u.slope(levels), dtype=np.float64) * rise, 1.0))
    for what, found, wanted in parts:
        if found.shape != levels.shape or not np.all(np.abs(found - wanted) < 1e-4):
            i = int(np.argmax(~(np.abs(found - wanted) < 1e-4))) if found.shape == levels.shape else 0
            share = found.ravel()[min(i, found.size - 1)]
            raise ValueError(
                f"clock {u.name!r} contradicts itself at sigma = {levels[i]:.4g}: {what} is {share:.6g} times what it must be"
            )


def clock_over(name: str | Clock, grid: Grid) -> Clock:
    """The clock that a run over `grid` steps in; one of the user's own is checked there."""
    u = clock(name, grid.schedule, grid.steps)
    if isinstance(name, Clock):
        check_clock(u, float(grid.sigmas.min()), float(grid.sigmas.max()))
    return u


def named_in(name: str, at: str | Clock) -> str:
    """What a method is called in a clock: by its own name in σ."""
    at = at if isinstance(at, str) else at.name
    return name if at == "sigma" else f"{name}-{at}"


def check_one_step(base: Any) -> None:
    """Refuse what is no one-step method: it must keep nothing but the state, and take steps that are known beforehand."""
    if not isinstance(base, Solver) or not base.budgeted or base.paired or base.stochastic or base.states != 1:
        got = base.name if isinstance(base, Solver) else repr(base)
        raise ValueError(
            f"base must be a solver of fixed steps that keeps nothing but the state, such as rk4 or ddim, but got {got}"
        )


class Solver(ABC):
    r"""A method for :math:`d\bar x = \epsilon(\bar x, \sigma)\, d\sigma` on a given grid.

    Subclass it to bring your own; every function takes an instance as ``solver=``. A solver sees the grid and
    a field ``field(x_bar, sigma)``; it never sees a network, a device or a progress bar. It holds no state of
    a run: :meth:`init` makes one, :meth:`step` returns the next, and neither changes what it was given.

    Attributes
    ----------
    name : str
        What it is called.
    order : int
        The order its error is proven and measured to fall at, start included.
    nfe_per_step : int
        Model calls a step, once started.
    source : str
        Where it comes from.
    adaptive : bool
        Whether it chooses its own steps between the nodes of the grid, so that its calls are not known beforehand.
    iterative : bool
        Whether it solves equations by iteration, so that its calls are not known beforehand, though its steps are the grid's.
    paired : bool
        Whether it carries a second state, without which its way back is not exact: see :meth:`begin` and :meth:`second`.
    stochastic : bool
        Whether it adds noise: then it goes down only, and has no dense output.
    differentiable : bool
        Whether gradients flow through it.
    start : str
        How a run begins, in a word or two.
    exact : str
        What it solves without error on any step.
    states : int
        Tensors of the size of the state that are kept from step to step, the state included.

    Examples
    --------
    The explicit trapezium, by hand:

    >>> class Trapezium(Solver):
    ...     name, order, nfe_per_step, source = "trapezium", 2, 2, "textbook"
    ...     def init(self, field, x_bar, grid):
    ...         return grid.sigmas.tolist()
    ...     def step(self, field, x_bar, n, state):
    ...         sigma, sigma_next = state[n], state[n + 1]
    ...         first = field(x_bar, sigma)
    ...         second = field(x_bar + (sigma_next - sigma) * first, sigma_next)
    ...         return x_bar + 0.5 * (sigma_next - sigma) * (first + second), state, None
    """

    name: str
    order: int
    nfe_per_step: int
    source: str
    adaptive: bool = False
    iterative: bool = False
    paired: bool = False
    stochastic: bool = False
    differentiable: bool = True
    start: str = "itself"
    exact: str = "constant ε"
    states: int = 1

    def keyed(self, seed: int, images: Sequence[int]) -> Solver:
        """The solver of a batch of these images: itself, but for one that draws noise by (seed, image)."""
        return self

    def own_grid(self, schedule: NoiseSchedule) -> Grid | None:
        """The only grid it runs on, in the direction it runs in, if there is but one."""
        return None

    def between(self, grid: Grid) -> tuple[int, int]:
        """The first and the last node between which the states of a run can be read: all, but for steps that are none of eq. 14's."""
        return 0, grid.steps

    def check_field(self, field: Any) -> None:  # noqa: B027  (most run with all)
        """Refuse an :class:`~ddim_ode.EpsilonField` that it was not made for, before any model call."""

    @abstractmethod
    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> Any:
        r"""The state before the first step; all that depends on the grid alone is worked out here, on the host.

        Parameters
        ----------
        field : callable
            ``field(x_bar, sigma)``.
        x_bar : Tensor
            (B, \*d), the state at ``grid.sigmas[0]``.
        grid : Grid
            All nodes of the run.
        """

    def begin(self, field: Field, x_bar: Tensor, second: Tensor, grid: Grid) -> Any:
        r"""The same where a run before has left a second state, (B, \*d): for a solver that is `paired`."""
        raise TypeError(f"{self.name} has no second state")

    def second(self, state: Any) -> Tensor | None:
        r"""The second state that a run in the other direction would have to begin with, (B, \*d), if there is one."""
        return None

    @abstractmethod
    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        r"""From ``grid.sigmas[n]`` to ``grid.sigmas[n + 1]``.

        Returns
        -------
        x_bar : Tensor
            The new state, (B, \*d).
        state : Any
            What the next step needs.
        error : Tensor or None
            An estimate of the local error, (B, \*d), if the method has one.
        """

    @property
    def measured(self) -> dict[str, list[float] | None] | None:
        """Its measured orders, the least and the greatest: ``measured_order`` at the end of a run, ``dense_order`` between nodes.

        Over uniform, quadratic and jittered grids in both directions, as ``python -m benchmarks.convergence`` found and
        wrote them down; None for a solver it does not know, whatever it is called.
        """
        from ddim_ode.solvers import get  # the names are made of solvers

        try:
            known = get(self.name)
        except ValueError:
            return None
        # Adaptive and iterative ones are measured at tolerances of their own.
        same = known == self or (not self.budgeted and type(known) is type(self))
        return _orders().get(self.name) if same else None

    @property
    def budgeted(self) -> bool:
        """Whether its calls are known beforehand, so that a budget of them can be given."""
        return not (self.adaptive or self.iterative)

    def outcome(self, state: Any) -> Outcome | None:
        """What became of each sample, for a solver that watches its samples by itself; None: the loop looks."""
        return None

    def stages(self, grid: Grid) -> Array:
        """Every σ at which a run over `grid` asks the field; lets labels be made before the loop."""
        return grid.sigmas[:-1]

    def nfe(self, steps: int) -> int:
        """Model calls of a sampling run of `steps` steps down to σ = 0, start included."""
        return steps * self.nfe_per_step

    def calls(self, grid: Grid) -> int:
        """Model calls of a run over `grid`, which may differ from :meth:`nfe` where it does not end at σ = 0 or begins there."""
        return self.nfe(grid.steps)

    def steps(self, nfe: int) -> int:
        """The most whole steps that a budget of `nfe` model calls pays for.

        Raises
        ------
        ValueError
            If it does not pay for one.
        """
        nfe = whole(nfe, "nfe", 0)
        # A start may cost more than its share, and the step to σ = 0 less: seldom fewer steps by much, and one more at most.
        steps = nfe // self.nfe_per_step + (nfe > 0)
        while steps > 0 and self.nfe(steps) > nfe:
            steps -= 1
        if steps == 0:
            raise ValueError(f"nfe = {nfe} does not pay for one step of {self.name}, which takes {self.nfe(1)} calls")
        return steps

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: order {self.order}, {self.nfe_per_step} calls a step>"
