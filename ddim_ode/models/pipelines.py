r"""Fields from diffusers' folders: what their scheduler's and network's configurations say, said in this package's terms.

A scheduler's configuration mixes three things. Its table of betas, its prediction type and its label are the
*model's* and are taken over. Its spacing and its solver are a *sampler's*, and are chosen here by ``grid=`` and
``solver=``. And some of its options change the answer (clipping, thresholding): those are not taken over, and
:class:`ModelWarning` says so.

diffusers itself is an extra: ``pip install ddim_ode[diffusers]``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import warnings
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddim_ode.field import Codec, EpsilonField, digest
from ddim_ode.models.released import reason
from ddim_ode.schedule import NoiseSchedule, whole

__all__ = [
    "Declared",
    "ModelWarning",
    "classes_tensor",
    "from_pipeline",
    "load_folder",
    "read_scheduler",
    "sample_shape",
]


class ModelWarning(UserWarning):
    """A model's folder asks for something that this package does otherwise."""


# -- the scheduler's configuration ----------------------------------------------------------------
# Schedulers whose model has an ODE of eq. 14, whatever they do with it themselves: some sample stochastically.
_BETAS = {
    "DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler",
    "DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler",
    "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
_DISTILLED = "its model maps noise to data in a few jumps and predicts no noise: there is no ODE to solve"
_REFUSED = {
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "CMStochasticIterativeScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "VQDiffusionScheduler": "its data are discrete, and no ODE leads to them",
    "UnCLIPScheduler": "its prior is sampled stochastically with learned variances; load its decoder's own scheduler",
    "ScoreSdeVeScheduler": "its network returns a score in variance-exploding coordinates: use EpsilonField.from_score(...)",
    "KarrasVeScheduler": "its network is conditioned on sigma: use EpsilonField.from_denoiser(...)",
    "EDMEulerScheduler": "its network is an EDM denoiser: use EpsilonField.from_denoiser(...)",
    "EDMDPMSolverMultistepScheduler": "its network is an EDM denoiser: use EpsilonField.from_denoiser(...)",
    "CosineDPMSolverMultistepScheduler": "its network is an EDM denoiser: use EpsilonField.from_denoiser(...)",
    "FlowMatchEulerDiscreteScheduler": "its network returns a velocity: use EpsilonField.from_velocity(...)",
    "FlowMatchHeunDiscreteScheduler": "its network returns a velocity: use EpsilonField.from_velocity(...)",
}
# Options that are a sampler's affair: grid= and solver= say here what they ask for.
_OURS = {
    "timestep_spacing", "steps_offset", "skip_prk_steps", "solver_order", "algorithm_type", "solver_type",
    "lower_order_final", "euler_at_final", "final_sigmas_type", "lambda_min_clipped", "variance_type", "predict_x0",
    "disable_corrector", "solver_p", "set_alpha_to_one", "interpolation_type", "use_lu_lambdas", "predictor_order",
    "corrector_order", "tau_func", "sigma_min", "sigma_max", "dynamic_thresholding_ratio", "sample_max_value",
    "clip_sample_range", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "flow_shift", "timestep_type",
}  # fmt: skip
_MODELS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
_CHANGES = {"clip_sample", "thresholding", "rescale_betas_zero_snr"}
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log", "use_beta_sigmas": None}


def read_scheduler(config: dict[str, Any]) -> tuple[NoiseSchedule, str, list[str]]:
    """What a scheduler's configuration says of the model.

    Parameters
    ----------
    config : dict
        The contents of ``scheduler_config.json``, or ``scheduler.config``. What it leaves out is its class's default.

    Returns
    -------
    schedule : NoiseSchedule
        From its betas, in float64.
    prediction : str
        As :class:`EpsilonField` has it.
    notes : list of str
        A sentence for each option that this package does otherwise and that changes the answer.

    Raises
    ------
    ValueError
        If the class of scheduler has no ODE of eq. 14, or an option is one that this version does not know how to
        read.
    """
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name in _REFUSED:
        raise ValueError(f"cannot make a field for {name}: {_REFUSED[name]}")
    if name not in _BETAS:
        raise ValueError(
            f"cannot make a field for the scheduler {name!r}: known are {', '.join(sorted(_BETAS))}; give schedule= and "
            "prediction= to say what the model is"
        )
    given, config = config, {**_defaults(name), **config}
    if config.get("use_flow_sigmas"):
        raise ValueError(f"{name} has use_flow_sigmas: {_REFUSED['FlowMatchEulerDiscreteScheduler']}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"{name} has timestep_type = {config['timestep_type']!r}: use EpsilonField.from_denoiser(...)")
    prediction = config["prediction_type"]
    if prediction not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"{name} has prediction_type = {prediction!r}: known are epsilon, sample, v_prediction")
    notes = []
    schedule, dropped = _schedule(config)
    if dropped:
        notes.append(
            "rescale_betas_zero_snr makes sigma_T infinite: the last step is dropped, and the ODE starts at "
            f"sigma = {schedule.sigma_max:.4g}, t = {schedule.T:.0f}"
        )
    if config["clip_sample"]:
        span = _number(config, "clip_sample_range")
        notes.append(
            f"clip_sample: {name} clips the predicted image to ±{span:g} in each step, and eq. 14 does not; clip={span:g} does"
        )
    if config.get("thresholding"):
        notes.append(
            f"thresholding: {name} limits the predicted image in each step, and eq. 14 does not; threshold= does"
        )
    stops = "the last step stops at the first trained level, and ours at sigma = 0"
    if config.get("set_alpha_to_one") is False:
        notes.append(f"set_alpha_to_one is false: {stops}")
    if config.get("final_sigmas_type") == "sigma_min":
        notes.append(f"final_sigmas_type is sigma_min: {stops}")
    if isinstance(lowest := config.get("lambda_min_clipped"), Real) and math.isfinite(lowest):
        notes.append(f"lambda_min_clipped: {name} starts at log sigma = {-lowest:g} at most, and ours at sigma_T")
    for option, grid in _SIGMAS.items():
        if config.get(option):
            notes.append(f"{option}: " + (f"a grid, here grid={grid!r}" if grid else "a grid that has no name here"))
    known = _OURS | _MODELS | _CHANGES | _SIGMAS.keys()
    for option in sorted(given.keys() - known):
        # By identity: 0 is a value, and equals False.
        if not option.startswith("_") and given[option] is not None and given[option] is not False:
            notes.append(f"unknown option {option} = {given[option]!r}: not used")
    return schedule, prediction, notes


def _defaults(name: str) -> dict[str, Any]:
    """What a class of scheduler takes for what its configuration leaves out; without diffusers, what DDPM's does."""
    found = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "prediction_type": "epsilon", "clip_sample": name in ("DDIMScheduler", "DDPMScheduler"), "clip_sample_range": 1.0,
    }  # fmt: skip
    # Without torchsde this one is an empty stand-in; its defaults are the other's.
    name = {"DPMSolverSDEScheduler": "KDPM2DiscreteScheduler"}.get(name, name)
    try:
        parameters = inspect.signature(getattr(_diffusers(), name).__init__).parameters
    except (ImportError, AttributeError):  # not installed, or a version without this class
        return found
    return found | {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _number(config: dict[str, Any], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, but the scheduler's configuration has {value!r}")
    return float(value)


def _schedule(config: dict[str, Any]) -> tuple[NoiseSchedule, bool]:
    """The schedule, and whether a last step of zero signal was dropped from it."""
    total = whole(config["num_train_timesteps"], "num_train_timesteps", 2)
    kind, trained = config["beta_schedule"], config.get("trained_betas")
    if trained is not None:
        try:
            betas = np.asarray(trained, dtype=np.float64)
        except (TypeError, ValueError):
            betas = np.zeros(())
        if betas.ndim != 1:
            raise ValueError(
                f"trained_betas must be a list of numbers, but the scheduler's configuration has {trained!r}"
            )
        table = np.cumprod(1.0 - betas)
    elif kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        make = {"linear": NoiseSchedule.linear, "scaled_linear": NoiseSchedule.scaled_linear}.get(kind)
        if make is None:
            schedule = NoiseSchedule.cosine(total)
        else:
            schedule = make(total, _number(config, "beta_start"), _number(config, "beta_end"))
        if not config.get("rescale_betas_zero_snr"):
            return schedule, False
        table = schedule.alphas_cumprod
    elif kind == "sigmoid":
        start, end = _number(config, "beta_start"), _number(config, "beta_end")
        table = np.cumprod(1.0 - (start + (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, total)))))
    else:
        raise ValueError(
            f"beta_schedule = {kind!r} is not known here: give schedule=NoiseSchedule.from_alphas_cumprod(...)"
        )
    if config.get("rescale_betas_zero_snr"):
        # Lin et al. 2024, algorithm 1: shift √α so that it ends at 0, scale so that its start stays.
        root = np.sqrt(table)
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return NoiseSchedule.from_alphas_cumprod(table[:-1]), True
    return NoiseSchedule.from_alphas_cumprod(table), False


