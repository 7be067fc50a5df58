r"""Is a model what its field says it is? A few dozen calls on the user's own images tell.

What a network predicts, which labels it wants and what its images' range is cannot be read from its weights, and a wrong
guess makes worse pictures, not an error. But each guess has a loss,
:math:`E\,|\hat\epsilon(x_0 + \sigma\epsilon, \sigma) - \epsilon|^2`, on the same images and the same noise, and the right
one has the least.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddim_ode.field import PREDICTIONS, EpsilonField, as_epsilon
from ddim_ode.integrate import check_state
from ddim_ode.models.released import reason
from ddim_ode.noise import noise

__all__ = ["Finding", "Report", "check"]

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    check : str
        Which: ``call``, ``determinism``, ``dtype``, ``batch``, ``prediction``, ``label``, ``fraction``, ``range`` or ``loss``.
    verdict : {"ok", "note", "wrong"}
        A note is no mistake, but worth knowing.
    text : str
        What was found, and what would do.
    values : dict
        The numbers behind it.
    """

    check: str
    verdict: Verdict
    text: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What :func:`check` found.

    Attributes
    ----------
    findings : tuple of Finding
        In the order they were made.
    loss : dict
        Noise-prediction loss per dimension, by σ, as declared.
    nfe : int
        Model calls spent.
    """

    findings: tuple[Finding, ...]
    loss: dict[float, float]
    nfe: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.verdict != "wrong" for finding in self.findings)

    def __str__(self) -> str:
        rows = [f"{finding.verdict:>6}  {finding.check:<12} {finding.text}" for finding in self.findings]
        return "\n".join(rows)


def check(field: EpsilonField, images: Tensor, *, seed: int = 0) -> Report:
    r"""Compare what a field declares of its model with what the model does.

    Parameters
    ----------
    field : EpsilonField
        What is to be checked. It is not changed.
    images : Tensor
        Data that the model was trained for, (B, \*d), in the range it was trained in; 32 or more tell more. For a
        latent-diffusion model, latents.
    seed : int
        Seed of the noise.

    Returns
    -------
    Report
        Printing it shows a line a check.

    Raises
    ------
    ValueError, TypeError
        If `images` do not fit the field.
    """
    check_state(field, images, "images")
    if images.shape[0] < 2:
        raise ValueError("images must be two or more: one cannot tell whether samples of a batch disturb each other")
    probe = _Probe(field, images, seed)
    findings: list[Finding] = []
    for examine in (_call, _determinism, _dtype, _batch, _range, _prediction, _label, _fraction):
        found = examine(probe)
        findings += [] if found is None else [found]
        if found is not None and found.check == "call" and found.verdict == "wrong":
            return Report(tuple(findings), {}, probe.calls)
    found, loss = _loss(probe)
    return Report((*findings, found), loss, probe.calls)


class _Probe:
    """A field and the noised images it is asked about: every guess sees the same."""

    def __init__(self, field: EpsilonField, images: Tensor, seed: int) -> None:
        self.field = copy.copy(field)  # its counter and its guesses are its own
        self.field.nfe = 0
        self.field.guidance_scale = 1.0  # a guided ε is no estimate of the noise, and its loss says nothing
        self.images = images.detach().to(torch.float64)
        self.noise = noise(tuple(images.shape[1:]), images.shape[0], seed).to(images.device)
        low, high = field.schedule.sigma_min, field.schedule.sigma_max
        self.levels = [s for s in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if low <= s <= high] or [math.sqrt(low * high)]
        self.middle = self.levels[len(self.levels) // 2]
        self.jitter, self.rounding = 0.0, 0.0
        self.calls = 0

    @property
    def variance(self) -> float:
        """Of all entries about their common mean."""
        return float((self.images - self.images.mean()).square().mean())

    def noised(self, sigma: float, images: Tensor | None = None) -> Tensor:
        return (self.images if images is None else images) + sigma * self.noise

    def ask(self, field: EpsilonField, x_bar: Tensor, sigma: float, rows: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            return field.bind(x_bar, (sigma,), rows)(x_bar, sigma)

    def each(self, field: EpsilonField, sigma: float, images: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,)."""
        found = self.ask(field, self.noised(sigma, images=images), sigma)
        return (found - self.noise).square().flatten(1).mean(dim=1)

    def loss(self, field: EpsilonField, sigma: float, images: Tensor | None = None) -> float:
        return float(self.each(field, sigma, images).mean())

    def losses(self, field: EpsilonField, levels: list[float]) -> list[float]:
        return [self.loss(field, sigma) for sigma in levels]

    def losses_by_prediction(self, levels: list[float], images: Tensor | None = None) -> dict[str, list[float]]:
        """The loss at each level, were the model's output of this or that type: one call a level tells all."""
        found: dict[str, list[float]] = {name: [] for name in PREDICTIONS}
        for sigma in levels:
            x_bar = self.noised(sigma, images=images)
            out = self.ask(self.guess(prediction="epsilon"), x_bar, sigma)  # ε is the output as it is
            for name, rows in found.items():
                a, b = as_epsilon(name, self.field.coordinates, max(sigma, self.field.schedule.sigma_min))
                rows.append(float((a * x_bar + b * out - self.noise).square().mean()))
        return found

    def guess(self, **changes: Any) -> EpsilonField:
        """The field with something else declared."""
        other = copy.copy(self.field)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def relabelled(self, change: Callable[[Tensor], Tensor]) -> EpsilonField:
        """The field with labels changed on their way to the model."""
        call = self.field._call
        return self.guess(_call=lambda x, t, *condition: call(x, change(t), *condition))

    @property
    def by_label(self) -> bool:
        """Whether there is a label to be wrong about."""
        return not self.field._by_sigma


