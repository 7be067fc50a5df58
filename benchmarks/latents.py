r"""Latents of images: whether they are draws of N(0, I), carry an attribute, and where paths between them lead.

    python -m benchmarks.latents [--out benchmarks/results] [--parts gaussianity,…] [--figures-only]

Records ``latents.json``, part by part, and draws ``docs/figures/latents.png``; about ten minutes on one core.

- *gaussianity*: an exact mixture on its own samples, which must pass, and the bundled networks on test images.
- *coarse*: what few calls show of themselves, on the exact mixture's own samples.
- *false_alarms*: how often draws of N(0, I) are called off, by limit, number and size.
- *attributes*: images of one class moved to another along the difference of means of other images' latents; a logistic
  regression on pixels of training images says what they are then, and the distance to the nearest of those training images how
  much they look like one. ``kept`` is :func:`ddim_ode.move_latent`; ``plain`` leaves the norm as it comes.
- *paths*: the middles of spherical and of straight paths between latents, by the same distance.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Callable
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
from ddim_ode.metrics import rms
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
    exact, drawn = _exact()
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


def study_coarse() -> list[dict[str, Any]]:
    """Encodings of an exact model's samples by few calls: their error, and what of it a report shows."""
    exact, drawn = _exact()
    best = ddim_ode.encode(exact, drawn, nfe=200, data_range=None).x
    rows = []
    for solver, budget in [("ddim", n) for n in (5, 10, 20, 50, 100)] + [(None, n) for n in (5, 10, 20)]:
        x = ddim_ode.encode(exact, drawn, nfe=budget, solver=solver, data_range=None).x
        report = gaussianity(x)
        named = {(m.over, m.name): m for m in report.moments}
        rows.append(
            {
                "solver": solver or "default", "nfe": budget, "rms": float(rms(x, best).square().mean().sqrt()),
                "off": len(report.off), "moments": len(report.moments), "norm": named["all numbers", "norm²/D"].found,
                "across": named["correlation of neighbours", "across"].found,
                "overlap": named["pairs of latents", "D cos² of their angle"].found,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _exact() -> tuple[EpsilonField, Tensor]:
    """The exact mixture of Fashion-MNIST, and 64 of its own samples."""
    mixture = image_mixture("fashion-mnist")
    field = EpsilonField.from_sigma(mixture, NoiseSchedule.linear(), shape=mixture.shape)
    return field, mixture.sample(64, torch.Generator().manual_seed(0))


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


def study_attributes(n: int = 64, moved: int = 32) -> dict[str, Any]:
    """What images of one class are judged to be once moved to another."""
    judge = _judge()
    field, test = ddim_ode.load("fashion-mnist"), dataset("fashion-mnist", "test")
    rows = []
    for source, target in PAIRS:
        a, b = (np.flatnonzero(test.labels == c) for c in (source, target))
        which = np.concatenate([a[:n], b[:n], a[n : n + moved]])
        latent = ddim_ode.encode(field, as_tensor(test.images[which]), nfe=20, batch_size=64).x
        labels, starts = test.labels[which], latent[2 * n :]
        real = as_tensor(test.images[b[n : n + moved]])
        _, near = judge(real)
        rows.append(
            {"from": source, "to": target, "norm": "images of the target", "nearest": near, "spread": _spread(real)}
        )
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
                            "nearest": near, "spread": _spread(made),
                        }
                    )  # fmt: skip
                    print(rows[-1], flush=True)
    return {"accuracy": judge.accuracy, "training_images": TRAINING, "rows": rows}


def study_paths(pairs: int = 32) -> list[dict[str, Any]]:
    """The middles of paths, and their ends for comparison."""
    judge = _judge()
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
                    "spread": _spread(made),
                    "nearest": judge(made)[1],
                }
            )
            print(rows[-1], flush=True)
    return rows


def _spread(images: Tensor) -> float:
    """The contrast: standard deviation over an image's pixels, averaged."""
    return float(images.flatten(1).std(dim=1).mean())


@functools.cache
def _judge() -> Judge:
    return Judge()


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


PARTS: dict[str, Callable[[], Any]] = {
    "gaussianity": study_gaussianity,
    "coarse": study_coarse,
    "paths": study_paths,
    "attributes": study_attributes,
    "false_alarms": study_false_alarms,
}


def main() -> None:
    """Measure, record part by part, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for latents.json")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/figures", help="folder for latents.png")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    parser.add_argument("--figures-only", action="store_true", help="draw from the JSON there is, measure nothing")
    options = parser.parse_args()
    path = output_folder(options.out) / "latents.json"
    record: dict[str, Any] = (
        json.loads(path.read_text("utf-8")) if path.exists() else {"study": "latents", "circumstances": {}}
    )
    warnings.simplefilter("ignore", LatentWarning)  # straight paths are measured because they are narrow
    for name in () if options.figures_only else options.parts.split(","):
        if name not in PARTS:
            raise SystemExit(f"unknown part {name!r}: known are {', '.join(PARTS)}")
        record[name] = PARTS[name]()
        record["circumstances"][name] = circumstances()
        write_json(path, record)
    save_figure(gaussianity_figure(record["gaussianity"]), output_folder(options.figures) / "latents.png")


if __name__ == "__main__":
    main()