# -- networks as model(x, t[, condition]) -------------------------------------------------------------
class Network(nn.Module):
    """A network of diffusers as ``model(x, t, condition)``; of learned-variance outputs the noise half is used.

    Parameters
    ----------
    inner : Module
        The network.
    argument : str
        The name its condition goes by.
    """

    def __init__(self, inner: nn.Module, argument: str) -> None:
        super().__init__()
        self.inner, self.argument = inner, argument

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        given = {} if condition is None else {self.argument: condition}
        out = self.inner(x, timestep=t, return_dict=False, **given)[0]
        return out if out.shape[1] == x.shape[1] else out.chunk(2, dim=1)[0]


# Networks that are known, by class: the name of their condition.
_NETWORKS = {
    "UNet2DModel": "class_labels",
    "UNet2DConditionModel": "encoder_hidden_states",
    "DiTTransformer2DModel": "class_labels",
    "Transformer2DModel": "class_labels",  # DiT's, as older versions save it
}


@dataclass(frozen=True)
class Declared:
    """What a caller says of a model beside its files: the arguments of :func:`ddim_ode.load` of the same names."""

    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    class_labels: Any = None
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    shape: tuple[int, int, int] | None = None


def load_folder(
    path: str | os.PathLike[str], declared: Declared, *, device: str | torch.device = "cpu", **options: Any
) -> EpsilonField:
    r"""The field of a diffusers folder: a pipeline, or a bare network.

    Parameters
    ----------
    path : path or str
        A folder with ``model_index.json`` or a network's ``config.json``; or the name of one on the hub
        (``"google/ddpm-cifar10-32"``), where the network allows.
    device : device
        Where the network goes.
    declared : Declared
        What is said of it. A schedule is needed for a bare network that was not trained with the paper's.
    **options
        As for :class:`EpsilonField`, such as ``guidance_scale``.

    Returns
    -------
    EpsilonField
        A latent-diffusion model's has a :class:`Codec` in ``.codec``.

    Raises
    ------
    ValueError
        If the folder is no model, is half there, or its scheduler has no ODE of eq. 14.
    ImportError
        If diffusers is not installed.

    Warns
    -----
    ModelWarning
        Once for each option of the scheduler that is done otherwise here; they are in ``field.notes`` too.
    """
    diffusers = _diffusers()
    index = _index(path)
    if index is not None and index.get("_class_name") == "StableDiffusionPipeline":
        extra = {"safety_checker": None, "requires_safety_checker": False}
        pipeline = _pretrained(diffusers.StableDiffusionPipeline, path, "", **extra)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                _frozen(part)
        return _of_pipeline(pipeline.to(device), declared, options)
    folder = Path(path)
    if index is None:
        part, config = "", _bare_config(path)
    else:
        part = next((name for name in ("unet", "transformer") if name in index), "")
        if not part:
            raise ValueError(
                f"{path} holds a {index.get('_class_name')} without unet or transformer: no noise predictor"
            )
        # Old folders keep everything at the top.
        part = part if not folder.is_dir() or (folder / part).is_dir() else ""
        config = _json(folder / part / "config.json") if folder.is_dir() else {"_class_name": index[part][1]}
    name = str(config.get("_class_name"))
    if name not in _NETWORKS:
        raise ValueError(
            f"{path} holds a {name}, and known are {', '.join(_NETWORKS)}: wrap it by hand, docs/models.md"
        )
    network = _frozen(_pretrained(getattr(diffusers, name), path, part))
    scheduler, vae = None, None
    if index is not None:
        if "scheduler" in index:
            scheduler = _scheduler(path)
        kind = next((k for k in ("vae", "vqvae") if k in index), None)
        if kind is not None:
            vae = _frozen(_pretrained(getattr(diffusers, index[kind][1]), path, kind))
    return _field(network, scheduler, vae, device, declared, None, None, options, str(path))


