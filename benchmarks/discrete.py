r"""Discrete data: what the members of appendix A's family are worth, by exact predictors and by a network.

    python -m benchmarks.discrete [--out benchmarks/results] [--parts toy,…] [--short] [--figures-only]

Records ``discrete.json`` part by part, and ``discrete.npz``, the images of the figure ``docs/figures/discrete.png``. The network
and samples are kept in ``out/discrete``, and what is there is not made again. Half an hour on one core.

- *toy*: three dimensions of three classes, the joint distribution given, the best predictor by Bayes' rule, every distribution
  by enumeration: the total variation between what S steps draw and the data, the largest error of a one-dimensional marginal,
  and the bound's excess over the entropy of the data.
- *digits*: the best predictor of scikit-learn's 1,797 digits at four grey levels. What its right joint distribution draws is one
  of them; how far are samples from the nearest?
- *training*, *bits*, *quality*: the package's U-Net on Fashion-MNIST at four grey levels; the bound on test images; distances
  between samples and test images, beside those of training images in groups as large.

``multinomial`` is the Markovian diffusion (Hoogeboom et al. 2021, D3PM of Austin et al. 2021) with the same α_t, for K > 2 no member of
the family: its posterior is a normalised product, q(x_t | x_s) q(x_s | x_0). (For K = 2 it is one, with σ_t between 0 and the largest.)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.folders import ROOT, add_folders, folders, recorded
from ddim_ode import NoiseSchedule
from ddim_ode.comparison import circumstances
from ddim_ode.data import sheet
from ddim_ode.datasets import dataset
from ddim_ode.diffusion.categorical import Chain, divergence, draw, indicators, mix, one_hot, uniform
from ddim_ode.diffusion.discrete import DiscreteField, bound, cross_entropy, sample
from ddim_ode.files import output_folder, replacing, write_json
from ddim_ode.models.discrete import DiscreteUNet, EmpiricalLogits
from ddim_ode.plotting import STYLE, save_figure
from ddim_ode.training import TrainingOptions

KEPT = ROOT / "out" / "discrete"
SCHEDULE = NoiseSchedule.cosine()
#: Grey levels.
CLASSES = 4
ETAS = (0.0, 0.2, 0.5, 1.0)
#: η of each step as 1 − exp(−5 Δτ/T): a rate of noise in time, not a share of each step.
RATE = 5.0
#: Groups that errors are taken over, and images in each.
GROUPS, SIZE = 4, 64
#: Groups of training images, beside which samples are judged.
FLOOR = 20

#: A member's step: distributions x_t and x_0 (or f_θ) in, that of x_s out; by the index of t in τ.
Step = Callable[[Tensor, Tensor, int], Tensor]


# -- members ------------------------------------------------------------------------------------
def members(steps: int) -> dict[str, tuple[Chain, Step]]:
    """Every process that is compared, at S steps of the linear τ."""
    found = {}
    least = Chain.make(SCHEDULE, steps)
    for eta in ETAS:
        found[f"eta={eta:g}"] = family(Chain.make(SCHEDULE, steps, eta=eta))
    length = np.diff(least.tau, prepend=0) / SCHEDULE.T
    found["rate"] = family(Chain(SCHEDULE, least.tau, least.largest * np.exp(-RATE * length)))
    found["multinomial"] = least, lambda x_t, x_0, i: product(x_t, x_0, *least.alphas[[i + 1, i]])
    return found


def family(chain: Chain) -> tuple[Chain, Step]:
    """A member of the family."""
    return chain, lambda x_t, x_0, i: mix(x_t, x_0, chain.weights[i].tolist())


def product(x_t: Tensor, x_0: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """The Markovian posterior, averaged over the distribution x_0: Σ_k x_0[k] q(x_t | x_s) q(x_s | k) / q(x_t | k)."""
    K, ratio = x_t.shape[1], alpha_t / alpha_s
    likelihood = ratio * x_t + (1.0 - ratio) / K  # of x_t, by x_s
    of_x_t = alpha_t * x_t + (1.0 - alpha_t) / K  # of x_t, by x_0
    share = x_0 / of_x_t
    # q(x_s | x_0 = k) is α_s where x_s = k, and the rest everywhere.
    return likelihood * (alpha_s * share + (1.0 - alpha_s) / K * share.sum(dim=1, keepdim=True))


# -- exact predictors ---------------------------------------------------------------------------
def joint(K: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All K^D states (N, D), and a distribution over them that is far from independent."""
    states = torch.tensor(list(itertools.product(range(K), repeat=D)))
    return states, torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(len(states), 0.3)))


