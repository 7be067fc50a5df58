"""The problems that solvers are chosen and judged on: exact mixtures of real images, and the bundled network.

Mixtures of larger images are fitted once, to the training images, and kept in ``out/``::

    python -m benchmarks.problems [fashion-mnist | mnist | cifar10 | cifar10-16]
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddim_ode
from ddim_ode import Adaptive, EpsilonField, Grid, NoiseSchedule
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, replacing
from ddim_ode.models.analytic import EmpiricalEpsilon, GaussianEpsilon, MixtureEpsilon
from ddim_ode.solvers.runge_kutta import DOP853, DOPRI5

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = 10
#: Problems that are mixtures of a data set's images, and which.
MIXTURES = {"fashion": "fashion-mnist", "mnist": "mnist", "cifar": "cifar10-16"}
NETWORKS = {"network": "fashion-mnist", "network-cifar10": "cifar10"}
#: The two solutions that a problem's reference is made of and checked by. A network knows σ by cosines of its label, of up to one
#: radian a label: below 1e-5 a solver has to follow their waves, high orders gain nothing, and a tolerance costs its calls.
EXACT = (Adaptive(DOP853, rtol=1e-10, atol=1e-10), Adaptive(DOPRI5, rtol=1e-10, atol=1e-10))
NETWORK = (Adaptive(DOPRI5, rtol=1e-6, atol=1e-6), Adaptive(DOPRI5, rtol=1e-6, atol=1e-6, clock="sigma"))
#: Problems to compare on: mixtures, and the two bundled networks.
PROBLEMS = ("digits", *MIXTURES, "network", "network-cifar10")


@dataclass(frozen=True, eq=False)
class Problem:
    r"""A field, latents to sample, and where they lead.

    Attributes
    ----------
    field : EpsilonField
        ε.
    latent : Tensor
        x_T, (B, \*d).
    exact : Tensor
        The data they lead to, (B, \*d): encoding these must give the latents back.
    difference : float
        RMS difference to a second solution: how far `exact` can be trusted.
    end : float
        The noise level where `exact` lies: 0, but for a finite data set. All its trajectories end in data points, so that
        at 0 an error would only tell which.
    """

    field: EpsilonField
    latent: Tensor
    exact: Tensor
    difference: float
    end: float = 0.0

    def grid(self, rule: str, steps: int, **options: float) -> Grid:
        """The grid of a rule, bent so that it ends at `end`: σ² becomes σ² + end² (1 − σ²/σ_T²)."""
        grid = Grid.make(rule, self.field.schedule, steps, **options)
        if self.end == 0.0:
            return grid
        bent = grid.sigmas**2 + self.end**2 * (1.0 - (grid.sigmas / grid.sigmas[0]) ** 2)
        return Grid(np.sqrt(bent), grid.schedule, grid.name)


def _digits() -> Tensor:
    """The 1,797 digits (8 × 8) of scikit-learn, in [−1, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data / 8.0 - 1.0)


def _digits_gaussian() -> GaussianEpsilon:
    digits = _digits()
    return GaussianEpsilon(digits.mean(0).reshape(1, 8, 8), torch.cov(digits.T, correction=0) + 1e-3 * torch.eye(64))


def _exact(eps: Any) -> EpsilonField:
    return EpsilonField.from_sigma(eps, NoiseSchedule.linear(), shape=eps.shape)


def digits_mixture() -> MixtureEpsilon:
    """Ten full-covariance Gaussians fitted to the digits."""
    fitted = _em(_digits().numpy(), floor=1e-3)
    means = torch.from_numpy(fitted.means_).reshape(COMPONENTS, 1, 8, 8)
    return MixtureEpsilon(torch.from_numpy(fitted.weights_), means, torch.from_numpy(fitted.covariances_))


def image_mixture(name: str) -> MixtureEpsilon:
    """Ten full-covariance Gaussians fitted to the training images of a data set; fitted now if that was not done yet.

    ``fashion-mnist``, ``mnist``, and ``cifar10-16``, which is CIFAR-10 with 2 × 2 pixels averaged: by
    expectation–maximisation. ``cifar10``: its 3072 dimensions are too many for that; the clusters are
    found by expectation–maximisation in the 192 leading principal directions, and each cluster's whole covariance is
    shrunk towards their mean by 2,000 images' worth, without which ten covariances fit 50,000 images too closely to do
    well on others.

    Raises
    ------
    FileNotFoundError
        If there is neither a kept mixture nor the data.
    """
    path = ROOT / "out" / f"mixture-{name}.npz"
    if not path.exists():
        print(f"fitting the mixture of {name}: some minutes, kept in {path}")
        images = dataset(name.removesuffix("-16")).images.astype(np.float32) / 127.5 - 1.0
        if name.endswith("-16"):
            n, channels, height, width = images.shape
            images = images.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
        shape = images.shape[1:]
        fit = _fit_cifar10 if name == "cifar10" else _fit_by_em
        weights, means, covariances = fit(images.reshape(len(images), -1))
        output_folder(path.parent)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            means = means.reshape(COMPONENTS, *shape)
            np.savez(file, weights=weights, means=means, covariances=covariances.astype(np.float32))
    return MixtureEpsilon.load(path)


