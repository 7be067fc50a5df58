r"""Encoding images and decoding them again, by many methods at once: what was lost, where, and whether the latent is right.

A small round-trip error can be had with a wrong latent, and a right latent with a large one. So each method is judged by

- its **latent error**, against a reference solution of the encoding;
- its **decode error**: the reference latent decoded by it, against the image;
- its **round trip**, decoded from all that its code holds;
- the same **from the latent alone**, where the code holds a second state;
- the same in a **float32** state, which shows what rounding grows to;
- **states** in the code, and **calls** each way.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim_ode.comparison import Reference, by_name, circumstances, pays
from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid
from ddim_ode.metrics import mse, rms
from ddim_ode.noise import noise
from ddim_ode.sampling import DEFAULTS, GRID, LatentWarning, both_ways, encode, plan, sample
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solution import Solution, Status
from ddim_ode.solvers import Adaptive, Solver, get
from ddim_ode.solvers.runge_kutta import DOPRI5

__all__ = ["Reconstruction", "reconstruct", "reference_latents"]


def reference_latents(
    evaluate: EpsilonField,
    images: Tensor,
    *,
    batch_size: int | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
) -> Reference:
    r"""Encode to high accuracy twice, by Dormand and Prince's pair in two clocks.

    Tolerances, relative and absolute in the units of data, are 1e-9, and 1e-6 for a network that computes in less than double
    precision: it knows σ by waves of its label that a tighter one would have to follow.

    Parameters
    ----------
    evaluate : EpsilonField
        ε.
    images : Tensor
        x_0, (B, \*d).
    batch_size, data_range
        As for :func:`ddim_ode.encode`.

    Returns
    -------
    Reference
        ``.x`` the latents, NaN for a sample whose reference failed.
    """
    solvers = _precise(evaluate), replace(_precise(evaluate), clock="sigma")
    runs = [encode(evaluate, images, solver=solver, batch_size=batch_size, data_range=data_range) for solver in solvers]
    exact = runs[0].x.clone()
    lost = [i for i, pair in enumerate(zip(runs[0].status, runs[1].status, strict=True)) if any(pair)]
    exact[lost] = math.nan
    difference = float(rms(exact, runs[1].x).square().nanmean().sqrt())
    names = (f"dopri5 at {solvers[0].rtol:g} in asinh", f"dopri5 at {solvers[1].rtol:g} in sigma")
    return Reference(exact, difference, runs[0].nfe + runs[1].nfe, names)


def _precise(evaluate: EpsilonField) -> Adaptive:
    tol = 1e-9 if evaluate.dtype in (None, torch.float64) else 1e-6
    return Adaptive(DOPRI5, rtol=tol, atol=tol)


@dataclass(eq=False)
class Reconstruction:
    """What :func:`reconstruct` found: `record` is plain data for JSON, the rest is kept beside it.

    Attributes
    ----------
    record : dict
        Circumstances, the reference, one row a method and budget, and the errors along the way.
    encodings : dict
        The encoding runs by (method, budget), for codes.
    reconstructions : dict
        Images that came back, by (method, budget), (B, \\*d).
    """

    record: dict[str, Any]
    encodings: dict[tuple[str, int | None], Solution] = field(default_factory=dict)
    reconstructions: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)


def reconstruct(
    evaluate: EpsilonField,
    images: Tensor,
    solvers: Sequence[str | Solver],
    budgets: Sequence[int],
    *,
    grid: str | None = None,
    exact: Reference | None = None,
    along: int | None = None,
    batch_size: int | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
    advance: Callable[[str], Any] = lambda what: None,
) -> Reconstruction:
    r"""Encode and decode images by every method at every budget: Table 2 of the paper, and what it does not say.

    Parameters
    ----------
    evaluate : EpsilonField
        ε.
    images : Tensor
        x_0, (B, \*d); for a latent-diffusion model, latents of images, whose errors are measured on decoded pictures.
    solvers : sequence of str or Solver
        Each is used both ways, and the default the other way for one that is calibrated for one. ``"default"`` is what
        :func:`ddim_ode.round_trip` does when nothing is named; from the latent alone it is what :func:`ddim_ode.sample` does.
    budgets : sequence of int
        Model calls each way; steps for methods that iterate. An adaptive one has neither, and is run once.
    grid : str, optional
        One grid for all that do not bring their own; by default :data:`ddim_ode.sampling.GRID`.
    exact : Reference, optional
        The true latents, if they are known; else :func:`reference_latents` finds them.
    along : int, optional
        The budget at which errors are followed along σ, which costs one more accurate solution; None: at none.
    batch_size
        As for :func:`ddim_ode.encode`.
    data_range : (float, float) or None
        As for :func:`ddim_ode.encode`; also the scale of mean squared errors.
    advance : callable, optional
        Called with a few words before each piece of work.

    Returns
    -------
    Reconstruction
        A row has ``solver`` (as :func:`~ddim_ode.comparison.by_name`), ``nfe`` (the budget), ``encoder``, ``decoder``, ``steps``,
        ``grid``, ``encode_calls``, ``decode_calls``, ``states``; means over images ``latent_rms``, ``decode_rms`` (root mean
        squares over images and dimensions, in x), ``round_trip_mse``, ``alone_mse``, ``float32_mse`` (on [0, 1]); ``each``, the
        same for every image; ``growth``, how many times larger a relative error of the second state comes back in x; ``residual``
        and ``contraction`` of methods that iterate; ``failed``, the images that failed, which the means leave out, and
        ``unconverged``, those that an iteration did not finish, which they do not; ``seconds``. A budget below one step, or another
        than a calibrated solver's own, gives a row of nulls.

    Raises
    ------
    ValueError
        If an argument cannot be used, before any model call.
    """
    methods = by_name(solvers)
    schedule = evaluate.schedule
    if not methods or not budgets:
        raise ValueError("reconstruct needs at least one solver and one budget")
    for solver in methods.values():
        if solver is not None:
            solver.check_field(evaluate)
        for budget in budgets:
            if _affordable(solver, budget, schedule):
                _downward(evaluate, solver, grid, budget, *_plan(evaluate, solver, grid, budget))
    if not any(_affordable(solver, budget, schedule) for solver in methods.values() for budget in budgets):
        raise ValueError(f"no budget of {', '.join(map(str, budgets))} calls pays for one step of {', '.join(methods)}")
    if exact is None:
        advance("reference")
        exact = reference_latents(evaluate, images, batch_size=batch_size, data_range=data_range)
    options: dict[str, Any] = {"batch_size": batch_size}
    judge = _Judge(evaluate, exact.x, images if evaluate.codec is None else evaluate.codec.decode(images), data_range)
    found = Reconstruction(
        circumstances(evaluate, torch.float64)
        | {
            "images": images.shape[0],
            "grid": grid or GRID,
            "defaults": {k: v._asdict() for k, v in DEFAULTS.items()},
            "data_range": list(data_range or (-1.0, 1.0)),
            "reference": {"rms_difference": exact.difference, "nfe": exact.nfe, "methods": exact.methods},
        }
    )
    rows: list[dict[str, Any]] = []
    found.record["rows"] = rows
    with warnings.catch_warnings():
        # A coarse encoder's latent may look odd; here that is a result, not a user's mistake.
        warnings.simplefilter("ignore", LatentWarning)
        for name, solver in methods.items():
            adaptive = solver is not None and solver.adaptive
            asked: Sequence[int | None] = (None,) if adaptive else budgets
            for nfe in asked:
                advance(name if nfe is None else f"{name}, {nfe} {_unit(solver)}")
                if nfe is not None and not _affordable(solver, nfe, schedule):
                    rows.append({"solver": name, "nfe": nfe} | dict.fromkeys(_MEASURED))
                    continue
                row, there, back = _measure(evaluate, images, judge, name, solver, grid, nfe, options)
                rows.append(row)
                found.encodings[name, nfe], found.reconstructions[name, nfe] = there, back.x
        if along is not None:
            advance("reference along the way")
            found.record["along"] = _along(evaluate, images, methods, grid, along, options, data_range)
    return found


_MEASURED = (
    "encoder", "decoder", "steps", "grid", "encode_calls", "decode_calls", "states", "latent_rms", "decode_rms", "round_trip_mse",
    "alone_mse", "float32_mse", "each", "growth", "residual", "contraction", "failed", "unconverged", "seconds",
)  # fmt: skip


def _unit(solver: Solver | None) -> str:
    return "steps" if solver is not None and solver.iterative else "calls"


def _affordable(solver: Solver | None, nfe: int, schedule: NoiseSchedule) -> bool:
    if solver is None:
        return all(get(default.solver).nfe(1) <= nfe for default in DEFAULTS.values())
    return not solver.budgeted or pays(solver, nfe, schedule)


def _plan(evaluate: EpsilonField, solver: Solver | None, grid: str | None, nfe: int | None) -> tuple[Solver, Grid]:
    """The encoder and its grid."""
    solver, _ = both_ways(evaluate, solver)
    if solver is None or solver.own_grid(evaluate.schedule) is not None:
        return plan(evaluate, "encode", solver, None, None, nfe)
    if solver.adaptive:
        return plan(evaluate, "encode", solver, None, None, None)
    if solver.iterative:
        return plan(evaluate, "encode", solver, grid or GRID, nfe, None)
    return plan(evaluate, "encode", solver, grid or GRID, None, nfe)


@dataclass(frozen=True, eq=False)
class _Judge:
    """What errors are measured against."""

    evaluate: EpsilonField
    latent: Tensor
    pictures: Tensor
    data_range: tuple[float, float] | None

    def lost(self, run: Solution, before: Sequence[Status]) -> Tensor:
        """The mean squared error of each image that came back, NaN where either way failed."""
        back = run.x if self.evaluate.codec is None else self.evaluate.codec.decode(run.x)
        return _only(mse(self.pictures, back, self.data_range or (-1.0, 1.0)), before, run.status)


def _only(values: Tensor, *status: Sequence[Status]) -> Tensor:
    # What an iteration left unsolved is a result like others; what is not finite is none.
    lost = [i for i, each in enumerate(zip(*status, strict=True)) if any(s not in _RESULTS for s in each)]
    values = values.clone()
    values[lost] = math.nan
    return values


_RESULTS = (Status.SUCCESS, Status.UNCONVERGED)


def _measure(
    evaluate: EpsilonField,
    images: Tensor,
    judge: _Judge,
    name: str,
    solver: Solver | None,
    grid: str | None,
    nfe: int | None,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Solution, Solution]:
    method, nodes = _plan(evaluate, solver, grid, nfe)
    way = {"data_range": judge.data_range} | options
    start = time.perf_counter()
    there = encode(evaluate, images, solver=method, grid=nodes, **way)
    down = _downward(evaluate, solver, grid, nfe, method, nodes)
    held = lambda run: run.second if down["solver"] is method else None  # another decodes the latent alone
    back = sample(evaluate, there.x, second=held(there), **down, **options)
    seconds = time.perf_counter() - start
    # What nothing but the latent is decoded by: the default for sampling, where that is another.
    plain: dict[str, Any] = {"nfe": nfe} if solver is None else down
    alone = back if held(there) is None else sample(evaluate, there.x, **plain, **options)
    known = judge.latent.flatten(1).isfinite().all(dim=1)
    from_reference = sample(evaluate, torch.nan_to_num(judge.latent), **plain, **options)
    coarse: dict[str, Any] = {"dtype": torch.float32}
    there32 = encode(evaluate, images, solver=method, grid=nodes, **coarse, **way)
    back32 = sample(evaluate, there32.x, second=held(there32), **down, **coarse, **options)
    each = {
        "latent_rms": _only(rms(there.x, judge.latent), there.status),
        "decode_rms": _only(
            torch.where(known.cpu(), rms(from_reference.x, images).cpu(), math.nan), from_reference.status
        ),
        "round_trip_mse": judge.lost(back, there.status),
        "alone_mse": judge.lost(alone, there.status),
        "float32_mse": judge.lost(back32, there32.status),
    }
    failed = [
        i for i, pair in enumerate(zip(there.status, back.status, strict=True)) if any(s not in _RESULTS for s in pair)
    ]
    unsolved = [i for i, pair in enumerate(zip(there.status, back.status, strict=True)) if Status.UNCONVERGED in pair]
    outcome = there.outcome
    row: dict[str, Any] = {
        "solver": name,
        "nfe": nfe,
        "encoder": there.solver,
        "decoder": back.solver,
        "steps": None if method.adaptive else nodes.steps,
        "grid": nodes.name,
        "encode_calls": _calls(there),
        "decode_calls": _calls(back),
        "states": 1 if held(there) is None else 2,
        **{key: _mean(value, root=key.endswith("rms")) for key, value in each.items()},
        "each": {key: value.tolist() for key, value in each.items()},
        "growth": None if held(there) is None else _growth(evaluate, there, back, down, options),
        "residual": None if outcome is None or outcome.residual is None else list(outcome.residual),
        "contraction": None if outcome is None or outcome.contraction is None else list(outcome.contraction),
        "failed": failed,
        "unconverged": unsolved,
        "seconds": seconds,
    }
    return row, there, back


def _growth(
    evaluate: EpsilonField, there: Solution, back: Solution, down: dict[str, Any], options: dict[str, Any]
) -> float:
    """How many times larger a relative error of the second state comes back in x: decoded once with one of 1e-6."""
    second = there.second
    assert second is not None
    push = 1e-6 * noise(tuple(second.shape[1:]), len(second), 0).to(second)
    moved = sample(evaluate, there.x, second=second * (1.0 + push), **down, **options)
    return float(_only(rms(moved.x, back.x), there.status, moved.status).square().nanmean().sqrt()) / 1e-6


def _downward(
    evaluate: EpsilonField, solver: Solver | None, grid: str | None, nfe: int | None, method: Solver, nodes: Grid
) -> dict[str, Any]:
    """How what `method` has encoded goes back: over the same nodes if it has two states or no budget, else by as many calls."""
    there, back = both_ways(evaluate, solver)
    if there is not back:  # what goes one way only, and the default the other
        return dict(zip(("solver", "grid"), plan(evaluate, "sample", back, None, None, nfe), strict=True))
    if method.paired or not method.budgeted:
        return {"solver": method, "grid": nodes.reversed()}
    return {"solver": method, "grid": plan(evaluate, "sample", method, grid or GRID, None, nfe)[1]}


def _calls(run: Solution) -> float:
    """Calls along the path of a sample: an adaptive run's are its samples' own, in the mean."""
    if run.outcome is not None and run.outcome.residual is None:
        return float(np.mean(run.outcome.nfe))
    return run.nfe


def _mean(values: Tensor, root: bool) -> float:
    """Over the images that did not fail; of root mean squares, that of all their dimensions."""
    return float(values.square().nanmean().sqrt() if root else values.nanmean())


def _along(
    evaluate: EpsilonField,
    images: Tensor,
    methods: dict[str, Solver | None],
    grid: str | None,
    nfe: int,
    options: dict[str, Any],
    data_range: tuple[float, float] | None,
) -> dict[str, Any]:
    """RMS error of the state, in x, at every node on the way up and on the way back."""
    runs: dict[str, tuple[Solution, Solution]] = {}
    for name, solver in methods.items():
        if not _affordable(solver, nfe, evaluate.schedule):
            continue
        method, nodes = _plan(evaluate, solver, grid, nfe)
        if method.adaptive:
            continue  # it has no nodes
        there = encode(evaluate, images, solver=method, grid=nodes, trajectory=True, data_range=data_range, **options)
        down = _downward(evaluate, solver, grid, nfe, method, nodes)
        second = there.second if down["solver"] is method else None
        back = sample(evaluate, there.x, second=second, trajectory=True, **down, **options)
        runs[name] = there, back
    levels = sorted({s for pair in runs.values() for run in pair for s in run.grid.sigmas.tolist()})
    if not levels:
        return {"nfe": nfe, "rows": []}
    exact = encode(evaluate, images, solver=_precise(evaluate), save_at=levels, data_range=data_range, **options)
    assert exact.saved is not None
    place = {level: i for i, level in enumerate(levels)}
    rows = []
    for name, pair in runs.items():
        row: dict[str, Any] = {"solver": name}
        for way, run in zip(("encode", "decode"), pair, strict=True):
            assert run.trajectory is not None
            errors = []
            for i, sigma in enumerate(run.grid.sigmas.tolist()):
                apart = rms(run.trajectory[i], exact.saved[place[sigma]]) / math.sqrt(1.0 + sigma * sigma)
                errors.append(float(apart.square().nanmean().sqrt()))
            row[way] = {"sigmas": run.grid.sigmas.tolist(), "rms": errors}
        rows.append(row)
    return {"nfe": nfe, "rows": rows}
