"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ddim_ode.grid import Grid

__all__ = ["Solution", "Status", "Step"]


class Status(IntEnum):
    """How a sample's run ended."""

    SUCCESS = 0
    #: The field returned NaN or infinity; the sample holds its last finite state.
    NONFINITE = 1


@dataclass(frozen=True)
class Step:
    """What a callback sees after a step.

    Attributes
    ----------
    index : int
        Number of the step, from 0.
    sigma, sigma_next : float
        Where it started and where it arrived.
    x_bar : Tensor
        The state at `sigma_next`, (B, \\*d). Do not change it in place.
    nfe : int
        Model calls of this run so far.
    rows : slice, Tensor or None
        Which samples of the whole call the batch stands for, if ``batch_size`` splits it; None: all.
    """

    index: int
    sigma: float
    sigma_next: float
    x_bar: Tensor
    nfe: int
    rows: slice | Tensor | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    r"""The end of a run over a batch.

    Attributes
    ----------
    x : Tensor
        :math:`\bar x / \sqrt{1 + \sigma^2}`, (B, \*d): data space after sampling (σ = 0), the unit-variance latent
        x_T after encoding.
    x_bar : Tensor
        The state of eq. 14, (B, \*d), each sample at its own `sigma`.
    sigma : tuple of float
        The noise level each sample reached: the grid's last, unless the sample failed.
    solver : str
        The solver's name.
    grid : Grid
        The nodes visited.
    nfe : int
        Model calls along the path of a sample; a call on a batch counts once.
    status : tuple of Status
        One a sample.
    trajectory : Tensor or None
        States at every node, (steps + 1, B, \*d), if asked for.
    """

    x_bar: Tensor
    sigma: tuple[float, ...]
    solver: str
    grid: Grid
    nfe: int
    status: tuple[Status, ...]
    trajectory: Tensor | None = None

    @property
    def x(self) -> Tensor:
        if len(set(self.sigma)) == 1:
            return self.x_bar * (1.0 + self.sigma[0] ** 2) ** -0.5
        scale = (1.0 + torch.tensor(self.sigma, dtype=torch.float64) ** 2) ** -0.5
        scale = scale.to(self.x_bar.device, self.x_bar.dtype)
        return self.x_bar * scale.reshape(-1, *(1,) * (self.x_bar.ndim - 1))

    @property
    def success(self) -> bool:
        """Whether every sample ended well."""
        return all(status is Status.SUCCESS for status in self.status)

    @staticmethod
    def concatenate(parts: list[Solution]) -> Solution:
        """Runs over batches, as one run over all of them."""
        if len(parts) == 1:
            return parts[0]
        trajectories = [part.trajectory for part in parts if part.trajectory is not None]
        return Solution(
            x_bar=torch.cat([part.x_bar for part in parts]),
            sigma=tuple(s for part in parts for s in part.sigma),
            solver=parts[0].solver,
            grid=parts[0].grid,
            nfe=parts[0].nfe,
            status=tuple(s for part in parts for s in part.status),
            trajectory=torch.cat(trajectories, dim=1) if trajectories else None,
        )