def transition(field: DiscreteField, states: Tensor, step: Step, chain: Chain, i: int) -> Tensor:
    """p_θ(x_s | x_t) for all states, (N, N), of the step that leaves τ_i: a product over dimensions."""
    f = field(states, int(chain.tau[i])).exp()
    each = step(indicators(states, field.classes), f, i)
    found = torch.ones(len(states), len(states), dtype=torch.float64)
    for d in range(states.shape[1]):
        found = found * each.select(2, d).index_select(1, states.select(1, d))
    return found


def propagate(field: DiscreteField, states: Tensor, chain: Chain, step: Step) -> list[Tensor]:
    """What the generative process makes of all states, exactly: (N,) at τ_S, …, τ_1 and 0."""
    found = [torch.full((len(states),), 1.0 / len(states), dtype=torch.float64)]
    for i in reversed(range(chain.tau.size)):
        found.append(found[-1] @ transition(field, states, step, chain, i))
    return found


def exact_bound(field: DiscreteField, states: Tensor, p: Tensor, chain: Chain, step: Step) -> float:
    """The variational bound in nats, its expectations over x_0 and x_t by enumeration."""
    K = field.classes
    clean = indicators(states, K)
    total = 0.0
    for i in range(chain.tau.size):
        alpha = float(chain.alphas[i + 1])
        # q(x_t | x_0): rows x_0, columns x_t.
        each = alpha * clean + (1.0 - alpha) / K
        q = torch.ones(len(states), len(states), dtype=torch.float64)
        for d in range(states.shape[1]):
            q = q * each.select(2, d).index_select(1, states.select(1, d))
        f = field(states, int(chain.tau[i])).exp()
        predicted = step(clean, f, i)
        for n in range(len(states)):
            known = step(clean, clean[n : n + 1].expand_as(clean), i)
            terms = divergence(known, predicted).flatten(1).sum(dim=1)
            total += float(p[n] * (q[n] * terms).nan_to_num(0.0)[q[n] > 0.0].sum())
    ends = float(chain.alphas[-1]) * clean + (1.0 - float(chain.alphas[-1])) / K
    return total + float((p * divergence(ends, torch.full_like(ends, 1.0 / K)).flatten(1).sum(dim=1)).sum())


TOY = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def study_toy(numbers: tuple[int, ...] = TOY) -> dict[str, Any]:
    """Total variation, marginals, and two excesses over the entropy: of the bound, and of the true likelihood."""
    K, D = 3, 3
    states, p = joint(K, D)
    field = DiscreteField(EmpiricalLogits(states, SCHEDULE, K, p), SCHEDULE, K, shape=(D,))
    single = lambda q: torch.einsum("n,nkd->kd", q, indicators(states, K))
    entropy = float(-torch.xlogy(p, p).sum())
    rows = []
    for steps in numbers:
        for name, (chain, step) in members(steps).items():
            drawn = propagate(field, states, chain, step)[-1]
            row = {
                "member": name, "steps": steps, "total_variation": float(0.5 * (drawn - p).abs().sum()),
                "marginal": float((single(drawn) - single(p)).abs().max()),
                "likelihood_excess": float((torch.xlogy(p, p) - torch.xlogy(p, drawn)).sum()),
                "bound_excess": exact_bound(field, states, p, chain, step) - entropy if steps <= 200 else None,
            }  # fmt: skip
            rows.append(row)
        print([f"{r['member']} {r['total_variation']:.2e}" for r in rows[-6:]], steps, flush=True)
    return {"classes": K, "dimensions": D, "entropy": entropy, "rows": rows}


