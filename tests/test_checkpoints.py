"""Weights files, the bundled network, and comparisons made with it."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ddim_ode
from ddim_ode import data
from ddim_ode.comparison import Reference, compare, reference
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.models.checkpoints import build, describe, save_model
from ddim_ode.plotting import error_figure, round_trip_figure, save_figure, sheet_figure
from ddim_ode.solvers.runge_kutta import DOPRI5

SMALL = {
    "shape": [1, 8, 8],
    "schedule": {"kind": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02},
    "residual": {"rank": 5, "rest": 0.1},
    "network": {
        "channels": 1,
        "resolution": 8,
        "width": 8,
        "multipliers": [1, 2],
        "attention": [4],
        "groups": 4,
        "in_channels": 2,
    },
}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = build(SMALL)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    network.mean.copy_(torch.linspace(-0.5, 0.5, 64).reshape(1, 8, 8))
    network.basis.copy_(torch.linalg.qr(torch.randn(64, 5)).Q)
    save_model(tmp_path / "m.safetensors", network, SMALL | {"training": {"step": 7}})
    return tmp_path / "m.safetensors", network


def test_a_file_gives_its_network_back(weights):
    path, network = weights
    field = ddim_ode.load(path)
    assert field.shape == (1, 8, 8)
    assert field.dtype == torch.float32
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    torch.testing.assert_close(field.model(x, t), network(x, t), rtol=1e-2, atol=1e-2)  # the weights went by float16
    assert torch.equal(field.model.mean, network.mean)
    assert describe(path)["training"] == {"step": 7}


def test_the_bundled_network_is_real():
    field = ddim_ode.load("fashion-mnist")
    images = data.as_tensor(data.bundled_images()[:8])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for sigma, bound in ((0.1, 0.4), (1.0, 0.08), (10.0, 0.004)):
        assert float((field(images + sigma * noise, sigma) - noise).square().mean()) < bound
    trip = ddim_ode.round_trip(field, images, nfe=10)
    assert trip.mse.shape == (8,)
    assert float(trip.mse.mean()) < 0.05
    latent = ddim_ode.noise(field.shape, 2, 0)
    code = ddim_ode.encode(field, ddim_ode.sample(field, latent, nfe=60).x, nfe=60, data_range=None)
    assert float((code.x - latent).square().mean().sqrt()) < 0.2


def test_bad_files_are_refused(weights, tmp_path):
    path, network = weights
    with pytest.raises(FileNotFoundError, match=r"neither a file, a folder, nor a bundled network \(.*fashion-mnist"):
        ddim_ode.load("fashion-mnits")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut short"):
        ddim_ode.load(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="of a network not known here"):
        ddim_ode.load(tmp_path / "other.safetensors")
    save_model(tmp_path / "wrong.safetensors", network.network, SMALL)
    with pytest.raises(ValueError, match="does not fit: missing"):
        ddim_ode.load(tmp_path / "wrong.safetensors")
    for change in ({"schedule": {"kind": "odd"}}, {"network": {"height": 3}}, {"residual": {}}):
        save_model(tmp_path / "odd.safetensors", network, SMALL | change)
        with pytest.raises(ValueError, match="does not describe a network"):
            ddim_ode.load(tmp_path / "odd.safetensors")
    save_model(tmp_path / "size.safetensors", network, SMALL | {"network": SMALL["network"] | {"width": 16}})
    with pytest.raises(ValueError, match=r"does not fit: .* is \(32, 8\), not \(64, 16\)"):
        ddim_ode.load(tmp_path / "size.safetensors")
    save_model(tmp_path / "new.safetensors", network, SMALL | {"format": 2})
    with pytest.raises(ValueError, match="format 2"):
        ddim_ode.load(tmp_path / "new.safetensors")


def test_comparisons_refuse_adaptive_solvers_before_the_reference(weights):
    field = ddim_ode.load(weights[0])
    latent, images = ddim_ode.noise((1, 8, 8), 1, 0), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="solvers= names dopri5, but adaptive solvers have tolerances"):
        compare(field, latent, images, ["ddim", "dopri5"], [2, 50])
    assert field.nfe == 0


def test_comparisons_measure_what_they_say(weights, tmp_path):
    field = ddim_ode.load(weights[0])
    latent = ddim_ode.noise((1, 8, 8), 3, 0)
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1
    exact = reference(field, latent, nfe=160)
    assert exact.difference < 1e-3
    found = compare(field, latent, images, ["default", "ddim", "rk4"], [2, 8], grid="linear", exact=exact)
    rows = {(row["solver"], row["nfe"]): row for row in found.record["rows"]}
    row = rows["ddim", 8]
    run = ddim_ode.sample(field, latent, nfe=8, solver="ddim", grid="linear")
    error = (run.x - exact.x).square().mean().sqrt()
    assert row["rms"] == pytest.approx(float(error), rel=1e-6)
    trip = ddim_ode.round_trip(field, images, nfe=8, solver="ddim", grid="linear")
    assert row["round_trip_mse"] == pytest.approx(float(trip.mse.mean()), rel=1e-6)
    assert row["calls"] == 8
    assert row["round_trip_calls"] == 16
    assert row["median"] <= row["worst"]
    assert rows["rk4", 2]["rms"] is None  # a budget below one step
    assert rows["rk4", 8]["steps"] == 2
    record = json.loads(json.dumps(found.record))
    for figure in (
        error_figure(record),
        round_trip_figure(record),
        sheet_figure([("a", [latent, latent])], ["x", "y"], "t"),
    ):
        save_figure(figure, tmp_path / "f.png")
        assert (tmp_path / "f.png").stat().st_size > 3000


def test_a_failed_reference_is_no_reference():
    """A sample whose reference fails is left out and named; its neighbours keep their errors."""
    schedule = ddim_ode.NoiseSchedule.linear()

    def eps(x_bar, sigma):
        bad = (x_bar[:, :1, :1, :1] > 3.2) & (0.30 < sigma < 0.35)
        return torch.where(bad, math.nan, sigma * x_bar / (0.5 + sigma**2))

    latent = ddim_ode.noise((1, 8, 8), 3, 0)
    latent[1, 0, 0, 0] = 4.9
    field = ddim_ode.EpsilonField.from_sigma(eps, schedule)
    exact = reference(field, latent, nfe=80)
    assert bool(exact.x[1].isnan().all())
    assert exact.difference < 1e-3
    found = compare(field, latent, torch.zeros(2, 1, 8, 8), ["ab3"], [5], exact=exact)
    assert found.record["reference"]["failed"] == [1]
    (row,) = found.record["rows"]
    truth = 0.5**0.5 * latent[[0, 2]] / (1 + 0.5 / schedule.sigma_max**2) ** 0.5
    run = ddim_ode.sample(field, latent[[0, 2]], nfe=5, solver="ab3")
    assert row["rms"] == pytest.approx(float((run.x - truth).square().mean().sqrt()), rel=2e-2)


def test_failed_samples_are_nan_not_numbers():
    field = ddim_ode.EpsilonField(lambda x, t: x * math.nan, ddim_ode.NoiseSchedule.linear(), shape=(1, 8, 8))
    latent = ddim_ode.noise((1, 8, 8), 2, 0)
    exact = Reference(latent, 0.0, 0, ("none", "none"))
    found = compare(field, latent, torch.zeros(2, 1, 8, 8), ["ddim"], [4], exact=exact)
    (row,) = found.record["rows"]
    assert np.isnan(row["rms"])
    assert row["failed"] == 4


def test_comparisons_take_solvers_and_those_of_one_way():
    shape = (1, 4, 4)
    model = GaussianEpsilon(torch.zeros(shape), torch.linspace(0.05, 0.4, 16).reshape(shape))
    field = ddim_ode.EpsilonField.from_sigma(model, ddim_ode.NoiseSchedule.linear(), shape=shape)
    latent, images = ddim_ode.noise(shape, 3, 1), ddim_ode.sample(field, n=2, nfe=40).x
    options = {"n": 4, "refine": 0, "reference_nfe": 160}
    up, down = (ddim_ode.calibrate(field, 5, direction=way, **options) for way in ("encode", "sample"))
    other = ddim_ode.calibrate(field, 5, seed=1, **options)
    ab2 = ddim_ode.Multistep(2)
    exact = Reference(ddim_ode.sample(field, latent, nfe=200).x, 0.0, 200, ("default",))
    settings = {"exact": exact, "data_range": None, "grid": "linear"}
    found = compare(field, latent, images, [down, up, other, ab2, "default"], [4, 5], **settings)
    rows = {(row["solver"], row["nfe"]): row for row in found.record["rows"]}
    assert list(dict.fromkeys(name for name, _ in rows)) == [
        "calibrated5", "calibrated-encode5", "calibrated5 (2)", ab2.name, "default",
    ]  # fmt: skip
    for name in ("calibrated5", "calibrated-encode5", "calibrated5 (2)"):
        assert {value for key, value in rows[name, 4].items() if key not in ("solver", "nfe")} == {None}
    assert len({frozenset(row) for row in rows.values()}) == 1
    row, run = rows["calibrated5", 5], ddim_ode.sample(field, latent, solver=down)
    assert row["rms"] == pytest.approx(float((run.x - exact.x).square().mean().sqrt()))
    assert (row["calls"], row["grid"], row["encoder"], row["decoder"]) == (5, "calibrated", "alf-flow", "calibrated5")
    back = ddim_ode.sample(field, ddim_ode.encode(field, images, nfe=5, data_range=None).x, solver=down)
    assert row["round_trip_mse"] == pytest.approx(float(((images - back.x) / 2).square().mean()))
    row = rows["calibrated-encode5", 5]
    assert (row["rms"], row["seconds"], row["calls"], row["round_trip_calls"]) == (None, None, 5, 10)
    assert (row["encoder"], row["decoder"], row["encode_grid"]) == ("calibrated-encode5", "flowdown5", "calibrated")
    assert set(found.samples) == {
        ("calibrated5", 5),
        ("calibrated5 (2)", 5),
        (ab2.name, 4),
        (ab2.name, 5),
        ("default", 4),
        ("default", 5),
    }
    assert rows[ab2.name, 5]["grid"] == "linear"
    record = json.loads(json.dumps(found.record))
    for figure in (error_figure(record), round_trip_figure(record)):
        assert figure.axes[0].get_legend() is not None
    calls = field.nfe
    for solvers, says in (
        ([ddim_ode.Generative(1.0)], "budgets= 5 with ddpm: ddpm samples only"),
        ([ddim_ode.Adaptive(DOPRI5)], "solvers= names dopri5, but adaptive"),
    ):
        with pytest.raises(ValueError, match=says):
            compare(field, latent, images, solvers, [5], **settings)
    wrong = ddim_ode.EpsilonField(lambda x, t: x, field.schedule, shape=shape)
    with pytest.raises(ValueError, match="calibrated for another model"):
        compare(wrong, latent, images, [down], [5])
    assert (field.nfe, wrong.nfe) == (calls, 0)
