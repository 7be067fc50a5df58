r"""Weights that others have released as files: whose they are is told by the names in them.

===================  =============================================================================================
the authors' ddim    ``temb.dense.0``, ``down.0.block.0``, …; a list (network, optimiser, epoch, step, average), or a
                     plain state dictionary, as the converted CIFAR-10 and LSUN files are
improved-, guided-   ``time_embed.0``, ``input_blocks.0.0``, …; a plain state dictionary, average or not by its name
===================  =============================================================================================

They are read with ``weights_only=True``: a file that needs more is refused.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ddim_ode.models.guided import GuidedUNet, read_config
from ddim_ode.models.unet import UNet

__all__ = ["build_released", "fit", "read_state", "reason"]

State = dict[str, Tensor]

# What training code calls the average, and the weights in it where it is kept with its settings.
_AVERAGES = (
    "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_params", "params_ema", "ema_weights",
    "ema_net", "ema_network",
)  # fmt: skip
_INNER = ("shadow", "shadow_params", "state_dict", "ema_model")


def read_state(path: Path, ema: bool | None = None) -> tuple[State, str, list[str]]:
    """The weights in a file, which they are, and what beside them may be an average.

    Parameters
    ----------
    path : Path
        A ``torch.save`` file, or safetensors.
    ema : bool, optional
        Whether to take the moving average, where a file holds both; by default, if it is there.

    Returns
    -------
    state : dict
        Tensors by name, without the prefix that data-parallel training leaves.
    which : str
        ``"average"``, ``"last"``, or ``"unknown"`` for a plain state dictionary.
    unread : list of str
        For the last weights, names in the file that an average may go by, of a form not known here.

    Raises
    ------
    ValueError
        If the file is cut short, needs to run code, or holds no weights or not those asked for.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of an odd pickle is said below
            if path.suffix == ".safetensors":
                loaded: Any = load_file(path)
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise ValueError(
                f"{path} is a pickle that wants to run code when it is read, and is not read: save its weights alone, "
                "torch.save(network.state_dict(), ...)"
            ) from error
        raise ValueError(f"{path} is not a whole weights file: it may be cut short; fetch it again") from error
    except (RuntimeError, EOFError, OSError, SafetensorError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole weights file ({reason(error)}): it may be cut short; fetch it again"
        ) from error
    state, which = _peel(loaded, ema)
    if state is None:
        raise ValueError(f"{path} holds no weights: {_describe(loaded)}")
    if ema is not None and which != "unknown" and (which == "average") != ema:
        raise ValueError(f"{path} holds {'no moving average' if ema else 'the moving average only'}: leave ema= out")
    return state, which, _unread(loaded) if which == "last" and isinstance(loaded, dict) else []


def build_released(state: State, path: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a state dictionary belongs to, with its weights.

    Parameters
    ----------
    state : dict
        From :func:`read_state`.
    path : Path
        For messages.
    **options
        What the weights do not tell: ``resolution`` for the authors' networks; ``heads`` or ``head_channels``,
        ``new_order`` and ``label_scale`` for guided-diffusion's.

    Returns
    -------
    network : Module
        In evaluation mode.
    description : dict
        ``family``, ``channels``, ``classes``, ``multiple``: of which each side of an image must be one, and
        ``guessed``: in words, what was taken for what was not given.

    Raises
    ------
    ValueError
        If the names are nobody's known, or some are missing.
    """
    try:
        guessed = _guess(state, options)
        network, family, classes = _build(state, path, options)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}: it is cut, or a part of a network") from error
    except IndexError as error:
        raise ValueError(
            f"{path} holds a weight of too few dimensions: it is of another network, or damaged"
        ) from error
    except (TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: no network of {options} can be built ({reason(error)})") from error
    fit(network, state, path)
    channels = int(state["conv_in.weight" if family == "ddim" else "input_blocks.0.0.weight"].shape[1])
    levels = len(read_config(state)["multipliers"]) if family == "guided" else 1
    described = {
        "family": family,
        "channels": channels,
        "classes": classes,
        "multiple": 2 ** (levels - 1),
        "guessed": guessed,
    }
    return network.eval().requires_grad_(False), described


def _guess(state: State, options: dict[str, Any]) -> str:
    """What of guided-diffusion's options is not given, and what is taken, in words."""
    taken = []
    if any(key.endswith(".qkv.weight") for key in state):
        if not {"heads", "head_channels"} & options.keys():
            # Their 64-channel heads came with blocks that resample; before that there were four. By the flags in
            # guided-diffusion's README, its ImageNet models of 64, 256 and 512 pixels (4, 6 and 7 levels) have
            # --num_head_channels 64, and that of 128 (--num_channels 256, 5 levels) has --num_heads 4.
            config = read_config(state) if "time_embed.0.weight" in state else {"resample_blocks": False}
            wide = config["resample_blocks"] and (config["width"], config["multipliers"]) != (256, (1, 1, 2, 3, 4))
            options |= {"head_channels": 64} if wide else {"heads": 4}
            taken.append("their attention heads (64 channels each" if wide else "their attention heads (4")
            taken[-1] += " are taken)"
        if "new_order" not in options:
            taken.append("the order of queries, keys and values (the older is taken)")
    if "time_embed.0.weight" in state and "label_scale" not in options:
        taken.append("whether labels are rescaled (they are not)")
    return ", nor ".join(taken)


def _build(state: State, path: Path, options: dict[str, Any]) -> tuple[nn.Module, str, int | None]:
    """The network, its family and its number of classes."""
    if "temb.dense.0.weight" in state and "conv_in.weight" in state:
        return _authors(state, path, options), "ddim", None
    if "time_embed.0.weight" in state and "input_blocks.0.0.weight" in state:
        config = read_config(state)
        return GuidedUNet(**config, **options), "guided", config["classes"]
    known = "the authors' ddim (temb.dense.0…) and improved-/guided-diffusion (time_embed.0…)"
    some = ", ".join(list(state)[:3])
    raise ValueError(
        f"{path} holds weights of a network not known here ({some}, …): known are {known}; wrap yours by hand"
    )


def fit(network: nn.Module, state: State, path: Path) -> None:
    """Load weights that must fit, name for name and shape for shape."""
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        cause = (
            "the file is of another network, or of a part of it" if missing else "the network has parts not known here"
        )
        raise ValueError(f"{path} does not fit: missing {missing[:3]}, unknown {extra[:3]}; likely {cause}")
    odd = [name for name in wanted if wanted[name].shape != state[name].shape]
    if odd:
        name = odd[0]
        raise ValueError(
            f"{path} does not fit: {name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}; likely what is said of the "
            "network (its own description, or heads, resolution, classes) is of another"
        )
    network.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in state.items()})


