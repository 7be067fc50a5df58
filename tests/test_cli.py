"""The command line, as scripts use it."""

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddim_ode
from ddim_ode import NoiseSchedule, calibration, data
from ddim_ode.cli import main
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.models.checkpoints import build, save_model
from ddim_ode.plotting import calibration_figure, save_figure
from tests.test_checkpoints import SMALL


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "m.safetensors", build(SMALL), SMALL)
    return str(tmp_path / "m.safetensors")


@pytest.fixture
def latent(tmp_path):
    np.save(tmp_path / "latent.npy", np.random.default_rng(1).standard_normal((2, 1, 8, 8)))
    return str(tmp_path / "latent.npy")


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


def test_compare_with_gaps_repeats_and_any_grid(model, images, tmp_path, capsys):
    common = ["compare", "--model", model, "--images", images, "--n", "1", "--n-images", "1", "--reference-nfe", "8"]
    common += ["--out", str(tmp_path / "out"), "--json"]

    def rows(*arguments):
        assert main([*common, *arguments]) == 0
        return [(r["solver"], r["nfe"], r["calls"]) for r in json.loads(capsys.readouterr().out)["rows"]]

    found = rows("--grid", "released-quadratic", "--solvers", "ddim,heun,ddim", "--nfe", "4,6,4")
    assert found == [("ddim", 4, 4), ("ddim", 6, 6), ("heun", 4, 4), ("heun", 6, 6)]
    assert rows("--solvers", "heun", "--nfe", "1,2") == [("heun", 1, None), ("heun", 2, 2)]


