r"""Sampling discrete data, and its objective: the generative half of the paper's appendix A.

A network gives :math:`f_\theta(x_t)`, a distribution over K classes for each dimension, which takes the place of x_0 in the steps
of :mod:`ddim_ode.diffusion.categorical`. It is trained by cross-entropy, whose optimum is that of the variational bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.diffusion.categorical import (
    Chain,
    check_classes,
    check_discrete,
    divergence,
    draw,
    fade,
    image_keys,
    indicators,
    mix,
    noised,
    uniform,
)
from ddim_ode.noise import check_seed
from ddim_ode.schedule import NoiseSchedule, whole
from ddim_ode.solution import Status

__all__ = [
    "Bound",
    "DiscreteField",
    "Samples",
    "bound",
    "cross_entropy",
    "sample",
]


# -- the model ----------------------------------------------------------------------------------
class DiscreteField:
    r"""A network that predicts x_0 from x_t, as log-probabilities over K classes.

    Parameters
    ----------
    model : callable
        ``model(x, t)`` from classes (B, \*d) in int64 and 0-based labels (B,) in int64, the paper's t less 1, to logits
        (B, K, \*d), finite or −∞. Log-probabilities are logits.
    schedule : NoiseSchedule
        The discrete schedule that it was trained with.
    classes : int
        K ≥ 2.
    shape : tuple of int, optional
        Shape \*d of a sample.

    Attributes
    ----------
    nfe : int
        Model calls so far.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        schedule: NoiseSchedule,
        classes: int,
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), but got {type(model).__name__}")
        check_discrete(schedule)
        self.model, self.schedule, self.classes = model, schedule, whole(classes, "classes", 2)
        self.shape = None if shape is None else tuple(whole(n, "each length in shape") for n in shape)
        self.nfe = 0

    @property
    def device(self) -> torch.device | None:
        """Where the model's parameters are; None: it has none."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((p.device for p in parameters), None)

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        r"""Log f_θ(x_t), (B, K, \*d), float64, at the paper's time t, one for all or (B,)."""
        label = t - 1 if isinstance(t, Tensor) else torch.full(x.shape[:1], int(t) - 1, device=x.device)
        self.nfe += 1
        logits = self.model(x, label)
        wanted = (x.shape[0], self.classes, *x.shape[1:])
        if not isinstance(logits, Tensor) or logits.shape != wanted or not logits.is_floating_point():
            got = f"{tuple(logits.shape)} in {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits (B, K, *d), here {wanted}, in floats, but returned {got}")
        return logits.double().log_softmax(1)

    def check(self, x: Any, name: str) -> Tensor:
        """Classes as int64, refused if this model has no use for them."""
        x = check_classes(x, self.classes, name)
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{name} must have shape (B, {wanted}) for this model, but got {tuple(x.shape)}")
        if self.device is not None and x.device != self.device:
            raise ValueError(f"{name} is on {x.device}, but the model is on {self.device}: move one with .to(...)")
        return x


# -- sampling -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Samples:
    r"""What :func:`sample` drew.

    Attributes
    ----------
    x : Tensor
        Classes (B, \*d), int64; of a sample that failed, its state before that.
    status : tuple of Status
        One a sample: ``NONFINITE`` where the model returned NaN, +∞, or −∞ for all classes of a pixel.
    nfe : int
        Model calls of each sample, S.
    chain : Chain
        The times and σ.
    trajectory : Tensor or None
        (S + 1, B, \*d), x at τ_S, …, τ_1 and 0, if asked for.
    """

    x: Tensor
    status: tuple[Status, ...]
    nfe: int
    chain: Chain
    trajectory: Tensor | None


