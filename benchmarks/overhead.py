r"""What the package adds to a model call, in microseconds, beside its peers.

The model does nothing (it returns a tensor made beforehand), so all the time is the sampler's. Everyone walks
200 steps over a batch (16, 3, 32, 32) on one thread, in turn, so that a busy machine disturbs all alike; the
figures are medians over the repeats, per model call of a whole run. The clock is the process's own: with one
thread, the wall time of an idle machine. The time of as many bare calls of the same model is subtracted from
everyone's. What a user would make once is made outside the timed part: grids, label tensors of the loops by
hand, and ``set_timesteps`` of diffusers. A second part asks what is left of it beside a real network: whole runs
over the bare calls of that network::

    python -m benchmarks.overhead [--out benchmarks/results] [--repeats 25] [--network-repeats 21]

Records ``overhead.json``. A peer that is not installed is named in its row, and nothing else changes.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim_ode
from ddim_ode import EpsilonField, Grid, NoiseSchedule, integrate
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.models.unet import UNet
from ddim_ode.solvers import get

ROOT = Path(__file__).resolve().parents[1]

SHAPE, STEPS = (16, 3, 32, 32), 200
SOLVERS = ("ddim", "ab3", "deis3", "dpmpp2m", "heun")
BUNDLED, NETWORK_STEPS = "fashion-mnist", 10
SCHEDULE = NoiseSchedule.linear()
#: A float32 state's overhead over that of the fastest peer, and a whole run over its bare network calls: at most.
TARGETS = {"ddim": 1 / 3, "ab3": 1 / 2, "network": 1.02}


@dataclass(frozen=True)
class Contender:
    """One row: `run` walks through `calls` model calls, or `missing` says why it cannot."""

    name: str
    group: str
    run: Callable[[], Any] | None
    calls: int = STEPS
    dtype: str = "float32"
    missing: str = ""


# -- contenders ---------------------------------------------------------------------------------
class Idle:
    """A model that returns the same tensor at no cost, whatever it is asked."""

    def __init__(self) -> None:
        self.out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def references(model: Idle, x: Tensor) -> list[Contender]:
    """Bare calls, the floor, and the two samplers as one would write them by hand with buffers."""
    label = torch.zeros(SHAPE[0])
    scales, weights = np.linspace(0.01, 1.0, STEPS).tolist(), np.linspace(-1.0, -0.01, STEPS).tolist()

    def bare() -> None:
        for _ in range(STEPS):
            model(x, label)

    def add() -> None:
        for _ in range(STEPS):
            torch.add(x, model.out)

    def by_hand(order: int) -> Tensor:
        x_bar, buffer = x.clone(), torch.empty_like(x)
        history = [model.out] * order
        for scale, weight in zip(scales, weights, strict=True):
            eps = model(torch.mul(x_bar, scale, out=buffer), label)
            history = [eps, *history[:-1]]
            for past in history:
                x_bar.add_(past, alpha=weight)
        return x_bar

    return [
        Contender("bare calls", "reference", bare),
        Contender("torch.add", "reference", add),
        Contender("ddim by hand", "reference", partial(by_hand, 1)),
        Contender("ab3 by hand", "reference", partial(by_hand, 3)),
    ]


def ours(model: Idle, x: Tensor, grid: Grid) -> list[Contender]:
    """The package through ``integrate``, with a state like the peers' and with its own float64 default."""
    field = EpsilonField(model, SCHEDULE, dtype=torch.float32)
    rows = []
    for dtype in (torch.float32, torch.float64):
        start = x.to(dtype)
        for name in SOLVERS:
            run = partial(integrate, field, start, grid, name)
            rows.append(Contender(name, "ddim_ode", run, get(name).nfe(STEPS), str(dtype).removeprefix("torch.")))
    return rows


def peers(model: Idle, x: Tensor) -> list[Contender]:
    """Those of diffusers and torchdiffeq, each as fast as its documentation allows."""
    rows = []
    try:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    except ImportError as error:
        rows.append(Contender("diffusers", "sampler", None, missing=f"not installed ({error})"))
    else:
        betas: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
        ddim = DDIMScheduler(**betas, clip_sample=False)
        dpm = DPMSolverMultistepScheduler(**betas, algorithm_type="dpmsolver++", solver_order=2)
        for name, scheduler in (("diffusers DDIM", ddim), ("diffusers DPM++ 2M", dpm)):
            rows.append(Contender(name, "sampler", partial(_diffusers, scheduler, model, x)))
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        rows.append(Contender("torchdiffeq", "integrator", None, missing=f"not installed ({error})"))
    else:
        times = torch.linspace(0.0, 1.0, STEPS + 1)
        # Asked for its two ends alone it keeps no state in between, which is faster than asking for the whole grid.
        ends, step = times[[0, -1]], {"step_size": 1.0 / STEPS}
        euler = partial(odeint, method="euler")

        def plain(t: Tensor, y: Tensor) -> Tensor:
            return model(y, t)

        def scaled(t: Tensor, y: Tensor) -> Tensor:
            return model(y * torch.rsqrt(1.0 + t * t), t.expand(SHAPE[0]))

        rows += [
            # An ODE whose field is the idle model as it is: less than sampling, which scales the input and makes labels.
            Contender("torchdiffeq, no scaling", "integrator", partial(euler, plain, x, ends, options=step)),
            Contender("same, all states kept", "integrator", partial(euler, plain, x, times)),
            # Eq. 14, the work that everyone else does (the label is taken to be the time itself).
            Contender("torchdiffeq, eq. 14", "integrator", partial(euler, scaled, x, ends, options=step)),
        ]
    return rows


