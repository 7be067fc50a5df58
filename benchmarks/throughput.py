r"""Images per second of training and of sampling with the networks that come with the package, on this machine.

Training is timed with and without bfloat16 autocast and ``torch.compile``, the settings in turn, so that a busy machine
disturbs all alike; sampling with and without autocast, at a batch of 16::

    python -m benchmarks.throughput [--out benchmarks/results] [--updates 6] [--repeats 5]

It takes about ten minutes on two cores, most of it compiling. Random images will do: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim_ode import EpsilonField, NoiseSchedule, sample
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.models.unet import UNet
from ddim_ode.training import TrainingOptions, train

ROOT = Path(__file__).resolve().parents[1]
NETWORKS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"channels": 1, "resolution": 28, "width": 32, "multipliers": (1, 2, 4), "attention": (7,)},
    "cifar10": {
        "channels": 3,
        "resolution": 32,
        "width": 44,
        "multipliers": (1, 2, 4),
        "attention": (8,),
        "groups": 4,
    },
}
SETTINGS = [(autocast, compile) for compile in (False, True) for autocast in (False, True)]


def name(autocast: bool, compile: bool) -> str:
    """A setting, in words."""
    return ("bfloat16" if autocast else "float32") + (", compiled" if compile else "")


def _updates(config: dict[str, Any], autocast: bool, compile: bool, images: np.ndarray) -> Callable[[int], float]:
    """``run(n)``: go on training for n updates, and say how many seconds they took."""
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    network = UNet(**config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    options = TrainingOptions(steps=1, batch_size=64, autocast=autocast, compile=compile, warmup=1, cooldown=0.0)
    done = 0

    def run(n: int) -> float:
        nonlocal done
        stamps: list[float] = []
        done += n + 1
        # The first update of a stretch reads the checkpoint and may compile: it is not counted.
        train(
            network, images, NoiseSchedule.linear(), Path(folder.name), replace(options, steps=done),
            save_every=10**9, progress=lambda step, loss: stamps.append(time.perf_counter()),
        )  # fmt: skip
        return stamps[-1] - stamps[0]

    run.folder = folder  # type: ignore[attr-defined]  # it lives as long as the function
    return run


def training(config: dict[str, Any], updates: int, repeats: int) -> list[dict[str, Any]]:
    """Images per second of each setting."""
    shape = (256, config["channels"], config["resolution"], config["resolution"])
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    runs = {setting: _updates(config, *setting, images) for setting in SETTINGS}
    seconds: dict[tuple[bool, bool], list[float]] = {setting: [] for setting in SETTINGS}
    for run in runs.values():
        run(1)
    for _ in range(repeats):
        for setting, run in runs.items():
            seconds[setting].append(run(updates))
    rates = {setting: [64 * updates / s for s in values] for setting, values in seconds.items()}
    return [
        {"setting": name(*s), "images_per_second": statistics.median(r), "spread": [min(r), max(r)]}
        for s, r in rates.items()
    ]


def sampling(config: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Images per second of 20 calls at a batch of 16."""
    torch.manual_seed(0)
    network = UNet(**config).eval().requires_grad_(False)
    fields = {
        kind: EpsilonField(network, NoiseSchedule.linear(), autocast=None if kind == "float32" else torch.bfloat16)
        for kind in ("float32", "bfloat16")
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in fields}
    for field in fields.values():
        sample(field, n=16, nfe=1)
    for _ in range(repeats):
        for kind, field in fields.items():
            began = time.perf_counter()
            sample(field, n=16, nfe=20)
            seconds[kind].append(time.perf_counter() - began)
    return [{"setting": kind, "images_per_second": 16 / statistics.median(s), "nfe": 20} for kind, s in seconds.items()]


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for throughput.json")
    parser.add_argument("--updates", type=int, default=6, help="training updates a stretch")
    parser.add_argument("--repeats", type=int, default=5, help="stretches")
    options = parser.parse_args()
    out = output_folder(options.out)
    record: dict[str, Any] = {"study": "throughput", "batch_size": 64, "networks": NETWORKS} | circumstances()
    record["training"] = {k: training(config, options.updates, options.repeats) for k, config in NETWORKS.items()}
    record["sampling"] = {k: sampling(config, options.repeats) for k, config in NETWORKS.items()}
    write_json(out / "throughput.json", record)
    for kind in ("training", "sampling"):
        for network, rows in record[kind].items():
            for row in rows:
                print(f"{kind:<9} {network:<14} {row['setting']:<20} {row['images_per_second']:8.1f} images/s")


if __name__ == "__main__":
    main()