def draw_all(field: DiscreteField, n: int, chain: Chain, step: Step, seed: int) -> Tensor:
    """Samples of a process, a member of the family or not, by the draws that :func:`sample` makes."""
    assert field.shape is not None
    like = torch.empty((0, *field.shape))
    x = (uniform(like, range(n), seed, 0) * field.classes).long()
    with torch.no_grad():
        for i in reversed(range(chain.tau.size)):
            t = int(chain.tau[i])
            x = draw(step(indicators(x, field.classes), field(x, t).exp(), i), uniform(like, range(n), seed, t))
    return x


def study_digits(n: int = 256) -> dict[str, Any]:
    """How far samples of the best predictor of the digits are from the nearest digit."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data.clip(max=15.0)).long() // (16 // CLASSES)
    field = DiscreteField(EmpiricalLogits(data, SCHEDULE, CLASSES), SCHEDULE, CLASSES, shape=(64,))
    points = one_hot(data, CLASSES).flatten(1)
    rows = []
    for steps in (2, 3, 5, 7, 10, 20):
        for name, (chain, step) in members(steps).items():
            x = draw_all(field, n, chain, step, seed=0)
            off = (64.0 - (indicators(x, CLASSES).flatten(1) @ points.T).amax(dim=1)) / 64.0
            row: dict[str, Any] = {"member": name, "steps": steps, "share": float((off == 0.0).double().mean())}
            row |= {"distance": float(off.mean()), "error": float(off.std() / math.sqrt(n))}
            rows.append(row)
            print(row, flush=True)
    return {"classes": CLASSES, "points": len(data), "samples": n, "rows": rows}


# -- a network ----------------------------------------------------------------------------------
NETWORK: dict[str, Any] = {"resolution": 28, "width": 48, "multipliers": (1, 2), "attention": (7,), "patch": 2}
OPTIONS = TrainingOptions(steps=2000, batch_size=64, lr=1e-3, warmup=50, cooldown=0.5, ema=0.995)


def levels(split: str) -> Tensor:
    """Fashion-MNIST at four grey levels, (N, 1, 28, 28)."""
    return torch.from_numpy(dataset("fashion-mnist", split).images).long() // (256 // CLASSES)


def study_training() -> dict[str, Any]:
    """Train by cross-entropy at times drawn evenly; go on from what is kept."""
    torch.manual_seed(OPTIONS.seed)
    network = DiscreteUNet(CLASSES, SCHEDULE, **NETWORK).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=OPTIONS.lr, weight_decay=0.0, betas=(0.9, 0.99))
    kept, step, losses, spent = output_folder(KEPT) / "network.pt", 0, [], 0.0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        step, losses, spent = saved["step"], saved["losses"], saved["seconds"]
    field, data, T = DiscreteField(network, SCHEDULE, CLASSES), levels("train"), int(SCHEDULE.T)
    dimensions = math.prod(data.shape[1:])
    began = time.process_time() - spent
    while step < OPTIONS.steps:
        # The draws of an update depend on its number alone, so that a run that was cut short goes on as it would have.
        random = np.random.default_rng((OPTIONS.seed, step))
        x_0 = data[torch.from_numpy(random.integers(len(data), size=OPTIONS.batch_size))]
        even = (np.arange(OPTIONS.batch_size) + random.random()) / OPTIONS.batch_size
        t = torch.from_numpy(np.ceil(T * even).astype(np.int64)).clamp(1, T)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(field, x_0, t, seed=step).mean() / dimensions
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIONS.clip)
        for group in optimiser.param_groups:
            group["lr"] = OPTIONS.learning_rate(step)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        decay = min(OPTIONS.ema, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1.0 - decay)
        losses.append(float(loss.detach()))
        if step % 100 == 0 or step == OPTIONS.steps:
            state = {"network": network.state_dict(), "average": average.state_dict(), "step": step, "losses": losses}
            state |= {"optimiser": optimiser.state_dict(), "seconds": time.process_time() - began}
            with replacing(kept) as temporary:
                torch.save(state, temporary)
            print(f"update {step}: {np.mean(losses[-100:]) / math.log(2.0):.4f} bits a pixel", flush=True)
    means = [float(np.mean(losses[i : i + 100])) for i in range(0, len(losses), 100)]
    return {
        "network": NETWORK, "parameters": sum(p.numel() for p in network.parameters()), "classes": CLASSES,
        "steps": step, "batch_size": OPTIONS.batch_size, "lr": OPTIONS.lr, "seconds": time.process_time() - began,
        "loss_nats_per_dimension_by_100": means,
    }  # fmt: skip


def trained() -> DiscreteField:
    """The network's moving average, in float32."""
    network = DiscreteUNet(CLASSES, SCHEDULE, **NETWORK)
    network.load_state_dict(torch.load(KEPT / "network.pt", weights_only=True)["average"])
    return DiscreteField(network.eval().requires_grad_(False), SCHEDULE, CLASSES, shape=network.shape)