def from_pipeline(pipeline: Any, **said: Any) -> EpsilonField:
    """The field of a diffusers pipeline in memory.

    Parameters
    ----------
    pipeline : DiffusionPipeline
        With a network of a known class. Its modules stay the caller's: in the mode they are in, frozen or not.
    **said
        ``schedule``, ``prediction``, ``class_labels``, ``prompt``, ``negative_prompt``, ``shape`` and the options of
        :class:`EpsilonField`, as for :func:`ddim_ode.load`.
    """
    names = {field.name for field in fields(Declared)}
    return _of_pipeline(
        pipeline,
        Declared(**{k: v for k, v in said.items() if k in names}),
        {k: v for k, v in said.items() if k not in names},
    )


def _of_pipeline(pipeline: Any, declared: Declared, options: dict[str, Any]) -> EpsilonField:
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None or type(network).__name__ not in _NETWORKS:
        raise ValueError(
            f"a {type(pipeline).__name__} holds a {type(network).__name__}, and known are {', '.join(_NETWORKS)}: wrap it "
            "by hand, docs/models.md"
        )
    if hasattr(network, "add_embedding"):
        raise ValueError(f"a {type(pipeline).__name__} has conditions beside the text: wrap it by hand, docs/models.md")
    condition = null = None
    if getattr(pipeline, "text_encoder", None) is not None:
        if declared.prompt is None:
            raise ValueError("a text-to-image pipeline needs prompt=, a text for all samples or one a sample")
        with torch.no_grad():
            condition, null = (_encode(pipeline, text) for text in (declared.prompt, declared.negative_prompt or ""))
    scheduler = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    return _field(network, scheduler, vae, network.device, declared, condition, null, options, type(pipeline).__name__)


