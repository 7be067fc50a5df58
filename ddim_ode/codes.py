"""Encoded images with everything that decoding them needs, in one object and one file.

A latent by itself says neither by which model, over which noise levels nor by which solver it was made, and half of a
reversible method's state is not in it. A :class:`Code` holds all of that, and is decoded by the solver that made it, back over
the same nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import ddim_ode
from ddim_ode.field import EpsilonField, differences, digest
from ddim_ode.files import replacing
from ddim_ode.grid import Grid
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solution import Solution, Status
from ddim_ode.solvers import Solver
from ddim_ode.solvers.configs import from_config, to_config

__all__ = ["Code", "is_code", "load_code"]

#: The version of the file's layout; readers refuse later ones.
FORMAT = 1
_KEY = "ddim_ode"


@dataclass(frozen=True, eq=False)
class Code:
    r"""Encoded images: latents, and by what they were made.

    Make one from a run by :meth:`of`; ``decode(field, code)`` decodes it.

    Attributes
    ----------
    latent : Tensor
        x_T, (B, \*d), in the state's dtype.
    second : Tensor or None
        The second state, (B, \*d), if the solver keeps two.
    solver : Solver
        What encoded, and will decode.
    grid : Grid
        Its nodes, rising.
    model : dict
        What the field said of itself: :meth:`ddim_ode.EpsilonField.describe`.
    status : tuple of Status
        How each image's encoding ended; one that failed is not decoded to anything that means something.
    version : str
        Of the package that made it.
    """

    latent: Tensor
    second: Tensor | None
    solver: Solver
    grid: Grid
    model: dict[str, Any]
    status: tuple[Status, ...]
    version: str = ""

    def __post_init__(self) -> None:
        if self.solver.paired and self.second is None:
            raise ValueError(
                f"a code of {self.solver.name} needs its second state, but there is none: take the encoding's Solution.second, "
                "or decode the latent alone, with what is lost by it"
            )

    @staticmethod
    def of(field: EpsilonField, run: Solution) -> Code:
        """The code of an encoding run.

        Parameters
        ----------
        field : EpsilonField
            What encoded.
        run : Solution
            What :func:`ddim_ode.encode` returned.

        Raises
        ------
        ValueError
            If the run is no encoding, or was stopped on its way.
        """
        if not run.grid.encoding:
            raise ValueError(f"a code is made of an encoding run, but this one goes down: {run.grid!r}")
        if Status.STOPPED in run.status:
            raise ValueError("a code is made of a whole run, but a callback stopped this one on its way")
        return Code(run.x, run.second, run.method, run.grid, field.describe(), run.status, ddim_ode.__version__)

    def differences(self, field: EpsilonField) -> list[str]:
        """In what `field` is not the model that made this code, in words; what neither of them knows is passed over."""
        return differences(self.model, field.describe())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a ``.safetensors`` or ``.npz`` file, whole or not at all.

        Raises
        ------
        ValueError
            If the ending is another, the file's kind does not hold the latents' dtype, or the solver cannot be written down.
        OSError
            If the file cannot be written.
        """
        path = Path(path)
        about = {
            "format": FORMAT,
            "version": self.version,
            "torch": torch.__version__,
            "dtype": str(self.latent.dtype).removeprefix("torch."),
            "solver": to_config(self.solver),
            "grid": self.grid.name,
            "schedule": _plain(self.grid.schedule.config),
            "model": _plain(self.model),
            "status": [s.name for s in self.status],
        }
        arrays = {"latent": self.latent.detach().cpu().contiguous()}
        if self.second is not None:
            arrays["second"] = self.second.detach().cpu().contiguous()
        arrays["sigmas"] = torch.from_numpy(self.grid.sigmas.copy())
        # A .safetensors file has no checksum of its own.
        text = json.dumps(about | {"sha256": _sum(about, arrays)})
        if path.suffix == ".safetensors":
            with replacing(path) as temporary:
                # Not by save_file: its files are for their owner's eyes alone, and its errors no OSError.
                temporary.write_bytes(save(arrays, {_KEY: text}))
        elif path.suffix == ".npz":
            if self.latent.dtype == torch.bfloat16:
                raise ValueError(
                    f"an .npz file does not hold bfloat16, as the latents are: write {path} as .safetensors"
                )
            with replacing(path) as temporary, open(temporary, "wb") as file:
                parts: dict[str, Any] = {name: x.numpy() for name, x in arrays.items()}
                np.savez(file, **(parts | {_KEY: np.array(text)}))
        else:
            raise ValueError(f"codes are written as .safetensors or .npz, but the file is {path}")


