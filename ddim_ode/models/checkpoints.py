"""Weights on disk: this package's own, one safetensors file that says what it is, and the way to everyone else's."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddim_ode.field import EpsilonField
from ddim_ode.files import replacing
from ddim_ode.models.pipelines import Declared, classes_tensor, load_folder, sample_shape
from ddim_ode.models.released import build_released, fit, read_state
from ddim_ode.models.unet import GaussianResidual, UNet
from ddim_ode.schedule import NoiseSchedule, whole

__all__ = ["bundled", "load", "save_model"]

_BUNDLED = Path(__file__).parent / "bundled"
_KEY = "ddim_ode"


def bundled() -> tuple[str, ...]:
    """Names of the networks that come with the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.safetensors")))


def load(
    model: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    schedule: NoiseSchedule | None = None,
    prediction: str | None = None,
    class_labels: Any = None,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    shape: tuple[int, int, int] | None = None,
    ema: bool | None = None,
    network: dict[str, Any] | None = None,
    **options: Any,
) -> EpsilonField:
    """The field of a model: bundled, trained here, or in one of the forms that others' models come in.

    Parameters
    ----------
    model : str or path
        - a name from :func:`bundled`, such as ``"fashion-mnist"``;
        - a ``.safetensors`` file that ``ddim-ode train`` wrote;
        - a diffusers folder, a pipeline's or a bare network's, or its name on the hub, such as ``"google/ddpm-cifar10-32"``;
        - weights of the authors' ddim, or of improved- or guided-diffusion (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``).
    device : device
        Where the network goes.
    schedule, prediction
        What the model was trained with, in place of what its folder says. Weights alone do not say: the paper's
        schedule and ε are taken if not given.
    class_labels : int or sequence of int, optional
        Classes for a class-conditional network: one for all samples, or one a sample.
    prompt, negative_prompt : str or list of str, optional
        Texts for a text-to-image pipeline: one for all samples, or one a sample.
    shape : tuple of int, optional
        (C, H, W) of a sample, where a diffusers folder does not say it or for another size than it says; for weights
        of improved- or guided-diffusion, which need not be square.
    ema : bool, optional
        Whether to take the moving average of the weights from a file that holds both; by default, if it is there.
    network : dict, optional
        What weights do not tell of their network: ``resolution``; ``heads``, ``head_channels``, ``new_order`` and
        ``label_scale`` (guided-diffusion's: :class:`ddim_ode.models.guided.GuidedUNet`).
    **options
        As for :class:`EpsilonField`: ``label``, ``guidance_scale``, ``autocast``, ``channels_last``, ``compile``.

    Returns
    -------
    EpsilonField
        With its schedule and sample shape; its ``.notes`` say what was assumed or is done otherwise.

    Raises
    ------
    FileNotFoundError
        If there is no such name, file or folder.
    ValueError
        If it is cut short, is nobody's known, or cannot be solved as eq. 14.

    Warns
    -----
    ModelWarning
        Where a folder asks for something that is done otherwise here.
    """
    path = Path(model)
    declared = Declared(schedule, prediction, class_labels, prompt, negative_prompt, shape)
    if ema is not None and not isinstance(ema, bool):
        raise ValueError(f"ema must be true or false, but got {ema!r}")
    if network is not None and not isinstance(network, dict):
        raise ValueError(f'network must be a dictionary, such as {{"resolution": 64}}, but got {network!r}')
    if str(model) in bundled():
        path = _BUNDLED / f"{model}.safetensors"
    elif path.is_dir() or (not path.exists() and _may_be_on_the_hub(model)):
        if network is not None or ema is not None:
            raise ValueError("network and ema belong to weights in a file; a folder says what it is")
        return load_folder(path if path.is_dir() else str(model), declared, device=device, **options)
    elif not path.is_file():
        raise FileNotFoundError(
            f"no model {str(model)!r}: it is neither a file, a folder, nor a bundled network ({', '.join(bundled()) or 'none'})"
        )
    if prompt is not None or negative_prompt is not None:
        raise ValueError(f"{path} knows no texts: prompt belongs to a text-to-image pipeline's folder")
    if path.suffix == ".safetensors" and _is_ours(path):
        unused = [k for k, v in (vars(declared) | {"ema": ema, "network": network}).items() if v is not None]
        if unused:
            raise ValueError(f"{path} says itself what it is: leave {', '.join(unused)} out")
        own, made, size = _read(path)
        return EpsilonField(own.to(device), made, shape=size, **options)
    return _released(path, device, declared, ema, dict(network or {}), options)