class Remembered:
    """A model that answers once for each time: members of the family are asked at the same x_t."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.answers = model, dict[int, Tensor]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        label = int(t[0])
        if label not in self.answers:
            self.answers[label] = self.model(x, t).float()
        return self.answers[label]


def study_bits(n: int = 256) -> dict[str, Any]:
    """The variational bound of test images, bits per dimension, by steps and member."""
    field, x_0 = trained(), levels("test")[:n]
    field = DiscreteField(Remembered(field.model), SCHEDULE, CLASSES, shape=field.shape)
    frequency = torch.bincount(levels("train").flatten(), minlength=CLASSES).double()
    frequency /= frequency.sum()
    rows = []
    for steps in (10, 20, 50, 100, 200):
        for name, (chain, step) in members(steps).items():
            if name == "multinomial":
                bits = _bits_of(field, x_0, chain, step)
            else:
                found = bound(field, x_0, tau=chain.tau.tolist(), sigmas=chain.sigmas.tolist())
                bits = found.bits
            row: dict[str, Any] = {"member": name, "steps": steps, "bits": float(bits.mean())}
            row["error"] = float(bits.std() / math.sqrt(n))
            if name != "multinomial":
                scale = 1.0 / (found.dimensions * math.log(2.0))
                row |= {"last_term": float(found.terms[-1].mean() * scale), "prior": float(found.prior.mean() * scale)}
                row["surrogate"] = float(found.surrogate.sum(dim=0).mean() * scale)
            rows.append(row)
            print(row, flush=True)
    entropy = float(-(frequency * frequency.log2()).sum())
    return {"images": n, "independent_pixels": entropy, "rows": rows}


def _bits_of(field: DiscreteField, x_0: Tensor, chain: Chain, step: Step) -> Tensor:
    """The bound of another process, by the draws that :func:`bound` makes."""
    clean, total = indicators(x_0, field.classes), torch.zeros(x_0.shape[0], dtype=torch.float64)
    with torch.no_grad():
        for i in range(chain.tau.size):
            t, alpha = int(chain.tau[i]), float(chain.alphas[i + 1])
            u = uniform(x_0, range(x_0.shape[0]), 0, t)
            x_t = indicators(draw(alpha * clean + (1.0 - alpha) / field.classes, u), field.classes)
            f = field(x_t.argmax(dim=1), t).exp()
            total += divergence(step(x_t, clean, i), step(x_t, f, i)).flatten(1).sum(dim=1)
    return total / (math.prod(x_0.shape[1:]) * math.log(2.0))


# -- samples ------------------------------------------------------------------------------------
def study_quality() -> dict[str, Any]:
    """Distances between samples and 2,000 test images, beside those of training images."""
    field, test, train = trained(), levels("test")[:2000], levels("train")[: FLOOR * SIZE]
    rows = [{"member": "training images", "steps": None} | distances(train, test)]
    for steps in (5, 10, 20, 50, 100):
        names = members(steps)
        for name in (*names, *(("eta=0, argmax", "eta=1, argmax") if steps in (10, 100) else ())):
            kept = KEPT / f"{name.replace(', ', '-')}-{steps}.npz"
            if not kept.exists():
                if name == "multinomial":
                    x = torch.cat([draw_all(field, SIZE, *names[name], seed=seed) for seed in range(GROUPS)])
                else:
                    chain, last = names[name.split(",")[0]][0], "argmax" if "argmax" in name else "sample"
                    options: dict[str, Any] = {"tau": chain.tau.tolist(), "sigmas": chain.sigmas.tolist(), "last": last}
                    x = torch.cat([sample(field, n=SIZE, seed=seed, **options).x for seed in range(GROUPS)])
                with replacing(kept) as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, x=x.numpy().astype(np.uint8))
            with np.load(kept, allow_pickle=False) as loaded:
                x = torch.from_numpy(loaded["x"]).long()
            rows.append({"member": name, "steps": steps} | distances(x, test))
            print(rows[-1], flush=True)
    return {"groups": GROUPS, "size": SIZE, "training_groups": FLOOR, "test_images": len(test), "rows": rows}


def distances(x: Tensor, test: Tensor) -> dict[str, list[float]]:
    """Each distance of :func:`_distances` as its mean over groups of images, and that mean's standard error."""
    found = [_distances(part, test) for part in x.split(SIZE)]
    values = {name: np.array([row[name] for row in found]) for name in found[0]}
    return {name: [float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v)))] for name, v in values.items()}