def is_code(path: str | os.PathLike[str]) -> bool:
    """Whether a file calls itself a code, whatever :func:`load_code` may find wrong with it, rather than an array of latents."""
    if Path(path).suffix == ".safetensors":
        return True
    try:
        with open(path, "rb") as opened:
            return _KEY in getattr(np.load(opened, allow_pickle=False), "files", ())
    except (OSError, EOFError, ValueError, BadZipFile, RuntimeError):
        return False


def load_code(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Code:
    """Read what :meth:`Code.save` has written.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is not a code, is cut short or damaged, lacks its second state, or was written by a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no code at {path}: there is no such file")
    about, arrays = _read(path)
    missing = [name for name in ("latent", "sigmas") if name not in arrays]
    if missing:
        raise ValueError(f"{path} is a code without its {' and '.join(missing)}")
    try:
        solver = from_config(about["solver"])
        schedule = NoiseSchedule.from_config(about["schedule"])
        grid = Grid(arrays["sigmas"].numpy(), schedule, about["grid"])
        status = tuple(Status[name] for name in about["status"])
        model, version = dict(about["model"]), str(about["version"])
        if not isinstance(solver, Solver):
            raise ValueError(f"its solver is {solver!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not say how to decode it: {error}") from error
    latent, second = arrays["latent"], arrays.get("second")
    if latent.ndim < 2 or not latent.is_floating_point():
        raise ValueError(f"{path} holds no latents, but {latent.dtype} of shape {tuple(latent.shape)}")
    if second is not None and second.shape != latent.shape:
        raise ValueError(
            f"{path} holds latents of shape {tuple(latent.shape)} with second states of {tuple(second.shape)}"
        )
    if len(status) != len(latent):
        raise ValueError(f"{path} holds {len(latent)} latents but the status of {len(status)} images")
    if solver.paired and second is None:
        raise ValueError(
            f"{path} lacks the second state that {solver.name} keeps, and cannot be decoded exactly without: encode the images "
            "again, or decode its latents alone"
        )
    said = about.pop("sha256", None)
    if said != _sum(about, arrays):
        raise ValueError(f"{path} is damaged: what it holds is not what was written")
    place = lambda x: None if x is None else x.to(device)
    return Code(latent.to(device), place(second), solver, grid, model, status, version)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arrays: dict[str, Tensor] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        else:
            # Opened here: numpy leaves open what it cannot read.
            with open(path, "rb") as opened:
                file = np.load(opened, allow_pickle=False)
                if isinstance(file, np.ndarray):
                    raise ValueError("it is a single array")
                text = str(file[_KEY]) if _KEY in file.files else None
                arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != _KEY}
    except (
        OSError, EOFError, KeyError, TypeError, ValueError, MemoryError, BadZipFile, zlib.error, SafetensorError,
        RuntimeError,  # of zipfile, for what is encrypted or in a way it does not know
    ) as error:  # fmt: skip
        raise ValueError(f"{path} cannot be read as a code: {error}") from error
    if text is None:
        raise ValueError(f"{path} is not a code: it does not say how it was made")
    try:
        about = json.loads(text)
        layout = int(about["format"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a code: what it says of itself cannot be read ({error})") from error
    if layout > FORMAT:
        raise ValueError(
            f"{path} was written by ddim_ode {about.get('version', '?')} in layout {layout}, and this version reads up to "
            f"{FORMAT}: upgrade"
        )
    return about, arrays


def _sum(about: dict[str, Any], arrays: dict[str, Tensor]) -> str:
    return hashlib.sha256((json.dumps(about) + digest(arrays)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, for JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
