r"""Explicit Runge–Kutta methods by tableau, in any clock.

In a clock u the equation is :math:`d\bar x/du = \sigma'(u)\, \epsilon(\bar x, \sigma(u))`, and

.. math:: k_i = \epsilon\Big(\bar x + h \sum_j a_{ij} \sigma'(u_j) k_j,\ \sigma(u_i)\Big), \qquad
          \bar x' = \bar x + h \sum_i b_i \sigma'(u_i) k_i, \qquad u_i = u_n + c_i h.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import whole
from ddim_ode.solvers.base import Clock, Field, Solver, check_named, clock, clock_over, named_in

__all__ = ["BS32", "DOP853", "DOPRI5", "EES25", "HEUN", "KUTTA3", "MIDPOINT", "RK4", "RungeKutta", "Tableau"]

Array = NDArray[np.float64]

#: The highest order whose conditions are checked: 200 of them, DOP853's.
_HIGHEST = 8
#: How far a condition may be off: coefficients are given to double precision, and DOP853's reach 43.
_ROUNDING = 1e-12


# -- rooted trees -------------------------------------------------------------------------------
#: A rooted tree: the trees that hang from its root, sorted. ``()`` is the tree of one node.
Tree = tuple


@cache
def trees(nodes: int) -> tuple[Tree, ...]:
    """All rooted trees of so many nodes: 1, 1, 2, 4, 9, 20, 48, 115, …."""

    def forests(left: int, largest: tuple[int, Tree]) -> Iterator[tuple[Tree, ...]]:
        if left == 0:
            yield ()
        for n in range(1, left + 1):
            for tree in trees(n):
                if (n, tree) <= largest:
                    yield from ((tree, *rest) for rest in forests(left - n, (n, tree)))

    return tuple(forests(nodes - 1, (nodes, ())))


def size(tree: Tree) -> int:
    """Nodes of a tree: the order of its condition."""
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    """γ: the sizes of all its subtrees, multiplied."""
    return math.prod(map(density, tree), start=size(tree))


def _slopes(tree: Tree, matrix: Array, found: dict[Tree, Array]) -> Array:
    """What a tree's elementary differential is worth in each stage's slope: Φ_i = ∏ over its branches of Σ_j a_ij Φ_j."""
    if tree not in found:
        branches = [matrix @ _slopes(branch, matrix, found) for branch in tree]
        found[tree] = np.prod(branches, axis=0) if branches else np.ones(len(matrix))
    return found[tree]


def _row(values: Any, name: str) -> tuple[float, ...]:
    """Finite numbers, or a ValueError that names them."""
    try:
        row = tuple(map(float, values))
    except (TypeError, ValueError):
        row = (math.nan,)
    if not all(map(math.isfinite, row)):
        raise ValueError(f"{name} must hold finite numbers, but got {values!r}")
    return row


def _matrix(rows: Any, name: str) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, Iterable):
        raise ValueError(f"{name} must hold rows of numbers, but got {rows!r}")
    return tuple(_row(row, f"a row of {name}") for row in rows)


# -- tableaus -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Inside:
    """States inside a step, for dense output of steps too long for their ends to tell.

    Attributes
    ----------
    order : int
        The order of those states; checked by the tableau.
    a : tuple of tuple of float
        Further stages, over the tableau's own, the slope at the end of the step, and earlier ones of these.
    b : tuple of (float, tuple of float)
        A fraction θ of the step, and the weights of all slopes there.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[tuple[float, tuple[float, ...]], ...]

    @property
    def c(self) -> tuple[float, ...]:
        """Nodes of the further stages."""
        return tuple(map(sum, self.a))


