r"""Likelihoods: what a budget, a solver, a starting level and a few probes are worth, and bits per dimension.

Four parts; the record is ``likelihood.json``::

    python -m benchmarks.likelihood [--out benchmarks/results] [--only PART]

``exact``
    Error in nats per dimension, the worst of four samples', on the small mixture of ``convergence.py`` and on that of the
    digits, with exact traces and their own density at σ_T as the prior: fixed grids by budget, pairs by tolerance.
``network``
    The same on the bundled Fashion-MNIST network, one probe, against dopri5 at 1e-6, which a second run in the clock σ
    checks.
``moves``
    Mean bits per dimension of 16 of the bundled images, one probe, the same draws throughout: by budget, by σ_0, by data
    type of the network.
``bits``
    Mean bits per dimension of both bundled networks on test images, at the defaults of ``ddim_ode.log_density``. CIFAR-10 is left
    out where its images are not at hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.convergence import mixture
from benchmarks.problems import NETWORK, NETWORKS, digits_mixture
from ddim_ode import EpsilonField, Likelihood, NoiseSchedule, load, log_density
from ddim_ode.comparison import circumstances
from ddim_ode.data import bundled_images
from ddim_ode.datasets import images
from ddim_ode.files import output_folder, write_json
from ddim_ode.models.analytic import MixtureEpsilon
from ddim_ode.solvers import get

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (20, 50, 100, 200)
#: A solver and the rule of its grid; None: what ``encode`` takes by itself.
FIXED: tuple[tuple[str | None, str | None], ...] = (
    (None, None),
    ("flowdown5", "flow"),
    ("unipc3", "asinh"),
    ("ab4-rk", "asinh"),
    ("rk4", "asinh"),
    ("dpmpp2m", "asinh"),
    ("heun", "asinh"),
    ("ddim", "quadratic"),
)
PAIRS = ("bs32", "dopri5", "dop853")
TOLERANCES = (1e-3, 1e-5, 1e-7)
LEVELS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)


def settings(
    tolerances: tuple[float, ...], budgets: tuple[int, ...]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What to call a run in the record, and the options that make it."""
    for solver, grid in FIXED:
        for nfe in budgets:
            yield {"solver": solver or "default"}, {"solver": solver, "grid": grid, "nfe": nfe}
    for name in PAIRS:
        for tolerance in tolerances:
            if name == "bs32" and tolerance < 1e-5:
                continue  # thousands of calls
            pair: Any = replace(get(name), rtol=tolerance, atol=tolerance)  # type: ignore[type-var]
            yield {"solver": name, "tolerance": tolerance}, {"solver": pair}


def rows(
    run: Callable[..., Likelihood], truth: Tensor, tolerances: tuple[float, ...], budgets: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Errors in nats per dimension, the worst sample's."""
    found = []
    for name, options in settings(tolerances, budgets):
        began = time.perf_counter()
        made = run(**options)
        seconds = time.perf_counter() - began
        outcome = made.encoding.outcome
        calls = made.nfe if outcome is None else float(np.mean(outcome.nfe))
        error = float((made.log_density - truth).abs().max()) / made.latent[0].numel()
        found.append(name | {"grid": made.encoding.grid.name, "calls": calls, "error": error, "seconds": seconds})
        print(found[-1], flush=True)
    return found


def exact() -> dict[str, Any]:
    """Mixtures, whose density is known at every level."""
    record = {}
    for name, eps in (("small", mixture().eps), ("digits", digits_mixture())):
        assert isinstance(eps, MixtureEpsilon)
        field = EpsilonField.from_sigma(eps, NoiseSchedule.linear())
        low, draw = field.schedule.sigma_min, torch.Generator().manual_seed(1)
        x_bar = eps.sample(4, draw)
        x_bar = x_bar + low * torch.randn(x_bar.shape, generator=draw, dtype=torch.float64)
        size = x_bar[0].numel()
        truth = eps.log_density(x_bar, low) + 0.5 * size * math.log1p(low * low)
        x = x_bar / math.sqrt(1.0 + low * low)
        run = lambda field=field, x=x, eps=eps, **options: log_density(field, x, prior=eps.log_density, **options)
        record[name] = rows(run, truth, TOLERANCES, BUDGETS)
    return record


def network() -> dict[str, Any]:
    """The bundled network on four bundled images."""
    field = load(NETWORKS["network"])
    assert field.shape is not None
    precise = EpsilonField(copy.deepcopy(field.model).double(), field.schedule, shape=field.shape)
    x = torch.from_numpy(bundled_images()[:4])
    truth, other = (log_density(precise, x, probes=1, solver=solver) for solver in NETWORK)
    difference = float((truth.log_density - other.log_density).abs().max()) / x[0].numel()
    print(f"references differ by {difference:.1e} nats per dimension, {truth.nfe} and {other.nfe} calls", flush=True)
    run = lambda **options: log_density(field, x, probes=1, **options)
    return {"difference": difference, "rows": rows(run, truth.log_density, (1e-3, 1e-4), BUDGETS[:3])}


def moves() -> list[dict[str, Any]]:
    """Bits by budget, by starting level and by the network's precision."""
    field, x = load(NETWORKS["network"]), torch.from_numpy(bundled_images()[:16])
    assert field.shape is not None
    precise = EpsilonField(copy.deepcopy(field.model).double(), field.schedule, shape=field.shape)
    settings: list[tuple[str, Any, EpsilonField, dict[str, Any]]] = [
        *(("nfe", nfe, field, {"nfe": nfe}) for nfe in (10, 20, 50, 100)),
        *(("sigma", sigma, field, {"nfe": 100, "sigma": sigma}) for sigma in LEVELS),
        ("network", "float64", precise, {"nfe": 50}),
    ]
    found = []
    for what, value, on, options in settings:
        mean = log_density(on, x, probes=1, **options).mean_bits
        assert mean is not None
        found.append({"varied": what, "value": value, "nfe": options["nfe"]} | mean._asdict())
        print(found[-1], flush=True)
    return found


def bits() -> list[dict[str, Any]]:
    """Both networks, at the defaults."""
    found = []
    for name, count in (("fashion-mnist", 64), ("cifar10", 32)):
        try:
            given = bundled_images() if name == "fashion-mnist" else images("cifar10", "test")
        except FileNotFoundError as error:
            print(f"{name} left out: {error}")
            continue
        began = time.perf_counter()
        made = log_density(load(name), torch.from_numpy(given[:count]), batch_size=8)
        mean = made.mean_bits
        assert mean is not None
        row = {"model": name, "nfe": made.nfe, "probes": made.probes, "seconds": time.perf_counter() - began}
        found.append(row | mean._asdict() | {"bits": made.bits.tolist() if made.bits is not None else None})
        print({k: v for k, v in found[-1].items() if k != "bits"}, flush=True)
    return found


PARTS: dict[str, Callable[[], Any]] = {"exact": exact, "network": network, "moves": moves, "bits": bits}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Likelihoods: errors by calls, bits by budget and level.")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", choices=PARTS, help="one part; the others of the record stay as they are")
    options = parser.parse_args()
    path = output_folder(options.out) / "likelihood.json"
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(path.read_text("utf-8")) if options.only and path.exists() else {}
    for part in [options.only] if options.only else PARTS:
        record[part] = {"circumstances": circumstances(), "found": PARTS[part]()}
        write_json(path, record)