def _encode(pipeline: Any, text: str | list[str]) -> Tensor:
    """The text encoder's last states of each text, (1 or B, tokens, width)."""
    tokens = pipeline.tokenizer(
        [text] if isinstance(text, str) else list(text), padding="max_length", truncation=True, return_tensors="pt",
        max_length=pipeline.tokenizer.model_max_length,
    )  # fmt: skip
    encoder = pipeline.text_encoder
    mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]


def _field(
    network: Any,
    scheduler: dict[str, Any] | None,
    vae: Any,
    device: Any,
    declared: Declared,
    condition: Tensor | None,
    null: Tensor | None,
    options: dict[str, Any],
    where: str,
) -> EpsilonField:
    config = network.config
    schedule, prediction, class_labels = declared.schedule, declared.prediction, declared.class_labels
    if condition is None and (declared.prompt is not None or declared.negative_prompt is not None):
        raise ValueError(f"{where} has no text encoder that is known here: leave prompt out")
    if condition is None and type(network).__name__ == "UNet2DConditionModel":
        raise ValueError(
            f"{where} wants a text's embedding: load the StableDiffusionPipeline it belongs to, or wrap it by hand"
        )
    notes: list[str] = []
    if schedule is None or prediction is None:
        if scheduler is None:
            if schedule is None:
                schedule = NoiseSchedule.linear()
                notes.append(
                    "no scheduler beside the network: the paper's schedule is taken, give schedule= for another"
                )
            read_prediction = "epsilon"
        else:
            read, read_prediction, notes = read_scheduler(scheduler)
            schedule = schedule or read
        prediction = prediction or read_prediction
    if config.get("out_channels") not in (None, config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"{where} takes {config.in_channels} channels and returns {config.out_channels}: it is asked about an image beside "
            "x, as for inpainting; wrap it by hand, docs/models.md"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{where} expects an embedding of its guidance scale (time_cond_proj_dim), as networks distilled for few steps "
            "do: wrap it by hand, docs/models.md"
        )
    shape = _shape(network, declared.shape, where)
    if class_labels is not None:
        count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        condition, null = classes_tensor(class_labels, count, device), _no_class(config, device)
    elif _is_conditional(config):
        raise ValueError(f"{where} is class-conditional: give class_labels=, one for all samples or one a sample")
    asked = {"clip_sample": "clip", "thresholding": "threshold"}
    notes = [note for note in notes if options.get(asked.get(note.split(":")[0], "")) is None]
    for note in notes:
        warnings.warn(f"{where}: {note}", ModelWarning, stacklevel=4)
    model = Network(network.to(device), _NETWORKS[type(network).__name__])
    model.training = network.training  # as the network is, which may be the caller's
    guided = options.get("guidance_scale", 1.0) != 1.0
    if guided and null is None:
        raise ValueError(f"{where} knows no condition that stands for none: guidance_scale must be 1")
    field = EpsilonField(
        model, schedule, prediction, shape=shape, condition=condition, null_condition=null if guided else None,
        **options,
    )  # fmt: skip
    field.notes = tuple(notes)
    field.codec = None if vae is None else _codec(vae.to(device), field.shape)
    return field


