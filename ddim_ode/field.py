r"""The vector field of eq. 14, from whatever network there is.

.. math:: d\bar x = \epsilon(\bar x, \sigma)\, d\sigma, \qquad
          \epsilon(\bar x, \sigma) = \epsilon_\theta\!\left(\bar x / \sqrt{\sigma^2 + 1},\ t(\sigma)\right)

:class:`EpsilonField` is the only place that knows what a network looks like: input scaling, time labels,
number formats, prediction types and guidance all live here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.schedule import NoiseSchedule, is_number

__all__ = ["COORDINATES", "Codec", "EpsilonField", "PREDICTIONS", "as_epsilon", "check_field", "differences"]

Array = NDArray[np.float64]

# ε = a x̄ + b · output, by σ, which the caller keeps at or above the first trained level. The score is that of x̄.
# σ is a float, or an array of them with one for each sample.
PREDICTIONS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "epsilon": lambda sigma: (0.0, 1.0),
    "sample": lambda sigma: (1.0 / sigma, -1.0 / sigma),
    "v_prediction": lambda sigma: (sigma / (1.0 + sigma**2), (1.0 + sigma**2) ** -0.5),
    "score": lambda sigma: (0.0, -sigma),
    "flow": lambda sigma: (1.0 / (1.0 + sigma), 1.0 / (1.0 + sigma)),
}

#: What a network's input is, as a multiple of x̄, by σ.
COORDINATES: dict[str, Callable[[Any], Any]] = {
    "preserving": lambda sigma: (1.0 + sigma * sigma) ** -0.5,
    "exploding": lambda sigma: 1.0,
    "flow": lambda sigma: 1.0 / (1.0 + sigma),
}

#: ``evaluate(x_bar, sigma)``, or ``evaluate(x_bar, sigma, rows)`` for some rows at a σ each: see :meth:`EpsilonField.bind`.
Evaluate = Callable[..., Tensor]


def _disturbs(module: nn.Module) -> bool:
    """Whether a module in training mode returns something else than in evaluation."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0
    )


def as_epsilon(prediction: str, coordinates: str, sigma: Any) -> tuple[Any, Any]:
    """A and b in ε = a x̄ + b · output, at a σ (or an array of them) no lower than the first trained level."""
    a, b = PREDICTIONS[prediction](sigma)
    # The score in x is that in x̄ over dx/dx̄.
    return (a, b * COORDINATES[coordinates](sigma)) if prediction == "score" else (a, b)