def sample(
    field: DiscreteField,
    latent: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    first: int = 0,
    steps: int | None = None,
    tau: str | Sequence[int] = "linear",
    eta: float | None = None,
    sigmas: Sequence[float] | None = None,
    last: str = "sample",
    batch_size: int | None = None,
    trajectory: bool = False,
) -> Samples:
    r"""Draw data: from classes drawn uniformly at τ_S down to τ_0 = 0, one model call a step.

    Parameters
    ----------
    field : DiscreteField
        f_θ.
    latent : Tensor, optional
        x at τ_S, classes (B, \*d). Without it, `n` are drawn.
    n : int, optional
        How many to draw, if no latent is given.
    seed, first : int
        Image i draws by (`seed`, `first` + i) and the time alone, whatever the batch.
    steps, tau, eta, sigmas
        As for :meth:`Chain.make`.
    last : {"sample", "argmax"}
        What the step to t = 0 returns: a draw from f_θ, which is the generative model, or each dimension's likeliest class.
    batch_size : int, optional
        Split the work into batches of this size; the images stay the same.
    trajectory : bool
        Keep the state at every time.

    Returns
    -------
    Samples

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call.
    """
    chain = Chain.make(field.schedule, steps, tau=tau, eta=eta, sigmas=sigmas)
    seed = check_seed(seed)
    if last not in ("sample", "argmax"):
        raise ValueError(f'last must be "sample" or "argmax", but got {last!r}')
    if latent is not None:
        latent = field.check(latent, "latent")
        if n is not None and n != latent.shape[0]:
            raise ValueError(f"n = {n} contradicts the {latent.shape[0]} latents given: leave one out")
        keys = image_keys(first, latent.shape[0])
    else:
        if n is None or field.shape is None:
            raise ValueError("sample needs latents: give latent=, or n= and a field that knows its shape")
        keys = image_keys(first, whole(n, "n"))
        u = uniform(torch.empty((0, *field.shape), device=field.device), keys, seed, 0)
        latent = (u * field.classes).long()
    size = len(keys) if batch_size is None else whole(batch_size, "batch_size")
    parts = [
        _descend(field, chain, x, keys[i * size : i * size + x.shape[0]], seed, last, trajectory)
        for i, x in enumerate(latent.split(size))
    ]
    states, failed = (torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
    lost = [False] * len(keys) if isinstance(failed, FakeTensor) else failed.tolist()
    status = tuple(Status.NONFINITE if bad else Status.SUCCESS for bad in lost)
    return Samples(states.select(0, -1), status, chain.tau.size, chain, states if trajectory else None)


@torch.no_grad()
def _descend(
    field: DiscreteField, chain: Chain, x: Tensor, keys: Sequence[int], seed: int, last: str, trajectory: bool
) -> tuple[Tensor, Tensor]:
    """States (S + 1, B, *d), or the last alone (1, B, *d), and which samples failed."""
    states, failed = [x], torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device)
    for t, weights in zip(chain.tau[::-1].tolist(), chain.weights[::-1].tolist(), strict=True):
        predicted = field(x, t)
        failed = failed | predicted.isnan().flatten(1).any(dim=1)
        if last == "argmax" and t == chain.tau[0]:
            drawn = predicted.argmax(dim=1)
        else:
            p = mix(indicators(x, field.classes), predicted.exp(), weights)
            drawn = draw(p, uniform(x, keys, seed, t))
        x = torch.where(failed.reshape(-1, *(1,) * (x.ndim - 1)), x, drawn)
        states = [*states, x] if trajectory else [x]
    return torch.stack(states), failed


# -- objectives ---------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Bound:
    r"""The variational bound of images, term by term, in nats: an estimate from one draw of x_t a term, without bias.

    Attributes
    ----------
    chain : Chain
        The times and σ.
    prior : Tensor
        KL(q(x_{τ_S} | x_0) ‖ 1/K), (B,), float64.
    terms : Tensor
        (S, B), as sampling goes: KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) for t = τ_S … τ_2, and last −log f_θ(x_0 | x_{τ_1}).
        NaN where the model's answer was.
    cross_entropy : Tensor
        (S, B): −log f_θ(x_0 | x_t) at the same draws.
    dimensions : int
        D.
    """

    chain: Chain
    prior: Tensor
    terms: Tensor
    cross_entropy: Tensor
    dimensions: int

    @property
    def nats(self) -> Tensor:
        """The bound on −log p_θ(x_0), (B,)."""
        return self.prior + self.terms.sum(dim=0)

    @property
    def bits(self) -> Tensor:
        """The same in bits per dimension."""
        return self.nats / (self.dimensions * math.log(2.0))

    @property
    def surrogate(self) -> Tensor:
        r"""What bounds `terms` from above, (S, B): :math:`(\alpha_s - \sigma_t \alpha_t)` times `cross_entropy`."""
        data = torch.from_numpy(self.chain.weights[::-1, 1].copy())
        return data.to(self.cross_entropy.device).unsqueeze(1) * self.cross_entropy