def _authors(state: State, path: Path, options: dict[str, Any]) -> UNet:
    """The authors' network: everything but the resolution is in the shapes."""
    levels = len({key.split(".")[1] for key in state if key.startswith("down.")})
    blocks = len({key.split(".")[3] for key in state if key.startswith("down.0.block.")})
    first = state["conv_in.weight"]
    width = first.shape[0]
    sizes = [state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state]
    # The networks they released: CIFAR-10 at 32, CelebA at 64, LSUN at 256.
    resolution = options.pop("resolution", {4: 32, 5: 64, 6: 256}.get(levels))
    if options:
        raise ValueError(f"{path} is a network of the authors' ddim, which does not take {', '.join(sorted(options))}")
    if resolution is None:
        raise ValueError(
            f"{path} has {levels} levels, and its weights do not tell the size of its images: give resolution="
        )
    return UNet(
        channels=state["conv_out.weight"].shape[0], resolution=resolution, width=width,
        multipliers=tuple(size // width for size in sizes), blocks=blocks,
        attention=tuple(resolution // 2**i for i in attended), groups=32,
    )  # fmt: skip


def _peel(loaded: Any, ema: bool | None) -> tuple[State | None, str]:
    """The state dictionary inside what training code saved around it."""
    if isinstance(loaded, (list, tuple)):
        # The authors' list: network, optimiser, epoch, step and, if there was one, the average.
        states = [x for x in loaded if _is_state(x)]
        if not states:
            return None, ""
        averaged = len(states) > 1 and ema is not False
        return _bare(states[-1 if averaged else 0]), "average" if averaged else "last"
    if not isinstance(loaded, dict):
        return None, ""
    if _is_state(loaded):
        return _bare(loaded), "unknown"
    for names, which in ((_AVERAGES, "average"), (("model", "state_dict", "net", "params"), "last")):
        for name in names:
            found: Any = _inside(loaded.get(name)) if which == "average" else loaded.get(name)
            if _is_state(found) and (ema is None or (which == "average") == ema):
                return _bare(found), which
    return None, ""


def _inside(average: Any) -> Any:
    """The average itself, where it is kept with its rate of decay and its count of updates."""
    if not isinstance(average, dict) or _is_state(average):
        return average
    return next((x for x in map(average.get, _INNER) if _is_state(x)), None)


def _unread(loaded: dict[Any, Any]) -> list[str]:
    """Keys of what may be an average and is not read."""
    return [
        str(key)
        for key, value in loaded.items()
        if any(word in str(key).lower() for word in ("ema", "average"))
        and isinstance(value, (dict, list, tuple))
        and not (key in _AVERAGES and _is_state(_inside(value)))
    ]


def _is_state(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in x.items())


def _bare(state: State) -> State:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _describe(loaded: Any) -> str:
    if isinstance(loaded, dict):
        return f"a dictionary of {', '.join(map(str, list(loaded)[:5])) or 'nothing'}"
    return f"a {type(loaded).__name__}"


def reason(error: BaseException) -> str:
    """What an error of somebody else's code says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