def _frozen(module: Any) -> Any:
    """A module of our own making, ready to be asked and not to be trained."""
    return module.eval().requires_grad_(False)


def _shape(network: Any, declared: Any, where: str) -> tuple[int, int, int]:
    """The shape of a sample: the caller's, else the configuration's."""
    config, kind = network.config, type(network).__name__
    size, channels = config.sample_size, config.in_channels
    if declared is None and size is None:
        raise ValueError(
            f"{where} does not say the size of its images (sample_size is null): give shape=({channels}, H, W)"
        )
    if declared is None:
        declared = (channels, *size) if isinstance(size, (list, tuple)) else (channels, size, size)
    # A text-to-image U-Net takes any size: it is told the sizes on its way up. DiT's patches make squares.
    multiple = 2 ** (len(config.block_out_channels) - 1) if kind == "UNet2DModel" else config.get("patch_size") or 1
    shape = sample_shape(declared, channels, multiple, where)
    if "Transformer" in kind and shape[1] != shape[2]:
        raise ValueError(f"{where} takes square images, but the shape is {shape}")
    return shape


def sample_shape(shape: Any, channels: int, multiple: int, where: str) -> tuple[int, int, int]:
    """A shape (C, H, W), refused unless it has these channels and each side is a multiple of `multiple`."""
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), such as ({channels}, 64, 64), but got {shape!r}")
    count, height, width = (whole(n, "each of the shape's numbers") for n in shape)
    if count != channels:
        raise ValueError(f"{where} takes {channels} channels, but the shape is {tuple(shape)}")
    if height % multiple or width % multiple:
        raise ValueError(f"{where} takes sizes that are multiples of {multiple}, but the shape is {tuple(shape)}")
    return count, height, width


