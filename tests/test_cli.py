"""The command line, as scripts use it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_ode
from ddim_ode import data
from ddim_ode.cli import main
from ddim_ode.models.checkpoints import build, save_model
from tests.test_checkpoints import SMALL


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "m.safetensors", build(SMALL), SMALL)
    return str(tmp_path / "m.safetensors")


@pytest.fixture
def images(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pictures)
    return str(tmp_path / "images.npz")


def test_compare_writes_everything(model, images, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["compare", "--model", model, "--images", images, "--solvers", "default,ddim,ab2", "--nfe", "2,4"]
    arguments += ["--n", "4", "--reference-nfe", "40", "--out", str(out)]
    assert main(arguments) == 0
    assert {p.name for p in out.iterdir()} == {
        "results.json", "error.png", "round_trip.png", "samples.png", "reconstructions.png",
    }  # fmt: skip
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["solver"] for row in record["rows"]] == ["default"] * 2 + ["ddim"] * 2 + ["ab2"] * 2
    assert {"commit", "torch", "device", "state_dtype", "threads", "seed", "grid", "defaults"} <= record.keys()
    printed = capsys.readouterr()
    assert "RMS error of samples" in printed.out
    assert printed.err == ""  # no progress bars where there is no terminal
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_sample_encode_decode(model, images, tmp_path, capsys):
    common = ["--model", model, "--nfe", "4"]
    assert main(["sample", *common, "--n", "3", "--seed", "5", "--out", str(tmp_path / "s.npz")]) == 0
    with np.load(tmp_path / "s.npz") as file:
        field = ddim_ode.load(model)
        np.testing.assert_allclose(file["images"], ddim_ode.sample(field, n=3, seed=5, nfe=4).x.numpy(), atol=1e-6)
    assert main(["sample", *common, "--n", "4", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (19, 19)
    assert main(["encode", *common, "--images", images, "--out", str(tmp_path / "z.npz")]) == 0
    assert main(["decode", *common, "--latent", str(tmp_path / "z.npz"), "--out", str(tmp_path / "d.npy")]) == 0
    trip = ddim_ode.round_trip(field, data.as_tensor(data.read_images(images)), nfe=4)
    np.testing.assert_allclose(np.load(tmp_path / "d.npy"), trip.reconstruction.numpy(), atol=1e-6)
    capsys.readouterr()
    assert main(["sample", *common, "--n", "2", "--json", "--out", str(tmp_path / "s.npz")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["command"], record["nfe"], record["seed"], record["samples"]) == ("sample", 4, 0, 2)
    assert record["sample"] == {"solver": "deisx4", "grid": "quadratic", "steps": 4, "nfe": 4}
    assert {"commit", "state_dtype", "network_dtype", "schedule", "threads"} <= record.keys()


def test_it_is_a_module_too():
    run = subprocess.run([sys.executable, "-m", "ddim_ode", "solvers"], capture_output=True, text=True, check=True)
    assert "deis3" in run.stdout


def test_reconstruct_and_interpolate(model, images, tmp_path):
    common = ["--model", model, "--nfe", "4", "--images", images]
    assert main(["reconstruct", *common, "--out", str(tmp_path / "r")]) == 0
    record = json.loads((tmp_path / "r" / "results.json").read_text(encoding="utf-8"))
    assert len(record["mse"]) == 4
    assert record["nfe"] == 8
    assert (tmp_path / "r" / "reconstructions.png").exists()
    assert main(["interpolate", *common, "--pairs", "2", "--points", "3", "--out", str(tmp_path / "i.npz")]) == 0
    assert data.read_array(tmp_path / "i.npz").shape == (6, 1, 8, 8)


def test_train_goes_on_where_it_stopped(tmp_path, images):
    common = [
        "train",
        "--data",
        images,
        "--out",
        str(tmp_path / "t"),
        "--width",
        "8",
        "--groups",
        "4",
        "--multipliers",
        "1,2",
    ]
    common += ["--attention", "4", "--batch-size", "4", "--save-every", "2", "--no-autocast", "--rank", "6"]
    assert main([*common, "--steps", "2"]) == 0
    assert main([*common, "--steps", "4"]) == 0
    lines = (tmp_path / "t" / "log.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "4"]
    assert ddim_ode.load(tmp_path / "t" / "model.safetensors").shape == (1, 8, 8)
    assert (tmp_path / "t" / "samples.png").exists()
    assert main([*common, "--steps", "4", "--blocks", "2"]) == 2
    assert main([*common, "--steps", "6", "--lr", "1e-3"]) == 2


def test_solvers_lists_them(capsys):
    assert main(["solvers"]) == 0
    assert "deis3" in capsys.readouterr().out
    assert main(["solvers", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {s.name for s in ddim_ode.solvers()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "--model", "no-such"], "neither a file nor a bundled network"),
        (["sample", "--solver", "abb3"], "did you mean ab3"),
        (["sample", "--grid", "karas"], "did you mean karras"),
        (["sample", "--nfe", "0"], "does not pay for one step"),
        (["sample", "--out", "OUT/a.jpg"], "written as .png"),
        (["sample", "--n", "0"], "n must be a whole number"),
        (["encode", "--out", "OUT/z.png"], "latents are written as .npz or .npy"),
        (["encode", "--solver", "abb3", "--out", "OUT/z.npz"], "did you mean ab3"),
        (["reconstruct", "--nfe", "0", "--out", "OUT"], "does not pay for one step"),
        (["encode", "--images", "OUT/none"], "no such file"),
        (["encode", "--images", "IMAGES"], r"the model takes"),
        (["decode", "--latent", "IMAGES"], "is it an image"),
        (["decode", "--latent", "OUT/none.npz"], "no such file"),
        (["compare", "--nfe", "5,x"], "whole numbers"),
        (["compare", "--nfe", ""], "at least one"),
        (["compare", "--n-images", "0"], "--n-images"),
        (["compare", "--grid", "karas"], "did you mean karras"),
        (["sample", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["sample", "--out", "."], "images are written as"),
        (["train", "--data", "IMAGES", "--rank", "6", "--steps", "0"], "steps must be"),
        (["compare", "--solvers", "ddim,abb3"], "did you mean ab3"),
        (["compare", "--out", "FILE/out"], "cannot write to the output folder"),
        (["reconstruct", "--out", "FILE/out"], "cannot write to the output folder"),
        (["train", "--out", "FILE/out", "--data", "IMAGES", "--rank", "6"], "cannot write to the output folder"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(arguments, says, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    places = {"OUT": str(out), "IMAGES": images, "FILE": str(tmp_path / "file")}
    for short, place in places.items():
        arguments = [a.replace(short, place) for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddim-ode: ")
    assert says in error
    assert "Traceback" not in error
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("file", "images.npz")]
    assert not written
    assert not out.exists()


def test_a_failed_sample_sets_the_exit_code(tmp_path, model, capsys, monkeypatch):
    field = ddim_ode.EpsilonField(lambda x, t: x * float("nan"), ddim_ode.NoiseSchedule.linear(), shape=(1, 8, 8))
    monkeypatch.setattr("ddim_ode.cli.load", lambda *_, **__: field)
    assert main(["sample", "--n", "2", "--nfe", "3", "--out", str(tmp_path / "s.npz")]) == 1
    assert "non-finite in samples 0, 1" in capsys.readouterr().err
