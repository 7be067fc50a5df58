r"""The log-density of data under the ODE: what a model gives an image, in nats and in bits per dimension.

Along a trajectory of eq. 14 the log-density of the state changes by the divergence of the field,

.. math:: \log p(\bar x_0) = \log \mathcal N(\bar x_T; 0, (1 + \sigma_T^2) I)
          + \int_{\sigma_0}^{\sigma_T} \mathrm{tr}\, \frac{\partial \epsilon}{\partial \bar x}\, d\sigma,

and :math:`x = \bar x_0 / \sqrt{1 + \sigma_0^2}` has :math:`\log p(x) = \log p(\bar x_0) + \frac D2 \log(1 + \sigma_0^2)`. The
two Gaussian terms in σ are themselves the integral of Dσ/(1 + σ²), the divergence of data of unit variance. Taken under
the integral sign they leave what tends to 0 as σ grows:

.. math:: \log p(x) = \log \mathcal N(x_T; 0, I) + D q(\sigma_T), \qquad
          \frac{dq}{d\sigma} = \frac1D\, \mathrm{tr}\, \frac{\partial \epsilon}{\partial \bar x} - \frac{\sigma}{1 + \sigma^2}.

What is solved beside x̄ is y = q √(1 + σ²), for which :math:`dy/d\sigma = \sqrt{1 + \sigma^2}\, q' + \sigma y / (1 + \sigma^2)`:
it grows as x̄ does, straight where σ is large, as the solvers want it; and an adaptive one, which measures the error of
state/√(1 + σ²), measures that of q: its tolerances are nats per dimension.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim_ode.field import EpsilonField, Evaluate
from ddim_ode.grid import Grid
from ddim_ode.integrate import check_state, integrate, to_dtype
from ddim_ode.sampling import NFE, Default, GridLike, fail, plan, set_aside
from ddim_ode.schedule import is_number, whole
from ddim_ode.solution import Solution, Status
from ddim_ode.solvers import Solver

__all__ = ["DEFAULT", "EXACT_UP_TO", "Likelihood", "Mean", "log_density"]

#: What is done when no solver and grid are named: the most accurate at 50 calls, benchmarks/likelihood.py.
DEFAULT = Default("flowup4", "flow", {"c": 1.6, "rho": 2.4})

#: Up to so many dimensions the trace is exact when nothing is said of it: that takes one vector–Jacobian product each.
EXACT_UP_TO = 64

#: Probes of a trace that is estimated, when nothing is said of them.
_PROBES = 4

#: Where a draw stands in the sequence of (seed, image): far from the latents, which begin at 0, and from one another.
_PROBE, _DEQUANTISE = 1, 2


class Mean(NamedTuple):
    """A mean over the images that did not fail.

    Attributes
    ----------
    value : float
        The mean.
    error : float
        Its standard error over images; the noise of the trace estimate, which differs from image to image, is in it. NaN
        for one image.
    trace_error : float
        The part of it that comes from the trace estimate alone: 0 for an exact trace, NaN for a single probe.
    n : int
        Images that it is over.
    """

    value: float
    error: float
    trace_error: float
    n: int


@dataclass(frozen=True, eq=False)
class Likelihood:
    r"""What :func:`log_density` found.

    Attributes
    ----------
    log_density : Tensor
        log p(x) of each sample, in nats, (B,), float64; NaN where the run failed.
    trace_error : Tensor
        Its standard error over the probes, in nats, (B,), float64: 0 for an exact trace, NaN for a single probe. What the
        solver does wrong is not in it.
    bits : Tensor or None
        Bits per dimension, (B,), float64, where uint8 images were given:
        :math:`-\log p(x)/(D \ln 2) + \log_2 127.5`.
    encoding : Solution
        The run up to σ_T, as :func:`ddim_ode.encode` returns it: the latents ``.x``, ``.nfe``, ``.status``, ``.grid``.
    trace : str
        ``"exact"`` or ``"hutchinson"``.
    probes : int
        Vector–Jacobian products a model call: the probes, or all D dimensions.
    """

    log_density: Tensor
    trace_error: Tensor
    bits: Tensor | None
    encoding: Solution
    trace: str
    probes: int

    @property
    def nfe(self) -> int:
        """Model calls, forwards."""
        return self.encoding.nfe

    @property
    def vjps(self) -> int:
        """Vector–Jacobian products, backwards, each about as dear as a model call."""
        return self.encoding.nfe * self.probes

    @property
    def status(self) -> tuple[Status, ...]:
        """How each sample's run ended."""
        return self.encoding.status

    @property
    def latent(self) -> Tensor:
        r"""x_T, (B, \*d)."""
        return self.encoding.x

    @property
    def mean_log_density(self) -> Mean:
        """That of :attr:`log_density`, in nats."""
        return _mean(self.log_density, self.trace_error)

    @property
    def bits_error(self) -> Tensor | None:
        """The standard error of :attr:`bits` over the probes, (B,)."""
        return None if self.bits is None else self.trace_error / (_size(self.latent) * math.log(2.0))

    @property
    def mean_bits(self) -> Mean | None:
        """That of :attr:`bits`."""
        error = self.bits_error
        return None if self.bits is None or error is None else _mean(self.bits, error)