@dataclass(frozen=True)
class Tableau:
    r"""An explicit Butcher tableau that checks itself.

    Attributes
    ----------
    name : str
        What the method is called.
    order : int
        The order it claims, 1 to 8: all its conditions are checked, :math:`\sum_i b_i \Phi_i(t) = 1/\gamma(t)` for each rooted
        tree t of as many nodes or fewer [1]_.
    a : tuple of tuple of float
        Strictly lower triangle, row i with i entries; row 0 is empty.
    b : tuple of float
        Weights.
    source : str
        Where it comes from.
    nodes : tuple of float, optional
        c, if its last digits matter; they must be the row sums of `a`, which are taken otherwise.
    error : tuple of tuple of float
        What :class:`ddim_ode.solvers.Adaptive` estimates its error by: one or two rows :math:`b - \hat b` over the stages
        and one more, the slope at the end of the step.
    embedded_orders : tuple of int
        The order that each :math:`\hat b` claims; checked too.
    inside : Inside, optional
        How to find states inside a step.

    Raises
    ------
    ValueError
        If something is not a finite number, the rows have the wrong lengths, the nodes are not the row sums, a row of
        error is all zeros, or the tableau or one of its embedded solutions fails an order condition.

    References
    ----------
    .. [1] Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, theorem II.2.13.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str = ""
    nodes: tuple[float, ...] | None = None
    error: tuple[tuple[float, ...], ...] = ()
    embedded_orders: tuple[int, ...] = ()
    inside: Inside | None = None

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        set_("a", _matrix(self.a, f"a of tableau {self.name}"))
        set_("b", _row(self.b, f"b of tableau {self.name}"))
        set_("error", _matrix(self.error, f"error of tableau {self.name}"))
        if not isinstance(self.embedded_orders, Iterable):
            raise ValueError(
                f"embedded_orders of tableau {self.name} must hold an order for each row of error, such as (4,), "
                f"but got {self.embedded_orders!r}"
            )
        set_("order", self._order(self.order, "order"))
        set_("embedded_orders", tuple(self._order(order, "embedded_orders") for order in self.embedded_orders))
        stages = len(self.b)
        if [len(row) for row in self.a] != list(range(stages)):
            raise ValueError(f"tableau {self.name}: row i of a must hold i entries, for {stages} stages")
        if self.nodes is not None:
            set_("nodes", _row(self.nodes, f"nodes of tableau {self.name}"))
            sums = [sum(row) for row in self.a]
            if len(self.c) != stages or not np.allclose(self.c, sums, rtol=0.0, atol=_ROUNDING):
                raise ValueError(f"tableau {self.name}: nodes must be the row sums of a, {sums}, but are {self.nodes}")
        if len(self.error) != len(self.embedded_orders) or len(self.error) > 2:
            raise ValueError(
                f"tableau {self.name}: error must hold one or two rows, and embedded_orders an order for each, but they have "
                f"{len(self.error)} and {len(self.embedded_orders)}"
            )
        if any(len(row) != stages + 1 for row in self.error):
            raise ValueError(
                f"tableau {self.name}: a row of error must hold {stages + 1} entries, for {stages} stages and the end of the step"
            )
        if not all(map(any, self.error)):
            raise ValueError(
                f"tableau {self.name}: a row of error must not be all zeros, by which every step would look right"
            )
        # The slope at the end of the step is one more stage, whose row is b.
        matrix = np.zeros((stages + 1, stages + 1))
        matrix[:stages, :stages], matrix[stages, :stages] = self.matrix, self.b
        b = np.append(self.b, 0.0)
        self._check(matrix, b, self.order, f"tableau {self.name}")
        for i, (row, order) in enumerate(zip(self.error, self.embedded_orders, strict=True)):
            self._check(matrix, b - np.array(row), order, f"the embedded solution {i} of tableau {self.name}")
        if self.inside is not None:
            self._check_inside(self.inside, matrix)

    def _check_inside(self, inside: Inside, matrix: Array) -> None:
        own = len(matrix)
        order = self._order(inside.order, "inside.order")
        rows = _matrix(inside.a, f"inside.a of tableau {self.name}")
        size_ = own + len(rows)
        if [len(row) for row in rows] != list(range(own, size_)):
            raise ValueError(f"tableau {self.name}: row i of inside.a must hold {own} + i entries")
        matrix = np.pad(matrix, (0, len(rows)))
        for i, row in enumerate(rows, own):
            matrix[i, :i] = row
        for theta, weights in inside.b:
            name = f"the state of tableau {self.name} at {theta:g} of a step"
            row = _row(weights, f"inside.b of tableau {self.name}")
            if len(row) != size_:
                raise ValueError(
                    f"tableau {self.name}: a row of inside.b must hold {size_} entries, but has {len(row)}"
                )
            self._check(matrix, np.array(row), order, name, theta)

    def _order(self, order: Any, name: str) -> int:
        order = whole(order, f"{name} of tableau {self.name}")
        if order > _HIGHEST:
            raise ValueError(
                f"tableau {self.name} claims order {order}, but conditions are checked up to order {_HIGHEST}"
            )
        return order

    @staticmethod
    def _check(matrix: Array, b: Array, order: int, name: str, theta: float = 1.0) -> None:
        found: dict[Tree, Array] = {}
        for tree in (tree for n in range(1, order + 1) for tree in trees(n)):
            value, wanted = float(b @ _slopes(tree, matrix, found)), theta ** size(tree) / density(tree)
            if not abs(value - wanted) <= _ROUNDING:
                raise ValueError(
                    f"{name} claims order {order}, but a condition of order {size(tree)} gives {value:.15g} where "
                    f"{wanted:.15g} is needed"
                )

    @property
    def c(self) -> tuple[float, ...]:
        """Nodes: the row sums of a."""
        return tuple(float(sum(row)) for row in self.a) if self.nodes is None else self.nodes

    @property
    def matrix(self) -> Array:
        """A as a square array."""
        full = np.zeros((len(self.b), len(self.b)))
        for i, row in enumerate(self.a):
            full[i, :i] = row
        return full


_EULER = Tableau("euler", 1, ((),), (1.0,), "Euler 1768")
MIDPOINT = Tableau(
    "midpoint", 2, ((), (1 / 2,)), (0.0, 1.0), "Runge 1895; DPM-Solver-2 in the clock log σ is its exponential form"
)
HEUN = Tableau("heun", 2, ((), (1.0,)), (1 / 2, 1 / 2), "Heun 1900; used by Karras et al. 2022 (EDM)")
KUTTA3 = Tableau("kutta3", 3, ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), "Kutta 1901")
RK4 = Tableau("rk4", 4, ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), "Kutta 1901")
EES25 = Tableau(
    "ees25",
    2,
    ((), (1 / 3,), (-5 / 48, 15 / 16)),
    (1 / 10, 1 / 2, 2 / 5),
    "EES(2,5), x = 1/10, arXiv:2509.20599: a step and the same step back end where they began, up to order 5",
)


def _inside_dop853(thetas: tuple[float, ...]) -> Inside:
    """DOP853's own interpolant of order 7 [Hairer, Nørsett & Wanner 1993, II.6], as weights at some fractions of a step."""
    method = scipy.integrate.DOP853
    stages, further = method.n_stages, len(method.A_EXTRA)
    unit = np.eye(stages + 1 + further)
    moved, first, last = np.append(method.B, np.zeros(1 + further)), unit[0], unit[stages]
    terms = [moved, first - moved, 2.0 * moved - first - last, *method.D]
    rows = []
    for theta in thetas:
        row = np.zeros(len(unit))
        for i in reversed(range(len(terms))):
            row = (row + terms[i]) * (theta if i % 2 == 0 else 1.0 - theta)
        rows.append((theta, tuple(row.tolist())))
    a = tuple(tuple(row[: stages + 1 + i].tolist()) for i, row in enumerate(method.A_EXTRA))
    return Inside(7, a, tuple(rows))