def _diffusers(scheduler: Any, model: Idle, x: Tensor) -> float:
    """One run; what it took without ``set_timesteps``, which a multistep scheduler needs before each run."""
    scheduler.set_timesteps(STEPS)
    began = time.process_time()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return time.process_time() - began


# -- measuring ----------------------------------------------------------------------------------
def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one run, or of the part of it that the run timed itself."""
    began = time.process_time()
    result = run()
    return result if isinstance(result, float) else time.process_time() - began


def interleaved(runs: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds, (repeats, runs): each repeat takes all in turn, starting one further on."""
    found = np.empty((repeats, len(runs)))
    for run in runs:
        run()  # the first time loads code and fills caches
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for i in range(repeats):
                for j in np.roll(np.arange(len(runs)), -i).tolist():
                    found[i, j] = seconds(runs[j])
    finally:
        gc.enable()
    return found


def per_call(grid: Grid, repeats: int) -> list[dict[str, Any]]:
    """Overhead per model call of everyone."""
    model, x = Idle(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    everyone = [*references(model, x), *peers(model, x), *ours(model, x, grid)]
    there = [c for c in everyone if c.run is not None]
    found = interleaved([c.run for c in there if c.run is not None], repeats) * 1e6
    # Bare calls come first among the references.
    idle = found[:, 0] / there[0].calls
    rows = []
    for c in everyone:
        row: dict[str, Any] = {"name": c.name, "group": c.group, "state_dtype": c.dtype, "calls": c.calls}
        if c.run is None:
            rows.append(row | {"missing": c.missing})
            continue
        each = found[:, there.index(c)] / c.calls
        if c.name not in ("bare calls", "torch.add"):
            each = each - idle
        low, middle, high = np.percentile(each, (25, 50, 75)).tolist()
        rows.append(row | {"us": middle, "us_quartiles": [low, high]})
    # Two yardsticks: samplers that do a sampler's work, and everything that was timed.
    for yardstick, groups in (("of_fastest_sampler", ("sampler",)), ("of_fastest_peer", ("sampler", "integrator"))):
        timed = [row["us"] for row in rows if row["group"] in groups and "us" in row]
        for row in rows:
            row[yardstick] = row["us"] / min(timed) if timed and "us" in row else None
    return rows


def per_run(grid: Grid, repeats: int) -> list[dict[str, Any]]:
    """Microseconds of a whole run, of its loop alone, and of a run whose grid the solver has never seen."""
    model, x = Idle(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    field = EpsilonField(model, SCHEDULE, dtype=torch.float32)
    # Other numbers, hence another plan, for each repeat and the first one that is not counted.
    fresh = {
        s: iter([Grid.explicit(grid.sigmas * (1.0 - 1e-12 * i), SCHEDULE) for i in range(1, repeats + 2)])
        for s in SOLVERS
    }

    def loop(name: str) -> float:
        solver = get(name)
        evaluate = field.bind(x, solver.stages(grid))
        x_bar, state = x, solver.init(evaluate, x, grid)
        began = time.process_time()
        for n in range(grid.steps):
            x_bar, state, _ = solver.step(evaluate, x_bar, n, state)
        return time.process_time() - began

    def new(name: str) -> float:
        nodes = next(fresh[name])
        return seconds(lambda: integrate(field, x, nodes, name))

    runs = [run for s in SOLVERS for run in (partial(integrate, field, x, grid, s), partial(loop, s), partial(new, s))]
    found = np.median(interleaved(runs, repeats), axis=0).reshape(-1, 3) * 1e6
    return [
        {"name": s, "run_us": run, "loop_us": inside, "outside_us": run - inside, "run_new_grid_us": unseen}
        for s, (run, inside, unseen) in zip(SOLVERS, found.tolist(), strict=True)
    ]


def with_network(repeats: int) -> dict[str, Any]:
    """Whole runs with the default float64 state, over bare calls of the same network on the same batch."""
    field, what = _network()
    network = field.model
    x = torch.randn(16, *(field.shape or ()), generator=torch.Generator().manual_seed(0))
    grid = Grid.make("quadratic", field.schedule, NETWORK_STEPS)
    labels = [torch.full((16,), label) for label in grid.labels[:-1].tolist()]

    def bare() -> None:
        for t in labels:
            network(x, t)

    start = x.double() * float(np.hypot(1.0, grid.sigmas[0]))
    names = ("ddim", "ab3")
    found = interleaved([bare, *(partial(integrate, field, start, grid, s) for s in names)], repeats)
    rows = [
        # Within a repeat the machine is about as busy for one as for the other.
        {"name": s, "ratio": statistics.median((found[:, j] / found[:, 0]).tolist()), "seconds": float(np.median(found[:, j]))}
        for j, s in enumerate(names, start=1)
    ]  # fmt: skip
    return {
        "network": what,
        "shape": list(x.shape),
        "calls": NETWORK_STEPS,
        "repeats": repeats,
        "state_dtype": "float64",
        "network_dtype": "float32",
        "bare_seconds": float(np.median(found[:, 0])),
        "rows": rows,
    }


def _network() -> tuple[EpsilonField, str]:
    try:
        return ddim_ode.load(BUNDLED), f"bundled {BUNDLED}"
    except (AttributeError, OSError, ValueError) as error:
        print(f"no bundled network {BUNDLED!r} here ({error}): taking a U-Net with random weights")
        torch.manual_seed(0)
        network = UNet(1, 28, 32, (1, 2, 4)).eval().requires_grad_(False)
        return EpsilonField(network, SCHEDULE, shape=(1, 28, 28)), "UNet(1, 28, 32, (1, 2, 4)), random"


def measure(repeats: int, network_repeats: int) -> dict[str, Any]:
    """The whole record."""
    grid = Grid.make("quadratic", SCHEDULE, STEPS)
    return {
        "study": "overhead",
        **circumstances(),
        **{name: _version(name) for name in ("diffusers", "torchdiffeq")},
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "dtype": "float32 network; each row names its state's",
        "seed": 0,
        "shape": list(SHAPE),
        "steps": STEPS,
        "repeats": repeats,
        "clock": "process time",
        "subtracted": "as many bare calls of the model, from every row but 'bare calls' and 'torch.add'",
        "targets": TARGETS,
        "per_call": per_call(grid, repeats),
        "per_run": per_run(grid, repeats),
        "with_network": with_network(network_repeats),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- showing ------------------------------------------------------------------------------------
def table(record: dict[str, Any]) -> str:
    """The record as text."""
    lines = [f"per model call, {record['steps']} steps of {tuple(record['shape'])}, {record['threads']} thread"]
    lines.append(f"{'':24}{'state':>9}{'us':>9}   {'quartiles':<16}{'of samplers':>14}{'of all':>9}")
    for row in record["per_call"]:
        head = f"{row['name']:24}{row['state_dtype']:>9}"
        if "missing" in row:
            lines.append(f"{head}  {row['missing']}")
            continue
        low, high = row["us_quartiles"]
        share = "".join(
            f"{'' if row[key] is None else format(row[key], '.2f'):>{width}}"
            for key, width in (("of_fastest_sampler", 14), ("of_fastest_peer", 9))
        )
        target = TARGETS.get(row["name"]) if row["state_dtype"] == "float32" else None
        wanted = "" if target is None else f"  (target {target:.2f})"
        lines.append(f"{head}{row['us']:9.1f}   {f'{low:.1f}-{high:.1f}':<16}{share}{wanted}")
    lines += ["", "per run, float32 state, us", f"{'':24}{'run':>9}{'loop':>9}{'outside':>9}{'new grid':>10}"]
    for row in record["per_run"]:
        cells = f"{row['run_us']:9.0f}{row['loop_us']:9.0f}{row['outside_us']:9.0f}{row['run_new_grid_us']:10.0f}"
        lines.append(f"{row['name']:24}{cells}")
    real = record["with_network"]
    lines += ["", f"{real['network']}, batch {real['shape'][0]}, float64 state: run over {real['calls']} bare calls"]
    lines += [f"{row['name']:24}{row['ratio']:9.4f}  (target {TARGETS['network']})" for row in real["rows"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description="Measure what the package adds to a model call.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for overhead.json")
    parser.add_argument("--repeats", type=int, default=25, help="of the runs with a model that does nothing")
    parser.add_argument("--network-repeats", type=int, default=21, help="of the runs with a network")
    options = parser.parse_args(argv)
    output_folder(options.out)
    torch.set_num_threads(1)
    record = measure(options.repeats, options.network_repeats)
    write_json(options.out / "overhead.json", record)
    print(table(record))


if __name__ == "__main__":
    main()
