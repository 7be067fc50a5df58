r"""Latents of images: whether they are draws of N(0, I), carry an attribute, and where paths between them lead.

    python -m benchmarks.latents [--out benchmarks/results] [--figures-only]

Records ``latents.json``, part by part, and draws ``docs/figures/latents.png``; about ten minutes on one core.

- *gaussianity*: an exact mixture on its own samples, which must pass, and the bundled networks on test images.
- *false alarms*: how often draws of N(0, I) are called off, by limit, number and size.
- *attributes*: images of one class moved to another along the difference of means of other images' latents; a logistic
  regression on pixels of training images says what they are then, and the distance to the nearest of those training images how
  much they look like one. ``kept`` is :func:`ddim_ode.move_latent`; ``plain`` leaves the norm as it comes.
- *paths*: the middles of spherical and of straight paths between latents, by the same distance.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import ddim_ode
from benchmarks.problems import image_mixture
from ddim_ode import EpsilonField, LatentWarning, NoiseSchedule, gaussianity
from ddim_ode.comparison import circumstances
from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, write_json
from ddim_ode.plotting import gaussianity_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
#: Pairs of Fashion-MNIST's classes: sneaker to boot, T-shirt to dress, pullover to shirt, trouser to bag.
PAIRS = ((7, 9), (0, 3), (2, 6), (1, 8))
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
SIZES = (
    (1, (1, 28, 28)),
    (2, (1, 8, 8)),
    (4, (3, 8, 8)),
    (8, (1, 28, 28)),
    (64, (1, 8, 8)),
    (64, (1, 28, 28)),
    (200, (2,)),
)
LIMITS = (4.0, 5.0, 6.0, 8.0)
#: Training images that the classifier and the distances are made of.
TRAINING = 10_000


def study_gaussianity() -> dict[str, Any]:
    """Reports of :func:`ddim_ode.gaussianity`, rounded to four digits."""
    mixture = image_mixture("fashion-mnist")
    exact = EpsilonField.from_sigma(mixture, NoiseSchedule.linear(), shape=mixture.shape)
    drawn = mixture.sample(64, torch.Generator().manual_seed(0))
    network = ddim_ode.load("fashion-mnist")
    images = as_tensor(bundled_images())
    # Half the way in σ is no way at all for a latent: there, x is the image still.
    sigmas = np.linspace(0.0, 1.0, 21)
    runs = {
        "mixture, its samples": ddim_ode.encode(exact, drawn, nfe=50, data_range=None),
        "network, test images": ddim_ode.encode(network, images, nfe=50, batch_size=64),
        "the same, up to σ = 1": ddim_ode.encode(network, images, grid=sigmas, batch_size=64),
    }
    try:
        colour = as_tensor(dataset("cifar10", "test").images[:64])
        runs["CIFAR-10, test images"] = ddim_ode.encode(ddim_ode.load("cifar10"), colour, nfe=50, batch_size=64)
    except FileNotFoundError as error:
        print(f"left out: {error}")
    found = {}
    for name, run in runs.items():
        report = gaussianity(run.x)
        print(f"\n{name}\n{report}", flush=True)
        found[name] = _rounded(report.record())
    return found


def study_false_alarms() -> list[dict[str, Any]]:
    """The share of sets of draws of N(0, I) that are called off at each limit."""
    rows = []
    for n, shape in SIZES:
        sets = 300 if n * int(np.prod(shape)) > 10_000 else 4000
        generator = torch.Generator().manual_seed(0)
        worst = []
        for _ in range(sets):
            report = gaussianity(torch.randn(n, *shape, generator=generator, dtype=torch.float64))
            worst.append(max(abs(m.z) for m in report.moments))
        off = {f"{limit:g}": float(np.mean(np.array(worst) > limit)) for limit in LIMITS}
        rows.append({"n": n, "shape": list(shape), "sets": sets, "off": off})
        print(rows[-1], flush=True)
    return rows


def study_attributes(judge: Judge, n: int = 64, moved: int = 32) -> list[dict[str, Any]]:
    """What images of one class are judged to be once moved to another."""
    field, test = ddim_ode.load("fashion-mnist"), dataset("fashion-mnist", "test")
    rows = []
    for source, target in PAIRS:
        a, b = (np.flatnonzero(test.labels == c) for c in (source, target))
        which = np.concatenate([a[:n], b[:n], a[n : n + moved]])
        latent = ddim_ode.encode(field, as_tensor(test.images[which]), nfe=20, batch_size=64).x
        labels, starts = test.labels[which], latent[2 * n :]
        for images in (4, 16, n) if (source, target) == PAIRS[0] else (n,):
            chosen = [*range(images), *range(n, n + images)]
            direction = ddim_ode.attribute_direction(latent[chosen], labels[chosen], of=target, against=source)
            for strength in STRENGTHS:
                ways = {"kept": ddim_ode.move_latent(starts, direction, strength)}
                if images == n:
                    ways["plain"] = starts + strength * direction
                for way, x in ways.items():
                    made = ddim_ode.decode(field, x, nfe=20, batch_size=64).x
                    classes, near = judge(made)
                    rows.append(
                        {
                            "from": source, "to": target, "images": images, "strength": strength, "norm": way,
                            "norm2_per_dimension": float(x.square().mean()),
                            "target": float(np.mean(classes == target)), "source": float(np.mean(classes == source)),
                            "nearest": near,
                        }
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    return rows


def study_paths(judge: Judge, pairs: int = 32) -> list[dict[str, Any]]:
    """The middles of paths, and their ends for comparison."""
    field, test = ddim_ode.load("fashion-mnist"), dataset("fashion-mnist", "test")
    rows = []
    encoded = ddim_ode.encode(field, as_tensor(test.images[: 2 * pairs]), nfe=20, batch_size=64).x
    for what, ends in (("encoded", encoded), ("drawn", ddim_ode.noise((1, 28, 28), 2 * pairs, seed=0))):
        a, b = ends[0::2], ends[1::2]
        for place, x in (("ends", ends), ("spherical", ddim_ode.slerp(a, b, 0.5)), ("straight", 0.5 * (a + b))):
            made = ddim_ode.decode(field, x, nfe=20, batch_size=64).x
            rows.append(
                {
                    "latents": what,
                    "at": place,
                    "norm2_per_dimension": float(x.square().mean()),
                    "spread": float(made.flatten(1).std(dim=1).mean()),
                    "nearest": judge(made)[1],
                }
            )
            print(rows[-1], flush=True)
    return rows


class Judge:
    """What images are, and how far from the nearest training image: (classes (N,), mean RMS distance on [−1, 1])."""

    def __init__(self) -> None:
        train, test = dataset("fashion-mnist"), dataset("fashion-mnist", "test")
        flat = lambda images: as_tensor(images).flatten(1).numpy()
        self.images = flat(train.images[:TRAINING])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it could be fitted further does not matter here
            self.model = LogisticRegression(max_iter=100).fit(self.images, train.labels[:TRAINING])
        self.accuracy = float(self.model.score(flat(test.images), test.labels))

    def __call__(self, images: Tensor) -> tuple[np.ndarray, float]:
        flat = images.clamp(-1.0, 1.0).flatten(1).float()
        near = torch.cdist(flat, torch.from_numpy(self.images)).amin(dim=1) / flat.shape[1] ** 0.5
        return self.model.predict(flat.numpy()), float(near.mean())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for latents.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for latents.png")
    parser.add_argument("--figures-only", action="store_true", help="draw from the JSON there is, measure nothing")
    options = parser.parse_args()
    path = output_folder(options.out) / "latents.json"
    if not options.figures_only:
        warnings.simplefilter("ignore", LatentWarning)  # straight paths are measured because they are narrow
        judge = Judge()
        record = {"study": "latents", "accuracy": judge.accuracy, "training_images": TRAINING} | circumstances()
        record["gaussianity"] = study_gaussianity()
        record["paths"] = study_paths(judge)
        record["attributes"] = study_attributes(judge)
        record["false_alarms"] = study_false_alarms()
        write_json(path, record)
    record = json.loads(path.read_text("utf-8"))
    save_figure(gaussianity_figure(record["gaussianity"]), output_folder(options.figures) / "latents.png")


if __name__ == "__main__":
    main()
