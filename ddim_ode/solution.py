"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_ode.dense import Dense, onto_ends
from ddim_ode.grid import Grid

__all__ = ["Outcome", "Solution", "Status", "Step"]


class Status(IntEnum):
    """How a sample's run ended."""

    SUCCESS = 0
    #: The field returned NaN or infinity; the sample holds its last finite state.
    NONFINITE = 1
    #: An adaptive solver used up its `max_steps`; the sample holds the state it had reached.
    MAX_STEPS = 2
    #: An adaptive solver's step fell below what σ can resolve; the sample holds the state it had reached.
    STALLED = 3
    #: A callback stopped the run.
    STOPPED = 4
    #: An implicit step was not solved to its tolerance, and the sample went on from the best state that was found; or its
    #: decoder does not return the image.
    UNCONVERGED = 5


@dataclass(frozen=True)
class Outcome:
    """What became of each sample of an adaptive or implicit run; every tuple holds one entry a sample.

    Attributes
    ----------
    status : tuple of Status
        How it ended.
    sigma : tuple of float
        The noise level it reached.
    nfe : tuple of int
        Model calls it took part in.
    accepted, rejected : tuple of int
        Its steps.
    residual : tuple of float or None
        Of an implicit run: by how much the worst of its steps is not solved, or, if that is more, by how much the decoder of
        an :class:`Inverse` then misses the image; in the units of data.
    contraction : tuple of float or None
        Of an implicit run: the largest factor by which a step's iteration was seen to change a difference of states. Below
        one nothing speaks against the step's solution being the only one; above, there may be others.
    """

    status: tuple[Status, ...]
    sigma: tuple[float, ...]
    nfe: tuple[int, ...]
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    residual: tuple[float, ...] | None = None
    contraction: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Step:
    """What a callback sees after a step. A callback that returns True stops the run of this batch there.

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
        The noise level each sample reached: the grid's last, unless the sample failed or the run was stopped.
    solver : str
        The solver's name.
    method : Solver or None
        The solver itself, as codes keep it.
    grid : Grid
        The nodes to visit; a run that a callback stopped has visited the first of them.
    nfe : int
        Model calls along the path of a sample; a call on a batch counts once.
    status : tuple of Status
        One a sample.
    trajectory : Tensor or None
        States at every node, (steps + 1, B, \*d), if asked for. A stopped run has fewer; where batches were stopped at
        different nodes, those that came less far are NaN beyond.
    dense : tuple of Dense
        Dense output, if asked for: pieces of the batch in order, each with its own nodes. :meth:`out` reads it.
    saved : Tensor or None
        x̄ at the levels of ``save_at``, in their order, (levels, B, \*d), if asked for; NaN where a sample did not get
        so far.
    outcome : Outcome or None
        Status, steps and calls of each sample of an adaptive or implicit run.
    second : Tensor or None
        The second state of a method that keeps two, (B, \*d): without it the way back is not exact.
    """

    x_bar: Tensor
    sigma: tuple[float, ...]
    solver: str
    grid: Grid
    nfe: int
    status: tuple[Status, ...]
    trajectory: Tensor | None = None
    dense: tuple[Dense, ...] = ()
    saved: Tensor | None = None
    outcome: Outcome | None = None
    second: Tensor | None = None
    method: Any = None

    @property
    def x(self) -> Tensor:
        with _recording(self.x_bar):
            if len(set(self.sigma)) == 1:
                return self.x_bar * (1.0 + self.sigma[0] ** 2) ** -0.5
            scale = (1.0 + torch.tensor(self.sigma, dtype=torch.float64) ** 2) ** -0.5
            scale = scale.to(self.x_bar.device, self.x_bar.dtype)
            return self.x_bar * scale.reshape(-1, *(1,) * (self.x_bar.ndim - 1))

    @property
    def success(self) -> bool:
        """Whether every sample ended well."""
        return all(status is Status.SUCCESS for status in self.status)

    def out(self, sigma: float) -> Tensor:
        r"""Dense output: x̄ at any σ between the ends of the run, (B, \*d). No model call.

        Parameters
        ----------
        sigma : float
            A noise level in the range of the run. Where a sample did not get so far, its row is NaN.

        Raises
        ------
        ValueError
            If the run was not made with ``dense=True``, or σ lies outside it.
        """
        if not self.dense:
            raise ValueError("this run kept no dense output: ask for it, dense=True")
        sigmas = self.grid.sigmas if self.method is None else self.grid.sigmas[list(self.method.between(self.grid))]
        low, high = float(sigmas.min()), float(sigmas.max())
        sigma = float(onto_ends(np.float64(sigma), low, high))
        if not low <= sigma <= high:
            raise ValueError(f"sigma must lie in the run, {low:.10g} to {high:.10g}, but got {sigma!r}")
        reached = [piece.range[0] <= sigma <= piece.range[1] for piece in self.dense]
        pieces = zip(self.dense, reached, strict=True)
        with _recording(*(piece.x_bar for piece in self.dense)):
            return torch.cat(
                [
                    piece(sigma) if there else torch.full_like(piece.x_bar.select(0, 0), torch.nan)
                    for piece, there in pieces
                ]
            )

    @staticmethod
    def concatenate(parts: list[Solution]) -> Solution:
        """Runs over batches, as one run over all of them."""
        if len(parts) == 1:
            return parts[0]
        with _recording(*(part.x_bar for part in parts)):
            return Solution._concatenate(parts)

    @staticmethod
    def _concatenate(parts: list[Solution]) -> Solution:
        trajectories = [part.trajectory for part in parts if part.trajectory is not None]
        saved = [part.saved for part in parts if part.saved is not None]
        outcomes = [part.outcome for part in parts if part.outcome is not None]
        seconds = [part.second for part in parts if part.second is not None]
        # A run that a callback stopped early has a shorter trajectory.
        longest = max(map(len, trajectories), default=0)
        trajectories = [
            t if len(t) == longest else torch.cat((t, t.new_full((longest - len(t), *t.shape[1:]), torch.nan)))
            for t in trajectories
        ]
        return Solution(
            x_bar=torch.cat([part.x_bar for part in parts]),
            sigma=tuple(s for part in parts for s in part.sigma),
            solver=parts[0].solver,
            grid=parts[0].grid,
            nfe=max(part.nfe for part in parts),
            status=tuple(s for part in parts for s in part.status),
            trajectory=torch.cat(trajectories, dim=1) if trajectories else None,
            dense=tuple(piece for part in parts for piece in part.dense),
            saved=torch.cat(saved, dim=1) if saved else None,
            outcome=None if not outcomes else _join(outcomes),
            second=torch.cat(seconds) if seconds else None,
            method=parts[0].method,
        )


def _recording(*results: Tensor) -> Any:
    """Results that gradients flow from are scaled, joined and read off with gradients, whatever the mode outside."""
    return torch.set_grad_enabled(torch.is_grad_enabled() or any(x.requires_grad for x in results))


def _join(parts: list[Outcome]) -> Outcome:
    first = parts[0]
    names = [f.name for f in fields(Outcome) if getattr(first, f.name) is not None]
    return Outcome(**{name: tuple(x for part in parts for x in getattr(part, name)) for name in names})
