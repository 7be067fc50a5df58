"""The studies of the paper: rows that belong together, samples of one sampler, errors beside numbers, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import discrete, folders, metrics, paper_figures, proposition1, round_trip, table1
from ddim_ode import EpsilonField, Features, Generative, NoiseSchedule, noise
from ddim_ode import round_trip as there_and_back
from ddim_ode.comparison import Reference
from ddim_ode.models.analytic import GaussianEpsilon
from ddim_ode.sampling import DEFAULTS, Default

SHAPE = (1, 4, 4)


def means(images):
    """Eight features of an image of 4 × 4 pixels."""
    return images.flatten(1).unflatten(1, (8, 2)).mean(dim=2)


means.name = "means"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of few cells, ``run(images)``, which returns its record and how many batches were sampled."""
    monkeypatch.setattr(table1, "STEPS", (2, 4, 1000))
    monkeypatch.setattr(table1, "ETAS", ("0", "1"))
    monkeypatch.setattr(table1, "SOLVERS", ("default", "ddim"))
    monkeypatch.setattr(table1, "BUDGETS", (5, 10))
    field = EpsilonField.from_sigma(
        GaussianEpsilon(torch.full(SHAPE, 0.1), torch.full(SHAPE, 0.2)), NoiseSchedule.linear(), shape=SHAPE
    )
    generator, counted = torch.Generator().manual_seed(0), []
    compared = tuple(Features("means", torch.randn((n, 8), generator=generator) * 0.3) for n in (60, 50))
    sample = table1.Cell.sample

    def counting(cell, field, first, n):
        counted.append((cell, first, n))
        return sample(cell, field, first, n)

    monkeypatch.setattr(table1.Cell, "sample", counting)
    path = tmp_path / "table1.json"

    def run(images, parts=table1.PARTS, data="somewhere"):
        counted.clear()
        table1.measure(field, means, compared, list(parts), images, data, tmp_path / "work", path)
        return json.loads(path.read_text("utf-8")), list(counted)

    return run


def test_samples_are_kept_batch_by_batch_and_rows_are_of_one_number(study, monkeypatch):
    record, counted = study(40)
    assert len(counted) == 2 * (5 * 2 + 2 * 2)  # 32 and 8 images of every cell; both rules are one at S = T
    again, counted = study(40)
    assert counted == []
    drop = lambda r: {k: v for k, v in r.items() if k != "circumstances"}
    assert [drop(again[part]) for part in table1.PARTS] == [drop(record[part]) for part in table1.PARTS]
    monkeypatch.setattr(table1, "STEPS", (2,))
    more, counted = study(50, ["table1"])
    assert {n for _, _, n in counted} == {18}  # the first batch was whole
    assert {row["samples"] for row in more["table1"]["rows"]} == {50}
    assert [row["steps"] for row in more["table1"]["rows"]] == [2] * 4
    assert more["table1b"] == again["table1b"]  # which says so itself
    assert {row["samples"] for row in study(50, ["table1"], "elsewhere")[0]["table1"]["rows"]} == {50}


def test_samples_of_another_sampler_are_made_again(study, monkeypatch):
    before, _ = study(10, ["table1b"])
    monkeypatch.setitem(DEFAULTS, "sample", Default("ab3", "karras", {}))
    after, counted = study(10, ["table1b"])
    assert [(cell.how, cell.steps) for cell, _, _ in counted] == [("default", 5), ("default", 10)]
    name = lambda record, how: {
        row["sampler"]["solver"] for row in record["table1b"]["rows"] if row["how"] == how
    }  # what the name stood for
    assert name(before, "default") != name(after, "default") == {"ab3"}
    assert name(before, "ddim") == name(after, "ddim")


def test_a_sampler_that_came_to_do_other_things_under_its_name_is_run_again(study, monkeypatch):
    study(10, ["table1"])
    step = Generative.step

    def other(solver, *arguments):
        x_bar, *rest = step(solver, *arguments)
        return x_bar * (1.0 + 1e-3 * solver.eta), *rest

    monkeypatch.setattr(Generative, "step", other)
    assert {cell.how for cell, _, _ in study(10, ["table1"])[1]} == {"1"}


def test_changes_go_from_each_number_to_the_next_and_to_all_steps_under_both_rules(study):
    record, _ = study(40)
    changes = record["table1"]["changes"]
    assert sorted((c["rule"], c["how"], c["from"], c["steps"]) for c in changes) == sorted(
        (rule, how, *pair) for rule in table1.RULES for how in ("0", "1") for pair in ((2, 4), (4, 1000))
    )
    rows = {(r["rule"], r["how"], r["steps"]): r for r in record["table1"]["rows"]}
    for c in changes:
        ends = [rows["linear" if S == 1000 else c["rule"], c["how"], S] for S in (c["steps"], c["from"])]
        assert c["kernel"] == pytest.approx(ends[0]["kernel"] - ends[1]["kernel"], abs=1e-12)
        assert c["frechet_error"] < np.hypot(ends[0]["frechet_error"], ends[1]["frechet_error"])  # it is paired
    assert {(c["how"], c["from"], c["steps"]) for c in record["table1b"]["changes"]} == {
        ("default", 5, 10), ("ddim", 5, 10),
    }  # fmt: skip
    shown = table1.changes(record, "table1", "kernel").splitlines()
    assert shown[2].startswith("| | linear 2 → 4 | linear 4 → 1000 | quadratic 2 → 4 | quadratic 4 → 1000 |")
    assert [table1.verdict(*pair) for pair in ((-2.1, 1.0), (-1.9, 1.0), (2.1, 1.0))] == ["better", "open", "worse"]


