"""Reading and writing images."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_ode import data

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 1, 6, 7), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (5, 3, 6, 7), dtype=np.uint8)


def idx(images):
    n, _, height, width = images.shape
    return b"\x00\x00\x08\x03" + b"".join(k.to_bytes(4, "big") for k in (n, height, width)) + images.tobytes()


def test_uint8_survives_the_round_trip():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    unit = data.as_tensor(every)
    assert float(unit.min()) == -1.0
    assert float(unit.max()) == 1.0
    np.testing.assert_array_equal(data.to_uint8(unit), every)
    np.testing.assert_array_equal(data.to_uint8(torch.tensor([[-3.0, 3.0]])), [[0, 255]])


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_pictures_and_folders(tmp_path, images):
    for i, image in enumerate(images):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    np.testing.assert_array_equal(data.read_images(tmp_path), images)
    np.testing.assert_array_equal(data.read_images(tmp_path / "3.png"), images[3:4])


@pytest.mark.parametrize("ending", ["npz", "npy"])
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_arrays(tmp_path, images, ending):
    unit = data.as_tensor(images)
    data.write_images(tmp_path / f"a.{ending}", unit)
    read = data.read_images(tmp_path / f"a.{ending}")
    assert read.dtype == np.float32  # floats stay floats
    np.testing.assert_array_equal(read, unit.numpy())
    assert data.as_tensor(read.astype(np.float64)).dtype == torch.float64
    np.testing.assert_array_equal(data.to_uint8(data.as_tensor(read)), images)
    np.save(tmp_path / "last.npy", images.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(data.read_images(tmp_path / "last.npy"), images)
    np.save(tmp_path / "flat.npy", GREY[:, 0])
    np.testing.assert_array_equal(data.read_images(tmp_path / "flat.npy"), GREY)
    assert not list(tmp_path.glob(".*"))


def test_sixteen_bit_pictures(tmp_path):
    ramp = np.array([[0, 257 * 10], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(data.read_images(tmp_path / "deep.png")[0, 0], [[0, 10], [200, 255]])


def test_idx_files(tmp_path):
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(GREY))
    (tmp_path / "b-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY)))
    np.testing.assert_array_equal(data.read_images(tmp_path / "a-images-idx3-ubyte"), GREY)
    np.testing.assert_array_equal(data.read_images(tmp_path / "b-images-idx3-ubyte.gz"), GREY)


def test_sheets(tmp_path):
    data.write_images(tmp_path / "s.png", data.as_tensor(GREY), columns=2)
    with Image.open(tmp_path / "s.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (3 * 7 + 1, 2 * 8 + 1)
    np.testing.assert_array_equal(sheet[8:14, 9:16], GREY[3, 0])


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_what_is_written_as_png_comes_back(tmp_path, images):
    data.write_images(tmp_path / "one.png", data.as_tensor(images[:1]))
    one = data.read_images(tmp_path / "one.png")
    assert one.flags.writeable  # else torch warns
    np.testing.assert_array_equal(one, images[:1])
    folder = tmp_path / "folder"
    folder.mkdir()
    data.write_images(folder, data.as_tensor(images))
    assert sorted(p.name for p in folder.iterdir()) == [f"0000{i}.png" for i in range(5)]
    np.testing.assert_array_equal(data.read_images(folder), images)
    assert data.picture_names(100_001)[9:11] == ["000009.png", "000010.png"]  # still in order


def test_a_folder_of_pictures_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def full_disk(picture, *arguments, **options):
        saved.append(picture)
        save(picture, *arguments, **options)
        if len(saved) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        data.write_images(tmp_path, data.as_tensor(GREY))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "becomes"), [(np.longdouble, "=f8"), (">f8", "=f8"), (">f4", "=f4"), (">f2", "=f2")])
def test_arrays_come_in_a_dtype_that_torch_has(tmp_path, dtype, becomes):
    floats = np.linspace(-1.0, 1.0, 16).reshape(1, 1, 4, 4)
    np.save(tmp_path / "a.npy", floats.astype(dtype))
    read = data.read_array(tmp_path / "a.npy")
    assert read.dtype == np.dtype(becomes)
    assert data.as_tensor(data.read_images(tmp_path / "a.npy")).shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(read, floats.astype(becomes))


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1j]), np.array([None]), np.zeros(1, "M8[s]")])
def test_what_is_no_number_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy (must hold real numbers|cannot be read as an array: Object arrays)"):
        data.read_array(tmp_path / "a.npy")


def test_bundled_images():
    images = data.bundled_images()
    assert images.shape == (64, 1, 28, 28)
    assert images.dtype == np.uint8


def test_bad_files_are_refused(tmp_path):
    def refused(name, content, says):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            data.read_images(tmp_path / name)

    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read_images(tmp_path / "none.png")
    refused("cut.png", b"\x89PNG\r\n\x1a\n123", "not a whole picture")
    refused("cut-ubyte", idx(GREY)[:-3], "cut short")
    refused("cut-ubyte.gz", gzip.compress(idx(GREY))[:-9], "not a whole gzip")
    refused("labels-ubyte", b"\x00\x00\x08\x01\x00\x00\x00\x01a", "not an idx file of uint8 images")
    np.savez(tmp_path / "whole.npz", images=GREY)
    refused("cut.npz", (tmp_path / "whole.npz").read_bytes()[:-40], "cannot be read as an array")
    np.savez(tmp_path / "two.npz", a=GREY, b=GREY)
    with pytest.raises(ValueError, match="several arrays"):
        data.read_images(tmp_path / "two.npz")
    for name, array, says in (
        ("range", GREY.astype(np.float32), r"floats in \[-1, 1\], but they span"),
        ("dtype", GREY.astype(np.int64), "int64"),
        ("shape", GREY[0, 0], "shape"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=says):
            data.read_images(tmp_path / f"{name}.npy")
    np.save(tmp_path / "unit.npy", GREY / 255.0)
    with pytest.raises(ValueError, match=r"as of images in \[0, 1\]: give data_range"):
        data.read_images(tmp_path / "unit.npy")
    with pytest.raises(ValueError, match="once scaled"):
        data.read_images(tmp_path / "unit.npy", (0.0, 0.5))
    with pytest.raises(ValueError, match="two numbers that rise"):
        data.read_images(tmp_path / "unit.npy", (1.0, 0.0))
    np.testing.assert_allclose(data.read_images(tmp_path / "unit.npy", (0.0, 1.0)), GREY / 127.5 - 1.0, atol=1e-12)
    np.testing.assert_allclose(data.read_images(tmp_path / "unit.npy", (-1.0, 1.0)), GREY / 255.0)
    for mode, array in (("F", GREY[0, 0] / 255.0), ("I", GREY[0, 0].astype(np.int32))):
        Image.fromarray(array.astype(np.float32) if mode == "F" else array).save(tmp_path / f"{mode}.tiff")
        with pytest.raises(ValueError, match="whose range it does not say"):
            data.read_images(tmp_path / f"{mode}.tiff")
    refused("bad-ubyte.gz", gzip.compress(idx(GREY))[:20] + b"garbage" * 20, "not a whole gzip")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4)))
    with pytest.raises(ValueError, match="no images"):
        data.read_images(tmp_path / "none.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture files"):
        data.read_images(tmp_path / "empty")


def test_bad_outputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"use \.png"):
        data.write_images(tmp_path / "a.jpg", torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="1 or 3"):
        data.write_images(tmp_path / "a.png", torch.zeros(1, 2, 2, 2))
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(OSError, match="directory"):
        data.write_array(tmp_path / "a.npz", torch.zeros(1, 1, 2, 2), "latent")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("ending", data.ANIMATIONS)
@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_animations(tmp_path, images, ending):
    frames = data.as_tensor(images[:4]).unflatten(0, (2, 2)).repeat_interleave(2, dim=0)  # each twice
    data.write_animation(tmp_path / f"a{ending}", frames, columns=2, milliseconds=50)
    with Image.open(tmp_path / f"a{ending}") as film:
        shown = []
        for i in range(film.n_frames):
            film.seek(i)
            film.load()  # WebP says how long a frame stays only then
            shown += [np.asarray(film.convert("RGB"))] * round(film.info["duration"] / 50)
    assert len(shown) == 4
    # A GIF rounds colours to 256 of them: here there are fewer.
    for i, frame in enumerate(shown):
        for j in range(2):
            image = np.broadcast_to(images[2 * (i // 2) + j], (3, 6, 7)).transpose(1, 2, 0)
            np.testing.assert_array_equal(frame[1:7, 1 + 8 * j : 8 + 8 * j], image)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{ending}"]


def test_animations_are_whole_or_absent(tmp_path, monkeypatch):
    frames = data.as_tensor(GREY[:4]).unflatten(0, (2, 2))
    for bad in (frames[0], frames[:0], frames.repeat(1, 1, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"an animation needs frames \(T, N, 1 or 3, H, W\)"):
            data.write_animation(tmp_path / "a.gif", bad)
    with pytest.raises(ValueError, match=r"cannot write a.mp4: animations are written here as .gif"):
        data.write_animation(tmp_path / "a.mp4", frames)
    monkeypatch.delitem(Image.SAVE_ALL, "WEBP")  # a Pillow that was built without
    with pytest.raises(ValueError, match=r"cannot write a.webp: animations are written here as .gif, .apng"):
        data.write_animation(tmp_path / "a.webp", frames)

    def half(image, file, name):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(Image.SAVE_ALL, "GIF", half)
    with pytest.raises(OSError, match="disk full"):
        data.write_animation(tmp_path / "a.gif", frames)
    assert list(tmp_path.iterdir()) == []


def test_an_array_by_its_name(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.arange(5))
    np.testing.assert_array_equal(data.read_array(tmp_path / "a.npz"), GREY)
    np.testing.assert_array_equal(data.read_array(tmp_path / "a.npz", "labels"), np.arange(5))
    with pytest.raises(ValueError, match="it holds images, labels, and no weights"):
        data.read_array(tmp_path / "a.npz", "weights")