def _distances(x: Tensor, test: Tensor) -> dict[str, float]:
    """Of images (n, 1, H, W) from the test images.

    ``pairs``: total variation between the joint histograms of neighbouring pixels, all places together; ``differ``: the share of
    such pairs that are not alike; ``energy``: the energy distance 2E|X − Y| − E|X − X'| − E|Y − Y'| of whole images, |·| the root
    mean squared difference of levels on [0, 1], without bias.
    """

    def pairs(images: Tensor) -> Tensor:
        across = images[..., :-1] * CLASSES + images[..., 1:]
        down = images[..., :-1, :] * CLASSES + images[..., 1:, :]
        counts = torch.bincount(torch.cat((across.flatten(), down.flatten())), minlength=CLASSES**2).double()
        return counts / counts.sum()

    scale = (CLASSES - 1) * math.sqrt(math.prod(x.shape[1:]))
    a, b = (images.flatten(1).float() / scale for images in (x, test))
    own = lambda v: float(torch.cdist(v, v).sum()) / (len(v) * (len(v) - 1))
    return {
        "pairs": float(0.5 * (pairs(x) - pairs(test)).abs().sum()),
        "differ": float(1.0 - pairs(x).reshape(CLASSES, CLASSES).trace()),
        "energy": 2.0 * float(torch.cdist(a, b).mean()) - own(a) - own(b),
    }


# -- figure -------------------------------------------------------------------------------------
SHOWN = {"eta=0": "η = 0", "eta=0.5": "η = 0.5", "eta=1": "η = 1, σ = 0", "multinomial": "multinomial diffusion"}
COLUMNS = (5, 20, 100)


def keep_images(path: Path, images: int = 8) -> None:
    """What the figure shows of the samples, in one file."""
    shown = {}
    for name, steps in itertools.product(SHOWN, COLUMNS):
        with np.load(KEPT / f"{name}-{steps}.npz", allow_pickle=False) as loaded:
            shown[f"{name}-{steps}"] = loaded["x"][:images]
    shown["test"] = levels("test")[:images].numpy().astype(np.uint8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **shown)