def test_compare_refuses_a_budget_before_any_work(images, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddim_ode.cli.reference", lambda *_, **__: pytest.fail("work was done"))
    common = ["compare", "--model", model, "--images", images, "--out", str(tmp_path / "out"), "--solvers", "heun"]
    assert main([*common, "--nfe", "4,2002"]) == 2
    assert "--nfe 2002 with heun: steps = 1001" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sample_with_noise(model, images, tmp_path, capsys):
    common = ["sample", "--model", model, "--nfe", "6", "--n", "3", "--json"]

    def drawn(name, *more):
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0
        return np.load(tmp_path / name), json.loads(capsys.readouterr().out)

    field = ddim_ode.load(model)
    found, record = drawn("a.npy", "--eta", "1", "--seed", "4")
    np.testing.assert_allclose(found, ddim_ode.sample(field, n=3, seed=4, nfe=6, eta=1.0).x.numpy(), atol=1e-6)
    assert record["seed"] == 4
    assert record["sample"] == {
        "solver": "ddpm", "grid": "quadratic", "steps": 6, "nfe": 6, "eta": 1.0, "sigma_hat": False
    }  # fmt: skip
    larger, record = drawn("b.npy", "--sigma-hat", "--seed", "4", "--grid", "linear")
    assert record["sample"] == {
        "solver": "ddpm-sigma-hat", "grid": "linear", "steps": 6, "nfe": 6, "eta": 1.0, "sigma_hat": True
    }  # fmt: skip
    assert np.abs(larger - found).max() > 1e-3
    # From given latents the noise is still drawn by the seed; without noise nothing is.
    latent = str(tmp_path / "z.npy")
    np.save(latent, ddim_ode.noise((1, 8, 8), 3, 4).numpy())
    again, record = drawn("c.npy", "--eta", "1", "--seed", "4", "--latent", latent)
    assert record["seed"] == 4
    np.testing.assert_allclose(again, found, atol=1e-6)
    still, record = drawn("d.npy", "--eta", "0", "--latent", latent)
    assert record["seed"] is None
    assert record["sample"]["eta"] == 0.0
    plain, record = drawn("e.npy", "--solver", "ddim", "--latent", latent)
    np.testing.assert_allclose(still, plain, atol=1e-6)
    assert record["sample"].keys() == {"solver", "grid", "steps", "nfe"}
    # A name says η to six digits, a record all of it.
    _, record = drawn("f.npy", "--eta", "0.12345678901")
    assert record["sample"]["eta"] == 0.12345678901
    for more, said in (
        (["--eta", "-1"], "eta must be a number of at least 0"),
        (["--eta", "3"], "eta = 3 makes the variance"),
        (["--eta", "0.5", "--sigma-hat"], "it goes with eta = 1"),
        (["--eta", "0.5", "--solver", "ab2"], "leave out --solver ab2"),
        (["--eta", "1", "--rtol", "1e-3"], "--rtol is for solvers that choose their own steps"),
        (["--sigma-hat", "--atol", "1e-3"], "--atol is for solvers that choose their own steps"),
        (["--solver", "ddpm"], "chosen by eta=, 1 for DDPM, or sigma_hat=True, at the terminal --eta and --sigma-hat"),
    ):
        assert main([*common, "--out", str(tmp_path / "new" / "x.npy"), *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_sample_encode_decode(model, images, tmp_path, capsys):
    common = ["--model", model, "--nfe", "10"]
    assert main(["sample", *common, "--n", "3", "--seed", "5", "--out", str(tmp_path / "s.npz")]) == 0
    with np.load(tmp_path / "s.npz") as file:
        field = ddim_ode.load(model)
        np.testing.assert_allclose(file["images"], ddim_ode.sample(field, n=3, seed=5, nfe=10).x.numpy(), atol=1e-6)
    assert main(["sample", *common, "--n", "4", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (19, 19)
    assert main(["encode", *common, "--images", images, "--out", str(tmp_path / "z.npz")]) == 0
    assert main(["decode", *common, "--latent", str(tmp_path / "z.npz"), "--out", str(tmp_path / "d.npy")]) == 0
    # In its own precision, unless another is named.
    single = ["decode", "--model", model, "--latent", str(tmp_path / "z.npz"), "--dtype", "float32", "--json"]
    capsys.readouterr()
    assert main([*single, "--out", str(tmp_path / "f.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["state_dtype"] == "float32"
    assert 0.0 < np.abs(np.load(tmp_path / "f.npy") - np.load(tmp_path / "d.npy")).max() < 1e-3
    # By another budget it is another run, and says so.
    other = [
        "decode",
        "--model",
        model,
        "--nfe",
        "12",
        "--latent",
        str(tmp_path / "z.npz"),
        "--out",
        str(tmp_path / "e.npy"),
    ]
    capsys.readouterr()
    assert main(other) == 2
    assert "this code was made otherwise: the grid" in capsys.readouterr().err
    assert main([*other, "--force"]) == 0
    assert np.abs(np.load(tmp_path / "e.npy") - np.load(tmp_path / "d.npy")).max() > 1e-6
    # Latents alone have no second state to go back by.
    assert main(["encode", *common, "--images", images, "--out", str(tmp_path / "z.npy")]) == 0
    assert main(["decode", *common, "--latent", str(tmp_path / "z.npy"), "--out", str(tmp_path / "a.npy")]) == 0
    trip = ddim_ode.round_trip(field, data.as_tensor(data.read_images(images)), nfe=10)
    np.testing.assert_allclose(np.load(tmp_path / "d.npy"), trip.reconstruction.numpy(), atol=1e-6)
    capsys.readouterr()
    assert main(["sample", *common, "--n", "2", "--json", "--out", str(tmp_path / "s.npz")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["command"], record["nfe"], record["seed"], record["samples"]) == ("sample", 10, 0, 2)
    assert record["sample"] == {"solver": "flowdown5", "grid": "flow", "steps": 10, "nfe": 10}
    assert {"commit", "state_dtype", "network_dtype", "schedule", "threads"} <= record.keys()


@pytest.mark.parametrize("out", ["new/", "new", "there.npz", "new.d/"])
def test_a_folder_of_pictures_goes_out_and_comes_back(out, model, latent, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").mkdir()
    common = ["--model", model, "--nfe", "2"]
    assert main(["sample", *common, "--n", "3", "--out", out]) == 0
    names = ["00000.png", "00001.png", "00002.png"]
    assert sorted(p.name for p in (tmp_path / out).iterdir()) == names
    drawn = ddim_ode.sample(ddim_ode.load(model), n=3, nfe=2).x
    np.testing.assert_array_equal(data.read_images(out), data.to_uint8(drawn))
    assert main(["encode", *common, "--images", out, "--out", "z.npy"]) == 0
    assert np.load("z.npy").shape == (3, 1, 8, 8)
    assert main(["interpolate", *common, "--pairs", "1", "--points", "3", "--out", out]) == 0  # it takes their places
    capsys.readouterr()
    assert main(["decode", *common, "--latent", latent, "--out", out]) == 2  # two more would mix with these three
    assert "other pictures, such as 00002.png" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / out).iterdir()) == names
    assert main(["decode", *common, "--latent", latent, "--out", "two/"]) == 0
    assert data.read_images("two").shape == (2, 1, 8, 8)


def test_a_seed_is_recorded_only_where_something_was_drawn(model, latent, images, tmp_path, capsys):
    common = ["--model", model, "--nfe", "10", "--seed", "99", "--json", "--out", str(tmp_path / "a.npz")]
    paths = ["interpolate", "--pairs", "1", "--points", "2"]
    for drawn, given in ((["sample"], ["--latent", latent]), (paths, ["--images", images])):
        for more, seed in (([], 99), (given, None)):
            assert main([*drawn, *common, *more]) == 0
            assert json.loads(capsys.readouterr().out)["seed"] == seed


def test_a_terminal_that_lacks_letters(model, tmp_path, monkeypatch):
    def printed(*arguments):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        with contextlib.suppress(SystemExit):  # argparse's way out of --help
            assert main(arguments) == 0
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode("ascii")

    assert "Adams?Bashforth" in printed("solvers")
    assert "(1 + ?" in printed("train", "--help")
    out = str(tmp_path / "σ.npz")
    record = printed("sample", "--model", model, "--nfe", "2", "--n", "1", "--json", "--out", out)
    assert json.loads(record)["out"] == out  # a record loses nothing


def test_adaptive_solvers_take_tolerances(model, tmp_path, capsys):
    common = ["sample", "--model", model, "--n", "2", "--json", "--out", str(tmp_path / "s.npz")]
    calls = []
    for tolerance in ("1e-2", "1e-4"):
        assert main([*common, "--solver", "dopri5", "--rtol", tolerance, "--atol", tolerance]) == 0
        record = json.loads(capsys.readouterr().out)["sample"]
        assert len(record["accepted"]) == len(record["rejected"]) == len(record["sample_nfe"]) == 2
        assert record["rtol"] == record["atol"] == float(tolerance)
        calls.append(record["nfe"])
    # What was not given is on record too.
    assert main([*common, "--solver", "dopri5", "--atol", "1e-2"]) == 0
    record = json.loads(capsys.readouterr().out)["sample"]
    assert (record["rtol"], record["atol"]) == (1e-5, 1e-2)
    assert calls[1] > calls[0]
    for arguments, says in (
        (["--solver", "ab3", "--rtol", "1e-3"], "--rtol is for solvers that choose their own steps"),
        (["--atol", "1e-3"], "--atol is for solvers that choose their own steps"),
        (["--solver", "dopri5", "--rtol", "0"], "rtol must be a number of at least"),
        (["--solver", "dopri5", "--nfe", "10"], "no budget of steps or nfe"),
        (["--solver", "dopri5", "--grid", "karras"], "--grid karras lays out steps, but dopri5 chooses its own"),
    ):
        assert main([*common, *arguments]) == 2
        assert says in capsys.readouterr().err


def test_compare_refuses_adaptive_solvers_before_any_work(model, images, tmp_path, capsys, monkeypatch):
    from ddim_ode import cli

    monkeypatch.setattr(cli, "reference", lambda *_, **__: pytest.fail("no work may be done"))
    arguments = ["compare", "--model", model, "--images", images, "--out", str(tmp_path / "out")]
    for budgets in ("2", "50"):  # fewer calls than a step takes, and more
        assert main([*arguments, "--solvers", "ddim,dopri5,scipy-dop853", "--nfe", budgets]) == 2
        assert "--solvers names dopri5, scipy-dop853, but adaptive solvers have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failures_are_named_by_their_kind(model, tmp_path, capsys, monkeypatch):
    from ddim_ode import cli
    from ddim_ode.solvers import get

    few = lambda name: replace(get(name), max_steps=2)
    monkeypatch.setattr(cli, "get", few)
    assert main(["sample", "--model", model, "--n", "2", "--solver", "bs32", "--out", str(tmp_path / "s.npz")]) == 1
    assert "sample: max_steps reached in samples 0, 1" in capsys.readouterr().err


def test_solvers_are_listed_with_what_was_measured(capsys):
    assert main(["solvers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["ab3"]["measured"]["measured_order"][0] == pytest.approx(2.0, abs=0.2)
    assert [rows[name]["states"] for name in ("ddim", "ab3", "abm3", "abm3-pece")] == [1, 3, 4, 2]
    assert rows["dopri5"]["adaptive"]
    assert not rows["scipy-lsoda"]["differentiable"]
    assert main(["solvers"]) == 0
    assert "measured" in capsys.readouterr().out


def test_it_is_a_module_too():
    run = subprocess.run([sys.executable, "-m", "ddim_ode", "solvers"], capture_output=True, text=True, check=True)
    assert "deis3" in run.stdout


def test_reconstruct_and_interpolate(model, images, tmp_path):
    common = ["--model", model, "--nfe", "10", "--images", images]
    assert main(["reconstruct", *common, "--solver", "ddim", "--out", str(tmp_path / "r")]) == 0
    record = json.loads((tmp_path / "r" / "results.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert len(row["each"]["round_trip_mse"]) == 4
    assert (row["encode_calls"], row["decode_calls"], row["states"]) == (10, 10, 1)
    made = {p.name for p in (tmp_path / "r").iterdir()}
    assert made == {
        "results.json", "errors.png", "along.png", "distribution-10.png", "reconstructions-10.png", "codes.safetensors",
        "reconstructions.npz",
    }  # fmt: skip
    trip = ddim_ode.round_trip(
        ddim_ode.load(model), data.as_tensor(data.read_images(images)), nfe=10, solver="ddim", grid="quadratic"
    )
    np.testing.assert_allclose(row["each"]["round_trip_mse"], trip.mse, rtol=1e-4)
    np.testing.assert_allclose(data.read_array(tmp_path / "r" / "reconstructions.npz"), trip.reconstruction, atol=1e-6)
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
    # The last place of a number that linear algebra made is no other network.
    described = tmp_path / "t" / "network.json"
    before = json.loads(described.read_text("utf-8"))
    before["residual"]["rest"] = math.nextafter(before["residual"]["rest"], 1.0)
    described.write_text(json.dumps(before), "utf-8")
    assert main([*common, "--steps", "6"]) == 0
    assert json.loads(described.read_text("utf-8")) == before


def test_floats_come_in_the_range_that_is_said(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((2, 28, 28)))
    encode = ["encode", "--images", str(tmp_path / "x.npy"), "--nfe", "4", "--out", str(tmp_path / "z.npz")]
    assert main(encode) == 2
    assert "--data-range 0,1" in capsys.readouterr().err
    assert main([*encode, "--data-range", "0"]) == 2
    assert "--data-range takes two numbers" in capsys.readouterr().err
    assert main([*encode, "--data-range", "0,1"]) == 0


def test_solvers_lists_them(capsys):
    assert main(["solvers"]) == 0
    assert "deis3" in capsys.readouterr().out
    assert main(["solvers", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {s.name for s in ddim_ode.solvers()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "--model", "no-such"], "neither a file, a folder, nor a bundled network"),
        (["sample", "--solver", "abb3"], "did you mean ab3"),
        (["sample", "--grid", "karas"], "did you mean karras"),
        (["sample", "--nfe", "0"], "does not pay for one step"),
        (["sample", "--out", "OUT/a.jpg"], "written as .png"),
        (["sample", "--n", "0"], "n must be a whole number"),
        (["encode", "--out", "OUT/z.png"], "codes are written as .safetensors or .npz"),
        (["encode", "--solver", "abb3", "--out", "OUT/z.npz"], "did you mean ab3"),
        (["reconstruct", "--nfe", "0", "--out", "OUT"], "--nfe takes whole numbers of at least 1"),
        (["reconstruct", "--solvers", "nothing", "--out", "OUT"], "unknown solver"),
        (["reconstruct", "--solvers", ",", "--out", "OUT"], "at least one name"),
        (["encode", "--images", "OUT/none"], "no such file"),
        (["encode", "--images", "IMAGES"], r"the model takes"),
        (["decode", "--latent", "IMAGES"], "is it an image"),
        (["decode", "--latent", "OUT/none.npz"], "no such file"),
        (["compare", "--nfe", "5,x"], "whole numbers"),
        (["compare", "--nfe", ""], "at least one"),
        (["compare", "--n-images", "0"], "--n-images"),
        (["compare", "--grid", "karas"], "did you mean karras"),
        (["sample", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["sample", "--device", "meta"], "--device meta cannot be used here"),
        (["encode", "--out", "."], "codes are written as"),
        (["encode", "--out", "OUT/z.npz/"], "codes are written as"),
        (["sample", "--batch-size", "0"], "--batch-size takes whole numbers of at least 1"),
        (["reconstruct", "--batch-size", "0"], "--batch-size"),
        (["sample", "--model", "MODEL", "--latent", "LATENT", "--n", "3"], "contradicts the 2 latents"),
        (["decode", "--latent", "LATENT"], "the latents are (1, 8, 8), but the model takes (1, 28, 28)"),
        (["decode", "--model", "MODEL", "--latent", "TEXT"], "must hold real numbers, but its dtype is <U4"),
        (["encode", "--images", "TEXT"], "must hold real numbers"),
        (["interpolate", "--pairs", "0"], "--pairs"),
        (["interpolate", "--pairs", "-1"], "--pairs takes whole numbers of at least 1, but got -1"),
        (["interpolate", "--images", "IMAGES", "--points", "1"], "--points takes whole numbers of at least 2"),
        (["interpolate", "--model", "MODEL", "--images", "IMAGES", "--pairs", "3"], "needs 6 images"),
        (["compare", "--nfe", "4,1500"], "--nfe 1500 with ddim"),
        (["compare", "--reference-nfe", "0"], "--reference-nfe"),
        (["compare", "--solvers", "default", "--grid", "karas"], "did you mean karras"),
        (["train", "--data", "IMAGES", "--rank", "6", "--groups", "3"], "groups"),
        (["train", "--data", "IMAGES", "--rank", "6", "--seed", "-1"], "seed"),
        (["train", "--data", "IMAGES", "--rank", "6", "--save-every", "0", "--out", "OUT/a/b"], "save_every"),
        (["train", "--data", "IMAGES", "--rank", "6", "--steps", "0"], "steps must be"),
        (["compare", "--solvers", "ddim,abb3"], "did you mean ab3"),
        (["compare", "--out", "FILE/out"], "cannot write to the output folder"),
        (["reconstruct", "--out", "FILE/out"], "cannot write to the output folder"),
        (["train", "--data", "WIDE", "--rank", "6"], "square images"),
        (["train", "--out", "FILE/out", "--data", "IMAGES", "--rank", "6"], "cannot write to the output folder"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    arguments, says, model, latent, images, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("in the way")
    np.save(tmp_path / "text.npy", np.array(["text"]))
    np.save(tmp_path / "wide.npy", np.zeros((4, 1, 8, 10), dtype=np.uint8))
    there = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    places = {"OUT": str(out), "IMAGES": images, "FILE": str(tmp_path / "file"), "MODEL": model, "LATENT": latent}
    places |= {"TEXT": str(tmp_path / "text.npy"), "WIDE": str(tmp_path / "wide.npy")}
    for short, place in places.items():
        arguments = [a.replace(short, place) for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddim-ode: ")
    assert says in error
    assert "Traceback" not in error
    assert set(tmp_path.rglob("*")) == there


def test_a_folder_that_was_there_stays(model, latent, tmp_path):
    (tmp_path / "there").mkdir()
    out = str(tmp_path / "there" / "new" / "newer" / "a.png")
    assert main(["sample", "--model", model, "--latent", latent, "--n", "3", "--out", out]) == 2
    assert not list((tmp_path / "there").iterdir())


def test_a_failed_sample_sets_the_exit_code(tmp_path, model, capsys, monkeypatch):
    field = ddim_ode.EpsilonField(lambda x, t: x * float("nan"), ddim_ode.NoiseSchedule.linear(), shape=(1, 8, 8))
    monkeypatch.setattr("ddim_ode.cli.load", lambda *_, **__: field)
    assert main(["sample", "--n", "2", "--nfe", "3", "--out", str(tmp_path / "s.npz")]) == 1
    assert "non-finite in samples 0, 1" in capsys.readouterr().err


def test_data_says_what_is_here_and_how_to_get_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ddim_ode.datasets._DEBIAN", tmp_path / "none")
    monkeypatch.setenv("DDIM_ODE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    for stem in ("train", "t10k"):
        (tmp_path / "mnist" / f"{stem}-images-idx3-ubyte").touch()
    assert main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "mnist") in next(line for line in lines if line.startswith("mnist"))
    assert "torchvision.datasets.CIFAR10" in next(line for line in lines if line.startswith("cifar10"))
    assert main(["data", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {"fashion-mnist", "mnist", "cifar10"}


def test_models_of_others_at_the_terminal(tmp_path, capsys):
    """Weights that do not say their schedule or classes: both are given, and what is assumed is said."""
    from ddim_ode.models.guided import GuidedUNet

    torch.manual_seed(0)
    network = GuidedUNet(channels=1, width=32, multipliers=(1,), blocks=1, attention=(), classes=3)
    torch.save(network.state_dict(), tmp_path / "guided.pt")
    options = {"class_labels": [0, 2], "network": {"resolution": 8}, "schedule": NoiseSchedule.cosine(50).config}
    (tmp_path / "options.json").write_text(json.dumps(options), "utf-8")
    common = [
        "sample",
        "--model",
        str(tmp_path / "guided.pt"),
        "--n",
        "2",
        "--nfe",
        "4",
        "--out",
        str(tmp_path / "s.npz"),
    ]
    assert main([*common, "--model-options", f"@{tmp_path / 'options.json'}", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["schedule"]["kind"] == "cosine"
    assert "ddim-ode: note: weights that do not say whether they are an average" in printed.err
    assert main(common) == 2
    assert "class-conditional: give class_labels=" in capsys.readouterr().err


def test_clipping_at_the_terminal(model, images, tmp_path, capsys):
    """The field's own options go through ``--model-options``; and a field that clips does not encode."""
    bounds = ["--model-options", '{"clip": 0.25, "threshold": 0.9}']
    common = ["sample", "--model", model, "--n", "2", "--nfe", "4", "--solver", "ddim", "--out"]
    assert main([*common, str(tmp_path / "plain.npz")]) == 0
    assert main([*common, str(tmp_path / "kept.npz"), *bounds]) == 0
    plain, kept = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("plain", "kept"))
    assert np.abs(plain).max() > 0.3
    assert np.abs(kept).max() <= 0.2501
    capsys.readouterr()
    encode = ["encode", "--model", model, "--images", images, "--nfe", "4", "--out", str(tmp_path / "z.npz")]
    assert main([*encode, *bounds]) == 2
    assert "clips or thresholds the predicted data cannot encode" in capsys.readouterr().err
    assert not (tmp_path / "z.npz").exists()
    assert main([*common, str(tmp_path / "no.npz"), "--model-options", '{"clip": "1"}']) == 2
    assert "clip must be a positive number" in capsys.readouterr().err


def test_likelihood(model, images, tmp_path, capsys):
    out = tmp_path / "new" / "l.json"
    arguments = ["likelihood", "--model", model, "--images", images, "--n", "3", "--nfe", "6", "--out", str(out)]
    arguments += ["--probes", "3", "--seed", "2"]
    assert main(arguments) == 0
    record = json.loads(out.read_text("utf-8"))
    pixels = torch.from_numpy(data.read_images(images)[:3])
    found = ddim_ode.log_density(ddim_ode.load(model), pixels, nfe=6, probes=3, seed=2)
    np.testing.assert_allclose(record["bits"], found.bits.numpy(), rtol=1e-6)
    np.testing.assert_allclose(record["log_density"], found.log_density.numpy(), rtol=1e-6)
    assert record["mean"]["bits"]["value"] == pytest.approx(found.mean_bits.value, rel=1e-6)
    assert (record["nfe"], record["vjps"], record["seed"], record["probes"]) == (6, 18, 2, 3)
    assert record["likelihood"] == {"solver": "flowup4", "grid": "flow", "steps": 6, "nfe": 6}
    assert {"commit", "state_dtype", "schedule", "sigma", "status"} <= record.keys()
    mean = found.mean_bits
    words = f"{mean.value:.4f} ± {mean.error:.4f} bits per dimension over 3 images (of it by the trace: {mean.trace_error:.4f}"
    assert words in capsys.readouterr().out
    assert main([*arguments, "--batch-size", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(printed["bits"], record["bits"], rtol=1e-6)
    assert main([*arguments[:-4], "--trace", "exact", "--sigma", "0.1"]) == 0  # 64 dimensions
    assert "exact trace; 384 products" in capsys.readouterr().out
    assert json.loads(out.read_text("utf-8"))["sigma"] == 0.1
    adaptive = [
        *arguments[:7],
        "--solver",
        "bs32",
        "--rtol",
        "1e-2",
        "--atol",
        "1e-2",
        "--probes",
        "1",
        "--out",
        str(out),
    ]
    assert main(adaptive) == 0
    assert "(of it by the trace: –;" in capsys.readouterr().out  # one probe has no spread
    assert json.loads(out.read_text("utf-8"))["likelihood"]["rtol"] == 1e-2


def test_likelihood_of_floats_is_a_log_density(model, tmp_path, capsys):
    x = np.random.default_rng(0).uniform(-1.0, 1.0, (2, 1, 8, 8))
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "l.json"
    common = ["likelihood", "--model", model, "--images", str(tmp_path / "x.npy"), "--nfe", "6", "--probes", "2"]
    assert main([*common, "--out", str(out)]) == 0
    record = json.loads(out.read_text("utf-8"))
    assert record["bits"] is None
    assert record["mean"]["bits"] is None
    found = ddim_ode.log_density(ddim_ode.load(model), torch.from_numpy(x), nfe=6, probes=2)
    np.testing.assert_allclose(record["log_density"], found.log_density.numpy(), rtol=1e-6)
    assert "nats over 2 images" in capsys.readouterr().out


def test_likelihood_names_what_failed(tmp_path, capsys, monkeypatch):
    def net(x, t):
        bright = x.detach().mean(dim=(1, 2, 3), keepdim=True) > 0.8
        return torch.where(bright, torch.full_like(x, math.nan), torch.tanh(x))

    field = ddim_ode.EpsilonField(net, NoiseSchedule.linear(), shape=(1, 8, 8))
    monkeypatch.setattr("ddim_ode.cli.load", lambda *_, **__: field)
    pictures = np.full((3, 1, 8, 8), 40, dtype=np.uint8)
    pictures[1] = 250
    np.save(tmp_path / "x.npy", pictures)
    out = tmp_path / "l.json"
    assert main(["likelihood", "--images", str(tmp_path / "x.npy"), "--nfe", "4", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "likelihood: non-finite in samples 1" in printed.err
    assert "over 2 images" in printed.out
    record = json.loads(out.read_text("utf-8"))
    assert record["status"] == ["SUCCESS", "NONFINITE", "SUCCESS"]
    assert record["bits"][1] is record["log_density"][1] is None
    assert record["mean"]["bits"]["value"] == pytest.approx((record["bits"][0] + record["bits"][2]) / 2)


def test_likelihood_refuses_before_any_work(model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddim_ode.cli.log_density", lambda *_, **__: pytest.fail("work was done"))
    common = ["likelihood", "--model", model, "--images", images]
    for arguments, says in (
        (["--out", str(tmp_path / "new" / "l.npz")], "likelihoods are written as .json"),
        (["--out", str(tmp_path)], "likelihoods are written as .json"),
        (["--probes", "0"], "--probes takes whole numbers of at least 1, but got 0"),
        (["--n", "0"], "--n takes whole numbers"),
        (["--solver", "abb3"], "did you mean ab3"),
        (["--solver", "dopri5", "--nfe", "20"], "no budget of steps or nfe"),
        (["--solver", "ab3", "--rtol", "1e-3"], "--rtol is for solvers that choose their own steps"),
    ):
        assert main([*common, *arguments]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sigma", "-1"], "sigma must be a noise level"),
        (["--trace", "exact", "--probes", "2"], "probes are those of an estimated trace"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_a_likelihood_that_is_refused_leaves_nothing(arguments, says, model, images, tmp_path, capsys):
    common = ["likelihood", "--model", model, "--images", images, "--out", str(tmp_path / "new" / "l.json")]
    assert main([*common, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# -- calibrated solvers -------------------------------------------------------------------------
class Seen(torch.nn.Module):
    """Stands in for a network of features: the pixels."""

    name = "pixels"

    def forward(self, x):
        return x.flatten(1)


@pytest.fixture
def gaussians(monkeypatch):
    """Models by the names "narrow" and "wide", whose ε is exact and cheap, and a cheap network of features."""
    fields = {}
    for name, widest in (("narrow", 0.2), ("wide", 1.5)):
        exact = GaussianEpsilon(torch.full((1, 8, 8), 0.1), torch.linspace(0.01, widest, 64).reshape(1, 8, 8))
        schedule = NoiseSchedule.linear() if name == "narrow" else NoiseSchedule.cosine()
        fields[name] = ddim_ode.EpsilonField.from_sigma(exact, schedule, shape=(1, 8, 8))
    monkeypatch.setattr("ddim_ode.cli.load", lambda name, **_: fields[name])
    monkeypatch.setattr("ddim_ode.cli.EfficientNetLite0", lambda: Seen().eval())
    return fields


CALIBRATE = ["calibrate", "--model", "narrow", "--n", "6", "--refine", "1", "--reference-nfe", "160"]


@pytest.fixture
def calibrated(gaussians, tmp_path, capsys):
    """Files of solvers: of three calls each way, and of five down."""
    out = tmp_path / "calibrated"
    assert main([*CALIBRATE, "--nfe", "3,5", "--out", str(out)]) == 0
    assert main([*CALIBRATE, "--nfe", "3", "--direction", "encode", "--out", str(out)]) == 0
    capsys.readouterr()
    return {name: str(out / f"calibrated-{name}.json") for name in ("3", "5", "encode-3")}


def test_calibrate_writes_everything(gaussians, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main([*CALIBRATE, "--nfe", "3,5,3", "--seed", "2", "--out", str(out)]) == 0
    names = {"calibrated-3.json", "calibrated-5.json", "results.json", "calibration.png"}
    assert {path.name for path in out.iterdir()} == names
    made = ddim_ode.calibrate(gaussians["narrow"], 5, n=6, refine=1, reference_nfe=160, seed=2)
    assert ddim_ode.load_solver(out / "calibrated-5.json") == made
    record = json.loads((out / "results.json").read_text("utf-8"))
    assert {"command", "model", "direction", "refine", "consistent", "commit", "threads", "schedule"} <= record.keys()
    rows = record["rows"]
    assert [(row["nfe"], row["file"], row["seed"]) for row in rows] == [
        (3, "calibrated-3.json", 2), (5, "calibrated-5.json", 2),
    ]  # fmt: skip
    assert rows[1]["stages"] == made.record["stages"]
    assert rows[1]["sha256"] == ddim_ode.load_solver(out / "calibrated-5.json").sha256
    assert rows[0]["features"]["network"] == "pixels"
    printed = capsys.readouterr()
    assert printed.err == ""
    kept = next(stage for stage in rows[0]["stages"] if stage["stage"] == rows[0]["kept"])
    line = next(line.split() for line in printed.out.splitlines() if line.lstrip().startswith("3 "))
    assert [f"{kept[half]:.1e}" for half in ("fitted", "held_back")] == line[-7:-5]
    assert line[-4] == str(rows[0]["reference"]["calls"])
    assert line[-2] == str(rows[0]["calls"])
    assert "4 trajectories that were fitted to and 2 that were held back" in printed.out
    assert "RMS distances of those of pixels" in printed.out
    assert main([*CALIBRATE, "--nfe", "3", "--json", "--consistent", "--out", str(out)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["consistent"]
    # The figure is drawn from what the file says, were it that a stage diverged.
    record["rows"][0]["stages"][1]["fitted"] = None
    figure = calibration_figure(record | {"rows": [*record["rows"], *record["rows"], record["rows"][0]]})
    assert [axes.get_title() for axes in figure.axes] == ["3 calls", "5 calls", "3 calls", "5 calls", "3 calls"]
    save_figure(figure, tmp_path / "five.png")


def test_calibrate_for_encoding(gaussians, tmp_path, capsys, latent):
    field, out = gaussians["narrow"], tmp_path / "out"
    pictures = ddim_ode.sample(field, n=5, nfe=40).x.clamp(-1.0, 1.0)
    np.save(tmp_path / "x.npy", pictures.numpy())
    np.save(tmp_path / "z.npy", ddim_ode.noise((1, 8, 8), 5, 7).numpy())
    common = [*CALIBRATE[:3], *CALIBRATE[5:], "--direction", "encode", "--nfe", "4", "--out", str(out), "--json"]
    for more, given in (
        (["--images", str(tmp_path / "x.npy")], {"images": pictures}),
        (["--images", str(tmp_path / "x.npy"), "--n", "4"], {"images": pictures[:4]}),
        (["--latent", str(tmp_path / "z.npy")], {"latents": ddim_ode.noise((1, 8, 8), 5, 7)}),
        (["--n", "5", "--seed", "7"], {"n": 5, "seed": 7}),
    ):
        assert main([*common, *more]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["file"] == "calibrated-encode-4.json"
        assert row["seed"] == (7 if "--seed" in more else 0)
        made = ddim_ode.calibrate(field, 4, direction="encode", refine=1, reference_nfe=160, **given)
        np.testing.assert_allclose(
            ddim_ode.load_solver(out / row["file"]).numbers.sigmas, made.numbers.sigmas, rtol=1e-5
        )
    assert {path.name for path in out.iterdir()} == {
        "calibrated-encode-4.json", "results-encode.json", "calibration-encode.png",
    }  # fmt: skip


def test_calibrate_says_when_the_default_was_kept_and_why_there_are_no_features(
    gaussians, tmp_path, capsys, monkeypatch
):
    def missing():
        raise ImportError("EfficientNet-Lite0 needs its packages")

    monkeypatch.setattr(calibration._Judged, "beats", lambda self, other: False)
    monkeypatch.setattr("ddim_ode.cli.EfficientNetLite0", missing)
    assert main([*CALIBRATE, "--nfe", "3", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "at 3 calls the default was kept: nothing was better, beyond chance, on what was held back" in printed.out
    assert "note: distances of features are left out: EfficientNet-Lite0 needs its packages" in printed.err
    flat = ddim_ode.EpsilonField.from_sigma(lambda x, s: s * x / (0.1 + s * s), NoiseSchedule.linear(), shape=(6,))
    monkeypatch.setitem(gaussians, "narrow", flat)
    assert main([*CALIBRATE, "--nfe", "3", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "samples of shape (6,) are no pictures" in printed.err
    assert "features" not in json.loads(printed.out)["rows"][0]


def test_a_budget_whose_reference_does_not_converge_loses_no_other(gaussians, tmp_path, capsys):
    common = [*CALIBRATE, "--reference-nfe", "60", "--out", str(tmp_path / "out"), "--nfe"]
    assert main([*common, "3,14,4"]) == 1
    assert "at 60 and 30 calls" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert [row["error"] is None for row in record["rows"]] == [True, False, True]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "calibrated-3.json", "calibrated-4.json", "results.json", "calibration.png",
    }  # fmt: skip
    common[-2] = str(tmp_path / "none")
    assert main([*common, "14"]) == 2
    assert "--nfe 14: the reference does not converge" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("given", "said"), [([], None), (["--reference-nfe", "160"], 160)])
def test_calibrate_leaves_the_calls_of_the_reference_open(gaussians, tmp_path, monkeypatch, given, said):
    seen = []

    def once(field, nfe, **options):
        seen.append(options["reference_nfe"])
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim_ode.cli.calibrate", once)
    command = ["calibrate", "--model", "narrow", "--nfe", "3", "--out", str(tmp_path / "out"), *given]
    assert main(command) == 130
    assert seen == [said]


def test_calibrate_keeps_what_is_done_when_it_is_interrupted(gaussians, tmp_path, monkeypatch):
    inner = ddim_ode.cli.calibrate

    def once(field, nfe, **options):
        if nfe == 4:
            raise KeyboardInterrupt
        return inner(field, nfe, **options)

    monkeypatch.setattr("ddim_ode.cli.calibrate", once)
    assert main([*CALIBRATE, "--nfe", "3,4", "--out", str(tmp_path / "out")]) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"calibrated-3.json", "results.json"}


def test_calibrate_names_the_trajectories_that_failed(gaussians, tmp_path, capsys, monkeypatch):
    exact = gaussians["narrow"].model

    def eps(x_bar, sigma):
        bad = (x_bar[:, :1, :1, :1] > 3.2) & (0.30 < sigma < 0.35)
        return torch.where(bad, math.nan, exact(x_bar, sigma))

    latent = ddim_ode.noise((1, 8, 8), 7, 0)
    latent[1, 0, 0, 0] = 1e3
    np.save(tmp_path / "z.npy", latent.numpy())
    monkeypatch.setitem(
        gaussians, "narrow", ddim_ode.EpsilonField.from_sigma(eps, NoiseSchedule.linear(), shape=(1, 8, 8))
    )
    arguments = [*CALIBRATE[:3], *CALIBRATE[5:], "--latent", str(tmp_path / "z.npy"), "--nfe", "3"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "--nfe 3: non-finite in reference trajectories 1, left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--nfe", "5,1"], "--nfe takes whole numbers of at least 2, but got '1'"),
        (["--nfe", ","], "at least one budget in --nfe"),
        (["--nfe", "5,50"], "--nfe 50: reference_nfe must be a whole number of at least 200"),
        (["--n", "3"], "--n takes whole numbers of at least 4"),
        (["--refine", "-1"], "--nfe 5: refine, the steps of refinement,"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--seed", "-1"], "seed must be"),
        (["--latent", "LATENT"], "contradicts the 2 latents given"),
        (["--latent", "IMAGES"], "is it an image"),
        (["--images", "IMAGES"], 'leave them out, or say direction="encode"'),
        (["--images", "IMAGES", "--latent", "LATENT", "--direction", "encode"], "give one of them"),
        (["--images", "OUT/none", "--direction", "encode"], "no such file"),
        (["--out", "FILE/out"], "cannot write to the output folder"),
        (["--device", "meta"], "--device meta cannot be used here"),
    ],
)
def test_calibrations_that_are_refused_leave_nothing(more, says, gaussians, latent, images, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    there = set(tmp_path.rglob("*"))
    places = {"OUT": str(tmp_path / "out"), "IMAGES": images, "LATENT": latent, "FILE": str(tmp_path / "file")}
    for short, place in places.items():
        more = [text.replace(short, place) for text in more]
    out = [] if "--out" in more else ["--out", str(tmp_path / "out")]
    assert main([*CALIBRATE, "--nfe", "5", *more, *out]) == 2
    assert says in capsys.readouterr().err
    assert gaussians["narrow"].nfe == 0
    assert set(tmp_path.rglob("*")) == there


def test_a_calibrated_solver_is_named_by_its_file(calibrated, gaussians, tmp_path, capsys):
    field = gaussians["narrow"]
    down, up = ddim_ode.load_solver(calibrated["3"]), ddim_ode.load_solver(calibrated["encode-3"])
    common = ["--model", "narrow", "--json", "--out"]

    def run(command, out, *more):
        assert main([command, *common, str(tmp_path / out), *more]) == 0
        return json.loads(capsys.readouterr().out)

    record = run("sample", "s.npz", "--n", "3", "--solver", calibrated["3"])
    assert record["sample"] == {
        "solver": "calibrated3", "grid": "calibrated", "steps": down.own_grid(field.schedule).steps, "nfe": 3,
        "file": calibrated["3"], "sha256": down.sha256,
    }  # fmt: skip
    drawn = ddim_ode.sample(field, n=3, solver=down).x
    np.testing.assert_allclose(data.read_array(tmp_path / "s.npz"), drawn, atol=1e-6)
    assert run("sample", "s.npz", "--n", "3", "--nfe", "3", "--solver", calibrated["3"])["nfe"] == 3
    np.save(tmp_path / "x.npy", drawn.clamp(-1.0, 1.0).numpy())
    pictures = ["--images", str(tmp_path / "x.npy")]
    record = run("encode", "z.safetensors", *pictures, "--solver", calibrated["encode-3"])
    assert record["encode"]["sha256"] == up.sha256
    # Its code is decoded by nothing but force; its latents by whatever is named.
    code = ["--latent", str(tmp_path / "z.safetensors")]
    for more in ([], ["--solver", calibrated["3"]]):
        assert main(["decode", *common, str(tmp_path / "new" / "d.npz"), *code, *more]) == 2
        assert "calibrated-encode3, which only encodes: decode its latent alone" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
        found = run("decode", "d.npz", *code, *more, "--force")["decode"]["solver"]
        assert found == ("calibrated3" if more else "flowdown5")
    latent = ddim_ode.encode(field, data.as_tensor(np.load(tmp_path / "x.npy")), solver=up).x
    np.testing.assert_allclose(
        data.read_array(tmp_path / "d.npz"), ddim_ode.sample(field, latent, solver=down).x, atol=1e-5
    )
    assert run("sample", "d.npz", *code, "--solver", calibrated["3"])["sample"]["solver"] == "calibrated3"
    # Where a command goes both ways the default goes the other.
    paths = ["--pairs", "1", "--points", "3"]
    for given, more, ways in (
        ("3", pictures, ("alf-flow", "calibrated3")),
        ("encode-3", pictures, ("calibrated-encode3", "flowdown5")),
        ("3", [], (None, "calibrated3")),
    ):
        record = run("interpolate", "i.npz", *paths, *more, "--nfe", "3", "--solver", calibrated[given])
        assert (record.get("encode", {}).get("solver"), record["interpolate"]["solver"]) == ways
    assert main(["solvers"]) == 0


def test_calibrated_solvers_are_compared(calibrated, gaussians, tmp_path, capsys):
    drawn = ddim_ode.sample(gaussians["narrow"], n=4, nfe=40).x.clamp(-1.0, 1.0)
    np.save(tmp_path / "x.npy", drawn.numpy())
    elsewhere = tmp_path / "elsewhere"
    assert main([*CALIBRATE, "--nfe", "3", "--seed", "5", "--out", str(elsewhere)]) == 0
    capsys.readouterr()
    other = str(elsewhere / "calibrated-3.json")
    every = ",".join(["ddim", *calibrated.values(), other, calibrated["3"]])
    common = ["--model", "narrow", "--images", str(tmp_path / "x.npy"), "--n-images", "2", "--solvers", every]
    common += ["--nfe", "3,5", "--out", str(tmp_path / "out")]
    names = ["ddim", "calibrated3", "calibrated5", "calibrated-encode3", "calibrated3 (2)"]
    for command in (["compare", "--n", "2", "--reference-nfe", "60"], ["reconstruct"]):
        assert main([*command, *common]) == 0
        assert "calibrated3: round trips are encoded by alf-flow and decoded by calibrated3" in capsys.readouterr().out
        assert main([*command, *common, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert list(dict.fromkeys(row["solver"] for row in record["rows"])) == names
        measured = {row["solver"]: [] for row in record["rows"]}
        for row in record["rows"]:
            measured[row["solver"]] += [row["nfe"]] if row["round_trip_mse"] is not None else []
        assert measured == dict(zip(names, ([3, 5], [3], [5], [3], [3]), strict=True))
        assert {row: about["file"] for row, about in record["calibrated"].items()} == {
            "calibrated3": calibrated["3"], "calibrated5": calibrated["5"], "calibrated-encode3": calibrated["encode-3"],
            "calibrated3 (2)": other,
        }  # fmt: skip


def test_solver_files_that_cannot_be_used_are_refused(calibrated, gaussians, tmp_path, capsys):
    good = Path(calibrated["3"]).read_text("utf-8")
    for name, text in (("cut", good[:-200]), ("changed", good.replace("0.", "1.", 1)), ("other", "{}")):
        (tmp_path / f"{name}.json").write_text(text, "utf-8")
    drawn = ddim_ode.sample(gaussians["narrow"], n=4, nfe=40).x.clamp(-1.0, 1.0)
    np.save(tmp_path / "x.npy", drawn.numpy())
    np.save(tmp_path / "z.npy", ddim_ode.noise((1, 8, 8), 2, 0).numpy())
    pictures, latent = ["--images", str(tmp_path / "x.npy")], ["--latent", str(tmp_path / "z.npy")]
    file = lambda name: ["--solver", str(tmp_path / f"{name}.json")]
    by = lambda name: ["--solver", calibrated[name]]
    lists = ["--solvers", f"default,{calibrated['3']}", "--nfe", "3"]
    cases = [
        (["sample", *file("none")], "no such file"),
        (["sample", *file("cut")], "is no solver, or is cut short"),
        (["encode", *pictures, *file("changed")], "is damaged"),
        (["decode", *latent, *file("other")], "is no solver"),
        (["compare", *pictures, "--solvers", f"ddim,{tmp_path / 'cut.json'}"], "is cut short"),
        (["reconstruct", *pictures, "--solvers", str(tmp_path / "other.json")], "is no solver"),
        (["sample", *by("encode-3")], "was made to encode, over its own grid, and cannot sample"),
        (["decode", *latent, *by("encode-3")], "and cannot sample"),
        (["encode", *pictures, *by("3")], "was made to sample, over its own grid, and cannot encode"),
        (["latents", *pictures, *by("3")], "and cannot encode"),
        (["likelihood", *pictures, *by("encode-3")], "begins at sigma = 0 and not where data have a density"),
        (["sample", *by("3"), "--nfe", "4"], "nfe = 4 contradicts calibrated3, which has 3"),
        (["interpolate", *pictures, "--pairs", "1", *by("3"), "--steps", "5"], "steps = 5 contradicts calibrated3"),
        (["sample", *by("3"), "--grid", "flow"], "calibrated3 brings its own grid"),
        (["sample", *by("3"), "--rtol", "1e-3"], "--rtol is for solvers that choose their own steps"),
        (["sample", *by("3"), "--eta", "1"], "leave out --solver"),
        (["sample", "--solver", "ddim", "--force"], "--force is for calibrated solvers of another model"),
        (["sample", "--eta", "1", "--force"], "--force is for calibrated solvers of another model"),
        (["compare", *pictures, "--solvers", "ddim", "--force"], "--force is for calibrated solvers"),
        (["reconstruct", *pictures, "--solvers", "ddim", "--force"], "--force is for calibrated solvers"),
        (["decode", *latent, "--force"], "--force is for codes and calibrated solvers, and neither"),
        (["reconstruct", *pictures, "--solvers", calibrated["3"], "--nfe", "4"], "no budget of 4 calls"),
        (["sample", "--model", "wide", *by("3")], "calibrated3 was calibrated for another model: schedule is"),
        (["interpolate", "--model", "wide", *pictures, "--pairs", "1", *by("3")], "calibrated for another model"),
        (["compare", "--model", "wide", *pictures, *lists], "calibrated for another model"),
        (["reconstruct", "--model", "wide", *pictures, *lists], "calibrated for another model"),
    ]
    there = set(tmp_path.rglob("*"))
    calls = [field.nfe for field in gaussians.values()]
    for arguments, says in cases:
        model = [] if "--model" in arguments else ["--model", "narrow"]
        end = {"encode": ".npz", "likelihood": ".json", "sample": ".npz", "decode": ".npz", "interpolate": ".npz"}
        out = str(tmp_path / "new" / f"x{end.get(arguments[0], '')}")
        assert main([*arguments, *model, "--out", out]) == 2, arguments
        assert says in capsys.readouterr().err, arguments
    assert [field.nfe for field in gaussians.values()] == calls
    assert set(tmp_path.rglob("*")) == there


def test_force_runs_a_calibrated_solver_with_another_model(calibrated, gaussians, tmp_path, capsys):
    gaussians["narrow"] = other = ddim_ode.EpsilonField(
        lambda x, t: 0.9 * x, gaussians["narrow"].schedule, shape=(1, 8, 8)
    )
    common = ["--model", "narrow", "--force", "--json", "--out"]
    assert main(["sample", *common, str(tmp_path / "s.npz"), "--n", "2", "--solver", calibrated["3"]]) == 0
    wanted = ddim_ode.sample(other, n=2, solver=ddim_ode.load_solver(calibrated["3"], force=True)).x
    np.testing.assert_allclose(data.read_array(tmp_path / "s.npz"), wanted, atol=1e-5)
    np.save(tmp_path / "z.npy", ddim_ode.noise((1, 8, 8), 2, 0).numpy())
    latent = ["--latent", str(tmp_path / "z.npy")]
    assert main(["decode", *common, str(tmp_path / "d.npz"), *latent, "--solver", calibrated["3"]]) == 0
    np.testing.assert_allclose(data.read_array(tmp_path / "d.npz"), data.read_array(tmp_path / "s.npz"))
