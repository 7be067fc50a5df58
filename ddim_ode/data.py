"""Images on disk: what the command line and the benchmarks read and write.

Inside, images are uint8 (N, C, H, W) until a batch is made of them; outside they are floats in [−1, 1]. Images that
come as floats, as decoded ones do, stay floats: rounding them would be a loss that nobody asked for.
"""

from __future__ import annotations

import gzip
import os
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddim_ode.files import replacing

__all__ = [
    "ANIMATIONS",
    "as_tensor",
    "bundled_images",
    "picture_names",
    "pictures",
    "read_array",
    "read_idx",
    "read_images",
    "read_picture",
    "to_uint8",
    "write_animation",
    "write_array",
    "write_images",
]

Uint8 = NDArray[np.uint8]
Images = NDArray[Any]  # uint8, or floats in [−1, 1]

#: Endings of animations, and what Pillow calls the format.
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG"}


def as_tensor(images: Images, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images 0…255 (uint8) as a tensor in [−1, 1]; floats in [−1, 1] become a tensor as they are, in their own dtype."""
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.to(dtype) / 127.5 - 1.0 if tensor.dtype == torch.uint8 else tensor


def to_uint8(images: Tensor) -> Uint8:
    """Images in [−1, 1] as 0…255, rounded; what lies outside is clipped."""
    return ((images.detach().to("cpu", torch.float64).clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).numpy()


def bundled_images() -> Uint8:
    """The first 64 test images of Fashion-MNIST, which come with the package: uint8 (64, 1, 28, 28)."""
    return read_images(Path(__file__).parent / "models" / "bundled" / "fashion-mnist-test-64.npz")


def read_images(path: str | os.PathLike[str], data_range: tuple[float, float] | None = None) -> Images:
    """Images from a file or folder, (N, C, H, W): uint8, or floats in [−1, 1] from an array that holds floats.

    Parameters
    ----------
    path : path
        A PNG (or other picture file), a folder of them, an ``.npy`` or ``.npz`` array, or an idx file
        (MNIST's format, gzipped or not). Arrays are uint8 or floats in [−1, 1], of shape (N, H, W),
        (N, C, H, W) or (N, H, W, C) with 1 or 3 channels. An ``.npz`` holds them under ``images``, ``x`` or
        as its only array.
    data_range : (float, float), optional
        The range that an array of floats spans, to be scaled to [−1, 1]. By default that is what it spans already, and
        floats that look like [0, 1] are refused.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is not images, is cut short, or has values out of range.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: there is no such file or folder")
    if path.is_dir():
        images = [read_picture(p) for p in pictures(path)]
        if not images:
            raise ValueError(f"{path} holds no picture files")
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(
                f"the pictures in {path} differ in shape ({', '.join(map(str, sorted(shapes)))}): make them equal"
            )
        return np.stack(images)
    if "-ubyte" in path.name or path.suffix == ".idx":
        return read_idx(path, 3)[:, None]
    if path.suffix in (".npy", ".npz"):
        return _as_images(read_array(path), path, data_range)
    return read_picture(path)[None]


def pictures(folder: Path) -> list[Path]:
    """The picture files in a folder, in the order of their names."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in Image.registered_extensions())


def picture_names(n: int) -> list[str]:
    """What the files of `n` images in a folder are called: their order is that of the images."""
    width = max(5, len(str(n - 1)))
    return [f"{i:0{width}}.png" for i in range(n)]


def read_array(path: str | os.PathLike[str], name: str | None = None) -> NDArray[Any]:
    """The array of an ``.npy`` file, or of an ``.npz`` (named `name`; by default ``images``, ``latent``, ``x``, or the only one).

    It comes in a dtype that torch has too: native byte order, no float longer than float64.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is not an array of real numbers, or is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no arrays at {path}: there is no such file")
    try:
        with open(path, "rb") as file:
            array = _array(np.load(file, allow_pickle=False), name)
    except (OSError, EOFError, KeyError, ValueError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path} must hold real numbers, but its dtype is {array.dtype}")
    long = array.dtype.kind == "f" and array.dtype.itemsize > 8
    return array.astype(np.float64 if long else array.dtype.newbyteorder("="), copy=False)


def _array(loaded: Any, wanted: str | None) -> NDArray[Any]:
    if isinstance(loaded, np.ndarray):
        return loaded
    if wanted is not None:
        if wanted not in loaded:
            raise ValueError(f"it holds {', '.join(loaded.files) or 'nothing'}, and no {wanted}")
        return loaded[wanted]
    for name in ("images", "latent", "x"):
        if name in loaded:
            return loaded[name]
    if len(loaded.files) == 1:
        return loaded[loaded.files[0]]
    raise ValueError(f"it holds several arrays ({', '.join(loaded.files)}) and none is called images, latent or x")


def write_images(path: str | os.PathLike[str], images: Tensor, columns: int | None = None) -> None:
    """Write images (N, C, H, W) in [−1, 1]: a sheet as ``.png``, a PNG each into a folder, else an array.

    Parameters
    ----------
    path : path
        A folder that exists gets the files :func:`picture_names`, all of them or none; else the ending decides:
        ``.png``, ``.npz`` or ``.npy``. Arrays keep the floats, under ``images``.
    images : Tensor
        (N, C, H, W) with 1 or 3 channels for PNGs; any shape for arrays.
    columns : int, optional
        Images a row of a sheet; by default as square as it goes.
    """
    path = Path(path)
    if path.suffix == ".png" or path.is_dir():
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"a PNG needs images (N, 1 or 3, H, W), but these have shape {tuple(images.shape)}; write .npz"
            )
        whole = to_uint8(images)
        each = {path / name: whole[i : i + 1] for i, name in enumerate(picture_names(len(whole)))}
        with ExitStack() as stack:
            for file, part in (each if path.is_dir() else {path: whole}).items():
                Image.fromarray(sheet(part, columns)).save(stack.enter_context(replacing(file)), format="PNG")
    else:
        write_array(path, images, "images")


def write_animation(
    path: str | os.PathLike[str], frames: Tensor, columns: int | None = None, *, milliseconds: int = 80
) -> None:
    """Write frames (T, N, C, H, W) in [−1, 1] as one animation without end, each frame a sheet of its N images.

    Parameters
    ----------
    path : path
        The ending decides: ``.gif``, ``.webp`` (lossless) or ``.apng``. A GIF has 256 colours a frame, which holds grey
        images and rounds coloured ones.
    frames : Tensor
        (T, N, 1 or 3, H, W), T and N at least 1.
    columns : int, optional
        Images a row of each sheet; by default as square as it goes.
    milliseconds : int
        How long a frame stays. Neighbours that are alike become one that stays as long as both.

    Raises
    ------
    ValueError
        If `frames` has another shape, or the ending is not known to this machine's Pillow.
    """
    path = Path(path)
    check_animation(path)
    if frames.ndim != 5 or frames.shape[2] not in (1, 3) or frames.numel() == 0:
        raise ValueError(f"an animation needs frames (T, N, 1 or 3, H, W), but these have shape {tuple(frames.shape)}")
    first, *rest = (Image.fromarray(sheet(to_uint8(frame), columns)) for frame in frames)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    with replacing(path) as temporary:
        first.save(
            temporary,
            ANIMATIONS[path.suffix],
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            **lossless,
        )


def check_animation(path: Path) -> None:
    """Refuse an animation that this machine's Pillow cannot write, by its ending."""
    Image.init()
    able = [ending for ending, form in ANIMATIONS.items() if form in Image.SAVE_ALL]
    if path.suffix not in able:
        raise ValueError(f"cannot write {path.name}: animations are written here as {', '.join(able)}")


def write_array(path: str | os.PathLike[str], tensor: Tensor, name: str) -> None:
    """Write a tensor as an ``.npz``, under `name`, or as an ``.npy``."""
    path = Path(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"cannot write {path.name}: use .png (images only), .npz or .npy")
    array = tensor.detach().cpu().numpy()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npz":
            named: dict[str, Any] = {name: array}
            np.savez(file, **named)
        else:
            np.save(file, array)


def sheet(images: Uint8, columns: int | None = None, gap: int = 1) -> Uint8:
    """Tile uint8 images (N, C, H, W) into one picture (H', W') or (H', W', 3), white between them; one stays as it is."""
    n, channels, height, width = images.shape
    if n == 1:
        columns, gap = 1, 0
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return canvas[..., 0] if channels == 1 else canvas


def read_picture(path: Path) -> Uint8:
    """One picture file as uint8 (C, H, W), with 1 channel or 3."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;"):  # 16 bits a pixel
                return (np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8)[None]
            if image.mode in ("I", "F"):  # 16-bit PNGs come so too, from some versions of Pillow
                if image.format != "PNG":
                    raise ValueError(
                        f"{path} holds {'floats' if image.mode == 'F' else '32-bit numbers'}, whose range it does not say: store "
                        "8 or 16 bits, or an .npy"
                    )
                return (np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8)[None]
            grey = image.mode in ("1", "L", "LA")
            array = np.array(image.convert("L" if grey else "RGB"))  # a copy is writable, as torch wants it
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a whole picture file: {error}") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def read_idx(path: Path, ndim: int) -> Uint8:
    """The array of an idx file of bytes, gzipped or not: `ndim` is 3 for images (N, H, W), 1 for labels (N,)."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 + 4 * ndim or raw[:3] != b"\x00\x00\x08" or raw[3] != ndim:
        what = {3: "images", 1: "labels"}[ndim]
        raise ValueError(f"{path} is not an idx file of uint8 {what}: its header is {raw[:4]!r}")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    start, size = 4 + 4 * ndim, int(np.prod(shape))
    if len(raw) != start + size:
        wanted = "x".join(map(str, shape))
        raise ValueError(f"{path} says {wanted} bytes but holds {len(raw) - start}: it is cut short")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it


def _as_images(array: NDArray[Any], path: Path, data_range: tuple[float, float] | None) -> Images:
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4:
        raise ValueError(
            f"{path} must hold images (N, H, W), (N, C, H, W) or (N, H, W, C), but its shape is {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"{path} holds no images: its shape is {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} must hold uint8, or floats in [-1, 1], but its dtype is {array.dtype}")
    if data_range is not None:
        low, high = data_range
        if not low < high:
            raise ValueError(f"data_range must be two numbers that rise, such as (0, 1), but got {data_range!r}")
        array = (array - low) * (2.0 / (high - low)) - 1.0
    # An image that holds NaN fails by itself, where it is used; its neighbours are judged.
    good = array[np.isfinite(array).reshape(len(array), -1).all(axis=1)]
    if not len(good):
        raise ValueError(f"{path} must hold floats in [-1, 1], but every image in it holds NaN or infinity")
    if not np.abs(good).max() <= 1.0 + 1e-3:
        raise ValueError(
            f"{path} must hold floats in [-1, 1], but they span {good.min():.4g}…{good.max():.4g}"
            f"{'' if data_range is None else ' once scaled'}: clip or scale them, or give data_range"
        )
    if data_range is None and good.min() >= 0.0 and good.max() > 0.0:
        raise ValueError(
            f"{path} must hold floats in [-1, 1], but they span {good.min():.4g}…{good.max():.4g}, as of images in [0, 1]: give "
            "data_range (--data-range 0,1, or -1,1 if they are light images in truth)"
        )
    return array