def _released(
    path: Path,
    device: str | torch.device,
    declared: Declared,
    ema: bool | None,
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> EpsilonField:
    state, which, unread = read_state(path, ema)
    shape, resolution = declared.shape, arguments.get("resolution")
    if shape is not None and resolution is not None:
        raise ValueError("give shape or the resolution in network, not both")
    if resolution is not None:
        arguments["resolution"] = resolution = whole(resolution, "resolution")
    if "input_blocks.0.0.weight" in state:
        arguments.pop("resolution", None)
    network, description = build_released(state, path, **arguments)
    channels = description["channels"]
    if description["family"] == "ddim":
        if shape is not None:
            raise ValueError(f'{path} takes square images: give network={{"resolution": …}} in place of shape')
    elif shape is not None or resolution is not None:
        shape = sample_shape(shape or (channels, resolution, resolution), channels, description["multiple"], str(path))
    classes, labels = description["classes"], declared.class_labels
    if (classes is None) != (labels is None):
        needs = (
            "knows no classes: leave class_labels out"
            if classes is None
            else "is class-conditional: give class_labels="
        )
        raise ValueError(f"{path} {needs}")
    condition = None if labels is None else classes_tensor(labels, classes, device)
    schedule, prediction = declared.schedule, declared.prediction
    notes = [{"average": "the moving average of the weights, of a file that holds both", "last": "the last weights, no average",
              "unknown": "weights that do not say whether they are an average: sampling wants the average"}[which]]  # fmt: skip
    if unread:
        keys = ", ".join(map(repr, unread))
        notes = [f"the last weights; the file also holds {keys}, which is not of a form known here"]
    if schedule is None:
        notes.append("weights do not say their schedule: the paper's is taken, give schedule= for another")
    if prediction is None:
        notes.append("weights do not say what they predict: ε is taken, give prediction= for another")
    if description["guessed"]:
        notes.append(f"weights do not say {description['guessed']}: give network= for another, docs/models.md")
    field = EpsilonField(
        network.to(device), schedule or NoiseSchedule.linear(), prediction or "epsilon", shape=shape,
        condition=condition, **options,
    )  # fmt: skip
    field.notes = tuple(notes)
    return field


def _may_be_on_the_hub(model: str | os.PathLike[str]) -> bool:
    files = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".npz", ".safetensors")
    return isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.endswith(files)


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True  # cut short: reading it whole says so


def build(description: dict[str, Any]) -> nn.Module:
    """The network, without weights, of a description: ``network`` (the U-Net's config), ``schedule``, ``residual``."""
    config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["network"].items()}
    network = UNet(**config)
    if description.get("residual") is None:
        return network
    schedule = NoiseSchedule.from_config(description["schedule"])
    shape, rank = description["shape"], description["residual"]["rank"]
    empty = torch.zeros(shape), torch.ones(rank), torch.zeros(math.prod(shape), rank)
    return GaussianResidual(network, schedule, *empty, rest=description["residual"]["rest"])


def save_model(path: str | os.PathLike[str], network: nn.Module, description: dict[str, Any]) -> None:
    """Write weights (matrices and convolutions in float16) and what they are to one safetensors file.

    Parameters
    ----------
    path : path
        Where to.
    network : Module
        A network that :func:`build` makes from `description`.
    description : dict
        Plain data: ``shape``, ``network``, ``schedule``, ``residual``, and anything worth keeping, such as ``training``.
    """
    parameters = {name for name, _ in network.named_parameters()}
    tensors = {
        # Vectors and the mean image weigh nothing and are kept whole.
        name: (tensor.to(torch.float16) if name in parameters or tensor.ndim == 2 else tensor).cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata={_KEY: json.dumps({"format": 1, **description})})
        temporary.chmod(mode)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a weights file says of itself, without loading it."""
    return _open(Path(path))[1]


def _read(path: Path) -> tuple[nn.Module, NoiseSchedule, tuple[int, ...]]:
    tensors, description = _open(path)
    try:
        network, schedule = build(description), NoiseSchedule.from_config(description["schedule"])
        shape = tuple(map(int, description["shape"]))
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a network this version can build: {error!r}") from error
    fit(network, tensors, path)
    return network.eval().requires_grad_(False), schedule, shape


def _open(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it may be cut short; fetch it again"
        ) from error
    if _KEY not in metadata:
        raise ValueError(
            f"{path} holds weights that this package did not write: it has no {_KEY!r} entry in its metadata"
        )
    try:
        description = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} does not say what it holds: its metadata is not JSON ({error})") from error
    if description.get("format") != 1:
        raise ValueError(
            f"{path} has format {description.get('format')!r}, and this version reads format 1: update ddim_ode"
        )
    return tensors, description