@dataclass(frozen=True)
class Codec:
    r"""Between images and the space that a latent-diffusion model works in.

    Attributes
    ----------
    encode : callable
        Images (B, C, H, W) in [−1, 1] to that space, (B, \*d).
    decode : callable
        And back, approximately.
    shape : tuple of int
        (C, H, W).
    weights : str, optional
        A hash of what both are made of.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    weights: str | None = None


class EpsilonField:
    r"""ε(x̄, σ) from a network.

    Networks of other makes have makers of their own: :meth:`from_denoiser`, :meth:`from_score`,
    :meth:`from_velocity`, and :meth:`from_sigma` for an ε known in (x̄, σ).

    Parameters
    ----------
    model : callable
        ``model(x, t)`` or, with a condition, ``model(x, t, condition)``: x (B, \*d) in its `coordinates`,
        t (B,) the time label, 0-based and fractional (see `label`); it returns (B, \*d), a new tensor each time:
        multistep solvers keep it.
    schedule : NoiseSchedule
        The schedule the model was trained with.
    prediction : {"epsilon", "sample", "v_prediction", "score", "flow"}
        What the model returns: ε; x₀; v = √α ε − √(1−α) x₀; the score ∇ log p(x) of the noised data in the model's
        own coordinates; or the velocity ε − x₀.
    coordinates : {"preserving", "exploding", "flow"}
        What x is: x̄/√(1 + σ²), of variance about one; x̄ = x₀ + σε itself; or x̄/(1 + σ) = (1 − t) x₀ + t ε, t = σ/(1 + σ).
    shape : tuple of int, optional
        Shape \*d of one sample; needed only to draw latents. Taken from ``model.shape`` if it has one.
    label : {"fractional", "nearest", "sigma"}
        The schedule's label; that rounded to an integer (int64), for networks that index a table with it, which
        caps the order any solver can show; or σ itself.
    dtype : torch.dtype, optional
        What the model computes in. By default that of its parameters; a model without parameters sees the
        state's.
    condition : Tensor, optional
        Third argument of the model, (B, …) or (1, …).
    null_condition : Tensor, optional
        The condition that stands for none, for classifier-free guidance, (B, …) or (1, …).
    guidance_scale : float
        w in ε = ε(null) + w (ε(condition) − ε(null)), from one doubled batch. 1 means no guidance.
    autocast : torch.dtype, optional
        Run the model under autocast to this dtype.
    channels_last : bool
        Feed the model (and lay out its weights) channels-last.
    compile : bool
        Pass the model through :func:`torch.compile`.
    clip : float, optional
        Clamp the predicted data x̂₀ = x̄ − σε to [−clip, clip], and ε with it: ε + (x̂₀ − clamped)/σ. Sampling only:
        clipping cannot be undone, and a field that clips does not encode.
    threshold : float, optional
        Dynamic thresholding (Saharia et al. 2022, Imagen): with s the quantile `threshold` of each sample's \|x̂₀\|, at least
        `clip` (1 by default), x̂₀ is clamped to [−s, s] and scaled by clip/s. Sampling only.

    Attributes
    ----------
    nfe : int
        Model calls so far; set it to 0 to count anew. A batch, doubled or not, is one call.
    codec : Codec or None
        Where x is not an image but a latent of one: the way between them.
    notes : tuple of str
        What a model's file asks for and this package does otherwise.

    Notes
    -----
    A network does not know σ = 0: it is asked with the label of the schedule's first trained level there,
    and so it is anywhere below that level.
    """

    clip: float | None = None
    threshold: float | None = None

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: str = "epsilon",
        *,
        coordinates: str = "preserving",
        shape: tuple[int, ...] | None = None,
        label: Literal["fractional", "nearest", "sigma"] = "fractional",
        dtype: torch.dtype | None = None,
        condition: Tensor | None = None,
        null_condition: Tensor | None = None,
        guidance_scale: float = 1.0,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool = False,
        clip: float | None = None,
        threshold: float | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), but got {type(model).__name__}")
        for name, value, known in (("prediction", prediction, PREDICTIONS), ("coordinates", coordinates, COORDINATES)):
            if value not in known:
                close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.2)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(f"unknown {name} {value!r}: {hint}known are {', '.join(known)}")
        if label not in ("fractional", "nearest", "sigma"):
            raise ValueError(f'label must be "fractional", "nearest" or "sigma", but got {label!r}')
        if label == "nearest" and not schedule.discrete:
            raise ValueError(f'label="nearest" needs a schedule whose labels are whole numbers, but got {schedule!r}')
        for name, given in (("condition", condition), ("null_condition", null_condition)):
            if given is not None and (not isinstance(given, Tensor) or given.ndim < 1):
                raise TypeError(f"{name} must be a tensor of one row a sample, or one for all, but got {given!r}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, but got {guidance_scale!r}")
        if guidance_scale != 1.0:
            if condition is None or null_condition is None:
                raise ValueError("guidance_scale other than 1 needs both condition and null_condition")
            if condition.shape[1:] != null_condition.shape[1:]:
                shapes = f"{tuple(condition.shape)} and {tuple(null_condition.shape)}"
                raise ValueError(
                    f"condition and null_condition must have rows of one shape, but their shapes are {shapes}"
                )
        if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
            raise TypeError(f"autocast must be a floating dtype, such as torch.bfloat16, but got {autocast!r}")
        self.coordinates = coordinates
        self.label = label
        self.condition, self.null_condition = condition, null_condition
        self.guidance_scale = float(guidance_scale)
        self.autocast, self.channels_last = autocast, channels_last
        self._by_sigma = False
        self._bound(clip, threshold)
        self._attach(model, schedule, prediction, shape, dtype)
        if channels_last and isinstance(model, nn.Module):
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._call = torch.compile(model) if compile else model

    @classmethod
    def from_sigma(
        cls,
        eps: Callable[[Tensor, Any], Tensor],
        schedule: NoiseSchedule,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        clip: float | None = None,
        threshold: float | None = None,
    ) -> EpsilonField:
        r"""The field of an ε known directly in (x̄, σ): an exact model or a σ-conditioned network.

        Parameters
        ----------
        eps : callable
            ``eps(x_bar, sigma)``, x̄ (B, \*d) and σ ≥ 0 a float; it returns (B, \*d). An adaptive solver has samples at
            different noise levels, and asks with σ a tensor (B, 1, …, 1) that broadcasts against x̄, in its dtype: some of
            them may be 0, so decide by ``torch.where``, not by ``if``.
        schedule : NoiseSchedule
            What σ runs over.
        shape, dtype, clip, threshold
            As for the class.
        """
        field = cls.__new__(cls)
        if not callable(eps):
            raise TypeError(f"eps must be callable as eps(x_bar, sigma), but got {type(eps).__name__}")
        field.label, field.guidance_scale, field.channels_last = "sigma", 1.0, False
        field.coordinates = "exploding"
        field.condition = field.null_condition = field.autocast = None
        field._by_sigma = True
        field._bound(clip, threshold)
        field._attach(eps, schedule, "epsilon", shape, dtype)
        field._call = eps
        return field

    @classmethod
    def from_denoiser(cls, denoiser: Callable[..., Tensor], schedule: NoiseSchedule, **options: Any) -> EpsilonField:
        r"""The field of a denoiser D(x̄, σ) ≈ E[x₀ | x̄], as EDM's networks and k-diffusion's wrappers are.

        .. math:: \epsilon = (\bar x - D(\bar x, \sigma)) / \sigma

        Parameters
        ----------
        denoiser : callable
            ``denoiser(x_bar, sigma)``, or with a condition ``denoiser(x_bar, sigma, condition)``: x̄ = x₀ + σε (B, \*d),
            σ (B,); it returns (B, \*d). Below ``schedule.sigma_min`` it is asked with that.
        schedule : NoiseSchedule
            What σ runs over: ``NoiseSchedule.edm(sigma_min, sigma_max)`` for EDM's.
        **options
            As for the class: ``shape``, ``dtype``, ``condition``, ``guidance_scale``, ``autocast``, ….
        """
        return cls(denoiser, schedule, "sample", coordinates="exploding", label="sigma", **options)

    @classmethod
    def from_score(
        cls,
        score: Callable[..., Tensor],
        schedule: NoiseSchedule,
        *,
        coordinates: Literal["preserving", "exploding"] = "preserving",
        **options: Any,
    ) -> EpsilonField:
        r"""The field of a score ∇ log p(x) of the noised data.

        .. math:: \epsilon = -\sigma\, \nabla_{\bar x} \log p_\sigma(\bar x)

        Parameters
        ----------
        score : callable
            ``score(x, t)``: x (B, \*d), t (B,) the schedule's label: t in (0, 1] for ``NoiseSchedule.continuous``, σ for
            ``NoiseSchedule.edm``.
        schedule : NoiseSchedule
            ``NoiseSchedule.continuous(0.1, 20.0)`` for score_sde's variance-preserving score functions, and
            ``NoiseSchedule.edm(0.01, sigma_max)`` for its variance-exploding networks.
        coordinates : {"preserving", "exploding"}
            What x is, and hence what the score is the gradient in.
        **options
            As for the class.
        """
        return cls(score, schedule, "score", coordinates=coordinates, **options)

    @classmethod
    def from_velocity(
        cls, velocity: Callable[..., Tensor], schedule: NoiseSchedule | None = None, **options: Any
    ) -> EpsilonField:
        r"""The field of a flow-matching (rectified-flow) velocity v ≈ E[ε − x₀ | x], x = (1 − t) x₀ + t ε.

        .. math:: \epsilon = (\bar x + v) / (1 + \sigma), \qquad \sigma = t / (1 - t)

        Parameters
        ----------
        velocity : callable
            ``velocity(x, t)``: x (B, \*d), t (B,) in (0, 1), 0 at the data. Turn the time round in a line of your own
            where it runs from noise to data.
        schedule : NoiseSchedule, optional
            By default ``NoiseSchedule.flow()``.
        **options
            As for the class.
        """
        return cls(velocity, schedule or NoiseSchedule.flow(), "flow", coordinates="flow", **options)

    def _bound(self, clip: float | None, threshold: float | None) -> None:
        if clip is not None and not (is_number(clip) and 0.0 < clip < math.inf):
            raise ValueError(f"clip must be a positive number, the largest value of the data, but got {clip!r}")
        if threshold is not None and not (is_number(threshold) and 0.0 < threshold <= 1.0):
            raise ValueError(f"threshold must be a quantile in (0, 1], such as 0.995, but got {threshold!r}")
        self.clip, self.threshold = clip, threshold

    def _attach(
        self,
        model: Any,
        schedule: NoiseSchedule,
        prediction: str,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, but got {type(schedule).__name__}: make one, NoiseSchedule.linear()"
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating dtype, such as torch.float32, but got {dtype!r}")
        shape = shape if shape is not None else getattr(model, "shape", None)
        if isinstance(shape, int):
            raise TypeError(f"shape must be that of one sample, such as ({shape},), but got {shape}")
        self.model, self.schedule, self.prediction, self.nfe = model, schedule, prediction, 0
        self.shape = None if shape is None else tuple(int(n) for n in shape)
        self._dtype = dtype
        self.codec: Codec | None = None
        self.notes: tuple[str, ...] = ()
        if isinstance(model, nn.Module) and any(_disturbs(m) for m in model.modules() if m.training):
            warnings.warn(
                "the model is in training mode and has dropout or batch norm: call model.eval() first", stacklevel=3
            )

    @property
    def clips(self) -> bool:
        """Whether the predicted data are clipped or thresholded."""
        return self.clip is not None or self.threshold is not None

    def _parameter(self) -> Tensor | None:
        if not isinstance(self.model, nn.Module):
            return None
        return next((p for p in self.model.parameters() if p.is_floating_point()), None)

    def parameters(self) -> tuple[Tensor, ...]:
        """What gradients may be taken to: the model's parameters and conditions that require them."""
        own = tuple(self.model.parameters()) if isinstance(self.model, nn.Module) else ()
        given = (x for x in (self.condition, self.null_condition) if x is not None)
        return tuple(x for x in (*own, *given) if x.requires_grad)

    def _weights(self) -> str | None:
        if not isinstance(self.model, nn.Module):
            return None
        state = _bare(self.model).state_dict()
        # Fake tensors have no values.
        return None if any(isinstance(x, FakeTensor) for x in state.values()) else digest(state)

    def describe(self) -> dict[str, Any]:
        """What an encoding depends on besides the images, as plain data: a hash of the weights, and how they are asked.

        ``weights`` is the SHA-256 of a module's parameters and buffers, None for a model that is not a module: such models
        cannot be told apart.
        """
        given = {"condition": self.condition, "null_condition": self.null_condition}
        return {
            "weights": self._weights(),
            "shape": None if self.shape is None else list(self.shape),
            "prediction": self.prediction,
            "coordinates": self.coordinates,
            "label": self.label,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "guidance_scale": self.guidance_scale,
            "clip": self.clip,
            "threshold": self.threshold,
            "codec": None if self.codec is None else self.codec.weights,
            "condition": digest({name: x for name, x in given.items() if x is not None})
            if any(x is not None for x in given.values())
            else None,
            "schedule": hashlib.sha256(repr(sorted(self.schedule.config.items())).encode()).hexdigest()[:16],
        }

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model computes in; None: whatever the state is in."""
        parameter = self._parameter()
        return self._dtype or (None if parameter is None else parameter.dtype)

    @property
    def device(self) -> torch.device | None:
        """Where the model lives now; None: wherever the state is."""
        parameter = self._parameter()
        return None if parameter is None else parameter.device

    def __repr__(self) -> str:
        what = type(self.model).__name__ if not hasattr(self.model, "__name__") else self.model.__name__
        return f"<EpsilonField {what}: {self.prediction}, {self.schedule!r}>"

    def __call__(self, x_bar: Tensor, sigma: float) -> Tensor:
        r"""ε(x̄, σ).

        Parameters
        ----------
        x_bar : Tensor
            (B, \*d).
        sigma : float
            Noise level in [0, σ_T].

        Returns
        -------
        Tensor
            (B, \*d), in the dtype of `x_bar`.
        """
        return self.bind(x_bar, (sigma,))(x_bar, float(sigma))

    def bind(self, x_bar: Tensor, sigmas: Iterable[float], rows: slice | Tensor | None = None) -> Evaluate:
        r"""The field for one run: all that depends on σ and on the batch's form alone is made here, once.

        Parameters
        ----------
        x_bar : Tensor
            A state of the run: its shape, dtype and device count, its values do not.
        sigmas : iterable of float
            Noise levels that will be asked for. Others may be, at the cost of a pause.
        rows : slice or Tensor, optional
            Which rows of the conditions the batch stands for; all by default.

        Returns
        -------
        callable
            ``evaluate(x_bar, sigma)``, for states of that shape and a float σ. And ``evaluate(x_bar, sigma, rows)``
            for some of the samples, each at its own noise level: x̄ (A, \*d), σ (A,) float64 and `rows` (A,) int64, where
            those samples stand in the batch. That form waits for the device if σ is there.
        """
        evaluate = self._bind_sigma(x_bar) if self._by_sigma else self._bind_network(x_bar, sigmas, rows)
        return _clipped(evaluate, self.clip or 1.0, self.threshold) if self.clips else evaluate

    def check_conditions(self, batch: int) -> None:
        """Refuse conditions that do not fit a run over `batch` samples."""
        for name in ("condition", "null_condition"):
            _rows(getattr(self, name), None, batch, name)

    def _bind_sigma(self, like: Tensor) -> Evaluate:
        dtype, state, shape, call = self.dtype or like.dtype, like.dtype, like.shape, self._call

        def evaluate(x_bar: Tensor, sigma: Any, rows: Tensor | None = None) -> Tensor:
            self.nfe += 1
            wanted = shape
            if rows is not None:
                wanted, sigma = x_bar.shape, _column(sigma, x_bar, dtype)
            try:
                eps = call(x_bar if state == dtype else x_bar.to(dtype), sigma)
            except (RuntimeError, ValueError) as error:
                if rows is None or not any(words in str(error) for words in _ONE_SIGMA):
                    raise
                raise ValueError(
                    "eps must take a tensor of noise levels, one a sample, from a solver that chooses its own steps, but it "
                    f"takes sigma for one number ({error}): decide by torch.where(sigma > 0.0, ..., ...), not by if"
                ) from error
            if not isinstance(eps, Tensor) or eps.shape != wanted:
                raise ValueError(_wrong_shape(eps, wanted))
            return eps if eps.dtype == state else eps.to(state)

        return evaluate

    def _bind_network(self, like: Tensor, sigmas: Iterable[float], rows: slice | Tensor | None) -> Evaluate:
        state, shape, device = like.dtype, like.shape, like.device
        dtype = self.dtype or state
        batch = shape[0]
        doubled = self.guidance_scale != 1.0
        condition = _rows(self.condition, rows, batch, "condition")
        if doubled:
            null = _rows(self.null_condition, rows, batch, "null_condition")
            condition = torch.cat((null, condition))  # type: ignore[arg-type]
        label_dtype = torch.int64 if self.label == "nearest" else torch.promote_types(dtype, torch.float32)
        table: dict[float, tuple[float, Tensor, float, float]] = {}
        sigma_min = self.schedule.sigma_min
        scaled = COORDINATES[self.coordinates]

        def label_of(levels: Array) -> Array:
            labels = np.maximum(levels, sigma_min) if self.label == "sigma" else self.schedule.label(levels)
            return np.rint(labels) if self.label == "nearest" else labels

        def learn(levels: Iterable[float]) -> None:
            values = np.fromiter(levels, dtype=np.float64)
            # One tensor for all levels, a row each: one copy to the device, not one a level.
            columns = torch.from_numpy(label_of(values)).to(device, label_dtype).unsqueeze(1)
            columns = columns.repeat(1, 2 * batch if doubled else batch)
            for sigma, t in zip(values.tolist(), columns.unbind(), strict=True):
                # A network's σ is never below its first trained level: see the class's notes.
                a, b = as_epsilon(self.prediction, self.coordinates, max(sigma, sigma_min))
                table[sigma] = (scaled(sigma), t, a, b)

        learn(sigmas)
        call, plain, scale_by = self._call, self.prediction == "epsilon", self.guidance_scale
        channels_last = self.channels_last and like.ndim == 4
        context: Any = contextlib.nullcontext
        if self.autocast is not None:
            context = lambda: torch.autocast(device.type, self.autocast)
        bare = self.autocast is None and not doubled and condition is None and not channels_last

        def ask(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            if doubled:
                x = torch.cat((x, x))
            with context():
                out = call(x, t) if condition is None else call(x, t, condition)
            if doubled:
                if not isinstance(out, Tensor) or out.shape[0] != x.shape[0]:
                    raise ValueError(_wrong_shape(out, x.shape))
                without, given = out.to(state).chunk(2)
                out = without + scale_by * (given - without)
            return out

        def evaluate(x_bar: Tensor, sigma: Any, rows: Tensor | None = None) -> Tensor:
            if rows is not None:
                return each(x_bar, sigma, rows)
            entry = table.get(sigma)
            if entry is None:
                learn((sigma,))
                entry = table[float(sigma)]
            scale, t, a, b = entry
            self.nfe += 1
            if state == dtype:
                x = x_bar * scale  # a copy even where scale is 1: a model may work in place
            elif dtype == torch.float16:  # x̄ may be as large as σ_T, which float16 need not hold
                x = (x_bar * scale).to(dtype)
            else:
                x = x_bar.to(dtype).mul_(scale)
            out = call(x, t) if bare else ask(x, t, condition)
            if not isinstance(out, Tensor) or out.shape != shape:
                raise ValueError(_wrong_shape(out, shape))
            if out.dtype != state:
                out = out.to(state)
            return out if plain else a * x_bar + b * out

        def each(x_bar: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            values = sigma.detach().cpu().double().numpy()
            a, b = as_epsilon(self.prediction, self.coordinates, np.maximum(values, sigma_min))
            numbers = np.stack(np.broadcast_arrays(label_of(values), scaled(values), a, b))
            labels, *factors = torch.from_numpy(numbers).to(device).unbind()
            t = labels.to(label_dtype)
            scale, a, b = (factor.to(state).reshape(-1, *(1,) * (x_bar.ndim - 1)) for factor in factors)
            chosen = condition
            if condition is not None:
                chosen = condition.index_select(0, torch.cat((rows, rows + batch)) if doubled else rows)
            self.nfe += 1
            x = (x_bar * scale).to(dtype)
            t = t.repeat(2) if doubled else t
            out = call(x, t) if bare else ask(x, t, chosen)
            if not isinstance(out, Tensor) or out.shape != x_bar.shape:
                raise ValueError(_wrong_shape(out, x_bar.shape))
            out = out.to(state)
            return out if plain else a * x_bar + b * out

        return evaluate


def check_field(field: Any) -> None:
    """Refuse what is no field."""
    if not isinstance(field, EpsilonField):
        raise TypeError(
            f"field must be an EpsilonField, but got {type(field).__name__}: wrap a network as EpsilonField(model, schedule)"
        )


def differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what one description of a field is not the other, in words; what neither of them knows is passed over.

    Parameters
    ----------
    own, other : mapping
        What :meth:`EpsilonField.describe` said, of what something was made by and of what it is to be used with.
    """
    out = []
    for name in dict.fromkeys((*own, *other)):
        a, b = own.get(name), other.get(name)
        if a == b or (name in ("weights", "shape") and None in (a, b)):
            continue
        if name == "weights":
            a, b = f"{str(a)[:12]}…", f"{str(b)[:12]}…"
        out.append(f"{name} is {b!r}, was {a!r}")
    return out