def _mean_log(losses: list[float]) -> float:
    return sum(math.log(max(x, 1e-300)) if math.isfinite(x) else 700.0 for x in losses) / len(losses)


#: Two calls that differ by less are equal: sums on a GPU may be made in any order.
_SAME = 1e-6


# -- the checks -------------------------------------------------------------------------------------
def _call(probe: _Probe) -> Finding:
    try:
        out = probe.ask(probe.field, probe.noised(probe.middle), probe.middle)
    except Exception as error:  # a user's model raises what it likes
        text = f"the model cannot be called: {reason(error)}"
        if "dtype" in str(error) and probe.field.dtype is None:
            text += (
                "; a model that does not show its parameters is given the state's dtype: declare dtype=torch.float32"
            )
        elif probe.by_label and probe.field.label != "nearest" and re.search("Long|Int|indices|index", str(error)):
            text += '; if it indexes a table with its labels, declare label="nearest"'
        return Finding("call", "wrong", text, {"error": repr(error)})
    if not bool(out.isfinite().all()):
        return Finding("call", "wrong", f"the model returns NaN or infinity at sigma = {probe.middle:g}", {})
    shape = tuple(probe.images.shape[1:])
    return Finding("call", "ok", f"takes and returns samples of shape {shape}", {"shape": list(shape)})


def _dtype(probe: _Probe) -> Finding | None:
    """What the model rounds to: on a line of three close points a smooth ε bends by its rounding alone."""
    if probe.jitter > _SAME:
        return None  # the rounding is drowned
    dtype = probe.field.autocast or probe.field.dtype
    name = "the state's dtype" if dtype is None else str(dtype).removeprefix("torch.")
    x_bar = probe.noised(probe.middle)
    first, second, third = (probe.ask(probe.field, x_bar + k * 1e-4 * probe.noise, probe.middle) for k in range(3))
    bend = probe.rounding = float((first - 2.0 * second + third).square().mean().sqrt()) / 6.0**0.5
    values = {"dtype": name, "rounding": bend}
    floor = f"no solver's error falls below its rounding, {bend:.1e} RMS in ε"
    if dtype in (torch.float16, torch.bfloat16):
        return Finding("dtype", "note", f"the model computes in {name}: {floor}", values)
    if bend > 1e-4:
        text = (
            f"declared to compute in {name}, but rounds as shorter formats do: {floor}; look for autocast inside the model, "
            "half-precision layers, or TF32 matrix products"
        )
        return Finding("dtype", "note", text, values)
    return Finding("dtype", "ok", f"the model computes in {name} (rounding {bend:.0e} RMS in ε)", values)


def _determinism(probe: _Probe) -> Finding:
    x_bar = probe.noised(probe.middle)
    first, second = (probe.ask(probe.field, x_bar, probe.middle) for _ in range(2))
    difference = probe.jitter = float((first - second).square().mean().sqrt())
    values = {"rms_difference": difference}
    model = probe.field.model
    training = isinstance(model, nn.Module) and any(module.training for module in model.modules())
    if difference > _SAME:
        cure = (
            "it is in training mode: call model.eval()" if training else "it draws random numbers, and an ODE has none"
        )
        return Finding("determinism", "wrong", f"two equal calls differ by {difference:.1e} RMS: {cure}", values)
    if training:
        return Finding("determinism", "note", "deterministic, but in training mode: call model.eval()", values)
    return Finding("determinism", "ok", "two equal calls agree", values)


