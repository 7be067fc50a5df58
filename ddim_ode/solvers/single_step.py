r"""Single-step members of the family: the multistep formula, begun anew with every step.

Inside a step the evaluations lie at levels between its ends, even fractions apart in the clock, and each state on the
way is made by the family's own formula, by the polynomial through some of the evaluations so far. What DPM-Solver calls
single-step methods are these, with log σ for the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.solvers.base import Clock, Field, Solver, check_clock, check_named, clock
from ddim_ode.solvers.multistep import DATA, NOISE, Linear, Weights, over, ticks_of, weigh

__all__ = ["DPM2S", "DPM3S", "DPMPP2S", "SingleStep"]

Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class SingleStep(Solver):
    r"""A single-step exponential method.

    Parameters
    ----------
    label : str
        Its name.
    order : int
        Its order; taken on trust: measure it (docs/solvers.md, "Bring your own").
    c : tuple of float
        Where its evaluations lie, as fractions of the step in the clock; the first is 0.
    through : tuple of tuple of int
        Through which evaluations the polynomial goes that leads to each next one, and last to the end of the step.
    linear : Linear
        The part solved exactly; the quantity interpolated is its own.
    clock : str or Clock
        The clock.
    source : str
        Where it comes from.

    Notes
    -----
    A step that touches σ = 0 where the clock is infinite there, as log σ is, or that leaves it where the linear part is, as
    DATA's is, is eq. 13, and takes one call.
    """

    label: str
    order: int
    c: tuple[float, ...]
    through: tuple[tuple[int, ...], ...]
    linear: Linear = NOISE
    clock: str | Clock = "log"
    source: str = ""

    def __post_init__(self) -> None:
        check_named(self.clock)
        object.__setattr__(self, "c", tuple(map(float, self.c)))
        object.__setattr__(self, "through", tuple(map(tuple, self.through)))
        if len(self.through) != len(self.c) or self.c[:1] != (0.0,) or any(not 0.0 < c <= 1.0 for c in self.c[1:]):
            raise ValueError(
                f"single-step method {self.label}: c must begin with 0 and stay in (0, 1] after it, and `through` must have a row "
                f"for each of its {len(self.c)} evaluations"
            )
        for i, row in enumerate(self.through):
            if not row or len(set(row)) < len(row) or not all(0 <= j <= i for j in row):
                raise ValueError(
                    f"single-step method {self.label}: row {i} of `through` must name evaluations 0 to {i}"
                )
        if self.linear.directed:
            raise ValueError(
                f"single-step method {self.label}: a linear part that differs by direction is not supported"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    @property
    def nfe_per_step(self) -> int:  # type: ignore[override]
        return len(self.c)

    @property
    def exact(self) -> str:  # type: ignore[override]
        return self.linear.exact

    def nfe(self, steps: int) -> int:
        # The last step of sampling goes to σ = 0.
        return steps * len(self.c) - (len(self.c) - 1 if self.clock == "log" else 0)

    def calls(self, grid: Grid) -> int:
        return self.stages(grid).size

    def stages(self, grid: Grid) -> Array:
        return np.array([stage.sigma for step in self.plan(grid) for stage in step])

    def plan(self, grid: Grid) -> tuple[tuple[_Stage, ...], ...]:
        """The stages of every step of `grid`."""
        return _plan(self, grid)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[tuple[_Stage, ...], ...]:
        self.linear.check(x_bar)
        return self.plan(grid)

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        at, stored = x_bar, []
        for stage in state[n]:
            eps = field(at, stage.sigma)
            if stage.to.propagator is None:
                assert stage.to.weights is not None
                return x_bar.add(eps, alpha=stage.to.weights[0]), state, None
            stored.append(self.linear.stored(at, eps, stage.sigma))
            assert stage.to.weights is not None
            chosen = tuple(stored[j] for j in stage.through)
            at = self.linear.advance(x_bar, stage.to.propagator, stage.to.weights, chosen)
        return at, state, None


class _Stage(NamedTuple):
    """An evaluation at `sigma`, and what leads from the step's beginning to the next, by the stored `through`."""

    sigma: float
    through: tuple[int, ...]
    to: Weights


@lru_cache(maxsize=64)
def _plan(method: SingleStep, grid: Grid) -> tuple[tuple[_Stage, ...], ...]:
    u = clock(method.clock, grid.schedule, grid.steps)
    ticks = ticks_of(u, grid)
    if isinstance(method.clock, Clock):
        check_clock(u, float(grid.sigmas.min()), float(grid.sigmas.max()), slope=False)
    quantity = "data" if method.linear is DATA else "own"
    out: list[tuple[_Stage, ...]] = []
    for n in range(grid.steps):
        sigma, to = float(grid.sigmas[n]), float(grid.sigmas[n + 1])
        if not np.isfinite(ticks[n : n + 2]).all() or (sigma == 0.0 and method.linear.singular):
            out.append((_Stage(sigma, (0,), Weights(sigma, None, (to - sigma,))),))
            continue
        at = ticks[n] + np.array((*method.c, 1.0)) * (ticks[n + 1] - ticks[n])
        # The ends are the grid's own numbers, not their images under the clock and back.
        sigmas = np.array([sigma, *np.asarray(u.sigma(at[1:-1])).tolist(), to])
        sigmas[np.array((*method.c, 1.0)) == 1.0] = to
        stages = []
        for i, through in enumerate(method.through):
            chosen = list(through)
            weights = weigh(method.linear, quantity, over(u, sigma, sigmas[i + 1]), sigmas[chosen], at[chosen])
            stages.append(_Stage(float(sigmas[i]), through, weights))
        out.append(tuple(stages))
    return tuple(out)


_DPM = "DPM-Solver, Lu et al. 2022"
DPM2S = SingleStep("dpm2s", 2, (0.0, 1 / 2), ((0,), (1,)), source=f"{_DPM}, Algorithm 1 (DPM-Solver-2)")
DPM3S = SingleStep(
    "dpm3s", 3, (0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2)), source=f"{_DPM}, Algorithm 2 (DPM-Solver-3)"
)
DPMPP2S = SingleStep(
    "dpmpp2s", 2, (0.0, 1 / 2), ((0,), (1,)), DATA, source="DPM-Solver++, Lu et al. 2022, Algorithm 1 (2S)"
)
