r"""A bundled network's noise-prediction loss by decade of σ, beside that of an exact mixture fitted to the same data.

The mixture (ten full-covariance Gaussians, see ``problems.py``) knows the data as well as a closed form can; a network
that does not clearly beat it where σ ≤ 1 has learned nothing worth a network::

    python -m benchmarks.network_loss [--model fashion-mnist | cifar10] [--images 10000] [--out benchmarks/results]

Both see the same noise on the same test images. All 10,000 take about half an hour on two cores for Fashion-MNIST;
CIFAR-10's mixture has 3072 dimensions, and 2,000 take twenty minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import ddim_ode
from benchmarks.problems import image_mixture
from ddim_ode.comparison import circumstances
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, write_json
from ddim_ode.training import sigma_loss

ROOT = Path(__file__).resolve().parents[1]
#: Four levels a decade from 0.01 to 100, and the last level of the paper's schedule.
EXPONENTS = np.arange(-8, 9) / 4


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="fashion-mnist", help="a bundled name or a weights file")
    parser.add_argument("--data", help="the data set it was trained on (default: that of its name)")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder for network_loss-DATA.json"
    )
    options = parser.parse_args()
    out = output_folder(options.out)
    data = options.data or options.model
    images = dataset(data, "test").images[: options.images]
    field, mixture = ddim_ode.load(options.model), image_mixture(data)
    sigmas = [*(10.0**EXPONENTS).tolist(), field.schedule.sigma_max]
    network = sigma_loss(field, images, sigmas)
    # float64: at large σ the mixture's responsibilities come from differences of large numbers.
    exact = sigma_loss(mixture, images, sigmas, dtype=torch.float64)
    rows = [{"sigma": s, "network": network[s], "mixture": exact[s], "ratio": network[s] / exact[s]} for s in sigmas]
    decades = []
    for low, high in ((0.01, 0.1), (0.1, 1.0), (1.0, 10.0), (10.0, 100.0), (100.0, np.inf)):
        inside = [row for row in rows if low * (1 - 1e-9) <= row["sigma"] < high * (1 - 1e-9)]
        means = {who: float(np.mean([row[who] for row in inside])) for who in ("network", "mixture")}
        decades.append(
            {"from": low, "to": min(high, field.schedule.sigma_max)}
            | means
            | {"ratio": means["network"] / means["mixture"]}
        )
    record = {
        "study": "network_loss",
        "model": options.model,
        "data": data,
        "images": len(images),
        "seed": 0,
    } | circumstances(field)
    write_json(out / f"network_loss-{data}.json", record | {"levels": rows, "decades": decades})
    print("| σ | network | mixture | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['sigma']:.3g} | {row['network']:.3g} | {row['mixture']:.3g} | {row['ratio']:.3f} |")
    print("\n| decade of σ | network | mixture | ratio |\n|---|---|---|---|")
    for row in decades:
        print(f"| {row['from']:g}–{row['to']:.4g} | {row['network']:.3g} | {row['mixture']:.3g} | {row['ratio']:.3f} |")


if __name__ == "__main__":
    main()
