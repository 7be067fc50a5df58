r"""Memory and time of a gradient through ``sample``, plain and with ``checkpoint=True``, against the number of steps.

The bundled fashion-mnist network in float32, a batch of 8, a float64 state, `deisx4` on the quadratic grid; the gradient
of the mean square of the samples with respect to the latents::

    python -m benchmarks.memory [--out benchmarks/results] [--figures docs/figures] [--device cpu] [--figures-only]

On CUDA the memory is ``torch.cuda.max_memory_allocated`` less what was allocated before. On the CPU it is the most
physical memory that a process held, less what it held before, each setting in a process of its own. Two things make
that number mean the tensors. A gradient of one step goes before, so that code and workspaces are loaded; and glibc
is told to return every block of 64 KB or more to the system as soon as it is freed (``MALLOC_MMAP_THRESHOLD_``),
where it would else keep holes that no tensor fills. The mark is ``VmHWM`` of ``/proc/self/status``, set back before
the run: ``ru_maxrss`` starts at what the parent process held. Times are taken without these settings, the two ways in
turn; on the CPU they are processor time of one thread, which a busy machine disturbs least.

The record is ``memory.json``; the figure is drawn from it alone. It takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddim_ode
from ddim_ode import EpsilonField, noise, sample
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
MODEL = "fashion-mnist"
BATCH = 8
STEPS = (2, 4, 8, 16, 32, 64)
#: Options of ``sample``, by name.
#: Named, so that a change of defaults does not make the record another's.
SOLVER, GRID = "deisx4", "quadratic"
WAYS: dict[str, dict[str, Any]] = {"gradients": {"gradients": True}, "checkpoint": {"checkpoint": True}}


def gradient(field: EpsilonField, latent: torch.Tensor, steps: int, way: str) -> int:
    """One gradient; the model calls of its forward pass."""
    run = sample(field, latent, steps=steps, solver=SOLVER, grid=GRID, **WAYS[way])
    torch.autograd.grad(run.x.square().mean(), latent)
    return run.nfe


def _problem(device: str, batch: int = BATCH) -> tuple[EpsilonField, torch.Tensor]:
    field = ddim_ode.load(MODEL, device=device)
    assert field.shape is not None
    return field, noise(field.shape, batch, 0).to(device).requires_grad_()


# -- memory -------------------------------------------------------------------------------------
def peak(steps: int, way: str, device: str, batch: int) -> dict[str, Any]:
    """Bytes that one gradient holds at most, measured in this process."""
    torch.set_num_threads(1)
    field, latent = _problem(device, batch)
    gradient(field, latent, 1, way)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls = gradient(field, latent, steps, way)
        return {"bytes": torch.cuda.max_memory_allocated() - before, "calls": calls}
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is held now
    before = _held("VmRSS")
    calls = gradient(field, latent, steps, way)
    return {"bytes": _held("VmHWM") - before, "calls": calls}


def _held(what: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {what}: memory on the CPU is measured on Linux")


def in_a_process(steps: int, way: str, device: str, batch: int = BATCH) -> dict[str, Any]:
    """:func:`peak`, in a fresh process."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps([steps, way, device, batch])]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


# -- time ---------------------------------------------------------------------------------------
def seconds(steps: int, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turn."""
    field, latent = _problem(device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, taken in found.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = clock()
            gradient(field, latent, steps, way)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(clock() - began)
    return {way: statistics.median(taken) for way, taken in found.items()}


# -- the record ---------------------------------------------------------------------------------
def measure(device: str, repeats: int) -> dict[str, Any]:
    """The whole record."""
    field, latent = _problem(device)
    for way in WAYS:
        gradient(field, latent, 2, way)
    rows: list[dict[str, Any]] = []
    for steps in STEPS:
        times = seconds(steps, device, repeats)
        for way in WAYS:
            found = in_a_process(steps, way, device)
            row = {"way": way, "steps": steps, "calls": found["calls"], "megabytes": found["bytes"] / 1e6}
            rows.append(row | {"seconds": times[way]})
            print(f"{way:12}{steps:4} steps{row['megabytes']:10.1f} MB{times[way]:8.2f} s", flush=True)
    # What does not grow with the batch: the graph's nodes and torch's list of what to compute again.
    few, many = (in_a_process(steps, "checkpoint", device, 1)["bytes"] / 1e6 for steps in (2, 34))
    return {
        "study": "memory",
        **circumstances(field, torch.float64),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "network": f"bundled {MODEL}",
        "solver": SOLVER,
        "grid": GRID,
        "seed": 0,
        "shape": list(latent.shape),
        "state_megabytes": latent.numel() * 8 / 1e6,
        "repeats": repeats,
        "clock": "wall" if device == "cuda" else "process time",
        "megabytes_per_step": {way: slope(rows, way) for way in WAYS},
        "megabytes_per_step_of_checkpoint_at_batch_1": (many - few) / 32,
        "rows": rows,
    }


def slope(rows: list[dict[str, Any]], way: str) -> float:
    """Megabytes a step adds: the line of least squares through the peaks."""
    mine = [row for row in rows if row["way"] == way]
    return float(np.polyfit([row["steps"] for row in mine], [row["megabytes"] for row in mine], 1)[0])


# -- the figure ---------------------------------------------------------------------------------
def draw(record: dict[str, Any], path: Path) -> None:
    """Memory and time against steps, from the record alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.8), layout="constrained")
    looks = {"gradients": ("#c01f3a", "o", "gradients=True"), "checkpoint": ("#1f77b4", "s", "checkpoint=True")}
    for panel, key, label in zip(
        panels,
        ("megabytes", "seconds"),
        ("peak memory, MB", f"{record['clock']}, s".replace("wall", "time")),
        strict=True,
    ):
        for way, (colour, marker, name) in looks.items():
            mine = [row for row in record["rows"] if row["way"] == way]
            if key == "megabytes":
                name = f"{name}: {record['megabytes_per_step'][way]:.2g} MB a step"
            steps = [row["steps"] for row in mine]
            panel.loglog(steps, [row[key] for row in mine], color=colour, marker=marker, markersize=5, label=name)
        panel.set_xticks(steps, labels=[str(n) for n in steps])
        panel.minorticks_off()
        panel.set_xlabel("steps")
        panel.set_ylabel(label)
        panel.grid(True, which="major", color="0.9", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.legend(frameon=False)
    what = f"{record['network']}, batch {record['shape'][0]}, {record['device_name']}"
    figure.suptitle(f"A gradient through sample: {what}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, print, draw."""
    parser = argparse.ArgumentParser(description="Measure the memory and time of a gradient through sample.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for memory.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for memory.png")
    parser.add_argument("--figures-only", action="store_true", help="draw from the memory.json there is")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of the timings")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(peak(*json.loads(options.one))))
        return
    output_folder(options.out)
    output_folder(options.figures)
    path = options.out / "memory.json"
    if not options.figures_only:
        torch.set_num_threads(1)
        write_json(path, measure(options.device, options.repeats))
    record = json.loads(path.read_text("utf-8"))
    draw(record, options.figures / "memory.png")
    for way, each in record["megabytes_per_step"].items():
        print(f"{way:12}{each:10.3f} MB a step; the state is {record['state_megabytes']:.3f} MB")
    print(f"checkpoint at batch 1: {record['megabytes_per_step_of_checkpoint_at_batch_1']:.3f} MB a step")


if __name__ == "__main__":
    main()
