"""The one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from ddim_ode.dense import Dense, onto_ends
from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid
from ddim_ode.noise import check_seed
from ddim_ode.schedule import as_numbers, whole
from ddim_ode.solution import Outcome, Solution, Status, Step
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
    dense: bool = False,
    save_at: Sequence[float] | None = None,
    gradients: bool = False,
    checkpoint: bool = False,
    rows: slice | Tensor | None = None,
    second: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
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
        Called with a :class:`Step` after each step from node to node of the grid. If it returns True (Python's, numpy's, or
        a boolean tensor of one element), the run stops there; whatever else it returns is ignored. An adaptive solver is
        not watched between the nodes: name those it must be called at.
    progress : bool
        Show a progress bar on the error stream, if it is a terminal; it counts nodes too.
    trajectory : bool
        Keep the states at all nodes.
    dense : bool
        Keep what :meth:`Solution.out` needs to give the state at any σ in between: states and slopes at all nodes.
    save_at : sequence of float, optional
        Noise levels in the range of the run, in any order, at which ``Solution.saved`` holds x̄, by the same dense output.
    gradients : bool
        Let gradients flow to `x_bar` and to the model's parameters, under ``torch.no_grad`` too. Without it nothing is
        recorded.
    checkpoint : bool
        The same, keeping only the states between steps and computing each step again in the backward pass: the
        network's activations of one step are held at a time, not those of all. The recomputed calls count in
        ``field.nfe``, not in ``Solution.nfe``.
    rows : slice or Tensor, optional
        Which rows of the field's conditions, and which samples for a callback, the batch stands for.
    second : Tensor, optional
        The second state at ``sigmas[0]``, for a solver that keeps two: ``Solution.second`` of the run to be undone.
    seed, first : int
        Of the noise that a stochastic solver adds: sample i draws by (`seed`, `first` + i) and the step, and with `rows` by
        its place among them.

    Returns
    -------
    Solution
        With ``x_bar`` at ``sigmas[-1]``. A sample whose state becomes NaN or infinite has the status
        ``NONFINITE`` and its last finite state; its neighbours are not touched. Finding that state costs a
        second run of the failed samples.

    Raises
    ------
    ValueError
        If the grid is not strictly monotone or leaves the schedule, `x_bar` is not finite, has the wrong
        shape, or is on another device than the network, or gradients are asked of a solver that gives none or in
        inference mode. Nothing has been computed then.
    """
    grid = sigmas if isinstance(sigmas, Grid) else Grid.explicit(sigmas, field.schedule)
    if grid.schedule is not field.schedule and grid.schedule.config != field.schedule.config:
        raise ValueError(
            f"the grid was made for {grid.schedule!r}, but the field has {field.schedule!r}: make it for that one"
        )
    method = get(solver)
    if method.stochastic and (dense or save_at is not None):
        raise ValueError(
            f"{method.name} may add noise at each step, and has no path between them: leave out dense and save_at"
        )
    if rows is None:  # else a batch of a run whose field was looked at when it began
        method.check_field(field)
    seed, first = check_seed(seed), whole(first, "first", 0)
    if (gradients or checkpoint) and not method.differentiable:
        raise ValueError(f"gradients do not flow through {method.name}: use another solver")
    if second is not None and not method.paired:
        raise ValueError(f"second is for solvers that keep two states, and {method.name} keeps one: leave it out")
    if checkpoint and method.adaptive:
        raise ValueError(f"checkpoint=True needs steps that are known beforehand, and {method.name} chooses its own")
    if (gradients or checkpoint) and torch.is_inference_mode_enabled():
        raise ValueError("gradients are never recorded in torch.inference_mode(): leave it, or use torch.no_grad()")
    if field.clips and grid.encoding:
        raise ValueError("a field that clips or thresholds the predicted data cannot encode: make one without")
    levels = None if save_at is None else _levels(save_at, grid.sigmas[list(method.between(grid))])
    check_state(field, x_bar, "x_bar")
    if second is not None:
        check_state(field, second, "second")
        if second.shape != x_bar.shape:
            raise ValueError(
                f"second must have the shape of the state, {tuple(x_bar.shape)}, but got {tuple(second.shape)}"
            )
    with torch.set_grad_enabled(gradients or checkpoint):
        if dtype is not None:
            x_bar = to_dtype(x_bar, dtype, float(grid.sigmas.max()))
            check_state(field, x_bar, f"x_bar, as {dtype},")
        if second is not None:
            second = to_dtype(second, x_bar.dtype, float(grid.sigmas.max()))
        wants_dense = dense or levels is not None
        key = (seed, first)
        run = _run(
            field, x_bar, second, grid, method, callback, progress, trajectory, wants_dense, checkpoint, rows, key
        )
        if levels is None:
            return run
        saved = torch.stack([run.out(level) for level in levels])
    return replace(run, saved=saved, dense=run.dense if dense else ())