def _fit_by_em(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    fitted = _em(images, floor=1e-4)
    return fitted.weights_, fitted.means_, fitted.covariances_


def _fit_cifar10(
    images: np.ndarray, kept: int = 192, shared: float = 2000.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centred = images - images.mean(axis=0)
    basis = np.linalg.eigh(centred.T @ centred)[1][:, -kept:]
    scores = centred @ basis
    cluster = _em(scores, floor=1e-4).predict(scores)
    counts = np.bincount(cluster, minlength=COMPONENTS).astype(np.float64)
    parts = [images[cluster == k] for k in range(COMPONENTS)]
    means = np.stack([part.mean(axis=0, dtype=np.float64) for part in parts])
    covariances = np.stack([np.cov(part, rowvar=False, bias=True, dtype=np.float32) for part in parts])
    pooled = np.tensordot(counts / counts.sum(), covariances, axes=1)
    for k, n in enumerate(counts):
        covariances[k] = (n * covariances[k] + shared * pooled) / (n + shared) + 1e-4 * np.eye(len(pooled))
    return counts / counts.sum(), means, covariances


def _em(data: np.ndarray, floor: float) -> Any:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(COMPONENTS, covariance_type="full", reg_covar=floor, random_state=0, tol=0.1).fit(data)


def problem(name: str, samples: int, seed: int) -> Problem:
    """A problem by name: one of :data:`PROBLEMS`, ``gaussian`` or ``empirical``.

    ``gaussian`` is the Gaussian of the digits, whose solution is a formula; ``empirical`` the digits themselves as a finite
    data set, down to σ = 0.3. The others are solved twice: exact models as :data:`EXACT` says, and networks, in float64, as
    :data:`NETWORK`.

    Parameters
    ----------
    name : str
        Which.
    samples : int
        Latents.
    seed : int
        Their seed.
    """
    solvers, end = EXACT, 0.0
    if name == "gaussian":
        gaussian = _digits_gaussian()
        field, latent = _exact(gaussian), ddim_ode.noise(gaussian.shape, samples, seed)
        top = field.schedule.sigma_max
        return Problem(field, latent, gaussian.solution(latent * math.sqrt(1.0 + top * top), top, 0.0), 0.0)
    if name == "empirical":
        field, end = _exact(EmpiricalEpsilon(_digits().reshape(-1, 1, 8, 8))), 0.3
    elif name.startswith("network"):
        field, solvers = ddim_ode.load(NETWORKS[name]), NETWORK
    else:
        field = _exact(digits_mixture() if name == "digits" else image_mixture(MIXTURES[name]))
    assert field.shape is not None
    latent = ddim_ode.noise(field.shape, samples, seed)
    kept = None
    precise = field
    if name.startswith("network"):
        # Minutes each, and the same whenever the network is: several studies ask for them.
        how = [(solver.name, solver.rtol, solver.atol) for solver in solvers]
        said = f"{field.describe()['weights']} {how} {samples} {seed} {torch.__version__}"
        kept = ROOT / "out" / f"reference-{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"
        if kept.exists():
            known = np.load(kept)
            return Problem(field, latent, torch.from_numpy(known["exact"]), float(known["difference"]), end)
        precise = EpsilonField(copy.deepcopy(field.model).double(), field.schedule, shape=field.shape)
    ends = [field.schedule.sigma_max, end]
    runs = [ddim_ode.sample(precise, latent, solver=solver, grid=ends) for solver in solvers]
    if not all(run.success for run in runs):
        raise RuntimeError(f"the reference of {name} failed: {[run.status for run in runs]}")
    exact, other = (run.x_bar for run in runs)
    difference = float((exact - other).square().mean().sqrt())
    if kept is not None:
        output_folder(kept.parent)
        with replacing(kept) as temporary, open(temporary, "wb") as file:
            np.savez(file, exact=exact.numpy(), difference=np.array(difference))
    return Problem(field, latent, exact, difference, end)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit the mixture of a data set's images.")
    parser.add_argument(
        "data", nargs="?", default="fashion-mnist", choices=("fashion-mnist", "mnist", "cifar10", "cifar10-16")
    )
    image_mixture(parser.parse_args().data)