def log_density(
    field: EpsilonField,
    x: Tensor,
    *,
    sigma: float | None = None,
    trace: str | None = None,
    probes: int | None = None,
    seed: int = 0,
    first: int = 0,
    steps: int | None = None,
    nfe: int | None = None,
    solver: str | Solver | None = None,
    grid: GridLike | None = None,
    dtype: torch.dtype = torch.float64,
    prior: Callable[[Tensor, float], Tensor] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Likelihood:
    r"""The log-density of data under the model, by encoding them along eq. 14 with its divergence.

    Parameters
    ----------
    field : EpsilonField
        ε. Its model must be one that autograd goes through.
    x : Tensor
        Floats (B, \*d): x at noise level `sigma`, :math:`\bar x/\sqrt{1 + \sigma^2}`. Or images (B, C, H, W) in uint8, which
        become :math:`x = (k + u - \frac12)/127.5 - 1` with u uniform on [0, 1), drawn from (seed, image index): the
        result then has ``bits`` per dimension too.
    sigma : float, optional
        σ_0, where the data are taken to lie; by default the first node of a grid that is given by its nodes, else
        ``schedule.sigma_min``, the least noise that the model was trained at. 0 is for fields that are smooth there.
    trace : {"exact", "hutchinson"}, optional
        All D diagonal entries of ∂ε/∂x̄, one vector–Jacobian product each; or their sum estimated as the mean of
        :math:`v^T (\partial\epsilon/\partial\bar x) v` [1]_ over Rademacher vectors v, the same ones at all σ. By default
        exact up to :data:`EXACT_UP_TO` dimensions, if no `probes` are asked for.
    probes : int, optional
        Vectors v of an estimated trace, 4 by default; probe k of image i depends on (seed, i, k) alone.
    seed : int
        Seed of the probes and of the dequantisation, 0 ≤ seed < 2⁶⁴.
    first : int
        Index of the first sample, where `x` is a part of something longer.
    steps, nfe, solver, grid
        As for :func:`ddim_ode.encode`; by default :data:`DEFAULT`. `nfe` counts forward calls; each comes with `probes` (or D)
        vector–Jacobian products. A rule's grid is bent to begin at σ_0: :math:`\sigma^2 + \sigma_0^2 (1 - \sigma^2/\sigma_T^2)`.
        The tolerances of an adaptive solver are those of x and of nats per dimension.
    dtype : torch.dtype
        The state's dtype. The network keeps its own.
    prior : callable, optional
        ``prior(x_bar, sigma)``, the log-density (B,) of x̄ (B, \*d) at the end of the run; by default that of
        N(0, (1 + σ²) I), which sampling starts from. ``log_density`` of an exact model is one.
    batch_size : int, optional
        Split the work into batches of this size; the result stays the same.
    progress : bool
        As for :func:`ddim_ode.integrate`.

    Returns
    -------
    Likelihood
        A sample that is not finite, or whose run fails, has the density NaN, and its status; its neighbours are not touched.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call; and at the first one, if autograd does not reach from ε back
        to x̄.

    Warns
    -----
    UserWarning
        If an exact trace is asked for beyond :data:`EXACT_UP_TO` dimensions: what it takes.

    References
    ----------
    .. [1] Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", 2019; Song et al., "Score-Based Generative Modeling
       through Stochastic Differential Equations", 2021, appendix D.2.
    """
    method, nodes = _plan(field, sigma, solver, grid, steps, nfe)
    if field.clips:
        raise ValueError("a field that clips or thresholds the predicted data has no density: make one without")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "the trace takes derivatives, which torch.inference_mode() forbids: leave it, or use torch.no_grad()"
        )
    seed, first = whole(seed, "seed", 0), whole(first, "first", 0)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, but got {seed}")
    if prior is not None and not callable(prior):
        raise TypeError(f"prior must be callable as prior(x_bar, sigma), but got {type(prior).__name__}")
    size = None if batch_size is None else whole(batch_size, "batch_size")
    images = isinstance(x, Tensor) and x.dtype == torch.uint8
    if images:
        if field.codec is not None:
            raise ValueError(
                "this model works on latents of images, and bits per dimension are those of images: give floats"
            )
        x = _dequantised(x, seed, first)
    x, spoilt = set_aside(x)
    check_state(field, x, "x")
    D = _size(x)
    trace, probes = _trace(trace, probes, D)
    field.check_conditions(x.shape[0])
    with torch.no_grad():
        scale = math.sqrt(1.0 + float(nodes.sigmas[0]) ** 2)
        start = to_dtype(x, dtype, float(nodes.sigmas[-1])).flatten(1) * scale
        augmented = _Augmented(field, tuple(x.shape[1:]), trace, probes, seed, first, method.adaptive)
        start = torch.cat((start, start.new_zeros(x.shape[0], augmented.columns)), dim=1)
        parts = []
        for i, part in enumerate(start.split(size or x.shape[0])):
            rows = slice(i * (size or 0), i * (size or 0) + part.shape[0])
            parts.append(integrate(augmented, part, nodes, method, rows=rows, progress=progress))
        run = Solution.concatenate(parts)
        end = float(nodes.sigmas[-1])
        x_bar, y = run.x_bar.split((D, augmented.columns), dim=1)
        run = replace(run, x_bar=x_bar.reshape(x.shape), second=None)
        estimates = y.unflatten(1, (-1, augmented.copies)).select(2, 0).double() * (D / math.sqrt(1.0 + end * end))
        found = _prior(prior, run.x_bar, end, D) + estimates.mean(dim=1)
        error = torch.zeros_like(found) if trace == "exact" else _standard_error(estimates)
        if spoilt:
            run = fail(run, spoilt)
        failed = torch.tensor([bool(status) for status in run.status], device=found.device)
        found, error = (value.masked_fill(failed, math.nan) for value in (found, error))
        bits = math.log2(127.5) - found / (D * math.log(2.0)) if images else None
    return Likelihood(found, error, bits, run, trace, probes)


