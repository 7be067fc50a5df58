r"""Dense output: the state between the nodes of a run.

Every solver asks for ε at the nodes it visits, and ε is the slope of x̄ in σ. So between two nodes the state is read
off the polynomial in σ that takes the states and slopes of the nodes around: Hermite's interpolation. One rule serves
all solvers, and reading it costs no model call. Nor does keeping it, except with some adaptive solvers, which make calls
for slopes and for states inside long steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Dense", "onto_ends"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Dense:
    r"""A piecewise polynomial through the nodes of a run.

    Attributes
    ----------
    sigmas : ndarray
        (N + 1,), float64: strictly monotone nodes.
    x_bar : Tensor
        States there, (N + 1, B, \*d).
    slopes : tuple of (Tensor or None)
        ε at each node, (B, \*d), None where it is not known: at the last of fixed steps, and inside adaptive ones.
    order : int
        The order at which its error falls as the grid is refined: that of the solver.

    Notes
    -----
    Each piece uses the nearest nodes until they give at least ``max(4, order)`` conditions, a state and a slope counting
    one each; a piece with c conditions leaves an error of O(h^c), of no lower order than the solver's own. Wider pieces
    would swing on few, large steps. A run of too few steps gives fewer conditions. docs/runs.md has the derivation.
    """

    sigmas: Array
    x_bar: Tensor
    slopes: tuple[Tensor | None, ...]
    order: int

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest σ."""
        return float(self.sigmas.min()), float(self.sigmas.max())

    def __call__(self, sigma: float) -> Tensor:
        r"""x̄ at `sigma`, (B, \*d)."""
        low, high = self.range
        sigma = float(onto_ends(np.float64(sigma), low, high))
        if not low <= sigma <= high:
            raise ValueError(f"sigma = {sigma:.10g} lies outside the run, which covers {low:.10g} to {high:.10g}")
        at = np.flatnonzero(self.sigmas == sigma)
        if at.size:
            return self.x_bar.select(0, int(at[0])).clone()
        chosen = self._window(sigma)
        total: Any = 0.0
        for i, (value, slope) in zip(chosen, self._weights(sigma, chosen), strict=True):
            total = total + value * self.x_bar.select(0, i)
            if slope is not None:
                total = total + slope * self.slopes[i]  # type: ignore[operator]
        return total

    def _window(self, sigma: float) -> list[int]:
        """Neighbouring nodes, the two around `sigma` first among them, until there are conditions enough."""
        falling = self.sigmas[0] > self.sigmas[-1]
        after = int(np.searchsorted(-self.sigmas if falling else self.sigmas, -sigma if falling else sigma))
        first, last = after - 1, after
        conditions = lambda: sum(1 + (self.slopes[i] is not None) for i in range(first, last + 1))
        while conditions() < max(4, self.order) and last - first + 1 < self.sigmas.size:
            # The nearer of the two neighbours, of those there are.
            left = abs(self.sigmas[first - 1] - sigma) if first > 0 else np.inf
            right = abs(self.sigmas[last + 1] - sigma) if last + 1 < self.sigmas.size else np.inf
            first, last = (first - 1, last) if left <= right else (first, last + 1)
        return list(range(first, last + 1))

    def _weights(self, sigma: float, chosen: list[int]) -> list[tuple[float, float | None]]:
        r"""What each node's state and slope is worth at `sigma`: the polynomial's cardinal functions.

        With multiplicities m (2 with a slope, 1 without) and :math:`q_i(s) = \prod_{j \ne i} ((s - s_j)/(s_i - s_j))^{m_j}`
        they are :math:`(1 - (s - s_i) q_i'(s_i)) q_i` and :math:`(s - s_i) q_i`; and q_i alone where there is no slope.
        """
        nodes = self.sigmas[chosen]
        several = np.array([1 + (self.slopes[i] is not None) for i in chosen])
        out: list[tuple[float, float | None]] = []
        for i, own in enumerate(nodes):
            others = np.arange(nodes.size) != i
            q = float(np.prod(((sigma - nodes[others]) / (own - nodes[others])) ** several[others]))
            if several[i] == 1:
                out.append((q, None))
                continue
            bend = float(np.sum(several[others] / (own - nodes[others])))
            out.append((q * (1.0 - (sigma - own) * bend), q * (sigma - own)))
        return out


def onto_ends(sigmas: Any, low: float, high: float) -> Any:
    """Levels that float32 has rounded past an end, on that end, as a grid takes σ_T; all others as they are."""
    inside = np.clip(sigmas, low, high)
    return np.where(np.abs(sigmas - inside) <= 1e-6 * inside, inside, sigmas)
