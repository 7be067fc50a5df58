r"""Training a noise predictor by eq. 5.

.. math:: L_\gamma = E_{t, x_0, \epsilon}\, \gamma_t\,
          \| \epsilon_\theta(\sqrt{\alpha_t}\, x_0 + \sqrt{1 - \alpha_t}\, \epsilon,\ t) - \epsilon \|^2

Labels are drawn from the whole interval [0, T − 1], fractions included, because the ODE's solvers ask for
fractional labels; each batch spreads its labels evenly, which leaves the expectation alone and lowers its
variance. γ = 1 and uniform labels are the paper's. The weights do not move the optimum, but a small network
trained for minutes learns the high noise levels much sooner with weights that grow there. What a step draws
depends on the seed and the step's number only, so that a resumed run is the run that was not interrupted.
"""

from __future__ import annotations

import copy
import csv
import math
import pickle
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ddim_ode.data import as_tensor
from ddim_ode.files import replacing
from ddim_ode.models.checkpoints import build
from ddim_ode.models.unet import GaussianResidual
from ddim_ode.noise import noise
from ddim_ode.schedule import NoiseSchedule, whole

__all__ = ["TrainingOptions", "begin", "sigma_loss", "spread", "train"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes
    ----------
    steps : int
        Updates in all. A run may be resumed with another number.
    batch_size : int
        Images an update.
    lr : float
        AdamW's learning rate after the warm-up.
    warmup : int
        Updates over which the learning rate rises.
    cooldown : float
        Share of `steps` at the end over which it falls linearly to 0.
    ema : float
        Decay of the exponential moving average of the weights, which is what sampling uses.
    clip : float
        Largest norm of the gradient.
    gamma : float
        Exponent p in γ_t = (1 + σ_t²/s²)^p, s the standard deviation of the data; 0 is the paper's γ = 1.
    label_power : float
        Labels are (T − 1) u^q, u uniform, with this q: above 1 they crowd towards small t; 1 is the paper's.
    flip : bool
        Whether to mirror half the images left to right.
    seed : int
        Seed of everything random.
    autocast : bool
        Whether to run the network in bfloat16 autocast.
    compile : bool
        Whether to pass the network through ``torch.compile``.
    """

    steps: int = 20_000
    batch_size: int = 64
    lr: float = 5e-4
    warmup: int = 500
    cooldown: float = 0.25
    ema: float = 0.999
    clip: float = 1.0
    gamma: float = 0.0
    label_power: float = 1.0
    flip: bool = False
    seed: int = 0
    autocast: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            whole(getattr(self, name), name)
        for name in ("lr", "clip", "label_power"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, but got {getattr(self, name)!r}")
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, but got {self.gamma!r}")
        whole(self.seed, "seed", 0)
        for name in ("cooldown", "ema"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], but got {getattr(self, name)!r}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = min(1.0, (self.steps - step) / max(self.cooldown * self.steps, 1.0))
        return self.lr * rise * fall


def begin(
    images: np.ndarray, schedule: NoiseSchedule, *, rank: int, seed: int = 0, **config: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A new network for images, and the description that :func:`ddim_ode.models.checkpoints.build` makes it from.

    Parameters
    ----------
    images : ndarray
        uint8 (N, C, H, W), square.
    schedule : NoiseSchedule
        What it will be trained with.
    rank : int
        Principal directions of the Gaussian part; 0: a plain network that predicts ε itself.
    seed : int
        Seed of the weights.
    **config
        As for :class:`ddim_ode.models.unet.UNet`; channels and resolution are those of the images.

    Returns
    -------
    network : Module
        Laid out channels-last.
    description : dict
        Plain data.
    """
    size = int(np.prod(images.shape[1:]))
    if not 0 <= rank <= size:
        raise ValueError(f"rank must lie in [0, {size}], the dimension of the images, but got {rank}")
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"the network takes square images, but these are {images.shape[2:]}: crop or pad them")
    description: dict[str, Any] = {
        "shape": list(images.shape[1:]),
        "schedule": schedule.config,
        "residual": None,
        "network": {
            "channels": images.shape[1],
            "resolution": images.shape[2],
            **config,
            "in_channels": 2 * images.shape[1] if rank else None,
        },
    }
    values: list[Tensor] = []
    if rank:
        *values, rest = principal(images, rank)
        description["residual"] = {"rank": rank, "rest": rest}
    torch.manual_seed(seed)
    network = build(description)
    if isinstance(network, GaussianResidual):
        for buffer, value in zip((network.mean, network.variance, network.basis), values, strict=True):
            buffer.copy_(value)
    return network.to(memory_format=torch.channels_last), description  # type: ignore[call-overload]  # torch's stub lacks it


