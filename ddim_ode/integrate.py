"""The one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from tqdm import tqdm

from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid
from ddim_ode.solution import Solution, Status, Step
from ddim_ode.solvers import Solver, get

__all__ = ["check_state", "integrate"]


def integrate(
    field: EpsilonField,
    x_bar: Tensor,
    sigmas: Grid | ArrayLike,
    solver: str | Solver = "ddim",
    *,
    dtype: torch.dtype | None = None,
    callback: Callable[[Step], Any] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    rows: slice | Tensor | None = None,
) -> Solution:
    r"""Solve eq. 14, :math:`d\bar x = \epsilon(\bar x, \sigma)\, d\sigma`, over a monotone sequence of σ.

    Parameters
    ----------
    field : EpsilonField
        ε.
    x_bar : Tensor
        The state :math:`\bar x = x\sqrt{1 + \sigma^2}` at ``sigmas[0]``, (B, \*d), finite.
    sigmas : Grid or sequence of float
        Nodes to visit: strictly falling (sampling) or rising (encoding), anywhere in [0, σ_T].
    solver : str or Solver
        A name from :func:`ddim_ode.solvers`, or a solver.
    dtype : torch.dtype, optional
        The state's dtype; by default that of `x_bar`.
    callback : callable, optional
        Called with a :class:`Step` after each step.
    progress : bool
        Show a progress bar on the error stream, if it is a terminal.
    trajectory : bool
        Keep the states at all nodes.
    rows : slice or Tensor, optional
        Which rows of the field's conditions, and which samples for a callback, the batch stands for.

    Returns
    -------
    Solution
        With ``x_bar`` at ``sigmas[-1]``. A sample whose state becomes NaN or infinite has the status
        ``NONFINITE`` and its last finite state; its neighbours are not touched. Finding that state costs a
        second run of the failed samples.

    Raises
    ------
    ValueError
        If the grid is not strictly monotone or leaves the schedule, or `x_bar` is not finite, has the wrong
        shape, or is on another device than the network. Nothing has been computed then.
    """
    grid = sigmas if isinstance(sigmas, Grid) else Grid.explicit(sigmas, field.schedule)
    if grid.schedule is not field.schedule and grid.schedule.config != field.schedule.config:
        raise ValueError(
            f"the grid was made for {grid.schedule!r}, but the field has {field.schedule!r}: make it for that one"
        )
    method = get(solver)
    check_state(field, x_bar, "x_bar")
    if dtype is not None:
        x_bar = to_dtype(x_bar, dtype, float(grid.sigmas.max()))
        check_state(field, x_bar, f"x_bar, as {dtype},")
    with torch.no_grad():
        return _run(field, x_bar, grid, method, callback, progress, trajectory, rows)


def _run(
    field: EpsilonField,
    start: Tensor,
    grid: Grid,
    solver: Solver,
    callback: Callable[[Step], Any] | None,
    progress: bool,
    trajectory: bool,
    rows: slice | Tensor | None,
) -> Solution:
    nodes = grid.sigmas.tolist()
    bound = field.bind(start, solver.stages(grid), rows)
    calls = 0

    def evaluate(x_bar: Tensor, sigma: float) -> Tensor:
        # Counted here: others may be using the field at the same time, a callback for one.
        nonlocal calls
        calls += 1
        return bound(x_bar, sigma)

    states = [start] if trajectory else None
    x_bar, state = start, solver.init(evaluate, start, grid)
    steps: Any = range(grid.steps)
    if progress:
        steps = tqdm(steps, desc=solver.name, unit="step", disable=None, leave=False)
    for n in steps:
        x_bar, state, _ = solver.step(evaluate, x_bar, n, state)
        if states is not None:
            states.append(x_bar)
        if callback is not None:
            callback(Step(n, nodes[n], nodes[n + 1], x_bar, calls, rows))

    if x_bar is start:  # a run that made no step of its own must still not hand the caller's tensor back
        x_bar = start.clone()
    count = start.shape[0]
    reached, status = [nodes[-1]] * count, [Status.SUCCESS] * count
    if not isinstance(x_bar, FakeTensor):  # a fake tensor has no values to check
        failed = _failed(x_bar)
        if failed is not None:
            x_bar = x_bar.clone()
            x_bar[failed], sigmas = _last_finite(field, start[failed], grid, solver, _subset(rows, failed))
            for i, sigma in zip(failed.tolist(), sigmas, strict=True):
                reached[i], status[i] = sigma, Status.NONFINITE
    kept = None if states is None else torch.stack(states)
    return Solution(x_bar, tuple(reached), solver.name, grid, calls, tuple(status), kept)


def _last_finite(
    field: EpsilonField, start: Tensor, grid: Grid, solver: Solver, rows: slice | Tensor | None
) -> tuple[Tensor, list[float]]:
    """Run failed samples again, watching each step: their last finite states and the σ of those."""
    evaluate = field.bind(start, solver.stages(grid), rows)
    x_bar, state = start, solver.init(evaluate, start, grid)
    good = start.clone()
    alive = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
    node = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
    # Not the last step: these samples are known to have failed by its end.
    for n in range(grid.steps - 1):
        x_bar, state, _ = solver.step(evaluate, x_bar, n, state)
        alive = alive & x_bar.isfinite().flatten(1).all(dim=1)
        if not bool(alive.any()):
            break
        good[alive] = x_bar[alive]
        node[alive] = n + 1
    return good, [float(grid.sigmas[i]) for i in node.tolist()]


def _subset(rows: slice | Tensor | None, chosen: Tensor) -> Tensor:
    if rows is None:
        return chosen
    if isinstance(rows, slice):
        return chosen * (rows.step or 1) + (rows.start or 0)
    return rows[chosen]


def to_dtype(x: Tensor, dtype: torch.dtype, largest: float = 1.0) -> Tensor:
    """The state in `dtype`, which must be a floating one that holds numbers `largest` times a few."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, such as torch.float64, but got {dtype}")
    if 8.0 * largest > torch.finfo(dtype).max:
        raise ValueError(
            f"dtype {dtype} cannot hold states at sigma = {largest:.4g}: use torch.float32 or torch.float64"
        )
    return x.to(dtype)


def _failed(x: Tensor) -> Tensor | None:
    """Indices of the samples that hold NaN or infinity, or None."""
    # A sum is finite only if its terms are: one cheap pass for the good path. It may overflow by itself.
    if bool(x.sum().isfinite()):
        return None
    failed = torch.nonzero(~x.isfinite().flatten(1).all(dim=1)).flatten()
    return failed if failed.numel() else None


def check_state(field: EpsilonField, x: Tensor, name: str) -> None:
    """Refuse a state that the run could not use, before any model call."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, but got {type(x).__name__}: use torch.as_tensor")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must hold floats, but its dtype is {x.dtype}; uint8 images become floats in [-1, 1] by x / 127.5 - 1"
        )
    if x.ndim < 2 or x.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B, *d) with B >= 1, but its shape is {tuple(x.shape)}")
    if field.shape is not None and tuple(x.shape[1:]) != field.shape:
        raise ValueError(
            f"{name} must have shape (B, {', '.join(map(str, field.shape))}) for this model, but got {tuple(x.shape)}"
        )
    if field.device is not None and x.device != field.device:
        raise ValueError(f"{name} is on {x.device}, but the model is on {field.device}: move one of them with .to(...)")
    if not isinstance(x, FakeTensor):
        failed = _failed(x)
        if failed is not None:
            bad = failed.tolist()
            raise ValueError(
                f"{name} must be finite, but sample{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:5]))} hold NaN or infinity"
            )