def test_tables_name_the_network_and_end_with_the_floor(study):
    record, _ = study(40)
    record["table1b"]["rows"][0]["floor"]["frechet"] = 12.34
    for measure in table1.MEASURES:
        text = table1.table(record, "table1", measure)
        assert text.startswith(f"{table1.MEASURES[measure][0]} of 40 samples from 60 images of somewhere, by means;")
        lines = text.splitlines()
        assert lines[2] == "| | linear 2 | linear 4 | quadratic 2 | quadratic 4 | 1000 |"
        assert lines[-1].startswith("| floor: other images | ")
        assert " ± " in lines[-1]
    figure = table1.draw(record)
    words = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    floor = record["table1"]["rows"][0]["floor"]
    assert words[0] == [f"floor {floor['frechet']:.1f} ± {2 * floor['frechet_error']:.1f}"]
    assert "means" in figure.get_suptitle()
    assert [axes.get_ylabel() for axes in figure.axes][::3] == [
        "Fréchet distance, ± 2 s.e.", "kernel distance × 10³, ± 2 s.e.",
    ]  # fmt: skip


def test_images_without_splits_are_halved_and_their_features_go_by_what_they_hold(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (21, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "a.npy", x)
    found = metrics.splits(str(tmp_path / "a.npy"))
    assert found["train"].shape[0] == 11
    assert found["test"].shape[0] == 10
    assert {image.tobytes() for image in found["train"]}.isdisjoint(image.tobytes() for image in found["test"])
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    monkeypatch.setattr(metrics, "EfficientNetLite0", lambda: means8)
    first = metrics.features_of(str(tmp_path / "a.npy"), "test")
    np.save(tmp_path / "b.npy", x)
    assert torch.equal(metrics.features_of(str(tmp_path / "b.npy"), "test").values, first.values)
    assert len(list((tmp_path / "out").glob("*.npz"))) == 1
    np.save(tmp_path / "a.npy", 255 - x)
    assert not torch.equal(metrics.features_of(str(tmp_path / "a.npy"), "test").values, first.values)


def means8(images):
    """Features of an image of 8 × 8 pixels."""
    return images.flatten(1).unflatten(1, (8, 8)).mean(dim=2)


means8.name = "means8"


def run(main, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["study", *map(str, arguments)])
        main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "some/folder"), "give --data"),
        (("--data", "digits"), "digits"),
        (("--data", "nowhere/at/all.npy"), "no images at nowhere"),
        (("--data", "fashion.npy", "--images", "31"), "5 at least and 30 at most"),
        (("--data", "fashion.npy", "--images", "4"), "5 at least"),
        (("--data", "colour.npy", "--images", "8"), r"\(1, 28, 28\).*\(3, 32, 32\)"),
        (("--figures-only",), "no .*table1.json to draw from"),
        (("--short", "--out", folders.RESULTS), "is no record"),
        (("--short", "--figures", folders.FIGURES), "is no record"),
    ],
)
def test_table1_refuses_before_it_samples(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shape in (("fashion", (60, 1, 28, 28)), ("colour", (60, 3, 32, 32))):
        x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.save(tmp_path / f"{name}.npy", x)
    monkeypatch.setattr(table1, "measure", lambda *_: pytest.fail("it went on"))
    monkeypatch.setattr(table1, "features_of", lambda *_: pytest.fail("it went on"))
    usual = () if "--short" in arguments else ("--out", tmp_path / "o", "--figures", tmp_path / "f")
    with pytest.raises(SystemExit, match=message):
        run(table1.main, *usual, *arguments)


def test_short_runs_have_a_place_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHORT", tmp_path / "short")
    options = lambda short, out=None: type("O", (), {"out": out, "figures": None, "short": short})()
    assert folders.folders(options(True)) == (tmp_path / "short", tmp_path / "short")
    assert folders.folders(options(True, tmp_path / "x")) == (tmp_path / "x", tmp_path / "short")
    assert folders.folders(options(False)) == (folders.RESULTS, folders.FIGURES)


@pytest.mark.parametrize("study", [discrete, paper_figures, proposition1, round_trip])
def test_figures_need_a_record(study, tmp_path):
    with pytest.raises(SystemExit, match="to draw from: run it without --figures-only first"):
        run(study.main, "--figures-only", "--out", tmp_path, "--figures", tmp_path)


def test_parts_that_are_recorded_are_left_out_unless_they_are_named(tmp_path, monkeypatch):
    calls = []

    def part(name):
        return lambda field, short: (calls.append(name), ({"rows": []}, {"x": np.zeros(1)}))[1]

    monkeypatch.setattr(paper_figures, "PARTS", {name: part(name) for name in ("figure3", "figure6")})
    monkeypatch.setattr(paper_figures, "draw", lambda *_: None)
    monkeypatch.setattr(paper_figures, "save_figure", lambda *_: None)
    out = ("--out", tmp_path, "--figures", tmp_path)
    run(paper_figures.main, *out)
    run(paper_figures.main, *out)
    assert calls == ["figure3", "figure6"]
    run(paper_figures.main, *out, "--parts", "figure6")
    assert calls == ["figure3", "figure6", "figure6"]
    run(paper_figures.main, *out, "--short")  # a record of another kind
    assert calls[3:] == ["figure3", "figure6"]
    (tmp_path / "paper_figures.npz").unlink()
    run(paper_figures.main, *out, "--short")
    assert len(calls) == 7
    monkeypatch.setattr("ddim_ode.__version__", "9")
    run(paper_figures.main, *out, "--short")
    assert len(calls) == 9


def test_the_power_of_a_time_is_found_where_a_line_fits_as_well():
    lengths = paper_figures.LENGTHS
    fit = paper_figures.line(lengths, [[1e-2 * S**1.05] * 3 for S in lengths])
    assert fit["r2"] > 0.9995  # which by itself would say that time is proportional
    assert fit["power"] == pytest.approx(1.05, abs=1e-9)
    assert fit["power_error"] < 1e-6
    assert fit["seconds_each"][0] == pytest.approx(1e-2 * 10**0.05)
    noisy = np.random.default_rng(0).normal(0.0, 0.02, len(lengths))
    fit = paper_figures.line(lengths, [[1e-2 * S * np.exp(e)] for S, e in zip(lengths, noisy, strict=True)])
    assert abs(fit["power"] - 1.0) < 3.0 * fit["power_error"] < 0.06


def test_figure_5_shows_shares_with_their_errors():
    rows = [{"eta": eta, "steps": S, "share": float(eta), "share_error": 0.02} for eta in ("0", "1") for S in (10, 20)]
    record = {"figure5": {"network": "means", "images": 4, "longest": 50, "rows": rows}}
    pictures = {
        f"figure5|{eta}|{S}": np.zeros((4, 1, 4, 4), np.uint8) for eta in ("0", "1") for S in (10, 20, 50)
    }  # uint8, as they are kept
    figure = paper_figures.draw(record, pictures, "figure5")
    panel = next(axes for axes in figure.axes if axes.get_xlabel() == "S")
    bars = [container for container in panel.containers if container.has_yerr]
    assert len(bars) == 2
    segments = bars[0][2][0].get_segments()
    assert segments[0][:, 1] == pytest.approx([-0.04, 0.04])
    assert "means" in panel.get_ylabel()
    assert any(line.get_ydata()[0] == 1.0 and line.get_linestyle() == ":" for line in panel.lines)


def test_table_2_has_errors_over_images_and_a_figure():
    field = EpsilonField.from_sigma(
        GaussianEpsilon(torch.zeros(2), torch.tensor([0.5, 1.5])), NoiseSchedule.linear(), shape=(2,)
    )
    images = 0.3 * noise((2,), 5, 1)
    case = object.__new__(round_trip.Case)
    case.field, case.images, case.range, case.exact = field, images, None, Reference(images, 0.0, 0, ("none",))
    found = round_trip.table2(case, (10, 20))
    trip = there_and_back(field, images, steps=20, solver="ddim", data_range=None)
    assert found["ddim"][1] == pytest.approx(float(trip.mse.mean()))
    assert found["ddim_error"][1] == pytest.approx(float(trip.mse.std() / 5**0.5))
    record = {"table2": {"network": found}}
    assert " ± " in round_trip.table2_page(record)
    panel = round_trip.draw_table2(record).axes[0]
    bars = panel.containers[0]
    low, high = bars[2][0].get_segments()[1][:, 1]
    assert high - found["ddim"][1] == pytest.approx(2.0 * found["ddim_error"][1])
    assert 0.0 < low < found["ddim"][1]
    # Records from before errors were kept are drawn without them.
    old = {"table2": {"network": {k: v for k, v in found.items() if not k.endswith("_error")}}}
    assert not round_trip.draw_table2(old).axes[0].containers[0].has_yerr
    assert " ± " not in round_trip.table2_page(old)


def test_tables_go_into_a_page_between_their_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- x:begin -->old<!-- x:end -->\nb <!-- y:begin --><!-- y:end -->\n", "utf-8")
    folders.into_page("page.md", {"x": "| new |"})
    assert page.read_text("utf-8") == "a\n<!-- x:begin -->\n| new |\n<!-- x:end -->\nb <!-- y:begin --><!-- y:end -->\n"
    with pytest.raises(ValueError):
        folders.into_page("page.md", {"x": "| newer |", "z": ""})
    assert "newer" not in page.read_text("utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["page.md"]
