"""The main job: solvers side by side, on the same latents and the same images, at the same budgets of calls."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

import ddim_ode
from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid
from ddim_ode.metrics import mse, rms
from ddim_ode.sampling import DEFAULTS, GRID, both_ways, plan, round_trip, sample
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solution import Status
from ddim_ode.solvers import Solver, get

__all__ = ["Comparison", "Reference", "by_name", "check_budgets", "circumstances", "compare", "pays", "reference"]


@dataclass(frozen=True, eq=False)
class Reference:
    r"""What the exact solution is taken to be.

    Attributes
    ----------
    x : Tensor
        (B, \*d), NaN for a sample whose reference failed.
    difference : float
        RMS difference to a second method at a like number of calls, over the others: how far `x` can be trusted.
    nfe : int
        Calls spent on both.
    methods : tuple of str
        What was run.
    """

    x: Tensor
    difference: float
    nfe: int
    methods: tuple[str, ...]


def reference(
    evaluate: EpsilonField, latent: Tensor, *, nfe: int = 400, progress: bool = False, batch_size: int | None = None
) -> Reference:
    r"""Solve to high accuracy twice: by two clocks, on two grids that keep refining as σ → 0.

    Parameters
    ----------
    evaluate : EpsilonField
        ε.
    latent : Tensor
        x_T, (B, \*d).
    nfe : int
        Calls each of the two may spend.
    progress, batch_size
        As for :func:`ddim_ode.sample`.
    """
    runs, names = [], []
    for method, c in ((get("ab4-rk"), 0.05), (get("arctan4-rk"), 0.2)):
        grid = Grid.make("asinh", evaluate.schedule, method.steps(nfe), c=c)
        runs.append(sample(evaluate, latent, solver=method, grid=grid, progress=progress, batch_size=batch_size))
        names.append(f"{method.name} on asinh, c = {c:g}")
    exact = runs[0].x.clone()
    lost = [i for i, pair in enumerate(zip(runs[0].status, runs[1].status, strict=True)) if any(pair)]
    exact[lost] = math.nan
    difference = float(rms(exact, runs[1].x).square().nanmean().sqrt())
    return Reference(exact, difference, runs[0].nfe + runs[1].nfe, tuple(names))


@dataclass(eq=False)
class Comparison:
    """What :func:`compare` found: `record` is plain data for JSON; the pictures are kept beside it.

    Attributes
    ----------
    record : dict
        Circumstances, the reference, and one row a solver and budget.
    samples, reconstructions : dict
        Images by (solver, budget), (B, \\*d).
    """

    record: dict[str, Any]
    samples: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    reconstructions: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def compare(
    evaluate: EpsilonField,
    latent: Tensor,
    images: Tensor,
    solvers: Sequence[str | Solver],
    budgets: Sequence[int],
    *,
    grid: str | None = None,
    dtype: torch.dtype = torch.float64,
    exact: Reference | None = None,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
    advance: Callable[[str], Any] = lambda what: None,
) -> Comparison:
    """Sample the same latents and round-trip the same images with every solver at every budget.

    Parameters
    ----------
    evaluate : EpsilonField
        ε.
    latent : Tensor
        x_T to sample, (B, \\*d).
    images : Tensor
        Images to encode and decode, (B', \\*d); for a latent-diffusion model, latents of them.
    solvers : sequence of str or Solver
        Of those that take a budget; ``"default"`` is what :func:`ddim_ode.sample` and :func:`ddim_ode.encode` do when nothing is
        named. One calibrated for sampling samples and decodes what the default has encoded; one for encoding does the encoding of
        the round trip alone.
    budgets : sequence of int
        Model calls, each way for the round trip.
    grid : str, optional
        One grid for all that do not bring their own; by default :data:`ddim_ode.sampling.GRID`.
    dtype : torch.dtype
        The state's dtype.
    exact : Reference, optional
        What errors are measured against; made if not given.
    data_range : (float, float) or None
        As for :func:`ddim_ode.encode`.
    advance : callable, optional
        Called with a few words before each piece of work.

    Returns
    -------
    Comparison
        A row has ``solver`` (as :func:`by_name`), ``nfe`` (the budget), ``calls`` (spent), ``steps``, ``rms`` (over all samples
        that have a reference; NaN if one of them failed), ``median`` and ``worst`` (per sample), ``seconds``, ``round_trip_mse``,
        ``round_trip_calls``, ``round_trip_seconds``, ``failed`` (samples), and ``encoder`` and ``decoder``, which made the round
        trip. A budget below one step, or another than a calibrated solver's own, gives a row of nulls. What only encodes has nulls
        for samples, and its ``calls`` are those of encoding.
        For a latent-diffusion model ``round_trip_mse`` compares what its decoder makes of `images` and of the latents
        that came back, so that the decoder's own loss is not counted; ``rms`` is of latents.

    Raises
    ------
    ValueError
        If a solver is unknown, adaptive or iterative, before any model call.
    """
    methods = by_name(solvers)
    refuse_unbudgeted(methods, "solvers=")
    check_budgets(evaluate, methods, budgets, grid, "budgets=")
    if exact is None:
        advance("reference")
        exact = reference(evaluate, latent)
    known = exact.x.flatten(1).isfinite().all(dim=1)
    without = torch.nonzero(~known).flatten().tolist()
    found = Comparison(
        {
            "reference": {
                "rms_difference": exact.difference,
                "nfe": exact.nfe,
                "methods": exact.methods,
                "failed": without,
            }
        }
    )
    rows: list[dict[str, Any]] = []
    found.record["rows"] = rows
    codec = evaluate.codec
    pictures = None if codec is None else codec.decode(images)
    for name, solver in methods.items():
        for nfe in budgets:
            advance(f"{name}, {nfe} calls")
            if not pays(solver, nfe, evaluate.schedule):
                rows.append({"solver": name, "nfe": nfe} | dict.fromkeys(_MEASURED))
                continue
            options: dict[str, Any] = {
                "nfe": nfe,
                "dtype": dtype,
                "solver": solver,
                "grid": _grid(solver, grid, evaluate),
            }
            start = time.perf_counter()
            encodes_only = solver is not None and both_ways(evaluate, solver)[1] is None
            run = None if encodes_only else sample(evaluate, latent, **options)
            middle = time.perf_counter()
            trip = round_trip(evaluate, images, data_range=data_range, **options)
            end = time.perf_counter()
            lost = trip.mse
            if codec is not None and pictures is not None:
                lost = mse(pictures, codec.decode(trip.reconstruction))
            row: dict[str, Any] = {"solver": name, "nfe": nfe} | dict.fromkeys(_MEASURED)
            failed: list[bool] = []
            if run is not None:
                each = rms(run.x, exact.x)
                failed = [s is not Status.SUCCESS for s in run.status]
                if any(failed):
                    each[torch.tensor(failed)] = math.nan
                each = each[known]
                found.samples[name, nfe] = run.x
                row |= {
                    "rms": float(each.square().mean().sqrt()),
                    "median": float(each.median()),
                    "worst": float(each.max()) if each.numel() else math.nan,
                    "seconds": middle - start,
                }
            found.reconstructions[name, nfe] = trip.reconstruction
            first = trip.encoding if run is None else run
            rows.append(
                row
                | {
                    "calls": first.nfe,
                    "steps": first.grid.steps,
                    "grid": trip.decoding.grid.name if run is None else run.grid.name,
                    "encode_grid": trip.encoding.grid.name,
                    "encoder": trip.encoding.solver,
                    "decoder": trip.decoding.solver,
                    "round_trip_mse": float(lost.mean()),
                    "round_trip_calls": trip.nfe,
                    "round_trip_seconds": end - middle,
                    "failed": sum(failed) + sum(s is not Status.SUCCESS for s in trip.status),
                }
            )
    found.record = (
        circumstances(evaluate, dtype) | {"samples": latent.shape[0], "images": images.shape[0]} | found.record
    )
    found.record["defaults"] = {k: v._asdict() for k, v in DEFAULTS.items()}
    found.record["grid"] = grid or GRID
    return found


def by_name(solvers: Sequence[str | Solver]) -> dict[str, Solver | None]:
    """Solvers under the names that rows have, each once; None is the default, and a second one of a name has a number behind it."""
    methods: dict[str, Solver | None] = {}
    for named in solvers:
        method = None if isinstance(named, str) and named == "default" else get(named)
        name, count = "default" if method is None else method.name, 1
        while name in methods and methods[name] != method:
            count += 1
            name = f"{method.name} ({count})"  # type: ignore[union-attr]
        methods[name] = method
    return methods


def pays(solver: Solver | None, nfe: int, schedule: NoiseSchedule) -> bool:
    """Whether a budget pays for a step, or is that of the only grid it runs on."""
    if solver is None:
        return True
    own = solver.own_grid(schedule)
    return solver.nfe(1) <= nfe if own is None else solver.calls(own) == nfe


def check_budgets(
    evaluate: EpsilonField, methods: dict[str, Solver | None], budgets: Sequence[int], grid: str | None, named: str
) -> None:
    """Refuse a run that could not be made, before any model call; `named` says where budgets were named.

    A budget that does not pay for one step is only a gap.
    """
    if grid is not None:
        Grid.make(grid, evaluate.schedule, 2)  # even if no run is on it
    for name, solver in methods.items():
        if solver is not None:
            solver.check_field(evaluate)
        for nfe in budgets:
            if not pays(solver, nfe, evaluate.schedule):
                continue
            try:
                for direction, each in zip(("encode", "sample"), both_ways(evaluate, solver), strict=True):
                    plan(evaluate, direction, each, _grid(each, grid, evaluate), None, nfe)
            except ValueError as error:
                raise ValueError(f"{named} {nfe} with {name}: {error}") from error


def _grid(solver: Solver | None, grid: str | None, evaluate: EpsilonField) -> str | None:
    """The default and what brings its own grid are not told one."""
    own = solver is None or solver.own_grid(evaluate.schedule) is not None
    return None if own else grid or GRID


def refuse_unbudgeted(methods: dict[str, Solver | None], named: str) -> None:
    """Refuse solvers that no budget of calls can be given to; `named` says where they were named."""
    without = [name for name, method in methods.items() if method is not None and not method.budgeted]
    if without:
        raise ValueError(
            f"{named} names {', '.join(without)}, but adaptive solvers have tolerances, iterative ones equations to "
            "solve, and neither a budget of calls to be compared at: leave them out"
        )


_MEASURED = (
    "calls",
    "steps",
    "grid",
    "encode_grid",
    "encoder",
    "decoder",
    "rms",
    "median",
    "worst",
    "seconds",
    "round_trip_mse",
    "round_trip_calls",
    "round_trip_seconds",
    "failed",
)


def circumstances(evaluate: EpsilonField | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a figure needs beside it to be believed: versions, commit, device, dtypes, threads, date."""
    record: dict[str, Any] = {
        "ddim_ode": ddim_ode.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if evaluate is not None:
        record["device"] = str(evaluate.device or "cpu")
        record["network_dtype"] = None if evaluate.dtype is None else str(evaluate.dtype).removeprefix("torch.")
        record["schedule"] = {k: v for k, v in evaluate.schedule.config.items() if k != "alphas_cumprod"}
    if dtype is not None:
        record["state_dtype"] = str(dtype).removeprefix("torch.")
    return record


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        # An installed copy may lie inside the checkout of something else, which does not know this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True, timeout=5)
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=5
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")