def bound(
    field: DiscreteField,
    x_0: Tensor,
    *,
    seed: int = 0,
    first: int = 0,
    steps: int | None = None,
    tau: str | Sequence[int] = "linear",
    eta: float | None = None,
    sigmas: Sequence[float] | None = None,
    batch_size: int | None = None,
) -> Bound:
    r"""The variational bound on −log p_θ(x_0) of data under the chain that :func:`sample` draws by; one model call a term.

    Parameters
    ----------
    field : DiscreteField
        f_θ.
    x_0 : Tensor
        Data, classes (B, \*d).
    seed, first : int
        Image i draws its x_t by (`seed`, `first` + i) and t alone, so that members of the family are compared on the same draws.
    steps, tau, eta, sigmas
        As for :meth:`Chain.make`.
    batch_size : int, optional
        Split the work into batches of this size; the result stays the same.

    Returns
    -------
    Bound

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call.
    """
    chain = Chain.make(field.schedule, steps, tau=tau, eta=eta, sigmas=sigmas)
    x_0, seed = field.check(x_0, "x_0"), check_seed(seed)
    keys = image_keys(first, x_0.shape[0])
    size = len(keys) if batch_size is None else whole(batch_size, "batch_size")
    parts = [
        _terms(field, chain, x, keys[i * size : i * size + x.shape[0]], seed) for i, x in enumerate(x_0.split(size))
    ]
    terms, entropies = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    dimensions = math.prod(x_0.shape[1:])
    # K q(x_T | x_0) is 1 + (K − 1) α at x_0 and 1 − α elsewhere.
    alpha, K = float(chain.alphas[-1]), field.classes
    at, elsewhere = 1.0 + (K - 1.0) * alpha, (K - 1.0) * (1.0 - alpha)
    prior = dimensions / K * max(0.0, at * math.log(at) + elsewhere * math.log1p(-alpha))
    return Bound(chain, torch.full_like(terms.select(0, -1), prior), terms, entropies, dimensions)


@torch.no_grad()
def _terms(field: DiscreteField, chain: Chain, x_0: Tensor, keys: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Divergences and cross-entropies, (S, B) each."""
    clean = indicators(x_0, field.classes)
    terms, entropies = [], []
    steps = zip(chain.tau.tolist(), chain.alphas[1:].tolist(), chain.weights.tolist(), strict=True)
    for t, alpha, weights in reversed(list(steps)):
        x_t = draw(fade(clean, alpha), uniform(x_0, keys, seed, t))
        predicted = field(x_t, t)
        entropies.append(_against(predicted, x_0))
        noisy = indicators(x_t, field.classes)
        each = divergence(mix(noisy, clean, weights), mix(noisy, predicted.exp(), weights))
        # To t = 0 the divergence is the cross-entropy, which logarithms keep where probabilities underflow.
        terms.append(entropies[-1] if t == chain.tau[0] else each.flatten(1).sum(dim=1))
    return torch.stack(terms), torch.stack(entropies)


def cross_entropy(field: DiscreteField, x_0: Tensor, t: int | Tensor, *, seed: int = 0, first: int = 0) -> Tensor:
    r"""The training loss −log f_θ(x_0 | x_t) at drawn x_t, in nats, summed over dimensions: (B,), with its gradient.

    Parameters
    ----------
    field : DiscreteField
        f_θ.
    x_0 : Tensor
        Data, classes (B, \*d).
    t : int or Tensor
        The paper's time, 1 to T, one for all or (B,) in int64.
    seed, first : int
        As for :func:`noised`: another seed at every update.

    Notes
    -----
    :math:`KL(q(x_s | x_t, x_0) \| p_\theta(x_s | x_t)) \le (\alpha_s - \sigma_t \alpha_t) (-\log f_\theta(x_0 | x_t))`, for the
    divergence is convex; and both have their least expectation where f_θ(x_t) is q(x_0 | x_t). So no σ enters training, and
    weights on t do not move the optimum.
    """
    x_0 = field.check(x_0, "x_0")
    times = torch.as_tensor(t)
    if times.is_floating_point() or times.dtype == torch.bool or times.shape not in ((), x_0.shape[:1]):
        raise ValueError(f"t must be a whole number or ({x_0.shape[0]},) of them, but got {t!r}")
    T = int(field.schedule.T)
    if not isinstance(times, FakeTensor) and not bool(((times >= 1) & (times <= T)).all()):
        raise ValueError(f"t must lie in 1 to {T}, but spans {int(times.min())} to {int(times.max())}")
    times = times.to(x_0.device, torch.int64).expand(x_0.shape[0])
    table = torch.tensor(field.schedule.alphas_cumprod).to(x_0.device)
    x_t = noised(x_0, table.index_select(0, times - 1), field.classes, seed=seed, first=first)
    return _against(field(x_t, times), x_0)


def _against(log_f: Tensor, x_0: Tensor) -> Tensor:
    """−log f(x_0), (B,)."""
    return -log_f.gather(1, x_0.unsqueeze(1)).flatten(1).sum(dim=1)
