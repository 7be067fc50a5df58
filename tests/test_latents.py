"""What one does with latents: attributes, and whether they are draws of N(0, I)."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_ode
from ddim_ode import (
    EpsilonField,
    LatentWarning,
    NoiseSchedule,
    attribute_direction,
    data,
    decode,
    encode,
    gaussianity,
    move_latent,
    noise,
)
from ddim_ode.cli import main
from ddim_ode.models.analytic import MixtureEpsilon
from tests.test_cli import images, model  # noqa: F401

SHAPE = (1, 8, 8)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture():
    """Two kinds of pictures: bright on the left, bright on the right, smooth within."""
    place = torch.arange(8.0, dtype=torch.float64)
    near = torch.exp(-0.5 * (place[:, None] - place).square())
    covariance = 0.02 * torch.kron(near, near) + 1e-3 * torch.eye(64, dtype=torch.float64)
    mean = torch.where(place < 4, 0.5, -0.5).expand(SHAPE)
    return MixtureEpsilon(torch.ones(2), torch.stack([mean, -mean]), torch.stack([covariance, covariance]))


@pytest.fixture(scope="module")
def field(mixture):
    return EpsilonField.from_sigma(mixture, NoiseSchedule.linear(), shape=SHAPE)


def kind(pictures):
    """0 for bright on the left, 1 for bright on the right."""
    return (pictures[..., 4:].mean(dim=(1, 2, 3)) > pictures[..., :4].mean(dim=(1, 2, 3))).long()


# -- are they draws of N(0, I)? -----------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (3, 5), (6, 2, 3, 4), (40, 2)])
def test_expectations_and_standard_errors_are_those_of_draws(shape):
    sets = 1000
    z = [[m.z for m in gaussianity(part).moments] for part in drawn(sets, *shape).unbind()]
    mean, spread = np.mean(z, axis=0), np.std(z, axis=0)
    assert np.abs(mean).max() < 4.5 / math.sqrt(sets)
    assert spread.min() > 0.85
    assert spread.max() < 1.15


def test_draws_are_seldom_called_off():
    for shape, n, allowed in ((SHAPE, 16, 1), ((1, 28, 28), 2, 3), ((3,), 50, 3)):
        off = sum(not gaussianity(noise(shape, n, seed=seed)).ok for seed in range(100))
        assert off <= allowed, (shape, n)


def rescaled(z, by):
    return z * (by / by.square().mean().sqrt())


SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(32).reshape(SHAPE)
DEPARTURES = {
    "too narrow": (lambda z: 0.9 * z, {("all numbers", "norm²/D")}),
    "brighter": (lambda z: z + 0.2, {("all numbers", "mean")}),
    "a mean in common": (
        lambda z: z + 0.4 * SIGNS.roll(1, -2) * SIGNS.mT,
        {("each dimension, over the latents", "mean, squared"), ("pairs of latents", "D cos² of their angle")},
    ),
    "a level of its own": (
        lambda z: z + 0.5 * drawn(64, 1, 1, 1, seed=1).sign(),
        {("each latent, over its dimensions", "mean, squared")},
    ),
    "narrow at the left": (
        lambda z: rescaled(z, torch.linspace(0.5, 1.5, 8, dtype=torch.float64)),
        {("each dimension, over the latents", "(variance − 1)²")},
    ),
    "norms that differ": (
        lambda z: rescaled(z, torch.linspace(0.6, 1.4, 64, dtype=torch.float64).reshape(-1, 1, 1, 1)),
        {("all numbers", "norm²/D, variance"), ("each latent, over its dimensions", "(variance − 1)²")},
    ),
    "skew": (
        lambda z: (z + 0.3 * (z.square() - 1.0)) / math.sqrt(1.18),
        {("each dimension, over the latents", "skewness"), ("each latent, over its dimensions", "skewness")},
    ),
    "skew both ways": (
        lambda z: (z + SIGNS * 0.3 * (z.square() - 1.0)) / math.sqrt(1.18),
        {("each dimension, over the latents", "skewness, squared")},
    ),
    "heavy tails": (
        lambda z: z * drawn(*z.shape, seed=2).abs().add(0.5) / 1.36,
        {
            ("each dimension, over the latents", "excess kurtosis"),
            ("each latent, over its dimensions", "excess kurtosis"),
        },
    ),
    "smooth across": (lambda z: (z + z.roll(1, -1)) / math.sqrt(2.0), {("correlation of neighbours", "across")}),
    "smooth down": (lambda z: (z + z.roll(1, -2)) / math.sqrt(2.0), {("correlation of neighbours", "down")}),
    "alike three apart": (
        lambda z: (z + z.roll(3, -1)) / math.sqrt(2.0),
        {("pairs of latents", "D cos² of their angle")},
    ),
}


@pytest.mark.parametrize("name", DEPARTURES)
def test_each_departure_shows_where_it_should(name):
    change, expected = DEPARTURES[name]
    z = drawn(64, *SHAPE)
    assert gaussianity(z).ok
    off = {(m.over, m.name) for m in gaussianity(change(z)).off}
    assert expected <= off
    if name in ("smooth across", "smooth down", "alike three apart"):
        assert off - expected <= {
            ("pairs of latents", "D cos² of their angle"),
            ("all numbers", "norm²/D, variance"),
            ("each latent, over its dimensions", "(variance − 1)²"),
            ("each latent, over its dimensions", "mean, squared"),
        }
    if name == "skew both ways":
        assert ("each dimension, over the latents", "skewness") not in off


def test_moments_are_scipys():
    z = drawn(7, 3, 4).exp()
    report = gaussianity(z)
    for found, values, axis in ((report.dimension, z.numpy(), 0), (report.image, z.reshape(7, 12).numpy(), 1)):
        np.testing.assert_allclose(found["mean"], values.mean(axis))
        np.testing.assert_allclose(found["variance"], values.var(axis, ddof=1))
        np.testing.assert_allclose(found["skewness"], stats.skew(values, axis))
        np.testing.assert_allclose(found["kurtosis"], stats.kurtosis(values, axis))
    np.testing.assert_allclose(report.norm, (z.numpy() ** 2).mean((1, 2)))
    assert report.correlations is None  # it is no picture
    assert [m.name for m in report.moments if m.over == "correlation of neighbours"] == ["axis 0", "axis 1"]


def test_the_map_of_correlations_points_the_right_way():
    z = drawn(200, *SHAPE)
    z = (z + z.roll((2, -1), (-2, -1))) / math.sqrt(2.0)  # each pixel like that two down and one to the left
    found = gaussianity(z).correlations
    assert found.shape == (9, 9)
    assert float(found[4, 4]) == 1.0
    both = torch.zeros(9, 9, dtype=torch.bool)
    both[4 + 2, 4 - 1] = both[4 - 2, 4 + 1] = both[4, 4] = True
    assert float(found[both].min()) > 0.4
    assert float(found[~both].abs().max()) < 0.1
    assert gaussianity(drawn(2, 3, 1, 5)).correlations.shape == (1, 9)


def test_an_exact_models_latents_pass_and_what_is_not_encoded_fails(field, mixture):
    pictures = mixture.sample(100, torch.Generator().manual_seed(1))
    assert gaussianity(encode(field, pictures, nfe=40, data_range=None).x).ok
    assert not gaussianity(pictures).ok
    half = encode(field, pictures, grid=np.linspace(0.0, 1.0, 21), data_range=None).x
    assert not gaussianity(half).ok
    # As it is beyond the data's own scale, all that is left to find is in what latents share.
    assert {m.name for m in gaussianity(half).off} >= {"norm²/D", "across", "down"}
    # One call makes a latent that decodes, but not the right one.
    assert not gaussianity(encode(field, pictures, nfe=1, solver="ddim", data_range=None).x).ok


def test_a_latent_that_is_not_finite_is_named_and_left_out():
    z = drawn(10, *SHAPE)
    spoilt = z.clone()
    spoilt[3, 0, 2, 2], spoilt[7, 0, 0, 0] = math.nan, math.inf
    report, rest = gaussianity(spoilt), gaussianity(z[[0, 1, 2, 4, 5, 6, 8, 9]])
    assert report.left_out == (3, 7)
    assert report.n == 8
    assert report.moments == rest.moments
    assert "left out, as they are not finite: 3, 7" in str(report)
    many = z.repeat(2, 1, 1, 1)
    many[:19] = math.nan
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 11 more" in str(gaussianity(many))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            (1, 8),
            [
                "variance of each dimension, over the latents: needs 2 latents, there is 1",
                "variance of norm²/D: needs 2",
            ],
        ),
        ((2, 8), ["skewness of each dimension, over the latents: needs 3 latents, there are 2"]),
        ((3, 8), ["kurtosis of each dimension, over the latents: needs 4 latents, there are 3"]),
        (
            (8, 1),
            ["variance of each latent, over its dimensions: needs 2 dimensions, there is 1", "angles between latents"],
        ),
    ],
)
def test_moments_that_need_more_are_said_to(shape, says):
    report = gaussianity(drawn(*shape))
    assert report.ok
    assert all(f"not measured: {line}" in str(report) for line in says)
    assert not report.dimension.keys() & {line.split(" of ")[0] for line in says if "dimension, over" in line}
    assert not gaussianity(drawn(*shape) + 9.0).ok  # what is left still judges


def test_constant_latents_are_no_draws():
    for z in (torch.zeros(5, *SHAPE), torch.ones(5, *SHAPE)):
        assert not gaussianity(z).ok
        json.dumps(gaussianity(z).record())
    z = drawn(20, *SHAPE)
    z[:, :, 0, 0] = 0.0  # a dimension that never changes has no skewness; the others' still counts
    report = gaussianity(z)
    assert math.isfinite(next(m for m in report.moments if m.name == "skewness").found)


def test_the_report_says_what_is_off_and_by_how_much():
    narrow = 0.5 * drawn(64, *SHAPE)
    good, bad = str(gaussianity(2.0 * narrow)), str(gaussianity(narrow))
    assert "they may be draws of N(0, I)" in good
    assert " off\n" not in good
    line = next(line for line in bad.splitlines() if line.strip().startswith("norm²/D  "))
    assert line.split()[1:3] == [f"{float(narrow.square().mean()):.4g}", "1"]
    assert line.endswith("off")
    assert "not draws of N(0, I)" in bad


@pytest.mark.parametrize(
    ("latents", "error", "says"),
    [
        (np.zeros((2, 3)), TypeError, "latents must be a tensor .* but got ndarray"),
        (
            torch.zeros(2, 3, dtype=torch.uint8),
            TypeError,
            "must be floats, but the dtype is torch.uint8: are they images",
        ),
        (torch.zeros(3), ValueError, r"must have shape \(N, \*d\) and hold something, but have shape \(3,\)"),
        (torch.zeros(0, 3), ValueError, "hold something"),
        (torch.full((2, 3), math.nan), ValueError, "at least one that is finite, but all 2 are not"),
    ],
)
def test_what_is_no_set_of_latents_is_refused(latents, error, says):
    with pytest.raises(error, match=says):
        gaussianity(latents)


# -- attributes ---------------------------------------------------------------------------------
def test_the_direction_is_the_difference_of_means():
    z = drawn(6, 2, 3).float()
    labels = [4, 7, 4, 7, 5, 7]
    expected = z[[1, 3, 5]].double().mean(0) - z[[0, 2]].double().mean(0)
    for given in (labels, np.array(labels, dtype=np.uint8), torch.tensor(labels)):
        found = attribute_direction(z, given, of=7, against=4)
        torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(attribute_direction(z, labels, of=4, against=7), -expected.float())
    z[3] = math.nan
    with pytest.warns(LatentWarning, match="latents 3 are not finite: left out"):
        found = attribute_direction(z, labels, of=7, against=4)
    torch.testing.assert_close(found, z[[1, 5]].mean(0) - z[[0, 2]].mean(0))


@pytest.mark.parametrize(
    ("labels", "of", "against", "says"),
    [
        ([0, 1, 0], 1, 0, "there are 3 for 4 latents"),
        ([0, 1, 0, 1], 2, 0, r"of = 2, but no finite latent has that label: there are 0 \(2\), 1 \(2\)"),
        ([0, 1, 0, 1], 1, -3, "against = -3"),
        ([0, 1, 0, 1], 1, 1, "both are 1"),
        ([0.0, 1.0, 0.0, 1.0], 1, 0, "labels must be whole numbers .* dtype float64"),
        ([[0], [1], [0], [1]], 1, 0, r"shape \(4, 1\)"),
        (["a", "b", "a", "b"], 1, 0, "labels must be whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, of, against, says):
    with pytest.raises(ValueError, match=says):
        attribute_direction(drawn(4, 3), labels, of=of, against=against)


def test_a_class_of_latents_that_all_failed_is_refused():
    z = drawn(4, 3)
    z[1] = z[3] = math.nan
    with (
        pytest.warns(LatentWarning),
        pytest.raises(ValueError, match=r"of = 1, but no finite .* 1 \(2\), of which 2 are not finite"),
    ):
        attribute_direction(z, [0, 1, 0, 1], of=1, against=0)


def test_moving_keeps_the_norm():
    z, d = drawn(5, *SHAPE).float(), drawn(*SHAPE, seed=1).float()
    torch.testing.assert_close(move_latent(z, d, 0.0), z)
    for strength in (-2.0, 0.5, 30.0):
        moved = move_latent(z, d, strength)
        assert moved.dtype == z.dtype
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1))
        # It is z + s d but for its length.
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(1), (z + strength * d).flatten(1))
        torch.testing.assert_close(cosine, torch.ones(5))
    assert not move_latent(z[:1], z[0], -1.0).any()  # to the middle, where there is no direction


def test_moving_stays_on_the_device():
    with FakeTensorMode():
        moved = move_latent(torch.empty(2, *SHAPE, device="cuda"), torch.empty(SHAPE, device="cuda"), 1.0)
    assert moved.device.type == "cuda"
    assert moved.shape == (2, *SHAPE)


@pytest.mark.parametrize(
    ("direction", "strength", "says"),
    [
        (torch.zeros(1, *SHAPE), 1.0, r"the shape of one latent, \(1, 8, 8\), but got \(1, 1, 8, 8\)"),
        ([0.0], 1.0, "but got list"),
        (torch.zeros(SHAPE), math.nan, "strength must be a finite number, but got nan"),
        (torch.zeros(SHAPE, device="meta"), 1.0, "direction is on meta, but latent on cpu"),
    ],
)
def test_moves_that_cannot_be_made_are_refused(direction, strength, says):
    with pytest.raises(ValueError, match=says):
        move_latent(drawn(2, *SHAPE), direction, strength)


def test_a_picture_is_moved_to_the_other_kind(field, mixture):
    pictures = mixture.sample(160, torch.Generator().manual_seed(2))
    latents = encode(field, pictures, nfe=30, data_range=None).x
    labels = kind(pictures)
    direction = attribute_direction(latents[:128], labels[:128], of=1, against=0)
    starts = latents[128:][labels[128:] == 0]
    shares = [
        float(kind(decode(field, move_latent(starts, direction, s), nfe=30).x).double().mean()) for s in (0, 1, 2)
    ]
    assert shares[0] == 0.0
    assert shares[2] > 0.9
    assert shares[0] <= shares[1] <= shares[2]
    back = decode(field, move_latent(starts, direction, -2.0), nfe=30).x
    assert not kind(back).any()


# -- at the terminal ----------------------------------------------------------------------------
@pytest.fixture
def labelled(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images=pictures, labels=np.tile([3, 5, 3], 4))
    return str(tmp_path / "labelled.npz")


def test_attribute_writes_before_and_after(model, labelled, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "a"
    arguments = ["attribute", "--model", model, "--images", labelled, "--from", "3", "--to", "5", "--n", "3"]
    arguments += ["--moved", "2", "--strengths", "0,1", "--nfe", "10", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    printed, record = json.loads(capsys.readouterr().out), json.loads((out / "results.json").read_text("utf-8"))
    assert printed["which"] == record["which"] == [0, 2, 3, 1, 4, 7, 5, 6]
    assert record["moved"] == [5, 6]  # had no part in the direction
    assert record["labels"] == [3, 3, 3, 5, 5, 5, 3, 3]
    assert (record["from"], record["to"], record["strengths"], record["nfe"]) == (3, 5, [0.0, 1.0], 20)
    names = {"results.json", "latents.npz", "direction.npz", "moved.npz", "attribute.png"}
    assert {p.name for p in out.iterdir()} == names
    field = ddim_ode.load(model)
    pictures = data.as_tensor(data.read_images(labelled)[record["which"]])
    latents = encode(field, pictures, nfe=10).x
    np.testing.assert_allclose(data.read_array(out / "latents.npz"), latents, atol=1e-5)
    direction = latents[3:6].mean(0) - latents[:3].mean(0)
    np.testing.assert_allclose(data.read_array(out / "direction.npz"), direction, atol=1e-5)
    moved = data.read_array(out / "moved.npz")
    expected = torch.cat([latents[6:], move_latent(latents[6:], direction, 1.0)])
    np.testing.assert_allclose(moved, decode(field, expected, nfe=10).x, atol=1e-4)
    assert main([*arguments, "--moved", "1"]) == 0
    assert "2 samples, 20 model calls" in capsys.readouterr().out


def test_a_sample_that_fails_does_not_spoil_the_direction(labelled, tmp_path, capsys, monkeypatch):
    pictures = data.as_tensor(data.read_images(labelled))
    broken = {2, 6}  # one of those that make the direction, one of those that are moved

    def network(x, t):
        lost = torch.zeros(len(x), dtype=torch.bool)
        for i in broken:
            lost |= (x - pictures[i]).flatten(1).abs().amax(1) < 1e-3
        return torch.where(lost.reshape(-1, 1, 1, 1), math.nan, 0.0 * x)

    made = EpsilonField(network, NoiseSchedule.linear(), shape=SHAPE)
    monkeypatch.setattr("ddim_ode.cli.load", lambda *_, **__: made)
    arguments = ["attribute", "--images", labelled, "--from", "3", "--to", "5", "--n", "3", "--nfe", "4"]
    arguments += ["--strengths", "0,1", "--out", str(tmp_path / "a")]
    assert main([*arguments, "--moved", "2"]) == 1
    assert "encode: non-finite in samples 1, 7" in capsys.readouterr().err
    record = json.loads((tmp_path / "a" / "results.json").read_text("utf-8"))
    assert record["moved"] == [5]
    latents = data.read_array(tmp_path / "a" / "latents.npz")
    assert np.isnan(latents[[1, 7]]).all()
    direction = data.read_array(tmp_path / "a" / "direction.npz")
    np.testing.assert_allclose(direction, latents[3:6].mean(0) - latents[[0, 2]].mean(0))
    broken |= {5}
    assert main([*arguments, "--moved", "2", "--out", str(tmp_path / "b")]) == 2
    assert "none of the 2 images to move could be encoded" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_latents_are_judged(model, images, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "z"
    assert main(["latents", "--model", model, "--images", images, "--nfe", "6", "--out", str(out), "--json"]) == 0
    printed, record = json.loads(capsys.readouterr().out), json.loads((out / "results.json").read_text("utf-8"))
    assert {p.name for p in out.iterdir()} == {"results.json", "latents.npz", "latents.png"}
    assert printed["moments"] == record["moments"]
    assert np.shape(record["dimension"]["mean"]) == (1, 8, 8)
    assert record["encode"]["nfe"] == 6
    again = ["latents", "--latent", str(out / "latents.npz"), "--out", str(tmp_path / "y")]
    assert main(again) == 0
    assert "4 latents of shape (1, 8, 8)" in capsys.readouterr().out
    assert json.loads((tmp_path / "y" / "results.json").read_text("utf-8"))["norm"] == record["norm"]
    for shape in ((1, 1, 8, 8), (9, 5), (2, 3, 1, 4)):  # too few for some moments, no pictures, a single line
        z = drawn(*shape).numpy()
        np.save(tmp_path / "z.npy", z)
        assert main(["latents", "--latent", str(tmp_path / "z.npy"), "--out", str(tmp_path / "x")]) == 0
    z[1] = np.nan
    np.save(tmp_path / "z.npy", z)
    capsys.readouterr()
    assert main(["latents", "--latent", str(tmp_path / "z.npy"), "--out", str(tmp_path / "x")]) == 1
    assert "latents: non-finite in samples 1" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["gif", "webp", "apng"])
def test_paths_go_there_and_back(ending, model, images, tmp_path, capsys):  # noqa: F811
    common = ["interpolate", "--model", model, "--images", images, "--pairs", "2", "--points", "4", "--nfe", "10"]
    assert main([*common, "--out", str(tmp_path / f"p.{ending}")]) == 0
    assert main([*common, "--out", str(tmp_path / "p.npz")]) == 0
    paths = data.to_uint8(torch.from_numpy(data.read_array(tmp_path / "p.npz"))).reshape(2, 4, 8, 8)
    with Image.open(tmp_path / f"p.{ending}") as film:
        assert film.n_frames == 6
        assert film.size == (2 * 9 + 1, 8 + 2)
        for i, point in enumerate((0, 1, 2, 3, 2, 1)):
            film.seek(i)
            frame = np.asarray(film.convert("L"))
            # both pairs, side by side
            np.testing.assert_allclose(frame[1:9, 1:9], paths[0, point], atol=1)
            np.testing.assert_allclose(frame[1:9, 10:18], paths[1, point], atol=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attribute", "--from", "3", "--to", "3"], "--from and --to are both 3"),
        (["attribute", "--from", "3", "--to", "5", "--n", "0"], "--n takes whole numbers"),
        (["attribute", "--from", "3", "--to", "5", "--strengths", "0,x"], "--strengths takes numbers"),
        (["attribute", "--from", "3", "--to", "5", "--strengths", ","], "--strengths takes numbers"),
        (["attribute", "--from", "3", "--to", "5", "--strengths", "nan"], "--strengths takes numbers"),
        (
            ["attribute", "--from", "3", "--to", "5", "--n", "4", "--moved", "5"],
            "--from 3 needs 9 images of that class (4 for the direction, 5 to move), but LABELLED holds 8",
        ),
        (
            ["attribute", "--from", "3", "--to", "4", "--n", "2", "--moved", "1"],
            "holds 0: its classes are 3 (8), 5 (4)",
        ),
        (["attribute", "--from", "3", "--to", "5", "--images", "IMAGES"], "no labels"),
        (["attribute", "--from", "3", "--to", "5", "--n", "2", "--moved", "1", "--nfe", "0"], "does not pay"),
        (["latents", "--latent", "LATENT", "--images", "IMAGES"], "--latent and --images are two things"),
        (["latents", "--latent", "IMAGES"], "is it an image"),
        (["latents", "--latent", "NONE"], "no such file"),
        (["latents", "--latent", "NANS"], "all 2 are not"),
        (["latents", "--images", "IMAGES", "--solver", "abb3"], "did you mean ab3"),
        (["interpolate", "--out", "OUT/a.mp4"], ".gif, .webp, .apng (an animation)"),
        (["sample", "--out", "OUT/a.gif"], "images are written as .png"),
    ],
)
def test_bad_requests_leave_nothing(arguments, says, model, images, labelled, tmp_path, capsys, monkeypatch):  # noqa: F811
    np.save(tmp_path / "latent.npy", drawn(2, *SHAPE).numpy())
    np.save(tmp_path / "nans.npy", np.full((2, 3), np.nan))
    places = {
        "LABELLED": labelled,
        "IMAGES": images,
        "LATENT": str(tmp_path / "latent.npy"),
        "OUT": str(tmp_path / "out"),
    }
    places |= {"NONE": str(tmp_path / "none.npy"), "NANS": str(tmp_path / "nans.npy")}
    there = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "attribute" and "--images" not in arguments:
        arguments = [*arguments, "--images", "LABELLED"]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "OUT/x"]
    for short, place in places.items():
        arguments = [place if a == short else a.replace("OUT/", f"{places['OUT']}/") for a in arguments]
        says = says.replace(short, place)
    assert main([*arguments, "--model", model]) == 2
    assert says in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == there