def _is_conditional(config: Any) -> bool:
    return config.get("num_class_embeds") is not None or config.get("num_embeds_ada_norm") is not None


def classes_tensor(class_labels: Any, count: int | None, device: Any) -> Tensor:
    """Class labels as int64 (1 or B,), refused unless each is one of `count`."""
    if count is None:
        raise ValueError("class_labels was given, but the network knows no classes")
    try:
        labels = torch.atleast_1d(torch.as_tensor(class_labels))
    except (TypeError, ValueError, RuntimeError):  # words, None, rows of different lengths
        labels = torch.zeros(0)
    wrong = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if wrong or labels.ndim != 1 or not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= count:
        raise ValueError(
            f"class_labels must be whole numbers from 0 to {count - 1}, one or a list, but got {class_labels!r}"
        )
    return labels.to(device, torch.int64)


def _no_class(config: Any, device: Any) -> Tensor | None:
    """The class that stands for none: DiT keeps one behind the others; a U-Net has no such thing."""
    count = config.get("num_embeds_ada_norm")
    return None if count is None else torch.tensor([count], device=device)


def _codec(vae: Any, shape: Any) -> Codec:
    scale, shift = float(vae.config.scaling_factor or 1.0), float(vae.config.get("shift_factor") or 0.0)
    dtype = next(vae.parameters()).dtype

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = vae.encode(images.to(dtype))
        latent = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return (latent - shift) * scale

    def decode(x: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode((x / scale + shift).to(dtype), return_dict=False)[0]

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = (vae.config.in_channels, shape[1] * factor, shape[2] * factor)
    return Codec(encode, decode, pixels, digest(vae.state_dict()))


# -- folders ------------------------------------------------------------------------------------
def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("diffusers folders need the extra: pip install ddim_ode[diffusers]") from error
    return diffusers


def _index(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """``model_index.json`` of a folder or of the hub; None for a bare network."""
    folder = Path(path)
    if folder.is_dir():
        return _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else None
    diffusers = _diffusers()
    try:
        config = diffusers.DiffusionPipeline.load_config(str(path))
    except OSError as error:
        if "does not appear to have a file" in str(error):  # a bare network has no index
            with contextlib.suppress(OSError):
                diffusers.UNet2DModel.load_config(str(path))
                return None
        raise OSError(
            f"{path} is no folder here, and the hub did not give it ({reason(error)}): without a network, fetch it "
            "elsewhere and name the folder"
        ) from error
    return config if isinstance(config, dict) else config[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not a model: it has no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(found).__name__}: fetch it again")
    return found


def _bare_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    if Path(path).is_dir():
        return _json(Path(path) / "config.json")
    config = _diffusers().UNet2DModel.load_config(str(path))
    return config if isinstance(config, dict) else config[0]


def _scheduler(path: str | os.PathLike[str]) -> dict[str, Any]:
    folder = Path(path)
    if folder.is_dir():
        inner = folder / "scheduler" / "scheduler_config.json"
        return _json(inner if inner.is_file() else folder / "scheduler_config.json")
    config = _diffusers().DDIMScheduler.load_config(str(path), subfolder="scheduler")
    return config if isinstance(config, dict) else config[0]


def _pretrained(kind: Any, path: str | os.PathLike[str], part: str, **options: Any) -> Any:
    try:
        options |= {"subfolder": part} if part else {}
        return kind.from_pretrained(str(path), low_cpu_mem_usage=False, **options)
    except Exception as error:  # the library and those under it raise what they like
        where = f"{path}/{part}" if part else str(path)
        raise ValueError(f"{where} is not a whole {kind.__name__}: {reason(error)}") from error