def figure(record: dict[str, Any], images: dict[str, np.ndarray]) -> Figure:
    """Errors by steps, above samples by member and steps."""
    with matplotlib.rc_context(STYLE):
        whole = Figure(figsize=(11.0, 6.6), layout="constrained")
        top, bottom = np.asarray(whole.subfigures(2, 1, height_ratios=(1.0, 0.85)))
        panels = top.subplots(1, 3)
        for panel, (part, key, error, title) in zip(
            panels,
            (
                ("toy", "total_variation", None, "3 dimensions: total variation"),
                ("digits", "distance", "error", "digits: share of pixels off the nearest"),
                ("quality", "differ", None, "network: share of unlike neighbours"),
            ),
            strict=True,
        ):
            rows = record[part]["rows"]
            for i, name in enumerate((*(f"eta={eta:g}" for eta in ETAS), "rate", "multinomial")):
                line = [row for row in rows if row["member"] == name and row["steps"] > 1]
                value = [row[key][0] if part == "quality" else row[key] for row in line]
                spread = [row[key][1] if part == "quality" else row[error] if error else 0.0 for row in line]
                label = name.replace("eta=", "η = ").replace("rate", "η = 1 − exp(−5 Δτ/T)")
                panel.errorbar(
                    [row["steps"] for row in line], value, spread, label=label, marker="osD^vP"[i], color=f"C{i}"
                )
            panel.set(xscale="log", yscale="linear" if part == "quality" else "log", xlabel="steps S", title=title)
            ticks = sorted({row["steps"] for row in rows if (row["steps"] or 0) > 1})
            panel.set_xticks(ticks, list(map(str, ticks)))
            panel.minorticks_off()
        panels[1].set_ylim(bottom=1e-4)  # below which there are zeros
        value, error = next(row for row in record["quality"]["rows"] if row["steps"] is None)["differ"]
        panels[2].axhspan(value - error, value + error, color="0.8", label="training images")
        panels[2].legend(fontsize=7)
        grid = bottom.subplots(len(SHOWN) + 1, len(COLUMNS))
        for axes in grid.ravel():
            axes.set_axis_off()
        for (i, (name, label)), (j, steps) in itertools.product(enumerate(SHOWN.items()), enumerate(COLUMNS)):
            _show(grid[i, j], images[f"{name}-{steps}"])
            if i == 0:
                grid[i, j].set_title(f"S = {steps}", fontsize=9)
            if j == 0:
                grid[i, j].text(-0.03, 0.5, label, transform=grid[i, j].transAxes, ha="right", va="center")
        _show(grid[-1, 0], images["test"])
        grid[-1, 0].text(-0.03, 0.5, "test images", transform=grid[-1, 0].transAxes, ha="right", va="center")
    return whole


def _show(axes: Any, x: np.ndarray) -> None:
    axes.imshow(sheet(x * (255 // (CLASSES - 1)), len(x)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


PARTS: dict[str, Callable[[], Any]] = {
    "toy": study_toy,
    "digits": study_digits,
    "training": study_training,
    "bits": study_bits,
    "quality": study_quality,
}


def main() -> None:
    """Measure, record part by part, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; others keep their record")
    add_folders(parser, "the toy alone, few steps: seconds, to see that it runs")
    options = parser.parse_args()
    wanted = [] if options.figures_only else options.parts.split(",")
    if unknown := set(wanted) - PARTS.keys():
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    out, figures = folders(options)
    path = out / "discrete.json"
    record: dict[str, Any] = {"study": "discrete", "schedule": SCHEDULE.config, "circumstances": {}}
    if path.exists() or options.figures_only:
        record = json.loads(recorded(path).read_text("utf-8"))
    studies: dict[str, Callable[[], Any]] = {"toy": lambda: study_toy(TOY[:5])} if options.short else PARTS
    for name in studies if options.short else wanted:
        record[name] = studies[name]()
        record["circumstances"][name] = circumstances()
        write_json(path, record)
    if "quality" in wanted and not options.short:
        keep_images(path.with_suffix(".npz"))
    if {"toy", "digits", "quality"} <= record.keys():
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as images:
            save_figure(figure(record, dict(images)), figures / "discrete.png")


if __name__ == "__main__":
    main()