def _bare(model: nn.Module) -> nn.Module:
    """The module that torch.compile or DistributedDataParallel has wrapped: the weights are its own."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and len(list(model.children())) == 1:
            return _bare(inner)
    return model


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        if isinstance(x, Tensor):
            total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            total.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _clipped(evaluate: Evaluate, most: float, quantile: float | None) -> Evaluate:
    """ε of the predicted data kept within bounds; at σ = 0, where ε does not enter them, as it is."""

    def excess(data: Tensor) -> Tensor:
        if quantile is None:
            return data - data.clamp(-most, most)
        bound = _quantile(data.flatten(1).abs(), quantile).clamp(min=most)
        bound = bound.reshape(-1, *(1,) * (data.ndim - 1))
        return data - torch.maximum(torch.minimum(data, bound), -bound) * (most / bound)

    # Not (x̄ − kept)/σ, which loses the digits of an ε that needed no clipping where σ is small.
    def bounded(x_bar: Tensor, sigma: Any, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            eps, sigma = evaluate(x_bar, sigma, rows), _column(sigma, x_bar, x_bar.dtype)
            above = torch.where(sigma > 0.0, sigma, torch.ones_like(sigma))
            return torch.where(sigma > 0.0, eps + excess(x_bar - sigma * eps) / above, eps)
        eps = evaluate(x_bar, sigma)
        if sigma == 0.0:
            return eps
        return eps.add(excess(x_bar.add(eps, alpha=-sigma)), alpha=1.0 / sigma)

    return bounded


def _quantile(x: Tensor, q: float) -> Tensor:
    """That of each row of (B, D), by linear interpolation: torch.quantile, for half precision and any size too."""
    place = q * (x.shape[1] - 1)
    low = math.floor(place)
    ranked = x.sort(dim=1).values
    return ranked.select(1, low).lerp(ranked.select(1, math.ceil(place)), place - low)


#: What torch says where a number is wanted of a tensor of several.
_ONE_SIGMA = ("Boolean value of Tensor", "cannot be converted to Scalar", "converted to Python scalars")


def _column(sigma: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A σ for each sample, (A,), as (A, 1, …, 1) beside the state (A, \\*d)."""
    return sigma.to(like.device, dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _rows(condition: Tensor | None, rows: slice | Tensor | None, batch: int, name: str) -> Tensor | None:
    if condition is None:
        return None
    if condition.shape[0] == 1:
        return condition.expand(batch, *condition.shape[1:])
    chosen = condition if rows is None else condition[rows]
    if chosen.shape[0] != batch:
        raise ValueError(
            f"{name} has {condition.shape[0]} rows, but the batch has {batch}: give one row a sample, or one for all"
        )
    return chosen


def _wrong_shape(out: Any, shape: Any) -> str:
    got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    return f"the model must return what it was given, shape {tuple(shape)}, but returned {got}"