def _batch(probe: _Probe) -> Finding:
    x_bar, count = probe.noised(probe.middle), probe.images.shape[0]
    ask = lambda x, rows=None: probe.ask(probe.field, x, probe.middle, rows)
    rms = lambda x: float(x.square().mean().sqrt())
    plain, first = ask(x_bar), torch.arange(count, device=x_bar.device) < (count + 1) // 2
    # Batches of one size: a model that keeps samples apart then rounds alike, whatever its dtype.
    found = []
    for other in (first, ~first):
        shape = (-1, *(1,) * (x_bar.ndim - 1))
        changed = torch.where(other.reshape(shape), -0.5 * x_bar, x_bar)
        found.append(rms((ask(changed) - plain)[~other]))
    # And in another order: what a sample's place does to it. It may round otherwise there.
    order = torch.arange(count, device=x_bar.device).roll(1)
    moved = rms(ask(x_bar[order], order) - plain[order])
    difference = max(*found, moved)
    values = {"rms_difference": difference}
    if max(found) > 1e-5 + 4.0 * probe.jitter or moved > 1e-5 + 4.0 * (probe.jitter + probe.rounding):
        text = (
            f"a sample's ε changes by {difference:.1e} RMS with its neighbours in the batch: batch norm in training mode, or a "
            "layer that mixes samples; results will depend on batch_size"
        )
        return Finding("batch", "wrong", text, values)
    return Finding("batch", "ok", f"samples of a batch do not disturb each other ({difference:.0e} RMS)", values)


def _prediction(probe: _Probe) -> Finding | None:
    if not probe.by_label:
        return None
    levels = [s for s in probe.levels if s >= 0.3] or probe.levels
    scores = {name: _mean_log(row) for name, row in probe.losses_by_prediction(levels).items()}
    best, declared = min(scores, key=lambda name: scores[name]), probe.field.prediction
    values = {"loss": {name: math.exp(score) for name, score in scores.items()}}
    if best != declared and scores[best] < scores[declared] - 0.1:
        text = (
            f'the model seems to predict "{best}", not "{declared}": loss {math.exp(scores[best]):.3g} against '
            f'{math.exp(scores[declared]):.3g}; declare prediction="{best}"'
        )
        probe.field = probe.guess(prediction=best)  # what follows is about the model, not about this mistake
        return Finding("prediction", "wrong", text, values)
    if best != declared:
        text = f'predicts "{declared}" as far as these images tell: "{best}" would do little better'
        return Finding("prediction", "note", text, values)
    return Finding("prediction", "ok", f'predicts "{declared}": every other type has a larger loss', values)


def _label(probe: _Probe) -> Finding | None:
    if not probe.by_label:
        return None
    scales = _scales(probe)
    if scales is not None:
        return scales
    shifted = _shift(probe)
    if shifted is None:
        return Finding("label", "ok", "labels fit; the schedule is too short to tell shifts of them apart", {})
    shift, gain, error, loss = shifted
    values = {"best_shift": shift, "gain": gain, "standard_error": error, "loss_by_shift": loss}
    unit = "a step is 1" if probe.field.schedule.discrete else "a thousandth of the time is 1"
    unit = "12 % of sigma is 1" if probe.field.label == "sigma" else unit
    if abs(shift) >= 0.5 and gain > 3.0 * error:
        text = f"labels seem off: the loss is least at labels {shift:+.1f} of those declared ({unit}); " + (
            "check whether the model counts from 0 or from 1" if abs(shift) < 1.6 else "check the schedule"
        )
        return Finding("label", "wrong", text, values)
    if abs(shift) >= 0.5:
        text = f"labels fit as far as these images tell: the loss changes with them by no more than chance ({unit}); give more"
        return Finding("label", "note", text, values)
    return Finding("label", "ok", f"labels fit: the loss is least {shift:+.2f} from those declared ({unit})", values)


