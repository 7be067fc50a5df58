"""iPNDM: the weights of a uniform grid, on whatever grid there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddim_ode.grid import Grid
from ddim_ode.schedule import whole
from ddim_ode.solvers.base import Field, Solver
from ddim_ode.solvers.runge_kutta import combine

__all__ = ["Ipndm"]

#: Adams–Bashforth on even steps, newest first.
_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True, repr=False)
class Ipndm(Solver):
    r"""Improved pseudo-numerical methods for diffusion models, on eq. 14.

    .. math:: \bar x' = \bar x + (\sigma' - \sigma) \sum_{j<k} w_j\, \epsilon_{n-j}

    with the weights of Adams–Bashforth on even steps, whatever the steps are (Liu et al. 2022, in the form of Zhang & Chen
    2022). The weights sum to one, but miss the slope wherever neighbouring steps differ: the order is that of how little
    they do. It is 1 on an arbitrary grid, and 2 on one whose steps change smoothly, where the misses add up to the change
    of the step from one end to the other. No number of evaluations mends that, though more may make the error smaller:
    :class:`Multistep` has the weights that the grid asks for.

    Parameters
    ----------
    k : int
        Evaluations, 1–4; the first k − 1 steps use as many as there are.
    """

    k: int = 4
    nfe_per_step = 1
    order = 1
    source = "iPNDM, Liu et al. 2022, Zhang & Chen 2022: fixed weights"
    start = "ramp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole(self.k, "k, the evaluations of iPNDM,"))
        if self.k > 4:
            raise ValueError(f"k, the evaluations of iPNDM, must be 1, 2, 3 or 4, but got {self.k!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "ipndm" if self.k == 4 else f"ipndm{self.k}"

    @property
    def states(self) -> int:  # type: ignore[override]
        return self.k

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> tuple[list[float], tuple[Tensor, ...]]:
        return grid.sigmas.tolist(), ()

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        sigmas, history = state
        history = (field(x_bar, sigmas[n]), *history)
        h = sigmas[n + 1] - sigmas[n]
        moved = combine(x_bar, tuple(h * w for w in _WEIGHTS[len(history) - 1]), history)
        return moved, (sigmas, history[: self.k - 1]), None
