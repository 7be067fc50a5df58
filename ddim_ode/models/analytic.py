r"""Data distributions whose optimal ε is known exactly: how every solver is judged.

For data with density p, noised to :math:`\bar x = x_0 + \sigma \epsilon`, the optimal noise predictor is
:math:`\epsilon(\bar x, \sigma) = -\sigma \nabla \log p_\sigma(\bar x) = (\bar x - E[x_0 | \bar x]) / \sigma`. Each class here
is callable as ``eps(x_bar, sigma)`` and plugs in as ``EpsilonField.from_sigma(eps, schedule)``. They compute in
the dtype and on the device of the state. σ is a float, or a tensor (B, 1, …, 1) of one noise level a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["EmpiricalEpsilon", "GaussianEpsilon", "MixtureEpsilon"]


class GaussianEpsilon:
    r"""Exact ε of N(μ, Σ) and the exact solution of its ODE.

    Parameters
    ----------
    mean : Tensor
        μ, (\*d).
    covariance : Tensor
        Σ: (D, D) with D the product of d, symmetric positive semi-definite; or (\*d) for a diagonal.

    Attributes
    ----------
    shape : tuple of int
        \*d.
    variance : Tensor
        λ, the eigenvalues of Σ, (D,), float64.
    basis : Tensor
        U, their directions, (D, D), float64.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        mean = torch.as_tensor(mean, dtype=torch.float64)
        self.shape = tuple(mean.shape)
        self.mean = mean.flatten()
        self.variance, self.basis = _eigen(
            torch.as_tensor(covariance, dtype=torch.float64), self.mean.numel(), "covariance"
        )
        self._placed = _Placed(self.mean, self.variance, self.basis)

    def __call__(self, x_bar: Tensor, sigma: float | Tensor) -> Tensor:
        """ε(x̄, σ) = σ U (λ + σ²)⁻¹ Uᵀ (x̄ − μ)."""
        mean, variance, basis = self._placed.like(x_bar)
        turned = (x_bar.flatten(1) - mean) @ basis
        sigma = _flat(sigma)
        return ((turned * _ratio(sigma, variance)) @ basis.T).reshape(x_bar.shape)

    def solution(self, x_bar: Tensor, sigma: float, to: float) -> Tensor:
        r"""The ODE's exact solution: :math:`\mu + U \sqrt{(\lambda + \sigma'^2)/(\lambda + \sigma^2)}\, U^T (\bar x - \mu)`.

        Parameters
        ----------
        x_bar : Tensor
            The state at `sigma`, (B, \*d).
        sigma, to : float
            Where it is, and where to take it.
        """
        mean, variance, basis = self._placed.like(x_bar)
        turned = (x_bar.flatten(1) - mean) @ basis
        total = variance + sigma * sigma
        # Where both vanish the data do not leave the mean, and nor does the solution.
        moved = turned * torch.where(total > 0.0, ((variance + to * to) / total).sqrt(), torch.ones_like(total))
        return (mean + moved @ basis.T).reshape(x_bar.shape)

    def log_density(self, x_bar: Tensor, sigma: float) -> Tensor:
        r"""Log N(x̄; μ, Σ + σ² I), (B,): that of the data noised to `sigma`.

        Parameters
        ----------
        x_bar : Tensor
            (B, \*d).
        sigma : float
            A noise level; above 0, if Σ is singular.
        """
        mean, variance, basis = self._placed.like(x_bar)
        return _log_normal((x_bar.flatten(1) - mean) @ basis, variance, sigma)