def _scales(probe: _Probe) -> Finding | None:
    """Labels of another scale or direction, if they do clearly better."""
    T, sigma = float(probe.field.schedule.T), probe.field.label == "sigma"
    guesses: dict[str, Callable[[Tensor], Tensor]] = {
        "a thousandth of those": lambda t: t / 1000.0,
        "a thousand times those": lambda t: t * 1000.0,
    }
    if sigma:
        guesses["a quarter of their logarithm"] = lambda t: t.log() / 4.0
    elif probe.field.label == "fractional":
        guesses["counted from the other end"] = lambda t: T - (1.0 if probe.field.schedule.discrete else 0.0) - t
    elif probe.field.label == "nearest":
        guesses = {"counted from the other end": lambda t: int(T) - 1 - t}
    declared = _mean_log(probe.losses(probe.field, probe.levels))
    scores = {}
    for name, change in guesses.items():
        try:
            scores[name] = _mean_log(probe.losses(probe.relabelled(change), probe.levels))
        except Exception:  # a label out of a model's range may raise anything; then it is not that one
            continue
    if not scores:
        return None
    best = min(scores, key=lambda name: scores[name])
    if scores[best] >= declared - 0.1:
        return None
    text = f"labels seem to be {best}: loss {math.exp(scores[best]):.3g} against {math.exp(declared):.3g} as declared"
    return Finding(
        "label", "wrong", text, {"loss": {k: math.exp(v) for k, v in scores.items()} | {"declared": math.exp(declared)}}
    )


def _shift(probe: _Probe) -> tuple[float, float, float, dict[str, float]] | None:
    """How far the labels seem to be off; what that gains in loss, the standard error of it, and the losses.

    The place is that of a parabola through the loss at shifted labels. The error is over images, each of which sees
    the same noise at all shifts.
    """
    schedule = probe.field.schedule
    step = 1.0 if schedule.discrete else schedule.T / 1000.0
    if probe.field.label == "sigma":
        # Off by a factor, then; a "step" is 12 %, the ratio of neighbouring levels where the paper's schedule is finest.
        levels = [s for s in (0.02, 0.04, 0.08, 0.16) if schedule.sigma_min <= s <= schedule.sigma_max] or probe.levels
        change = lambda k: lambda t: t * math.exp(0.12 * k)
    else:
        # Where a step changes σ most: near the data. Shifted labels must be some that the model knows.
        last = schedule.T - 2.0 * step
        levels = [float(schedule.sigma(t)) for k in (2, 3, 5, 9, 16) if (t := schedule.t_min + step * k) <= last][-4:]
        change = lambda k: lambda t: t + (k * step if t.is_floating_point() else int(k))
    if not levels:
        return None
    shifts = (-2.0, -1.0, 0.0, 1.0, 2.0)
    found = torch.zeros(len(shifts), len(levels), probe.images.shape[0], dtype=torch.float64)
    for i, k in enumerate(shifts):
        field = probe.relabelled(change(k)) if k else probe.field
        for j, sigma in enumerate(levels):
            found[i, j] = probe.each(field, sigma).cpu()
    # Relative to the mean at each level, so that no level drowns the others.
    each = (found / found.mean(dim=(0, 2), keepdim=True)).mean(dim=1)
    total = each.mean(dim=1)
    at = int(total.argmin())
    offset = 0.0
    if 0 < at < len(shifts) - 1:
        left, middle, right = total[at - 1 : at + 2].tolist()
        bend = left - 2.0 * middle + right
        offset = 0.5 * (left - right) / bend if bend > 0.0 else 0.0
    gain = each[2] - each[at]
    error = float(gain.std() / gain.numel() ** 0.5)
    return (
        shifts[at] + offset,
        float(gain.mean()),
        error,
        {f"{k:+g}": v for k, v in zip(shifts, total.tolist(), strict=True)},
    )