def _levels(save_at: Sequence[float], sigmas: Any) -> list[float]:
    low, high = float(sigmas.min()), float(sigmas.max())
    levels = onto_ends(as_numbers(save_at), low, high)
    if levels.ndim != 1 or not levels.size or not np.all((levels >= low) & (levels <= high)):
        raise ValueError(f"save_at must be sigmas in the run, {low:.10g} to {high:.10g}, but got {save_at!r}")
    return levels.tolist()


class _Watched:
    """The field as a solver sees it, counting calls of this run: others may be using the field at the same time."""

    def __init__(self, bound: Callable[..., Tensor], dense: bool) -> None:
        self.bound, self.dense, self.calls = bound, dense, 0
        self.node: float | None = None  # where the step began, until its slope there is known
        self.at: Tensor | None = None  # and with what state
        self.slope: Tensor | None = None
        self.visits: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.parameters: tuple[Tensor, ...] = ()  # what an adjoint takes gradients to, besides the state

    def __call__(self, x_bar: Tensor, sigma: float | Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        eps = self.bound(x_bar, sigma) if rows is None else self.bound(x_bar, sigma, rows)
        if self.node is not None and rows is None and sigma == self.node and x_bar is self.at:
            self.slope, self.node, self.at = eps, None, None
        return eps

    def visit(self, rows: Tensor, sigma: Tensor, x_bar: Tensor, slope: Tensor | None) -> None:
        """Told by an adaptive solver of each node that samples reach, the first included: (A,), (A,), (A, …), (A, …)."""
        if self.dense:
            self.visits.append((rows, sigma, x_bar, slope))


def _run(
    field: EpsilonField,
    start: Tensor,
    second: Tensor | None,
    grid: Grid,
    solver: Solver,
    callback: Callable[[Step], Any] | None,
    progress: bool,
    trajectory: bool,
    dense: bool,
    checkpoint: bool,
    rows: slice | Tensor | None,
    key: tuple[int, int],
) -> Solution:
    named, solver = solver, _keyed(solver, key, rows, start.shape[0])
    nodes = grid.sigmas.tolist()
    evaluate = _Watched(field.bind(start, solver.stages(grid), rows), dense)
    evaluate.parameters = field.parameters()
    states = [start] if trajectory or dense else None
    slopes: list[Tensor | None] = []
    evaluate.node, evaluate.at = nodes[0], start  # a solver may ask for the slope there before its first step
    x_bar, state = start, _begin(solver, evaluate, start, second, grid)
    step = partial(recompute, solver.step, use_reentrant=False) if checkpoint else solver.step
    steps: Any = range(grid.steps)
    if progress:
        steps = tqdm(steps, desc=solver.name, unit="step", disable=None, leave=False)
    done = 0
    for n in steps:
        if dense and (n > 0 or evaluate.slope is None):
            evaluate.node, evaluate.at, evaluate.slope = nodes[n], x_bar, None
        x_bar, state, _ = step(evaluate, x_bar, n, state)
        done = n + 1
        if states is not None:
            states.append(x_bar)
            slopes.append(evaluate.slope)
        if solver.adaptive and _all_failed(solver.outcome(state)):
            # Nobody reached this node, nor will anybody the rest: they hold NaN below.
            done, left = grid.steps, grid.steps - done
            if states is not None:
                states.extend([x_bar] * left)
                slopes.extend([None] * left)
            break
        if callback is not None and _stops(callback(Step(n, nodes[n], nodes[done], x_bar, evaluate.calls, rows))):
            break

    calls = evaluate.calls
    count = start.shape[0]
    reached = [nodes[done]] * count
    status = [Status.SUCCESS if done == grid.steps else Status.STOPPED] * count
    outcome, other = solver.outcome(state), solver.second(state)
    # A run that made no step of its own must still not hand the caller's tensors back.
    if x_bar is start or x_bar is second:
        x_bar = x_bar.clone()
    if other is not None and (other is start or other is second):
        other = other.clone()
    if outcome is not None:
        ends = zip(outcome.status, outcome.sigma, status, strict=True)
        reached = list(outcome.sigma)
        status = [own or stopped for own, _, stopped in ends]
        outcome = replace(outcome, status=tuple(status))
    elif not isinstance(x_bar, FakeTensor):  # a fake tensor has no values to check
        failed = _failed(x_bar)
        beside = None if other is None else _failed(other)
        if beside is not None:
            failed = beside if failed is None else torch.cat((failed, beside)).unique()
        if failed is not None:
            x_bar = x_bar.clone()
            with torch.no_grad():
                with_ = None if second is None else second[failed]
                last, sigmas, last_second = _last_finite(
                    field, start[failed], with_, grid, named, done, _subset(rows, failed), key
                )
            x_bar[failed] = last
            if other is not None:
                other = other.clone()
                other[failed] = last_second
            for i, sigma in zip(failed.tolist(), sigmas, strict=True):
                reached[i], status[i] = sigma, Status.NONFINITE
    kept = None if states is None else torch.stack(states)
    if outcome is not None and kept is not None and any(outcome.status):
        # A sample that stopped early holds its last state, which is not one at the nodes beyond.
        sign = 1.0 if grid.encoding else -1.0
        beyond = torch.tensor([[sign * (s - to) > 0.0 for to in outcome.sigma] for s in nodes[: done + 1]])
        kept = kept.masked_fill(beyond.to(kept.device).reshape(*beyond.shape, *(1,) * (start.ndim - 1)), torch.nan)
    pieces: tuple[Dense, ...] = ()
    if dense and evaluate.visits:
        pieces = _each_dense(evaluate.visits, count, solver.order)
    elif dense and kept is not None:
        begin, end = solver.between(grid)
        size = min(end, done) + 1 - begin
        read = slice(begin, begin + size)
        pieces = (Dense(grid.sigmas[read], kept.narrow(0, begin, size), (*slopes, None)[read], solver.order),)
    return Solution(
        x_bar,
        tuple(reached),
        solver.name,
        grid,
        calls,
        tuple(status),
        kept if trajectory else None,
        pieces,
        None,
        outcome,
        other,
        named,
    )


def _begin(solver: Solver, evaluate: Any, start: Tensor, second: Tensor | None, grid: Grid) -> Any:
    return solver.init(evaluate, start, grid) if second is None else solver.begin(evaluate, start, second, grid)


def _all_failed(outcome: Outcome | None) -> bool:
    return outcome is not None and all(outcome.status)


def _stops(answer: Any) -> bool:
    """Whether a callback's answer is a plain yes: a list, a count or a bar that it hands on by the way is none."""
    if isinstance(answer, Tensor) and answer.dtype == torch.bool:
        if answer.numel() != 1:
            raise ValueError(
                f"a callback must answer for the whole batch, but returned booleans of shape {tuple(answer.shape)}: "
                "reduce them with .all() or .any()"
            )
        return bool(answer)
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


def _each_dense(
    visits: list[tuple[Tensor, Tensor, Tensor, Tensor | None]], count: int, order: int
) -> tuple[Dense, ...]:
    """The nodes that each sample of an adaptive run visited, as its own dense output."""
    nodes: list[list[tuple[float, Tensor, Tensor | None]]] = [[] for _ in range(count)]
    for rows, sigmas, x_bar, slope in visits:
        for j, (i, sigma) in enumerate(zip(rows.tolist(), sigmas.tolist(), strict=True)):
            nodes[i].append((sigma, x_bar[j : j + 1], None if slope is None else slope[j : j + 1]))
    return tuple(
        Dense(np.array([s for s, _, _ in own]), torch.stack([x for _, x, _ in own]), tuple(e for _, _, e in own), order)
        for own in nodes
    )


def _last_finite(
    field: EpsilonField,
    start: Tensor,
    second: Tensor | None,
    grid: Grid,
    solver: Solver,
    steps: int,
    rows: slice | Tensor | None,
    key: tuple[int, int],
) -> tuple[Tensor, list[float], Tensor]:
    """Run failed samples again, watching each step: their last finite states, the σ of those, and the second states there."""
    solver = _keyed(solver, key, rows, start.shape[0])
    evaluate = field.bind(start, solver.stages(grid), rows)
    x_bar, state = start, _begin(solver, evaluate, start, second, grid)
    good, other = start.clone(), solver.second(state)
    # A method may have a second state only once it has made a step; one that is not finite at once is none either.
    beside = torch.zeros_like(good) if other is None else other.nan_to_num(0.0, 0.0, 0.0)
    alive = torch.ones(start.shape[0], dtype=torch.bool, device=start.device)
    node = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
    # Not the last step: these samples are known to have failed by its end.
    for n in range(steps - 1):
        x_bar, state, _ = solver.step(evaluate, x_bar, n, state)
        other = solver.second(state)
        alive = alive & x_bar.isfinite().flatten(1).all(dim=1)
        if other is not None:
            alive = alive & other.isfinite().flatten(1).all(dim=1)
        if not bool(alive.any()):
            break
        good[alive] = x_bar[alive]
        if other is not None:
            beside[alive] = other[alive]
        node[alive] = n + 1
    return good, [float(grid.sigmas[i]) for i in node.tolist()], beside


def _keyed(solver: Solver, key: tuple[int, int], rows: slice | Tensor | None, count: int) -> Solver:
    if not solver.stochastic:
        return solver
    seed, first = key
    if rows is None:
        images: Sequence[int] = range(first, first + count)
    elif isinstance(rows, slice):
        start, step = rows.start or 0, rows.step or 1
        images = range(first + start, first + start + step * count, step)
    else:
        images = [first + i for i in rows.tolist()]
    return solver.keyed(seed, images)


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


def check_state(field: EpsilonField | None, x: Tensor, name: str) -> None:
    """Refuse a state that the run, or whatever else has no field, could not use, before any model call."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, but got {type(x).__name__}: use torch.as_tensor")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must hold floats, but its dtype is {x.dtype}; uint8 images become floats in [-1, 1] by x / 127.5 - 1"
        )
    if x.ndim < 2 or x.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B, *d) with B >= 1, but its shape is {tuple(x.shape)}")
    if field is not None and field.shape is not None and tuple(x.shape[1:]) != field.shape:
        raise ValueError(
            f"{name} must have shape (B, {', '.join(map(str, field.shape))}) for this model, but got {tuple(x.shape)}"
        )
    if field is not None and field.device is not None and x.device != field.device:
        raise ValueError(f"{name} is on {x.device}, but the model is on {field.device}: move one of them with .to(...)")
    if not isinstance(x, FakeTensor):
        failed = _failed(x)
        if failed is not None:
            bad = failed.tolist()
            raise ValueError(
                f"{name} must be finite, but sample{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:5]))} hold NaN or infinity"
            )