class MixtureEpsilon:
    r"""Exact ε of a Gaussian mixture with full covariances.

    Parameters
    ----------
    weights : Tensor
        (K,), positive; scaled to sum to one.
    means : Tensor
        (K, \*d).
    covariances : Tensor
        (K, D, D).

    Attributes
    ----------
    shape : tuple of int
        \*d.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        means = torch.as_tensor(means, dtype=torch.float64)
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if weights.ndim != 1 or means.shape[0] != weights.numel() or covariances.shape[0] != weights.numel():
            raise ValueError(
                "weights (K,), means (K, *d) and covariances (K, D, D) must agree on K, but have shapes "
                f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(covariances.shape)}"
            )
        if not bool((weights > 0.0).all()):
            raise ValueError(f"weights must be positive, but the smallest is {float(weights.min()):.4g}")
        self.shape = tuple(means.shape[1:])
        self.weights = weights / weights.sum()
        self.means = means.flatten(1)
        size = self.means.shape[1]
        parts = [_eigen(c, size, f"covariances[{k}]") for k, c in enumerate(covariances)]
        self.variances, self.bases = (torch.stack(x) for x in zip(*parts, strict=True))
        self._placed = _Placed(self.weights, self.means, self.variances, self.bases)

    @classmethod
    def load(cls, path: Any) -> MixtureEpsilon:
        """A mixture from an ``.npz`` with ``weights``, ``means``, ``covariances``."""
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            return cls(*(torch.from_numpy(file[name]) for name in ("weights", "means", "covariances")))

    def __call__(self, x_bar: Tensor, sigma: float | Tensor) -> Tensor:
        """ε(x̄, σ): the components' exact ε, weighted by how likely each is to have made x̄."""
        if isinstance(sigma, Tensor):
            return _above_zero(self, x_bar, sigma)
        if sigma == 0.0:
            return 0.0 * x_bar  # not a constant: it has a derivative, which is 0
        return self._above_zero(x_bar, sigma)

    def _above_zero(self, x_bar: Tensor, sigma: Any) -> Tensor:
        weights, means, variances, bases = self._placed.like(x_bar)
        flat, sigma = x_bar.flatten(1), _flat(sigma)
        turned = [(flat - m) @ u for m, u in zip(means, bases, strict=True)]
        square = sigma * sigma
        total = variances + square if isinstance(square, float) else [v + square for v in variances]
        logs = [
            w.log() - 0.5 * (v.log().sum(dim=-1) + (z * z / v).sum(dim=1))
            for w, v, z in zip(weights, total, turned, strict=True)
        ]
        share = torch.stack(logs, dim=1).softmax(dim=1)
        out = torch.zeros_like(flat)
        for k, z in enumerate(turned):
            out += ((share[:, k : k + 1] * z) * _ratio(sigma, variances[k])) @ bases[k].T
        return out.reshape(x_bar.shape)

    def log_density(self, x_bar: Tensor, sigma: float) -> Tensor:
        r"""Log Σ_k w_k N(x̄; μ_k, Σ_k + σ² I), (B,): that of the data noised to `sigma`.

        Parameters
        ----------
        x_bar : Tensor
            (B, \*d).
        sigma : float
            A noise level; above 0, if a Σ_k is singular.
        """
        weights, means, variances, bases = self._placed.like(x_bar)
        flat = x_bar.flatten(1)
        parts = zip(weights, means, variances, bases, strict=True)
        return torch.stack([w.log() + _log_normal((flat - m) @ u, v, sigma) for w, m, v, u in parts]).logsumexp(dim=0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw (n, \*d) from the mixture, float64, on the CPU."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        unit = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        out = torch.empty_like(unit)
        for k in which.unique().tolist():
            rows = which == k
            out[rows] = self.means[k] + (unit[rows] * self.variances[k].sqrt()) @ self.bases[k].T
        return out.reshape(n, *self.shape)


class EmpiricalEpsilon:
    r"""Exact ε of a finite data set: the closed-form optimal denoiser.

    :math:`E[x_0 | \bar x] = \sum_i w_i x_i` with :math:`w = \mathrm{softmax}(-\|\bar x - x_i\|^2 / 2\sigma^2)`, summed in
    chunks, so that 60,000 images of 784 dimensions need no more memory than themselves and one chunk.

    Parameters
    ----------
    data : Tensor
        (N, \*d), any float dtype, or uint8 for images, which are read as x / 127.5 − 1.
    chunk : int
        Data points a chunk.

    Notes
    -----
    At σ = 0 it returns zeros; ε has no limit there that is a function of x̄. A method with a stage at σ = 0 (Heun's,
    Kutta's) asks for it, and does not land on the data; one that asks at the start of its steps only does.
    """

    def __init__(self, data: Tensor, chunk: int = 8192) -> None:
        if not (data.is_floating_point() or data.dtype == torch.uint8):
            raise TypeError(f"data must be floats, or uint8 images, but its dtype is {data.dtype}: convert it")
        if data.ndim < 2 or data.shape[0] < 1:
            raise ValueError(f"data must have shape (N, *d) with N >= 1, but its shape is {tuple(data.shape)}")
        self.shape = tuple(data.shape[1:])
        self.data = data.flatten(1)
        self.chunk = chunk

    def __call__(self, x_bar: Tensor, sigma: float | Tensor) -> Tensor:
        """ε(x̄, σ) = (x̄ − E[x₀ | x̄]) / σ."""
        if isinstance(sigma, Tensor):
            return _above_zero(self, x_bar, sigma)
        if sigma == 0.0:
            return 0.0 * x_bar  # not a constant: it has a derivative, which is 0
        return self._above_zero(x_bar, sigma)

    def _above_zero(self, x_bar: Tensor, sigma: Any) -> Tensor:
        x, sigma = x_bar.flatten(1), _flat(sigma)
        best = torch.full((x.shape[0], 1), -torch.inf, dtype=x.dtype, device=x.device)
        mass, mean = torch.zeros_like(best), torch.zeros_like(x)
        for y in self._parts(x):
            # −|x − y|²/2σ², less the part in |x|² that all points share
            logits = (x @ y.T - 0.5 * (y * y).sum(dim=1)) / (sigma * sigma)
            top = torch.maximum(best, logits.amax(dim=1, keepdim=True))
            weights, old = (logits - top).exp(), (best - top).exp()
            mass = mass * old + weights.sum(dim=1, keepdim=True)
            mean = mean * old + weights @ y
            best = top
        return ((x - mean / mass) / sigma).reshape(x_bar.shape)

    def log_density(self, x_bar: Tensor, sigma: float) -> Tensor:
        r"""Log (1/N) Σ_i N(x̄; x_i, σ² I), (B,): that of the data noised to `sigma` > 0; at 0 they have none.

        Parameters
        ----------
        x_bar : Tensor
            (B, \*d).
        sigma : float
            A noise level above 0.
        """
        if not sigma > 0.0:
            raise ValueError(f"sigma must be above 0 for the density of a finite data set, but got {sigma!r}")
        x = x_bar.flatten(1)
        total = torch.full((x.shape[0],), -torch.inf, dtype=x.dtype, device=x.device)
        for y in self._parts(x):
            # Not by |x|² + |y|² − 2xy, which far from the data would lose the digits of an answer that is a difference.
            near = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
            total = torch.logaddexp(total, (near * (-0.5 / sigma**2)).logsumexp(dim=1))
        return total - math.log(len(self.data)) - 0.5 * x.shape[1] * math.log(2.0 * math.pi * sigma**2)

    def _parts(self, like: Tensor) -> Iterator[Tensor]:
        """The data in chunks, as floats beside `like`."""
        for part in self.data.split(self.chunk):
            y = part.to(like.device, like.dtype)
            yield y / 127.5 - 1.0 if part.dtype == torch.uint8 else y


class _Placed:
    """Constants, copied once to each device and dtype that asks for them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self.copies: dict[Any, tuple[Tensor, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, ...]:
        key = (x.device, x.dtype)
        if key not in self.copies:
            placed = tuple(t.to(x.device, x.dtype) for t in self.tensors)
            # Fake tensors must not outlive their mode, nor inference tensors theirs.
            if any(isinstance(t, FakeTensor) for t in placed) or torch.is_inference_mode_enabled():
                return placed
            self.copies[key] = placed
        return self.copies[key]


def _eigen(covariance: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    if covariance.shape == (size, size):
        # A covariance estimated in float32 is symmetric to float32's rounding only.
        if float((covariance - covariance.T).abs().max()) > 1e-5 * float(covariance.abs().max()):
            raise ValueError(f"{name} must be symmetric")
        variance, basis = torch.linalg.eigh(0.5 * (covariance + covariance.T))
    elif covariance.numel() == size:
        variance, basis = covariance.flatten(), torch.eye(size, dtype=torch.float64)
    else:
        raise ValueError(f"{name} must be (D, D) or (*d) for D = {size}, but its shape is {tuple(covariance.shape)}")
    if float(variance.min()) < -1e-10 * float(variance.max()):
        raise ValueError(f"{name} must be positive semi-definite, but has the eigenvalue {float(variance.min()):.4g}")
    return variance.clamp(min=0.0), basis


def _log_normal(turned: Tensor, variance: Tensor, sigma: float) -> Tensor:
    """Log N(0, diag(λ) + σ² I) of what has been turned onto its directions, (B, D) to (B,)."""
    total = variance + sigma * sigma
    if not isinstance(total, FakeTensor) and not bool((total > 0.0).all()):
        raise ValueError(
            f"sigma = {sigma:g} leaves a direction without variance, where there is no density: take it above 0"
        )
    return -0.5 * ((turned * turned / total).sum(dim=1) + (2.0 * math.pi * total).log().sum())


def _flat(sigma: Any) -> Any:
    """A σ for each sample as a column beside flattened states; a float as it is."""
    return sigma.reshape(-1, 1) if isinstance(sigma, Tensor) else sigma


def _above_zero(model: Any, x_bar: Tensor, sigma: Tensor) -> Tensor:
    """ε with a σ for each sample, and 0 for those at σ = 0."""
    above = sigma > 0.0
    # Those are asked for at σ = 1 instead: a NaN that is thrown away still spoils gradients.
    eps = model._above_zero(x_bar, torch.where(above, sigma, torch.ones_like(sigma)))
    return torch.where(above, eps, torch.zeros_like(eps))


def _ratio(sigma: Any, variance: Tensor) -> Tensor:
    """σ/(λ + σ²), and 0 where both vanish: the limit along the data."""
    if isinstance(sigma, Tensor):
        return torch.where(sigma > 0.0, sigma / (variance + sigma * sigma), torch.zeros_like(variance))
    return sigma / (variance + sigma * sigma) if sigma > 0.0 else torch.zeros_like(variance)