def _fraction(probe: _Probe) -> Finding | None:
    if not probe.by_label or not probe.field.schedule.discrete or probe.field.label == "sigma":
        return None
    cap = "no solver shows an order above 1 beyond that rounding"
    if probe.field.label == "nearest":
        return Finding("fraction", "note", f"labels are rounded to integers, as declared: {cap}", {})
    schedule = probe.field.schedule
    if schedule.T < 3:
        return None
    changes: dict[str, list[float]] = {}
    # Coarse formats round large labels more: bfloat16's are multiples of 4 above 512.
    for t in sorted({max(2, int(schedule.T) // 10), max(2, int(0.9 * schedule.T))}):
        sigma = float(schedule.sigma(float(t)))
        x_bar = probe.noised(sigma)

        def fixed(label: float, x_bar: Tensor = x_bar, sigma: float = sigma) -> Tensor:
            return probe.ask(probe.relabelled(lambda labels: torch.full_like(labels, label)), x_bar, sigma)

        at = [fixed(t - 1.0 + quarter / 4.0) for quarter in range(5)]
        changes[str(t - 1)] = [float((a - b).abs().max()) for a, b in itertools.pairwise(at)]
    values = {"changes": changes}
    told = max(map(max, changes.values())) > 0.0  # else the model does not look at its labels at all
    stuck = [label for label, steps in changes.items() if told and min(steps) == 0.0]
    if stuck:
        text = (
            f'the model rounds labels itself, near {" and ".join(stuck)}: declare label="nearest" if it rounds to whole '
            f"numbers, and look for labels in half precision if it does not; {cap}"
        )
        return Finding("fraction", "note", text, values)
    return Finding("fraction", "ok", "fractional labels are told apart", values)


def _range(probe: _Probe) -> Finding | None:
    """Images of another scale, if they do clearly better, whatever the model predicts.

    Images of less contrast are easier to denoise: each guess is judged beside what its own variance allows.
    """
    if probe.field.codec is not None or probe.images.ndim != 4:
        return None
    low, high = float(probe.images.min()), float(probe.images.max())
    guesses = {}
    if low < -0.5:
        guesses["[0, 1]"] = (probe.images + 1.0) / 2.0
    elif low >= 0.0 and high <= 1.0 + 1e-3:
        guesses["[-1, 1]"] = 2.0 * probe.images - 1.0
    values: dict[str, Any] = {"span": [low, high]}
    # Where the noise drowns all detail, the mean is what a range shows by.
    levels = [s for s in probe.levels if s >= 0.3] or probe.levels

    def least(images: Tensor) -> list[float]:
        if not probe.by_label:
            found = [probe.loss(probe.field, s, images) for s in levels]
        else:
            found = min(probe.losses_by_prediction(levels, images).values(), key=_mean_log)
        variance = float((images - images.mean()).square().mean())
        return (
            [x * (variance + s * s) / variance for x, s in zip(found, levels, strict=True)] if variance > 0.0 else found
        )

    declared = least(probe.images) if guesses else []
    for name, images in guesses.items():
        values[name] = least(images)
        if _mean_log(values[name]) < _mean_log(declared) - 0.1:
            text = (
                f"the model seems to want images in {name}: these span {low:.3g}…{high:.3g}, and scaled so the loss is less of "
                "what their variance allows; what follows is of images so scaled"
            )
            probe.images = images
            return Finding("range", "wrong", text, values)
    return Finding("range", "ok", f"images span {low:.3g}…{high:.3g}", values)


def _loss(probe: _Probe) -> tuple[Finding, dict[float, float]]:
    """The loss by σ, beside that of the best ε that knows only the images' mean and variance, on the same noise."""
    mean, variance = probe.images.mean(), probe.variance
    middle = [s for s in probe.levels if 0.1 <= s <= 1.0] or probe.levels
    loss: dict[float, float] = {}
    bound: dict[float, float] = {}
    worse: list[float] = []
    unclear: list[float] = []
    for sigma in probe.levels:
        each = probe.each(probe.field, sigma)
        gaussian = (probe.noised(sigma) - mean) * (sigma / (variance + sigma**2))
        known = (gaussian - probe.noise).square().flatten(1).mean(dim=1)
        loss[sigma], bound[sigma] = float(each.mean()), float(known.mean())
        excess = each - known
        if sigma not in middle or loss[sigma] < bound[sigma]:
            continue
        chance = 3.0 * float(excess.std()) / excess.numel() ** 0.5
        (unclear if float(excess.mean()) < chance else worse).append(sigma)
    values = {
        "loss": {f"{s:g}": v for s, v in loss.items()},
        "isotropic_gaussian": {f"{s:g}": v for s, v in bound.items()},
    }
    rows = ", ".join(f"{value:.3g} at {sigma:g}" for sigma, value in loss.items())
    at = lambda levels: ", ".join(f"{s:g}" for s in levels)
    if worse:
        text = (
            f"loss by sigma: {rows}; at {at(worse)} that is worse than knowing the images' variance alone: untrained, "
            "trained on other data, or declared wrongly"
        )
        return Finding("loss", "wrong", text, values), loss
    if unclear:
        text = (
            f"loss by sigma: {rows}; at {at(unclear)} no better than knowing the images' variance alone, but by no more "
            "than chance: give more images"
        )
        return Finding("loss", "note", text, values), loss
    share = math.exp(sum(math.log(loss[s] / bound[s]) for s in middle) / len(middle))
    text = f"loss by sigma: {rows}; {share:.2f} of what the images' variance alone allows"
    return Finding("loss", "ok", text, values), loss
