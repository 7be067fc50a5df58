"""Weights on disk: one safetensors file that says what it is, and the bundled networks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ddim_ode.field import EpsilonField
from ddim_ode.files import replacing
from ddim_ode.models.unet import GaussianResidual, UNet
from ddim_ode.schedule import NoiseSchedule

__all__ = ["bundled", "load", "save_model"]

_BUNDLED = Path(__file__).parent / "bundled"
_KEY = "ddim_ode"


def bundled() -> tuple[str, ...]:
    """Names of the networks that come with the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.safetensors")))


def load(model: str | os.PathLike[str], *, device: str | torch.device = "cpu", **options: Any) -> EpsilonField:
    """The field of a bundled network, or of a weights file that ``ddim-ode train`` wrote.

    Parameters
    ----------
    model : str or path
        A name from :func:`bundled`, such as ``"fashion-mnist"``, or a ``.safetensors`` file.
    device : device
        Where the network goes.
    **options
        As for :class:`EpsilonField`: ``label``, ``autocast``, ``channels_last``, ``compile``.

    Returns
    -------
    EpsilonField
        With its schedule and sample shape; weights in float32.

    Raises
    ------
    FileNotFoundError
        If there is no such name or file.
    ValueError
        If the file is cut short, or was not written by this package.
    """
    path = Path(model)
    if str(model) in bundled():
        path = _BUNDLED / f"{model}.safetensors"
    elif not path.is_file():
        raise FileNotFoundError(
            f"no model {str(model)!r}: it is neither a file nor a bundled network ({', '.join(bundled()) or 'none'})"
        )
    network, schedule, shape = _read(path)
    return EpsilonField(network.to(device), schedule, shape=shape, **options)


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
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"{path} does not fit the network it describes: missing {missing[:3]}, unknown {extra[:3]}")
    odd = [name for name, tensor in tensors.items() if tensor.shape != wanted[name].shape]
    if odd:
        raise ValueError(f"{path} does not fit the network it describes: other shapes in {odd[:3]}")
    network.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
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
