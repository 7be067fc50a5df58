r"""Grids: the sequence of noise levels that a run visits.

A grid is made once and used by every solver in both directions; no step ever derives its neighbour again.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddim_ode.schedule import NoiseSchedule, whole

__all__ = ["Grid", "check_tau", "grids"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """An immutable, strictly monotone sequence of σ, and the network's label at each.

    Make one with :meth:`make` (by rule) or :meth:`explicit` (from numbers).

    Attributes
    ----------
    sigmas : ndarray
        float64, read-only; σ_T down to 0 for sampling, 0 up to σ_T for encoding, or any part of either.
    schedule : NoiseSchedule
        What the grid was made for.
    name : str
        The rule's name, or ``"explicit"``.
    """

    sigmas: Array
    schedule: NoiseSchedule
    name: str = "explicit"

    def __post_init__(self) -> None:
        sigmas = np.array(self.sigmas, dtype=np.float64)
        if sigmas.ndim != 1 or sigmas.size < 2:
            raise ValueError(f"a grid needs at least two sigmas in one row, but got an array of shape {sigmas.shape}")
        if not np.all(np.isfinite(sigmas)):
            raise ValueError("a grid's sigmas must be finite, but there is NaN or infinity among them")
        end = self.schedule.sigma_max
        if sigmas.max() > end * (1.0 + 1e-6):  # σ_T in float32 is σ_T
            raise ValueError(
                f"a grid's sigmas must not exceed the schedule's sigma_max = {end:.10g}, but reach {sigmas.max():.10g}"
            )
        sigmas = np.minimum(sigmas, end)
        steps = np.diff(sigmas)
        if not (np.all(steps > 0.0) or np.all(steps < 0.0)):
            at = int(np.argmin(steps * np.sign(sigmas[-1] - sigmas[0]) > 0.0))
            raise ValueError(
                "a grid's sigmas must strictly rise or strictly fall, but "
                f"sigmas[{at}] = {sigmas[at]:.10g} is followed by sigmas[{at + 1}] = {sigmas[at + 1]:.10g}"
            )
        if sigmas.min() < 0.0:
            raise ValueError(f"a grid's sigmas must not be negative, but the smallest is {sigmas.min():.10g}")
        sigmas.setflags(write=False)
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def labels(self) -> Array:
        """The network's label at each σ."""
        return self.schedule.label(self.sigmas)

    @property
    def steps(self) -> int:
        """Number of steps, one less than the number of nodes."""
        return self.sigmas.size - 1

    @property
    def encoding(self) -> bool:
        """Whether σ rises."""
        return bool(self.sigmas[-1] > self.sigmas[0])

    def reversed(self) -> Grid:
        """The same nodes, to the bit, in the other direction."""
        return Grid(self.sigmas[::-1], self.schedule, self.name)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Grid) or not np.array_equal(self.sigmas, other.sigmas):
            return False
        return self.schedule is other.schedule or self.schedule.config == other.schedule.config

    def __hash__(self) -> int:
        return hash(self.sigmas.tobytes())

    def __repr__(self) -> str:
        return f"<Grid {self.name}: {self.steps} steps, sigma {self.sigmas[0]:.6g} -> {self.sigmas[-1]:.6g}>"

    @staticmethod
    def explicit(sigmas: ArrayLike | Tensor, schedule: NoiseSchedule) -> Grid:
        """A grid from the noise levels themselves, in either direction."""
        if isinstance(sigmas, str):
            raise TypeError(
                f"sigmas must be numbers, but got {sigmas!r}: a rule's grid is Grid.make({sigmas!r}, schedule, steps)"
            )
        if isinstance(sigmas, Tensor):
            sigmas = sigmas.detach().to("cpu", torch.float64).numpy()
        return Grid(np.asarray(sigmas, dtype=np.float64), schedule)

    @staticmethod
    def from_tau(tau: Sequence[int], schedule: NoiseSchedule) -> Grid:
        """The sampling grid over the paper's τ_1 < … < τ_S, times out of 1 … T in rising order, down to σ = 0 (C.1)."""
        sigmas = schedule.sigma(check_tau(tau, schedule)[::-1].astype(np.float64))
        return Grid(np.append(sigmas, 0.0), schedule, "tau")

    @staticmethod
    def make(name: str, schedule: NoiseSchedule, steps: int, **options: float) -> Grid:
        r"""A sampling grid of `steps` steps, from σ_T down to σ = 0.

        Parameters
        ----------
        name : str
            One of :func:`grids`:

            ``linear``, ``quadratic``
                The paper's D.2: τ_i = ⌊c i⌋ and τ_i = ⌊c i²⌋, with c such that τ_S = T, and made distinct.
            ``released-quadratic``
                The authors' code: squares of an even spacing of [0, √(0.8 T)], as 0-based labels. It stops
                at 0.8 T, and drops repeated τ.
            ``karras``
                Even in σ^{1/ρ} between σ_T and σ_min, then 0. Option ``rho`` (7).
            ``log``
                Even in log σ between σ_T and σ_min, then 0.
            ``t``
                Even in t, with fractions.
            ``asinh``, ``arctan``
                Even in asinh(σ/c) or arctan(σ/c) down to 0. Option ``c`` (asinh 0.02, arctan 1).
            ``flow``
                Even in (σ/(c + σ))^{1/ρ} down to 0: for c = ρ = 1 even in rectified flow's time. Options ``c`` (3 + 20/S)
                and ``rho`` (1.9 + 3/S): few steps are better off at large σ.
            ``flow-up``
                The same with ``c`` (1 + 0.18 √S) and ``rho`` (2.9) for encoding, where few steps are better off near the data.
        schedule : NoiseSchedule
            The schedule to cover.
        steps : int
            Number of steps S ≥ 1.
        **options : float
            The rule's own numbers, as above.

        Raises
        ------
        ValueError
            If the name or an option is unknown, or the schedule has fewer distinct steps.
        """
        if name not in _RULES:
            close = difflib.get_close_matches(name, _RULES, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"unknown grid {name!r}: {hint}known grids are {', '.join(_RULES)}")
        steps = whole(steps, "steps")
        known = list(inspect.signature(_RULES[name]).parameters)[2:]
        for option, value in options.items():
            if option not in known:
                raise ValueError(
                    f"grid {name!r} does not take the option {option!r}: it has {', '.join(known) or 'none'}"
                )
            if not isinstance(value, Real) or not 0.0 < float(value) < math.inf:
                raise ValueError(f"{option} must be a positive number, but got {value!r}")
        sigmas = _RULES[name](schedule, steps, **options)
        return Grid(np.append(sigmas, 0.0), schedule, name)


