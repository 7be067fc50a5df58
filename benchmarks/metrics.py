r"""What distances between sets of images are worth: floors, stated errors beside spreads, differences that they resolve.

    python -m benchmarks.metrics [--out benchmarks/results] [--parts speed,…]

Records ``metrics.json``, part by part; features of data are kept in ``out/``. Half an hour on one core the first time, a quarter then.

- *speed*: time of the processor, which others at work do not count in, an image and a comparison.
- *floors*: training images beside test images, as many of both, and beside all of the test images.
- *errors*: stated standard errors beside the spread over disjoint sets of training images, all classes (no real distance)
  and four of them (a large one); and what a bootstrap would say.
- *differences*: the bundled network sampled from the same latents by two solvers at two budgets, each with each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim_ode
from ddim_ode import EfficientNetLite0, Features, Quality, SampleSizeWarning, quality
from ddim_ode.comparison import circumstances
from ddim_ode.data import Images, as_tensor
from ddim_ode.datasets import dataset, datasets
from ddim_ode.datasets import images as dataset_images
from ddim_ode.files import output_folder, replacing, write_json
from ddim_ode.quality import Estimate, frechet_distance

ROOT = Path(__file__).resolve().parents[1]
#: Images of each split whose features are used, at most.
IMAGES, FEWER = 10_000, {"cifar10": 5_000}
COUNTS = (500, 1000, 5000)
MEASURES = ("frechet", "kernel", "precision", "recall")
RUNS = (("ddim", 10), (None, 10), ("ddim", 20), (None, 20))


def study_speed(batches: int = 8) -> dict[str, Any]:
    """Milliseconds of the processor an image at the default batch size, and seconds of a comparison with 500 samples."""
    network, images = EfficientNetLite0(), as_tensor(dataset("fashion-mnist", "test").images[:16])
    seconds = []
    for _ in range(batches):
        start = time.process_time()
        Features.of(images, network)
        seconds.append((time.process_time() - start) / len(images))
    reference, samples = features_of("fashion-mnist", "test"), features_of("fashion-mnist", "train")[:500]
    compared = []
    for _ in range(2):
        start = time.process_time()
        quality(samples, reference)
        compared.append(time.process_time() - start)
    found = {
        "milliseconds_per_image": {"least": 1e3 * min(seconds), "median": 1e3 * float(np.median(seconds))},
        "seconds_of_a_comparison": {"first": compared[0], "again": compared[1]},
    }
    print(found, flush=True)
    return found


def study_floors() -> list[dict[str, Any]]:
    """Training images beside test images."""
    rows = []
    for name in ("fashion-mnist", "cifar10"):
        try:
            train, test = features_of(name, "train"), features_of(name, "test")
        except FileNotFoundError as error:
            print(f"left out: {error}")
            continue
        for n in COUNTS:
            sets = min(len(train) // n, 10)
            for beside in sorted({n, len(test)}):
                if beside == n:
                    pairs = [(train[i : i + n], test[i : i + n]) for i in range(0, sets * n, n)]
                else:
                    pairs = [(train[i : i + n], test) for i in range(0, sets * n, n)]
                found = [quality(*pair) for pair in pairs]
                rows.append({"data": name, "n": n, "beside": beside, "sets": sets, "first": found[0].record()})
                for measure in MEASURES:
                    values = [getattr(one, measure).value for one in found]
                    rows[-1][measure] = {"mean": float(np.mean(values)), "spread": _spread(values)}
                print(rows[-1], flush=True)
    return rows


def study_errors(n: int = 500, orders: int = 4) -> dict[str, Any]:
    """Stated errors, of the samples alone, beside the spread over disjoint sets; a thousand test images throughout."""
    train, reference = features_of("fashion-mnist", "train"), features_of("fashion-mnist", "test")[:1000]
    labels = torch.from_numpy(dataset("fashion-mnist").labels[: len(train)])
    rows = []
    for what, chosen in (("all classes", train), ("classes 0 to 3", train[labels < 4])):
        groups: list[list[Quality]] = []
        for seed in range(orders):
            order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
            groups.append([quality(chosen[part], reference) for part in order.split(n) if len(part) == n])
        row: dict[str, Any] = {"samples": what, "n": n, "sets": len(groups[0]), "orders": orders}
        for measure in MEASURES:
            found = [[getattr(one, measure) for one in group] for group in groups]
            spread = np.sqrt(np.mean([np.var([one.value for one in group], ddof=1) for group in found]))
            stated = np.sqrt(np.mean([_of_samples(one) ** 2 for group in found for one in group]))
            row[measure] = {"spread": float(spread), "stated": float(stated)}
        rows.append(row)
        print(row, flush=True)
    generator, one = torch.Generator().manual_seed(0), train[:n]
    again = [frechet_distance(one[torch.randint(n, (n,), generator=generator)], reference).value for _ in range(40)]
    bootstrap = {
        "value": frechet_distance(one, reference).value,
        "mean": float(np.mean(again)),
        "spread": _spread(again),
    }
    print(bootstrap, flush=True)
    return {"rows": rows, "bootstrap": bootstrap}


def study_differences(n: int = 500) -> dict[str, Any]:
    """Solvers on the same latents: every number, and the difference of each pair with its error, paired and not."""
    field, network, reference = (
        ddim_ode.load("fashion-mnist"),
        EfficientNetLite0(),
        features_of("fashion-mnist", "test"),
    )
    floor = features_of("fashion-mnist", "train")
    found: dict[str, Quality] = {}
    for solver, nfe in RUNS:
        samples = ddim_ode.sample(field, n=n, seed=0, nfe=nfe, solver=solver, batch_size=50).x.clamp(-1.0, 1.0)
        name = f"{solver or 'default'}, {nfe} calls"
        found[name] = quality(Features.of(samples, network), reference, floor=floor)
        print(f"\n{name}\n{found[name]}", flush=True)
    rounded = ((samples + 1.0) * 127.5).round() / 127.5 - 1.0
    found[f"{name}, in 8 bits"] = quality(Features.of(rounded, network), reference, floor=floor)
    names, pairs = list(found), []
    for i, a in enumerate(names):
        for b in names[:i]:
            row: dict[str, Any] = {"of": a, "less": b}
            together, apart = (found[a].difference(found[b], paired=paired) for paired in (True, False))
            for measure in MEASURES:
                row[measure] = {
                    "difference": together[measure].value,
                    "paired": together[measure].error,
                    "unpaired": apart[measure].error,
                }
            pairs.append(row)
            print(row, flush=True)
    return {"n": n, "rows": {name: one.record() for name, one in found.items()}, "pairs": pairs}


def splits(data: str) -> dict[str, Images]:
    """Images to compare with, ``test``, and others for the floor, ``train``; `data` is what :func:`ddim_ode.datasets.images` takes.

    What has no splits, as a folder of pictures or an array, is halved: every other image is a test image.
    """
    found = {split: dataset_images(data, split) for split in ("train", "test")}
    if np.array_equal(found["train"], found["test"]):
        found = {"train": found["train"][::2], "test": found["test"][1::2]}
    return {split: x[: FEWER.get(data, IMAGES)] for split, x in found.items()}


def features_of(data: str, split: str) -> Features:
    """Features of the first images of a split, see :func:`splits`, kept where they were made once."""
    found = splits(data)[split]
    # A data set goes by its name; files, which may come to hold other images under one name, by what they hold.
    key = data if data in datasets() else hashlib.sha256(found.tobytes()).hexdigest()[:16]
    path = ROOT / "out" / f"features-{key}-{split}.npz"
    return kept_features(path, EfficientNetLite0(), as_tensor(found), progress=True)


def kept_features(path: Path, network: Any, x: Tensor, progress: bool = False) -> Features:
    """Features of images by a named network, from a file if they are there; made and written there if not."""
    if path.exists():
        with np.load(path) as kept:
            if str(kept["network"]) == network.name and len(kept["values"]) == len(x):
                return Features(network.name, torch.from_numpy(kept["values"]))
    if progress:
        print(f"features of {len(x)} images: some minutes, kept in {path}", flush=True)
    found = Features.of(x, network, progress=progress)
    output_folder(path.parent)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, values=found.values.float().numpy(), network=np.array(found.network))
    return found


def _of_samples(found: Estimate) -> float:
    """The part of the standard error that is the samples'."""
    return float(found.samples.std()) / len(found.samples) ** 0.5


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


PARTS: dict[str, Callable[[], Any]] = {
    "speed": study_speed,
    "floors": study_floors,
    "errors": study_errors,
    "differences": study_differences,
}


def main() -> None:
    """Measure and record, part by part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for metrics.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    options = parser.parse_args()
    path = output_folder(options.out) / "metrics.json"
    record: dict[str, Any] = (
        json.loads(path.read_text("utf-8")) if path.exists() else {"study": "metrics", "circumstances": {}}
    )
    warnings.simplefilter("ignore", SampleSizeWarning)  # how much few images cost is what is measured
    for name in options.parts.split(","):
        if name not in PARTS:
            raise SystemExit(f"unknown part {name!r}: known are {', '.join(PARTS)}")
        record[name] = PARTS[name]()
        record["circumstances"][name] = circumstances()
        write_json(path, record)


if __name__ == "__main__":
    main()