class _Augmented(EpsilonField):
    """The field of x̄, flattened, with y behind it, one a probe, or `copies` of each one: (B, D + K). It keeps no state of a run."""

    def __init__(
        self,
        field: EpsilonField,
        shape: tuple[int, ...],
        trace: str,
        probes: int,
        seed: int,
        first: int,
        watched: bool,
    ) -> None:
        self.field, self.schedule, self.model = field, field.schedule, field.model
        self.sample, self.size = shape, math.prod(shape)
        self.trace, self.probes, self.seed, self.first = trace, probes, seed, first
        different = 1 if trace == "exact" else probes
        # A solver that watches the root mean square over the state must not lose y among D numbers.
        self.copies = -(-self.size // different) if watched else 1
        self.columns = different * self.copies
        self.shape = (self.size + self.columns,)

    def parameters(self) -> tuple[Tensor, ...]:
        """None: no gradients leave a likelihood."""
        return ()

    def bind(self, x_bar: Tensor, sigmas: Iterable[float], rows: slice | Tensor | None = None) -> Evaluate:
        count, D, columns = x_bar.shape[0], self.size, self.columns
        evaluate = self.field.bind(x_bar.new_empty((count, *self.sample)), sigmas, rows)
        vectors = None if self.trace == "exact" else self._vectors(x_bar, rows)

        def slope(state: Tensor, sigma: Any, rows: Tensor | None = None) -> Tensor:
            x, y = state.split((D, columns), dim=1)
            which = () if rows is None else (sigma, rows)
            with torch.enable_grad():
                x = x.detach().reshape(-1, *self.sample).clone().requires_grad_()
                eps = evaluate(x, *(which or (sigma,)))
            if vectors is None:
                trace = _diagonal(eps, x)
            else:
                trace = _products(eps, x, vectors if rows is None else vectors.index_select(1, rows))
            if rows is not None:
                sigma = sigma.to(state.device, state.dtype).unsqueeze(1)
            if self.copies > 1:
                trace = trace.repeat_interleave(self.copies, dim=1)
            square = 1.0 + sigma * sigma
            excess = trace / D - sigma / square
            return torch.cat((eps.detach().flatten(1), square**0.5 * excess + (sigma / square) * y), dim=1)

        return slope

    def _vectors(self, like: Tensor, rows: slice | Tensor | None) -> Tensor:
        """The vectors v, (K, B, D)."""
        chosen = rows.tolist() if isinstance(rows, Tensor) else range(like.shape[0])
        if isinstance(rows, slice):
            chosen = range(rows.start, rows.stop)
        drawn = np.stack([_rademacher(self.seed, self.first + i, self.probes, self.size) for i in chosen], axis=1)
        return torch.from_numpy(drawn).to(like.device, like.dtype)


def _products(eps: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """vᵀ (∂ε/∂x̄) v of each sample for each of `vectors` (K, B, D): (B, K)."""
    parts = vectors.unbind()
    pulled = [_pull(eps, x, v.reshape(x.shape), last=k == len(parts) - 1) for k, v in enumerate(parts)]
    return torch.stack([(g.flatten(1) * v).sum(dim=1) for g, v in zip(pulled, parts, strict=True)], dim=1)


def _diagonal(eps: Tensor, x: Tensor) -> Tensor:
    """The sum of the diagonal of ∂ε/∂x̄ of each sample: (B, 1)."""
    size = _size(x)
    total = x.new_zeros(x.shape[0], 1)
    # All rows of a part in one batched pass, which costs a fifth of one pass a row where the model is small.
    parts = torch.eye(size, dtype=x.dtype, device=x.device).split(EXACT_UP_TO)
    for k, part in enumerate(parts):
        units = part.unsqueeze(1).expand(-1, x.shape[0], -1).reshape(-1, *x.shape)
        rows = _pull(eps, x, units, last=k == len(parts) - 1, batched=True).flatten(2)
        total = total + (rows * part.unsqueeze(1)).sum(dim=(0, 2)).unsqueeze(1)
    return total


def _pull(eps: Tensor, x: Tensor, v: Tensor, *, last: bool, batched: bool = False) -> Tensor:
    """vᵀ ∂ε/∂x̄, of the shape of `v`; after the `last` one what autograd has kept is let go."""
    found = None
    if eps.requires_grad:
        (found,) = torch.autograd.grad(eps, x, v, retain_graph=not last, allow_unused=True, is_grads_batched=batched)
    if found is None:
        raise ValueError(
            "the trace takes derivatives of the model's output by its input, but autograd finds no way from one to the "
            "other: does the model run under torch.no_grad(), detach its input, or return a constant?"
        )
    return found


def _plan(
    field: EpsilonField,
    sigma: float | None,
    solver: str | Solver | None,
    grid: GridLike | None,
    steps: int | None,
    nfe: int | None,
) -> tuple[Solver, Grid]:
    """Solver and nodes of a run up from σ_0."""
    method, nodes = plan(field, "encode", solver, grid, steps, nfe, DEFAULT)
    if method.own_grid(field.schedule) is not None:
        raise ValueError(
            f"{method.name} brings its own grid, which begins at sigma = 0 and not where data have a density: name another solver"
        )
    top = field.schedule.sigma_max
    if sigma is not None and not (is_number(sigma) and 0.0 <= sigma < top):
        raise ValueError(f"sigma must be a noise level in [0, {top:.6g}), where the data lie, but got {sigma!r}")
    if grid is not None and not isinstance(grid, str):
        if sigma is not None and sigma != nodes.sigmas[0]:
            raise ValueError(
                f"sigma = {sigma:g} contradicts the grid given, which begins at {nodes.sigmas[0]:g}: leave one out"
            )
        return method, nodes
    low = field.schedule.sigma_min if sigma is None else float(sigma)
    bent = _bent(nodes, low)
    budget = NFE if nfe is None else nfe
    # A step that does not touch σ = 0 may cost more calls than the one that was counted.
    while steps is None and method.budgeted and method.calls(bent) > budget and bent.steps > 1:
        bent = _bent(plan(field, "encode", solver, grid, bent.steps - 1, None, DEFAULT)[1], low)
    return method, bent


def _bent(nodes: Grid, low: float) -> Grid:
    """A grid up from σ = 0, bent to begin at `low`; where σ is large nothing moves."""
    sigmas, top = nodes.sigmas, nodes.sigmas[-1]
    bent = np.sqrt(sigmas**2 + low**2 * (1.0 - (sigmas / top) ** 2))
    bent[0], bent[-1] = low, top
    return Grid(bent, nodes.schedule, nodes.name)


def _trace(trace: str | None, probes: int | None, size: int) -> tuple[str, int]:
    """Which trace, and vector–Jacobian products a call."""
    if trace is None:
        trace = "exact" if probes is None and size <= EXACT_UP_TO else "hutchinson"
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f'trace must be "exact" or "hutchinson", but got {trace!r}')
    if trace == "hutchinson":
        return trace, _PROBES if probes is None else whole(probes, "probes")
    if probes is not None:
        raise ValueError('probes are those of an estimated trace: leave them out, or give trace="hutchinson"')
    if size > EXACT_UP_TO:
        warnings.warn(
            f"the exact trace takes {size} vector-Jacobian products, one a dimension, at every model call: "
            'trace="hutchinson" estimates it from a few',
            stacklevel=3,
        )
    return trace, size


def _prior(prior: Callable[[Tensor, float], Tensor] | None, x_bar: Tensor, sigma: float, size: int) -> Tensor:
    """The log-density of x = x̄/√(1 + σ²) at the end of the run."""
    volume = 0.5 * size * math.log1p(sigma * sigma)
    if prior is None:
        square = x_bar.double().flatten(1).square().sum(dim=1) / (1.0 + sigma * sigma)
        return -0.5 * (square + size * math.log(2.0 * math.pi))
    found = prior(x_bar, sigma)
    if not isinstance(found, Tensor) or found.shape != x_bar.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"prior must return one log-density a sample, shape ({x_bar.shape[0]},), but returned {got}")
    return found.double() + volume