def train(
    network: nn.Module,
    images: np.ndarray,
    schedule: NoiseSchedule,
    out: Path,
    options: TrainingOptions,
    *,
    device: str | torch.device = "cpu",
    save_every: int = 500,
    on_save: Callable[[nn.Module, int], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train `network` in place and return its moving average; go on from ``out/checkpoint.pt`` if it is there.

    Parameters
    ----------
    network : Module
        ``network(x, t)``, x in variance-preserving coordinates, t the 0-based label.
    images : ndarray
        uint8 (N, C, H, W).
    schedule : NoiseSchedule
        A discrete schedule.
    out : Path
        Folder for ``checkpoint.pt`` (network, average, optimiser, step) and ``log.csv`` (step, loss, learning
        rate, seconds).
    options : TrainingOptions
        How to train.
    device : device
        Where.
    save_every : int
        Updates between checkpoints and log lines.
    on_save : callable, optional
        ``on_save(average, step)`` after each of these.
    progress : callable, optional
        ``progress(step, loss)`` after each update.
    stop : callable, optional
        Asked after each update: once true, a checkpoint is written and the run ends there.

    Returns
    -------
    Module
        The moving average of the weights, in evaluation mode.

    Notes
    -----
    Under ``torchrun``, with a process group initialised, each process takes its share of every batch, gradients are
    averaged, and the first process writes the files: the run is that of one process, up to rounding. `batch_size`
    counts the images of all processes together.

    Raises
    ------
    ValueError
        If `out` holds a run with other options (`steps` and `compile` may differ) or on other images, if `schedule` is
        continuous, or once the loss is not finite.
    """
    whole(save_every, "save_every")
    if not schedule.discrete:
        raise ValueError(f"training needs a discrete schedule, but got {schedule!r}")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if _many() else (0, 1)
    if options.batch_size % world:
        raise ValueError(f"batch_size must be a multiple of the {world} processes, but is {options.batch_size}")
    checkpoint, saved, mark = out / "checkpoint.pt", None, zlib.crc32(np.ascontiguousarray(images).data)
    if checkpoint.exists():
        saved = _saved(checkpoint, device)
        _check_options(saved["options"], options, out)
        if saved["images"] != mark:
            raise ValueError(f"{out} holds a run on other images: give another folder")
    variance = spread(images)[1] ** 2
    if not variance > 1e-12:
        raise ValueError("images must differ from their mean image, but all are alike: there is nothing to learn")
    network = network.to(device).train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.0, betas=(0.9, 0.99))
    step = 0
    if saved is not None:
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
    if rank == 0:
        _keep_log(out / "log.csv", step)
    run = torch.compile(network, dynamic=False) if options.compile else network
    parameters: list[Tensor] = list(network.parameters())
    averaged: list[Tensor] = list(average.parameters())

    if step >= options.steps and rank == 0 and on_save is not None:  # the last run may have been cut short just there
        on_save(average, step)
    # Losses and seconds since the last line of the log: with them a resumed run writes the lines it would have written.
    losses: list[Tensor] = [] if saved is None else list(saved["losses"].unbind())
    since = time.monotonic() - (0.0 if saved is None else saved["seconds"])
    saved, stopped = None, False
    while step < options.steps and not stopped:
        batch = _batch(images, variance, schedule, options, step)
        x, t, noise, weight = (part[rank::world].to(device) for part in batch)
        torch.manual_seed(_seed(options.seed, step, rank))  # dropout's
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.autocast):
            predicted = run(x, t)
        squares = (predicted.to(torch.float32) - noise).square()
        (squares * weight).mean().backward()
        loss = squares.detach().mean()
        if world > 1:
            _average([loss, *(p.grad for p in parameters if p.grad is not None)], world)
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate(step)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        decay = min(options.ema, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(averaged, parameters, 1.0 - decay)
        losses.append(loss)
        if progress is not None:
            progress(step, float(losses[-1]))
        stopped = _any(stop(), device) if world > 1 else stop()
        whole_line = step % save_every == 0 or step == options.steps
        if not (whole_line or stopped):
            continue
        row = [step, float(torch.stack(losses).mean()), options.learning_rate(step - 1), time.monotonic() - since]
        if not math.isfinite(row[1]):
            kept = (
                f"what was saved before step {step - len(losses) + 1} is kept"
                if checkpoint.exists()
                else "nothing was saved"
            )
            raise ValueError(f"the loss became {row[1]} before step {step}; {kept}: try a smaller lr, in a new folder")
        if whole_line:
            losses, since = [], time.monotonic()
        if rank > 0:
            continue
        state: dict[str, Any] = {"network": network.state_dict(), "average": average.state_dict()}
        state |= {"optimiser": optimiser.state_dict(), "step": step, "options": asdict(options), "images": mark}
        state |= {"losses": torch.stack(losses) if losses else torch.empty(0), "seconds": time.monotonic() - since}
        if whole_line:
            # Before the checkpoint: a line too many is dropped on resuming, a line too few is lost.
            _append(out / "log.csv", row)
        with replacing(checkpoint) as temporary:
            torch.save(state, temporary)
        if whole_line and on_save is not None:
            on_save(average, step)
    return average


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _average(tensors: list[Tensor], world: int) -> None:
    """Replace tensors by their means over all processes, in one message."""
    flat = torch.cat([x.flatten() for x in tensors])
    distributed.all_reduce(flat)
    flat /= world
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def _any(flag: bool, device: str | torch.device) -> bool:
    """Whether any process says so: all must stop at the same step."""
    told = torch.tensor(float(flag), device=device)
    distributed.all_reduce(told)
    return bool(told > 0.0)


def _saved(checkpoint: Path, device: str | torch.device) -> dict[str, Any]:
    try:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        missing = {"network", "average", "optimiser", "step", "options", "images", "losses", "seconds"} - saved.keys()
    except (RuntimeError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint} is not a whole checkpoint: remove it to begin anew") from error
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(sorted(missing))}: it is no checkpoint of this version")
    return saved


def _check_options(before: dict[str, Any], options: TrainingOptions, out: Path) -> None:
    """Refuse to go on with a run under other options than its own; more steps, or a compiler, are no others."""
    changed = [k for k, v in asdict(options).items() if k not in ("steps", "compile") and before.get(k, v) != v]
    if changed:
        differences = ", ".join(f"{k} = {before[k]!r}, not {getattr(options, k)!r}" for k in changed)
        raise ValueError(f"{out} holds a run with {differences}: give the same, or another folder")


def spread(images: np.ndarray) -> tuple[Tensor, float]:
    """The mean image, (C, H, W), and the standard deviation about it, of uint8 images, in the units of [−1, 1]."""
    total = np.zeros(images.shape[1:])
    squares = np.zeros(images.shape[1:])
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096].astype(np.float64) / 127.5 - 1.0
        total += part.sum(axis=0)
        squares += (part * part).sum(axis=0)
    mean = total / len(images)
    return torch.from_numpy(mean).to(torch.float32), float(
        np.sqrt((squares / len(images) - mean * mean).mean().clip(0.0))
    )


def principal(images: np.ndarray, rank: int, *, dense: int = 4096) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean image (C, H, W), leading variances (k,), their directions (C·H·W, k), and the mean of the other variances.

    Of uint8 images (N, C, H, W), in the units of [−1, 1]; k = `rank`. Above `dense` dimensions by subspace iteration.
    """
    size = int(np.prod(images.shape[1:]))
    rows = 4096 if size <= dense else max(1, 2**24 // size)
    parts = lambda: (images[i : i + rows].reshape(-1, size) / 127.5 - 1.0 for i in range(0, len(images), rows))
    if size <= dense:
        mean, second = np.zeros(size), np.zeros((size, size))
        for part in parts():
            mean += part.sum(axis=0)
            second += part.T @ part
        mean /= len(images)
        variance, basis = np.linalg.eigh(second / len(images) - np.outer(mean, mean))
        variance, basis = variance[::-1].clip(min=0.0).copy(), basis[:, ::-1].copy()
        rest = float(variance[rank:].mean()) if rank < size else 0.0
    else:
        # The covariance itself would not fit: powers of it on a few directions more than are wanted.
        mean = np.sum([part.sum(axis=0) for part in parts()], axis=0) / len(images)

        def times(directions: np.ndarray) -> np.ndarray:
            product = np.zeros_like(directions)
            for part in parts():
                product += (part - mean).T @ ((part - mean) @ directions)
            return product / len(images)

        basis = np.random.default_rng(0).standard_normal((size, min(rank + 16, size)))
        for _ in range(8):
            basis = np.linalg.qr(times(basis))[0]
        variance, turn = np.linalg.eigh(basis.T @ times(basis))
        variance, basis = variance[::-1].clip(min=0.0), basis @ turn[:, ::-1]
        total = sum(float(np.square(part - mean).sum()) for part in parts()) / len(images)
        rest = (total - float(variance[:rank].sum())) / (size - rank) if rank < size else 0.0
    leading, directions = (torch.from_numpy(np.ascontiguousarray(x[..., :rank])).float() for x in (variance, basis))
    return torch.from_numpy(mean.reshape(images.shape[1:])).float(), leading, directions, rest


def _batch(
    images: np.ndarray,
    variance: float,
    schedule: NoiseSchedule,
    options: TrainingOptions,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noised images, labels, noise and weights of one update: a function of (seed, step)."""
    size, count = options.batch_size, len(images)
    first = step * size
    rows = np.concatenate(
        [_order(count, options.seed, epoch) for epoch in range(first // count, (first + size - 1) // count + 1)]
    )
    chosen = as_tensor(images[rows[first % count : first % count + size]])
    random = torch.Generator().manual_seed(_seed(options.seed, step))
    if options.flip:
        mirrored = torch.rand(size, generator=random) < 0.5
        chosen = torch.where(mirrored[:, None, None, None], chosen.flip(-1), chosen)
    offset = torch.rand((), generator=random, dtype=torch.float64)
    t = ((torch.arange(size) + offset) / size) ** options.label_power * (schedule.T - 1.0)
    alpha = torch.from_numpy(schedule.alpha(t.numpy() + 1.0)).to(torch.float32).reshape(-1, 1, 1, 1)
    noise = torch.randn(chosen.shape, generator=random)
    x = alpha.sqrt() * chosen + (1.0 - alpha).sqrt() * noise
    weight = (1.0 + (1.0 - alpha) / alpha / variance) ** options.gamma
    return x, t.to(torch.float32), noise, weight


def _seed(*key: int) -> int:
    """A seed for torch from whole numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in an epoch; the last two asked for are kept."""
    key = (count, seed, epoch)
    if key not in _orders:
        while len(_orders) > 1:
            del _orders[next(iter(_orders))]
        _orders[key] = np.random.default_rng((seed, epoch)).permutation(count)
    return _orders[key]


def _append(path: Path, row: Sequence[Any]) -> None:
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "loss", "learning_rate", "seconds"])
        writer.writerow(row)


def _keep_log(path: Path, step: int) -> None:
    """Drop log lines of updates that the checkpoint does not hold."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with replacing(path) as temporary:
            temporary.write_text(
                "".join(lines[:1] + [x for x in lines[1:] if int(x.split(",")[0]) <= step]), encoding="utf-8"
            )


@torch.no_grad()
def sigma_loss(
    epsilon: Callable[[Tensor, float], Tensor],
    images: np.ndarray,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    batch_size: int = 250,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[float, float]:
    r"""The noise-prediction loss :math:`E |\hat\epsilon(x_0 + \sigma\epsilon, \sigma) - \epsilon|^2`, per dimension, at each σ.

    Every image is used once a σ, with noise that depends on the seed and the image alone, so that two
    predictors are compared on the same inputs.

    Parameters
    ----------
    epsilon : callable
        ``epsilon(x_bar, sigma)``: a field, or an exact model.
    images : ndarray
        uint8 (N, C, H, W).
    sigmas : sequence of float
        Noise levels.

    Returns
    -------
    dict
        Mean squared error per dimension, by σ.
    """
    totals = {float(sigma): 0.0 for sigma in sigmas}
    for start in range(0, len(images), batch_size):
        x0 = as_tensor(images[start : start + batch_size], dtype).to(device)
        drawn = noise(tuple(x0.shape[1:]), len(x0), seed, first=start).to(device, dtype)
        for sigma in totals:
            totals[sigma] += float((epsilon(x0 + sigma * drawn, sigma) - drawn).square().sum())
    return {sigma: total / images.size for sigma, total in totals.items()}
