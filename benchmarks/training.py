r"""What changes the loss most per hour spent on training: one setting changed at a time, all for the same time.

The base is the command that trained the bundled CIFAR-10 network, cut to a few minutes. Each variant gets the same
processor time, measured on this process, so that a setting that makes updates slower gets fewer of them; the time that
compiling takes is left out, for it does not grow with the run. Judged by the noise-prediction loss of the moving average
on test images, the same noise for all::

    python -m benchmarks.training [--data cifar10] [--minutes 4] [--images 500] [--out benchmarks/results]

One seed a variant: differences below a few per cent are chance.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_ode import EpsilonField, NoiseSchedule
from ddim_ode.comparison import circumstances
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, write_json
from ddim_ode.training import TrainingOptions, begin, sigma_loss, train

ROOT = Path(__file__).resolve().parents[1]
NETWORK: dict[str, Any] = {"width": 44, "groups": 4, "multipliers": [1, 2, 4], "attention": [8], "rank": 128}
# A moving average of the length that suits the bundled network would hold the start of a short run still.
OPTIONS = TrainingOptions(
    batch_size=64, lr=1e-3, warmup=50, cooldown=0.5, gamma=0.5, label_power=1.5, ema=0.99, flip=True, compile=True
)
VARIANTS: dict[str, dict[str, Any]] = {
    "as it was trained": {},
    "no Gaussian part: a plain ε-network": {"rank": 0},
    "γ = 1 (the paper's), labels uniform": {"gamma": 0.0, "label_power": 1.0},
    "float32, no autocast": {"autocast": False},
    "not compiled": {"compile": False},
    "lr 3e-4": {"lr": 3e-4},
    "lr 2e-3": {"lr": 2e-3},
    "no cool-down": {"cooldown": 0.0},
    "no moving average": {"ema": 0.0},
    "batch of 32": {"batch_size": 32},
    "width 24": {"width": 24},
    "no flips": {"flip": False},
}
DECADES = ((0.01, 0.1), (0.1, 1.0), (1.0, 10.0))
SIGMAS = [10.0**e for e in (-1.75, -1.25, -0.75, -0.25, 0.25, 0.75)]


def measure(changes: dict[str, Any], images: np.ndarray, held: np.ndarray, minutes: float) -> dict[str, Any]:
    """Train one variant for its time; its loss by decade."""
    schedule = NoiseSchedule.linear()
    config = NETWORK | {k: v for k, v in changes.items() if k in NETWORK}
    options = replace(OPTIONS, **{k: v for k, v in changes.items() if k not in NETWORK})

    def run(steps: int) -> tuple[torch.nn.Module, float]:
        network, _ = begin(images, schedule, **config)
        stamps: list[float] = []
        tick: Callable[[int, float], None] = lambda step, loss: stamps.append(time.process_time())
        with tempfile.TemporaryDirectory() as folder:
            average = train(
                network, images, schedule, Path(folder), replace(options, steps=steps), save_every=10**9, progress=tick
            )
        # The first updates compile.
        return average, (stamps[-1] - stamps[1]) / (steps - 2)

    _, pilot = run(14)
    steps = max(60, round(60.0 * minutes / pilot))
    average, seconds = run(steps)
    field = EpsilonField(average, schedule, shape=tuple(images.shape[1:]))
    loss = sigma_loss(field, held, SIGMAS)
    decades = [math.exp(np.mean([math.log(loss[s]) for s in SIGMAS if low <= s < high])) for low, high in DECADES]
    return {
        "steps": steps,
        "seconds_per_update": seconds,
        "loss": {f"{s:g}": v for s, v in loss.items()},
        "decades": decades,
    }


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="a data set's name")
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time a variant")
    parser.add_argument("--images", type=int, default=500, help="test images that the loss is measured on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for training.json")
    o = parser.parse_args()
    out = output_folder(o.out)
    images, held = dataset(o.data).images, dataset(o.data, "test").images[: o.images]
    record: dict[str, Any] = {"study": "training", "data": o.data, "minutes": o.minutes, "images": len(held)}
    record |= {"network": NETWORK, "options": asdict(OPTIONS)} | circumstances() | {"rows": []}
    print(f"{'variant':<40} {'updates':>7} {'s each':>7}   loss against the first row, by decade of σ from 0.01")
    for name, changes in VARIANTS.items():
        row = {"variant": name, "changes": changes} | measure(changes, images, held, o.minutes)
        base = record["rows"][0]["decades"] if record["rows"] else row["decades"]
        row["ratios"] = [a / b for a, b in zip(row["decades"], base, strict=True)]
        record["rows"].append(row)
        shown = " ".join(f"{x:6.3f}" for x in row["ratios"])
        print(f"{name:<40} {row['steps']:>7} {row['seconds_per_update']:>7.2f}   {shown}", flush=True)
        write_json(out / "training.json", record)


if __name__ == "__main__":
    main()
