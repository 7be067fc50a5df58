"""The usual data sets, found and read in the forms that people have them in."""

import gzip
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from ddim_ode import data, datasets

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 1, 28, 28), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
LABELS = RANDOM.integers(0, 10, 12)


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("DDIM_ODE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_idx(folder, packed):
    folder.mkdir(parents=True)
    for stem, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        for name, content in (
            (f"{stem}-images-idx3-ubyte", idx(GREY[part, 0])),
            (f"{stem}-labels-idx1-ubyte", idx(LABELS[:6][part])),
        ):
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


def cifar_pickle(images, labels):
    return pickle.dumps({b"data": images.reshape(len(images), -1), b"labels": labels.tolist()}, protocol=2)


def write_cifar(folder, form):
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        images, labels = COLOUR[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]
        if form == "pickle":
            (folder / name).write_bytes(cifar_pickle(images, labels))
        else:
            Image.fromarray(images.reshape(2, 3, 1024).transpose(0, 2, 1)).save(folder / f"{name}.png")
    if form == "png":
        (folder / "train_lables.json").write_text(json.dumps(LABELS[:10].tolist()), "utf-8")
        (folder / "test_lables.json").write_text(json.dumps(LABELS[10:].tolist()), "utf-8")


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
@pytest.mark.parametrize(
    ("place", "packed"), [("{own}", True), ("{own}/package/data", False), ("{torchvision}/raw", False)]
)
def test_idx_sets(root, name, place, packed):
    folder = root / place.format(own=name, torchvision={"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
    write_idx(folder, packed)
    train, test = datasets.dataset(name), datasets.dataset(name, "test")
    np.testing.assert_array_equal(train.images, GREY[:4])
    np.testing.assert_array_equal(train.labels, LABELS[:4])
    np.testing.assert_array_equal(test.images, GREY[4:])
    assert train.path == folder
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(("place", "form"), [("cifar-10-batches-py", "pickle"), ("cifar10/package", "png")])
def test_cifar10(root, place, form):
    write_cifar(root / place, form)
    train, test = datasets.dataset("cifar10"), datasets.dataset("cifar10", "test")
    np.testing.assert_array_equal(train.images, COLOUR[:10])
    np.testing.assert_array_equal(train.labels, LABELS[:10])
    np.testing.assert_array_equal(test.images, COLOUR[10:])
    np.testing.assert_array_equal(test.labels, LABELS[10:])


def test_specs(root):
    write_cifar(root / "cifar10", "png")
    np.testing.assert_array_equal(datasets.images("cifar10"), COLOUR[:10])
    np.testing.assert_array_equal(datasets.images("cifar10:test"), COLOUR[10:])
    np.testing.assert_array_equal(datasets.images("cifar10", "test"), COLOUR[10:])
    np.testing.assert_array_equal(datasets.images(root / "cifar10"), COLOUR[:10])
    np.save(root / "own.npy", COLOUR)
    np.testing.assert_array_equal(datasets.images(root / "own.npy"), COLOUR)
    with pytest.raises(ValueError, match="split must be"):
        datasets.images("cifar10:validation")
    with pytest.raises(FileNotFoundError, match="no such file"):
        datasets.images("cifar100")


def test_the_folder_that_holds_a_set_is_looked_into(root):
    write_cifar(root / "torchvision" / "cifar-10-batches-py", "pickle")
    np.testing.assert_array_equal(datasets.images(root / "torchvision", "test"), COLOUR[10:])
    write_idx(root / "torchvision" / "MNIST" / "raw", packed=True)
    with pytest.raises(ValueError, match=r"several data sets: name one, .*MNIST/raw or .*cifar-10-batches-py"):
        datasets.images(root / "torchvision")


def test_what_is_missing_is_told_how_to_get(root):
    for name in datasets.datasets():
        with pytest.raises(FileNotFoundError, match=f"no {name} in .*DDIM_ODE_DATA"):
            datasets.dataset(name)
        assert datasets.find(name) is None
    with pytest.raises(ValueError, match="known are fashion-mnist, mnist, cifar10"):
        datasets.dataset("cifar100")


def test_a_pickle_that_wants_more_than_arrays_is_not_run(root):
    class Evil:
        def __reduce__(self):
            return (open, (str(root / "ran"), "w"))

    write_cifar(root / "cifar10", "pickle")
    (root / "cifar10" / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match=r"test_batch is not a whole CIFAR-10 batch: it asks for .*open"):
        datasets.dataset("cifar10", "test")
    assert not (root / "ran").exists()


def test_files_cut_short(root):
    write_cifar(root / "cifar10", "pickle")
    batch = root / "cifar10" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-100])
    with pytest.raises(ValueError, match="data_batch_3 is not a whole CIFAR-10 batch"):
        datasets.dataset("cifar10")
    write_idx(root / "mnist", packed=False)
    (root / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:3]))
    with pytest.raises(ValueError, match="4 images of mnist but 3 labels"):
        datasets.dataset("mnist")
    (root / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        datasets.dataset("mnist", "test")


def test_images_of_another_size_are_another_set(root):
    write_idx(root / "fashion-mnist", packed=False)
    small = idx(GREY[:, 0, :8, :8])
    (root / "fashion-mnist" / "train-images-idx3-ubyte").write_bytes(small)
    with pytest.raises(ValueError, match=r"does not hold fashion-mnist: its images are \(1, 8, 8\)"):
        datasets.dataset("fashion-mnist")


def test_real_forms_agree_with_the_general_reader(root):
    write_idx(root / "mnist", packed=True)
    np.testing.assert_array_equal(data.read_images(root / "mnist" / "t10k-images-idx3-ubyte.gz"), GREY[4:])


def test_images_with_their_labels(root):
    write_cifar(root / "cifar10", "png")
    for spec, part in (("cifar10:test", slice(10, 12)), (root / "cifar10", slice(0, 10))):
        images, labels = datasets.labelled(spec)
        np.testing.assert_array_equal(images, COLOUR[part])
        np.testing.assert_array_equal(labels, LABELS[part])
    np.savez(root / "own.npz", images=GREY, labels=LABELS[:6].astype(np.uint8))
    images, labels = datasets.labelled(str(root / "own.npz"))
    np.testing.assert_array_equal(images, GREY)
    np.testing.assert_array_equal(labels, LABELS[:6])
    assert labels.dtype == np.int64
    np.savez(root / "unit.npz", images=GREY / 255.0, labels=LABELS[:6])
    assert datasets.labelled(root / "unit.npz", data_range=(0.0, 1.0))[0].min() < 0.0


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": GREY}, "it holds images, and no labels"),
        ({"images": GREY, "labels": LABELS[:5]}, "holds 6 images but 5 labels"),
        (
            {"images": GREY, "labels": LABELS[:6] / 2.0},
            r"must be whole numbers \(N,\), but have shape \(6,\) and dtype float64",
        ),
        ({"images": GREY, "labels": LABELS[:6, None]}, r"whole numbers \(N,\), but have shape \(6, 1\)"),
        ({"images": GREY, "labels": np.array(["a"] * 6)}, "must hold real numbers"),
    ],
)
def test_labels_that_do_not_fit(root, arrays, says):
    np.savez(root / "own.npz", **arrays)
    with pytest.raises(ValueError, match=says):
        datasets.labelled(root / "own.npz")


def test_images_that_come_without_labels(root):
    np.save(root / "own.npy", GREY)
    with pytest.raises(
        ValueError, match=r"images without labels: name one of fashion-mnist, mnist, cifar10, or an .npz"
    ):
        datasets.labelled(root / "own.npy")
    with pytest.raises(FileNotFoundError, match="no such file"):
        datasets.labelled(root / "none.npz")