# -- draws --------------------------------------------------------------------------------------
def _stream(seed: int, image: int, what: int, number: int = 0) -> np.random.Generator:
    """Draws of an image that no latent shares: the key is that of :func:`ddim_ode.noise`, the counter begins elsewhere."""
    key, counter = np.array([seed, image], dtype=np.uint64), np.array([0, 0, number, what], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def _rademacher(seed: int, image: int, probes: int, size: int) -> Any:
    """Signs (K, D), int8."""
    draws = [_stream(seed, image, _PROBE, k).integers(0, 2, size, dtype=np.int8) for k in range(probes)]
    return 2 * np.stack(draws) - 1


def _dequantised(images: Tensor, seed: int, first: int) -> Tensor:
    """Images 0…255 as (k + u − ½)/127.5 − 1, float64, where they are."""
    if images.ndim != 4:
        raise ValueError(f"x in uint8 must be images (B, C, H, W), but its shape is {tuple(images.shape)}")
    shape = tuple(images.shape[1:])
    drawn = [_stream(seed, first + i, _DEQUANTISE).random(shape) for i in range(images.shape[0])]
    u = torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, *shape)
    return (images.double() + (u.to(images.device) - 0.5)) / 127.5 - 1.0


# -- statistics ---------------------------------------------------------------------------------
def _size(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def _standard_error(estimates: Tensor) -> Tensor:
    """Of the mean over the columns of (B, K); NaN for one."""
    count = estimates.shape[1]
    if count == 1:
        return torch.full_like(estimates.select(1, 0), math.nan)
    return estimates.std(dim=1) / math.sqrt(count)


def _mean(values: Tensor, errors: Tensor) -> Mean:
    good = values.isfinite()
    values, errors = values[good], errors[good]
    count = values.numel()
    if count == 0:
        return Mean(math.nan, math.nan, math.nan, 0)
    spread = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Mean(float(values.mean()), spread, float(errors.square().sum().sqrt()) / count, count)
