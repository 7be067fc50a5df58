"""The problems that solvers are chosen and judged on: exact mixtures of real images, and the bundled network.

The mixture of Fashion-MNIST is fitted once, by expectation–maximisation on the 60,000 training images, and kept::

    python -m benchmarks.problems [--out out/mixture-fashion-mnist.npz]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ddim_ode
from ddim_ode import EpsilonField, NoiseSchedule
from ddim_ode.comparison import reference
from ddim_ode.datasets import dataset
from ddim_ode.files import output_folder, replacing
from ddim_ode.models.analytic import MixtureEpsilon

ROOT = Path(__file__).resolve().parents[1]
FASHION_MIXTURE = ROOT / "out" / "mixture-fashion-mnist.npz"
COMPONENTS = 10


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
        How far `exact` can be trusted: see :class:`ddim_ode.comparison.Reference`.
    """

    field: EpsilonField
    latent: Tensor
    exact: Tensor
    difference: float


def digits_mixture() -> MixtureEpsilon:
    """Ten full-covariance Gaussians fitted to the 1,797 digits (8 × 8) of scikit-learn."""
    from sklearn.datasets import load_digits

    return _fit(load_digits().data / 8.0 - 1.0, (1, 8, 8), floor=1e-3)


def fashion_mixture(path: Path = FASHION_MIXTURE) -> MixtureEpsilon:
    """Ten full-covariance Gaussians fitted to the training images of Fashion-MNIST; fitted now if there is no file.

    Raises
    ------
    FileNotFoundError
        If there is neither the file nor the data.
    """
    if not path.exists():
        print(f"fitting the mixture of Fashion-MNIST: about ten minutes, kept in {path}")
        images = dataset("fashion-mnist").images.reshape(60_000, -1).astype(np.float32) / 127.5 - 1.0
        mixture = _fit(images, (1, 28, 28), floor=1e-4)
        output_folder(path.parent)
        covariances = (mixture.bases * mixture.variances[:, None]) @ mixture.bases.transpose(1, 2)
        means = mixture.means.reshape(COMPONENTS, *mixture.shape)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, weights=mixture.weights, means=means, covariances=covariances.float())
    return MixtureEpsilon.load(path)


def _fit(data: np.ndarray, shape: tuple[int, ...], floor: float) -> MixtureEpsilon:
    from sklearn.mixture import GaussianMixture

    fitted = GaussianMixture(COMPONENTS, covariance_type="full", reg_covar=floor, random_state=0, tol=0.1).fit(data)
    means = torch.from_numpy(fitted.means_).reshape(COMPONENTS, *shape)
    return MixtureEpsilon(torch.from_numpy(fitted.weights_), means, torch.from_numpy(fitted.covariances_))


def problem(name: str, samples: int, seed: int, *, nfe: int = 400) -> Problem:
    """A problem by name: ``digits``, ``fashion`` (mixtures) or ``network`` (the bundled Fashion-MNIST network).

    Parameters
    ----------
    name : str
        Which.
    samples : int
        Latents.
    seed : int
        Their seed.
    nfe : int
        Calls each of the two reference solutions spends.
    """
    if name == "network":
        field = ddim_ode.load("fashion-mnist")
    else:
        exact = {"digits": digits_mixture, "fashion": fashion_mixture}[name]()
        field = EpsilonField.from_sigma(exact, NoiseSchedule.linear(), shape=exact.shape)
    assert field.shape is not None
    latent = ddim_ode.noise(field.shape, samples, seed)
    found = reference(field, latent, nfe=nfe)
    return Problem(field, latent, found.x, found.difference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit the mixture of Fashion-MNIST.")
    parser.add_argument("--out", type=Path, default=FASHION_MIXTURE, help="where to keep it")
    fashion_mixture(parser.parse_args().out)
