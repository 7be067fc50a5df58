r"""Explicit Runge–Kutta methods by tableau, in any clock.

In a clock u the equation is :math:`d\bar x/du = \sigma'(u)\, \epsilon(\bar x, \sigma(u))`, and

.. math:: k_i = \epsilon\Big(\bar x + h \sum_j a_{ij} \sigma'(u_j) k_j,\ \sigma(u_i)\Big), \qquad
          \bar x' = \bar x + h \sum_i b_i \sigma'(u_i) k_i, \qquad u_i = u_n + c_i h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.solvers.base import Clock, Field, Solver, clock

__all__ = ["HEUN", "KUTTA3", "MIDPOINT", "RK4", "RungeKutta", "Tableau"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau that checks itself.

    Attributes
    ----------
    name : str
        What the method is called.
    order : int
        The order it claims, 1 to 4: all its conditions are checked.
    a : tuple of tuple of float
        Strictly lower triangle, row i with i entries; row 0 is empty.
    b : tuple of float
        Weights.
    source : str
        Where it comes from.

    Raises
    ------
    ValueError
        If the rows have the wrong lengths, or the tableau fails an order condition.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", tuple(tuple(map(float, row)) for row in self.a))
        object.__setattr__(self, "b", tuple(map(float, self.b)))
        if not 1 <= self.order <= 4:
            raise ValueError(f"tableau {self.name} claims order {self.order}, but conditions are checked up to order 4")
        if [len(row) for row in self.a] != list(range(len(self.b))):
            raise ValueError(f"tableau {self.name}: row i of a must hold i entries, for {len(self.b)} stages")
        a, b, c = self.matrix, np.array(self.b), np.array(self.c)
        conditions = [
            (1, b.sum(), 1.0),
            (2, b @ c, 1 / 2),
            (3, b @ c**2, 1 / 3),
            (3, b @ a @ c, 1 / 6),
            (4, b @ c**3, 1 / 4),
            (4, (b * c) @ a @ c, 1 / 8),
            (4, b @ a @ c**2, 1 / 12),
            (4, b @ a @ a @ c, 1 / 24),
        ]
        for order, value, wanted in conditions:
            if order <= self.order and abs(value - wanted) > 1e-12:
                raise ValueError(
                    f"tableau {self.name} claims order {self.order}, but a condition of order {order} gives {value:.15g} "
                    f"where {wanted:.15g} is needed"
                )

    @property
    def c(self) -> tuple[float, ...]:
        """Nodes: the row sums of a."""
        return tuple(float(sum(row)) for row in self.a)

    @property
    def matrix(self) -> Array:
        """A as a square array."""
        full = np.zeros((len(self.b), len(self.b)))
        for i, row in enumerate(self.a):
            full[i, :i] = row
        return full


MIDPOINT = Tableau(
    "midpoint", 2, ((), (1 / 2,)), (0.0, 1.0), "Runge 1895; DPM-Solver-2 in the clock log σ is its exponential form"
)
HEUN = Tableau("heun", 2, ((), (1.0,)), (1 / 2, 1 / 2), "Heun 1900; used by Karras et al. 2022 (EDM)")
KUTTA3 = Tableau("kutta3", 3, ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), "Kutta 1901")
RK4 = Tableau("rk4", 4, ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "Kutta 1901")


class _Stages(NamedTuple):
    """One step, as numbers: where its stages lie, and what each slope is worth in x̄."""

    sigmas: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class RungeKutta(Solver):
    """An explicit Runge–Kutta method.

    Parameters
    ----------
    tableau : Tableau
        The method.
    clock : str or Clock
        The variable it steps in; see :func:`ddim_ode.solvers.base.clock`.

    Notes
    -----
    A step one of whose stages would lie where the clock is singular (log σ, σ²/2 and t are, at σ = 0) is taken in the
    clock σ instead.
    """

    tableau: Tableau
    clock: str | Clock = "sigma"

    @property
    def name(self) -> str:  # type: ignore[override]
        at = self.clock if isinstance(self.clock, str) else self.clock.name
        return self.tableau.name if at == "sigma" else f"{self.tableau.name}-{at}"

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.tableau.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return len(self.tableau.b)

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.tableau.source

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[_Stages, ...]:
        return self.plan(grid)

    def stages(self, grid: Grid) -> Array:
        return np.array([sigma for step in self.plan(grid) for sigma in step.sigmas])

    def plan(self, grid: Grid) -> tuple[_Stages, ...]:
        """The stages of every step of `grid`."""
        return _plan(self, grid)

    def _stages(self, u: Clock, sigma: float, sigma_next: float) -> _Stages | None:
        """The stages of one step in the clock `u`, or None where the clock is singular."""
        c = np.array(self.tableau.c)
        with np.errstate(all="ignore"):
            start, end = float(u.u(sigma)), float(u.u(sigma_next))
            h = end - start
            # The ends are the grid's own numbers, not their images under the clock and back.
            if not np.isfinite(h):
                return None
            at = np.where(c == 0.0, sigma, np.where(c == 1.0, sigma_next, u.sigma(start + c * h)))
            worth = h * np.asarray(u.slope(at), dtype=np.float64)
        if not (np.all(np.isfinite(worth)) and np.all(np.isfinite(at))):
            return None
        a = tuple(tuple((np.array(row) * worth[: len(row)]).tolist()) for row in self.tableau.a)
        return _Stages(tuple(at.tolist()), a, tuple((np.array(self.tableau.b) * worth).tolist()))

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        return run_stages(field, x_bar, state[n])[0], state, None


@lru_cache(maxsize=64)
def _plan(method: RungeKutta, grid: Grid) -> tuple[_Stages, ...]:
    u, plain = clock(method.clock, grid.schedule), clock("sigma", grid.schedule)
    ends = zip(grid.sigmas[:-1].tolist(), grid.sigmas[1:].tolist(), strict=True)
    return tuple(method._stages(u, *step) or method._stages(plain, *step) for step in ends)  # type: ignore[misc]


def run_stages(field: Field, x_bar: Tensor, stages: _Stages) -> tuple[Tensor, Tensor]:
    """One Runge–Kutta step: the new state, and the slope at the old one."""
    slopes: list[Tensor] = []
    for sigma, row in zip(stages.sigmas, stages.a, strict=True):
        slopes.append(field(combine(x_bar, row, slopes), sigma))
    return combine(x_bar, stages.b, slopes), slopes[0]


def combine(x_bar: Tensor, weights: tuple[float, ...], terms: Any) -> Tensor:
    """x̄ + Σ w_i y_i, skipping zeros."""
    total = None
    for weight, term in zip(weights, terms, strict=True):
        if weight != 0.0:
            total = x_bar.add(term, alpha=weight) if total is None else total.add_(term, alpha=weight)
    return x_bar if total is None else total