def _published(
    name: str, order: int, method: Any, errors: dict[int, Array], source: str, inside: Inside | None = None
) -> Tableau:
    """The tableau that a class of scipy holds, and what its estimates b − b̂ are, by the order of b̂."""
    a = tuple(tuple(method.A[i, :i].tolist()) for i in range(method.n_stages))
    rows = tuple(tuple(row.tolist()) for row in errors.values())
    return Tableau(
        name, order, a, tuple(method.B.tolist()), source, tuple(method.C.tolist()), rows, tuple(errors), inside
    )


BS32 = _published("bs32", 3, scipy.integrate.RK23, {2: -scipy.integrate.RK23.E}, "Bogacki & Shampine 1989")
DOPRI5 = _published("dopri5", 5, scipy.integrate.RK45, {4: -scipy.integrate.RK45.E}, "Dormand & Prince 1980")
DOP853 = _published(
    "dop853",
    8,
    scipy.integrate.DOP853,
    {5: scipy.integrate.DOP853.E5, 3: scipy.integrate.DOP853.E3},
    "Prince & Dormand 1981; estimates of Hairer, Nørsett & Wanner 1993, II.5 and II.10",
    _inside_dop853((0.25, 0.5, 0.75)),
)


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
    euler_at_zero : bool
        Take a step that would ask the field at σ = 0 by Euler's method, as EDM's sampler takes its last.

    Notes
    -----
    A step one of whose stages would lie where the clock is singular (log σ, σ²/2 and t are, at σ = 0) is taken in the
    clock σ instead.
    """

    tableau: Tableau
    clock: str | Clock = "sigma"
    euler_at_zero: bool = False

    def __post_init__(self) -> None:
        check_named(self.clock)

    @property
    def name(self) -> str:  # type: ignore[override]
        return named_in(f"{self.tableau.name}-edm" if self.euler_at_zero else self.tableau.name, self.clock)

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.tableau.order

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return len(self.tableau.b)

    @property
    def source(self) -> str:  # type: ignore[override]
        edm = "; EDM's sampler, Karras et al. 2022, algorithm 1: Euler's step at σ = 0"
        return self.tableau.source + edm if self.euler_at_zero else self.tableau.source

    def nfe(self, steps: int) -> int:
        return steps * self.nfe_per_step - (self.nfe_per_step - 1 if self.euler_at_zero else 0)

    def calls(self, grid: Grid) -> int:
        return self.stages(grid).size

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[_Stages, ...]:
        return self.plan(grid)

    def stages(self, grid: Grid) -> Array:
        return np.array([sigma for step in self.plan(grid) for sigma in step.sigmas])

    def plan(self, grid: Grid) -> tuple[_Stages, ...]:
        """The stages of every step of `grid`."""
        return _plan(self, grid)

    def _stages(self, u: Clock, sigma: float, sigma_next: float) -> _Stages | None:
        """The stages of one step in the clock `u`, or None where the clock is singular."""
        tableau = self.tableau
        if self.euler_at_zero and 0.0 in (sigma, sigma_next):
            tableau = _EULER
        c = np.array(tableau.c)
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
        a = tuple(tuple((np.array(row) * worth[: len(row)]).tolist()) for row in tableau.a)
        return _Stages(tuple(at.tolist()), a, tuple((np.array(tableau.b) * worth).tolist()))

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        return run_stages(field, x_bar, state[n])[0], state, None


@lru_cache(maxsize=64)
def _plan(method: RungeKutta, grid: Grid) -> tuple[_Stages, ...]:
    u, plain = clock_over(method.clock, grid), clock("sigma", grid.schedule)
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