def check_tau(tau: Any, schedule: NoiseSchedule) -> NDArray[np.int64]:
    """The paper's τ as an array, refused if it does not rise or leaves 1 … T."""
    if not schedule.discrete:
        raise ValueError("tau counts trained steps, and this schedule is continuous: use Grid.explicit")
    T, given = int(schedule.T), np.asarray(tau)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
        raise ValueError(f"tau must be whole numbers out of 1 to {T}, in rising order, but got {tau!r}")
    if given.min() < 1 or given.max() > T:
        raise ValueError(f"tau must lie in 1 to {T}, but spans {given.min()} to {given.max()}")
    given = given.astype(np.int64)
    falls = np.flatnonzero(np.diff(given) <= 0)
    if falls.size:
        i = int(falls[0])
        raise ValueError(f"tau must rise strictly, but tau[{i}] = {given[i]} is followed by {given[i + 1]}")
    return given


def grids() -> tuple[str, ...]:
    """Names that :meth:`Grid.make` knows."""
    return tuple(_RULES)


def _tau(schedule: NoiseSchedule, steps: int, power: int) -> Array:
    if not schedule.discrete:
        return schedule.sigma(schedule.T * (np.arange(steps, 0.0, -1.0) / steps) ** power)
    total = int(schedule.T)
    if steps > total:
        raise ValueError(f"steps = {steps} needs that many distinct times, but the schedule was trained at {total}")
    tau, last = [], 0
    for i in range(1, steps + 1):
        last = max(last + 1, total * i**power // steps**power)
        tau.append(last)
    return schedule.sigma(np.array(tau[::-1], dtype=np.float64))


def _linear(schedule: NoiseSchedule, steps: int) -> Array:
    return _tau(schedule, steps, 1)


def _quadratic(schedule: NoiseSchedule, steps: int) -> Array:
    return _tau(schedule, steps, 2)


def _released_quadratic(schedule: NoiseSchedule, steps: int) -> Array:
    if not schedule.discrete:
        raise ValueError(
            "grid 'released-quadratic' counts trained steps, and this schedule is continuous: use 'quadratic'"
        )
    if steps < 2:
        raise ValueError("grid 'released-quadratic' needs steps >= 2: its first label is 0, its last 0.8 T")
    labels = np.unique((np.linspace(0.0, np.sqrt(schedule.T * 0.8), steps) ** 2).astype(np.int64))
    return schedule.sigma(labels[::-1].astype(np.float64) + 1.0)


def _time(schedule: NoiseSchedule, steps: int) -> Array:
    return schedule.sigma(schedule.T * np.arange(steps, 0.0, -1.0) / steps)


def _to_sigma_min(
    schedule: NoiseSchedule, steps: int, clock: Callable[[Any], Any], inverse: Callable[[Any], Any]
) -> Array:
    ends = clock(np.array([schedule.sigma_max, schedule.sigma_min]))
    sigmas = inverse(np.linspace(ends[0], ends[1], steps))
    sigmas[0] = schedule.sigma_max
    if steps > 1:
        sigmas[-1] = schedule.sigma_min
    return sigmas


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Array:
    return _to_sigma_min(schedule, steps, lambda s: s ** (1.0 / rho), lambda u: u**rho)


def _log(schedule: NoiseSchedule, steps: int) -> Array:
    return _to_sigma_min(schedule, steps, np.log, np.exp)


def _asinh(schedule: NoiseSchedule, steps: int, c: float = 0.02) -> Array:
    return _down_to_zero(schedule, steps, c, np.arcsinh, np.sinh)


def _arctan(schedule: NoiseSchedule, steps: int, c: float = 1.0) -> Array:
    return _down_to_zero(schedule, steps, c, np.arctan, np.tan)


def _flow(schedule: NoiseSchedule, steps: int, c: float | None = None, rho: float | None = None) -> Array:
    # Chosen with the default solver of sampling: benchmarks/defaults.py.
    c = 3.0 + 20.0 / steps if c is None else c
    rho = 1.9 + 3.0 / steps if rho is None else rho
    return _flow_grid(schedule, steps, c, rho)


def _flow_up(schedule: NoiseSchedule, steps: int, c: float | None = None, rho: float = 2.9) -> Array:
    # And with that of encoding.
    return _flow_grid(schedule, steps, 1.0 + 0.18 * math.sqrt(steps) if c is None else c, rho)


def _flow_grid(schedule: NoiseSchedule, steps: int, c: float, rho: float) -> Array:
    end = schedule.sigma_max / (c + schedule.sigma_max)
    u = end * (np.arange(steps, 0.0, -1.0) / steps) ** rho
    sigmas = c * u / (1.0 - u)
    sigmas[0] = schedule.sigma_max
    return sigmas


def _down_to_zero(
    schedule: NoiseSchedule, steps: int, c: float, clock: Callable[[Any], Any], inverse: Callable[[Any], Any]
) -> Array:
    sigmas = c * inverse(clock(schedule.sigma_max / c) * np.arange(steps, 0.0, -1.0) / steps)
    sigmas[0] = schedule.sigma_max
    return sigmas


_RULES: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "released-quadratic": _released_quadratic,
    "karras": _karras,
    "log": _log,
    "t": _time,
    "asinh": _asinh,
    "arctan": _arctan,
    "flow": _flow,
    "flow-up": _flow_up,
}
