r"""What calibrated solvers are worth: on latents that nothing was fitted to, by problem, direction, calls and number of trajectories.

Parts:

``unseen``
    Errors at each number of calls, beside the unfitted default and, sampling at 5, 10 and 20 calls, the best setting of every released
    peer: of the settings that came close to its best in ``peers.py``, the one that is best *by the error it is then reported with*.
``trajectories``
    Errors by the number of trajectories that a calibration was given, 4 to 64 (32 on the larger network), of which it holds back a
    third.
``quality``
    The Fréchet and kernel distance, precision and recall of samples at 5 and 10 calls, default and calibrated from the same latents,
    without and with ``consistent=True``, and the floor.

Run from the root of a checkout::

    python -m benchmarks.calibration [--parts …] [--problems …] [--figures-only]

Solvers are kept in ``out/calibration``, and not fitted again where they are: after a change to how they are fitted, remove them.
Rows that ``calibration.json`` has are not run again either, unless ``--again`` is given. Hours on one thread, most of them the
networks at 20 calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

import ddim_ode
from benchmarks import peers
from benchmarks.contenders import PACKAGES
from benchmarks.folders import into_page
from benchmarks.metrics import features_of
from benchmarks.problems import NETWORKS, PROBLEMS, Problem, problem
from ddim_ode import Calibrated, EfficientNetLite0, Features, LatentWarning, calibrate, load_solver, quality
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.metrics import rms
from ddim_ode.plotting import save_figure

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("unseen", "trajectories", "quality")
DIRECTIONS = ("sample", "encode")
#: Where peers run, and calls of calibrated solvers; more of them on the digits, which take seconds each.
CONTESTED = (5, 10, 20)
CALLS = {"digits": (4, 5, 6, 8, 10, 12, 15, 20)}
#: Trajectories given, and latents that errors are measured on.
GIVEN = {"network-cifar10": 24}
OTHERWISE = 48
UNSEEN = {"digits": 512, "network": 32, "network-cifar10": 12}
MANY = 128
NUMBERS = (4, 8, 16, 32, 64)
#: The most of them where more would take hours.
FEWER = {"network-cifar10": 32}
#: Calibrated error over that of the best peer, on networks, at most.
TARGETS = {5: 0.5, 10: 0.5, 20: 0.6}
#: Seeds of what is fitted to, and of what is not.
FITTED, HELD_OUT = 100, 2
#: Images of the quality part, and the default's calls that stand in for the exact trajectories there.
IMAGES, NEARLY_EXACT = 1000, 50


def solver(name: str, task: Problem, nfe: int, direction: str, n: int, consistent: bool = False) -> Calibrated:
    """A calibrated solver, from ``out/calibration`` if it is there."""
    stem = f"{name}-{direction}-{nfe}-{n}" + ("-consistent" if consistent else "")
    path = output_folder(ROOT / "out/calibration") / f"{stem}.json"
    if path.exists():
        return load_solver(path)
    found = calibrate(task.field, nfe, n=n, seed=FITTED, direction=direction, consistent=consistent)
    found.save(path)
    return found


def errors(each: Tensor) -> dict[str, float]:
    """Of the samples' errors: RMS over all, the geometric mean, and the worst."""
    return {
        "rms": float(each.square().mean().sqrt()),
        "geometric": float(each.clamp(min=1e-300).log().mean().exp()),
        "worst": float(each.max()),
    }


def run(task: Problem, direction: str, **options: Any) -> Tensor:
    """The error of each sample in one run over the latents, or over the images that they lead to."""
    if direction == "sample":
        return rms(ddim_ode.sample(task.field, task.latent, **options).x, task.exact)
    return rms(ddim_ode.encode(task.field, task.exact, data_range=None, **options).x, task.latent)


def both(task: Problem, direction: str, nfe: int, own: Calibrated) -> dict[str, Any]:
    """Errors of a calibrated solver and of the default, and in how many samples the first is the nearer."""
    each, default = run(task, direction, solver=own), run(task, direction, nfe=nfe)
    nearer = int((each < default).sum())
    return {"calibrated": errors(each), "default": errors(default), "nearer": nearer} | told(own)


def round_trips(task: Problem, nfe: int, up: Calibrated, down: Calibrated) -> dict[str, dict[str, float]]:
    """Errors of the images that come back from the latents alone, by calibrated solvers both ways and by the defaults."""
    found = {}
    for how, there, back in (("calibrated", {"solver": up}, {"solver": down}), ("default", {"nfe": nfe}, {"nfe": nfe})):
        latent = ddim_ode.encode(task.field, task.exact, data_range=None, **there).x
        found[how] = errors(rms(ddim_ode.sample(task.field, latent, **back).x, task.exact))
    return found


Save = Callable[[Any], None]


def unseen(name: str, known: dict[str, Any], had: dict[str, Any], save: Save) -> None:
    """One problem: calibrated solvers, the default, peers; saved row by row, beside what it `had`."""
    task = problem(name, UNSEEN.get(name, MANY), HELD_OUT)
    given = GIVEN.get(name, OTHERWISE)
    rows, found = had.get("rows", []), had.get("peers")
    about: dict[str, Any] = {"latents": len(task.latent), "dimension": task.latent[0].numel(), "trajectories": given}
    about |= {"reference_difference": task.difference}
    for nfe, direction in itertools.product(CALLS.get(name, CONTESTED), DIRECTIONS):
        if any((row["direction"], row["nfe"]) == (direction, nfe) for row in rows):
            continue
        own = solver(name, task, nfe, direction, given)
        row: dict[str, Any] = {"direction": direction, "nfe": nfe} | both(task, direction, nfe, own)
        if direction == "encode":
            row["round_trip"] = round_trips(task, nfe, own, solver(name, task, nfe, "sample", given))
        else:
            row["calls_of_default"] = worth(task, nfe, row["calibrated"]["geometric"])
        rows = [*rows, row | circumstances(task.field, torch.float64)]
        save(about | {"rows": rows, "peers": found})
        print(f"{name} {direction} {nfe}: {row['calibrated']} default {row['default']}, {row['kept']}", flush=True)
    if found is None:
        save(about | {"rows": rows, "peers": contest(name, task, known)})


def told(own: Calibrated) -> dict[str, Any]:
    """What a calibration says of itself."""
    record = own.record
    return {
        "kept": record["kept"], "leap": record["leap"], "stages": record["stages"], "gap": record["gap"], "calls": record["calls"],
        "seconds": record["seconds"], "high_frequencies": record["high_frequencies"], "reference": record["reference"],
    }  # fmt: skip


def worth(task: Problem, nfe: int, error: float) -> int | None:
    """How many calls the default takes to be as accurate, by the geometric mean; None: more than 50."""
    more = range(nfe, 51)
    return next((calls for calls in more if errors(run(task, "sample", nfe=calls))["geometric"] <= error), None)


def contest(name: str, task: Problem, known: dict[str, Any]) -> dict[str, Any]:
    """The best of every peer: of settings close to its best on this problem by the record, or else as for a problem not swept yet."""
    found = {}
    for package in PACKAGES:
        close = known.get(name, {}).get("packages", {}).get(package, {}).get("close", {})
        other = peers.chooser(name, package, known)

        def chosen(setting: str, budget: int, close: Any = close, other: Any = other, package: str = package) -> bool:
            if budget not in CONTESTED:
                return False
            if not close:
                return other(setting, budget)
            return setting.removeprefix(f"{package}/") in close.get(str(budget), {})

        result = peers.contest(package, task, chosen)
        found[package] = (
            result if "missing" in result else {key: result[key] for key in ("runs", "best", "best_custom", "failed")}
        )
        print(f"{name}: {package} done", flush=True)
    return found


def trajectories(name: str, had: list[dict[str, Any]], save: Save) -> None:
    """Errors on unseen latents by the number of trajectories given; saved row by row."""
    task, rows = problem(name, UNSEEN.get(name, MANY), HELD_OUT), had
    for nfe, n in itertools.product((5, 10), NUMBERS):
        if n > FEWER.get(name, n) or any((row["nfe"], row["n"]) == (nfe, n) for row in rows):
            continue
        own = solver(name, task, nfe, "sample", n)
        row = {"nfe": nfe, "n": n} | both(task, "sample", nfe, own)
        rows = [*rows, row | circumstances(task.field, torch.float64)]
        save(rows)
        print(f"{name} {nfe} calls from {n}: {row['calibrated']}, {own.record['kept']}", flush=True)


def distances(name: str, save: Save) -> None:
    """Distances of samples from test images, calibrated and default, from the same latents."""
    data = NETWORKS[name]
    reference, floor, network = features_of(data, "test"), features_of(data, "train"), EfficientNetLite0()
    task, given = problem(name, UNSEEN[name], HELD_OUT), GIVEN.get(name, OTHERWISE)

    def features(**options: Any) -> Features:
        x = ddim_ode.sample(task.field, n=IMAGES, seed=0, batch_size=50, **options).x
        return Features.of(x.clamp(-1.0, 1.0).float(), network)

    exact = features(nfe=NEARLY_EXACT)
    best = quality(exact, reference, floor).record()
    rows: list[dict[str, Any]] = []
    for nfe in (5, 10):
        own = {
            how: solver(name, task, nfe, "sample", given, consistent)
            for how, consistent in (("calibrated", False), ("consistent", True))
        }
        options = {"default": {"nfe": nfe}} | {how: {"solver": x} for how, x in own.items()}
        found = {how: features(**chosen) for how, chosen in options.items()}
        seen = {how: quality(x, reference, floor) for how, x in found.items()}
        row: dict[str, Any] = {"nfe": nfe, "images": IMAGES, "network": network.name, "data": data, "exact": best}
        row |= {"exact_nfe": NEARLY_EXACT, "kept": {how: x.record["kept"] for how, x in own.items()}}
        row["solvers"] = {how: x.record() for how, x in seen.items()}
        row["apart"] = {how: float((x.values - exact.values).square().sum(1).mean().sqrt()) for how, x in found.items()}
        row["error"] = {how: errors(run(task, "sample", **chosen)) for how, chosen in options.items()}
        more = {how: seen[how].difference(seen["default"], paired=True) for how in own}
        row["more"] = {
            how: {key: {"value": e.value, "error": e.error} for key, e in x.items()} for how, x in more.items()
        }
        rows.append(row | circumstances(task.field, torch.float64))
        save(rows)
        print(f"{name} {nfe}: {rows[-1]['more']}", flush=True)


# -- showing ------------------------------------------------------------------------------------
def best_peer(found: dict[str, Any], nfe: int) -> tuple[str, float] | None:
    """The package whose best setting has the least RMS error at a budget."""
    errors_ = {
        package: row["rms"]
        for package, result in (found["peers"] or {}).items()
        for row in result.get("best", ())
        if row["nfe"] == nfe and row["rms"] is not None and math.isfinite(row["rms"])
    }
    return min(errors_.items(), key=lambda item: item[1]) if errors_ else None


def _error(x: float) -> str:
    return f"{x:.2g}" if x < 1e-3 else f"{x:.4f}"


def _beside(own: dict[str, float], default: dict[str, float]) -> list[str]:
    """RMS and geometric mean, the default's, and the ratios."""
    cells = []
    for key in ("rms", "geometric"):
        cells += [f"**{_error(own[key])}**", _error(default[key]), f"{own[key] / default[key]:.2f}"]
    return cells


def table_unseen(record: dict[str, Any]) -> str:
    """Errors by problem, direction and calls."""
    lines = [
        "| problem (D) | way | calls | calibrated: RMS | default | ratio | geometric mean | default | ratio | nearer "
        "| best peer, RMS | ratio | kept | calls from σ | gap | high frequencies |",
        "|---" * 16 + "|",
    ]
    for name, found in record["unseen"].items():
        for row in sorted(found["rows"], key=lambda row: DIRECTIONS.index(row["direction"])):
            own, default = row["calibrated"], row["default"]
            cells = [f"{name} ({found['dimension']})", row["direction"], str(row["nfe"])]
            cells += _beside(own, default)
            cells.append(f"{row['nearer']} of {found['latents']}")
            peer = best_peer(found, row["nfe"]) if row["direction"] == "sample" else None
            if peer is None:
                cells += ["", ""]
            else:
                ratio = own["rms"] / peer[1]
                missed = name in NETWORKS and ratio > TARGETS[row["nfe"]]
                cells += [
                    f"{_error(peer[1])} ({peer[0]})",
                    f"{ratio:.2f}" + (f" (target {TARGETS[row['nfe']]:g}: missed)" if missed else ""),
                ]
            level = "σ_T" if row["leap"] is None else f"{row['leap']:.3g}"
            fine = " → ".join(f"{row['high_frequencies'][how]:.2f}" for how in ("default", "kept"))
            cells += [row["kept"], level, f"{row['gap']:.2f}", fine]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_round_trips(record: dict[str, Any]) -> str:
    """What comes back from latents alone, there and back in the same number of calls each."""
    lines = [
        "| problem | calls each way | calibrated: RMS | default | ratio | geometric mean | default | ratio |",
        "|---" * 8 + "|",
    ]
    for name, found in record["unseen"].items():
        for row in found["rows"]:
            if row["direction"] == "encode":
                own, default = row["round_trip"]["calibrated"], row["round_trip"]["default"]
                lines.append("| " + " | ".join((name, str(row["nfe"]), *_beside(own, default))) + " |")
    return "\n".join(lines)


def table_cost(record: dict[str, Any]) -> str:
    """What calibrations cost, and after how many images they have paid."""
    lines = [
        "| problem | calls | model evaluations spent | seconds, one thread | as accurate as the default at | paid after images |",
        "|---" * 6 + "|",
    ]
    for name, found in record["unseen"].items():
        for row in found["rows"]:
            if row["direction"] == "encode":
                continue
            worth_ = row["calls_of_default"]
            saved = None if worth_ is None else worth_ - row["nfe"]
            paid = (
                f"less than {row['calls'] / (51 - row['nfe']):,.0f}"
                if saved is None
                else "never"
                if saved <= 0
                else f"{row['calls'] / saved:,.0f}"
            )
            at = "more than 50 calls" if worth_ is None else f"{worth_} calls"
            lines.append(f"| {name} | {row['nfe']} | {row['calls']:,} | {row['seconds']:.0f} | {at} | {paid} |")
    return "\n".join(lines)


def table_trajectories(record: dict[str, Any]) -> str:
    """Errors by the number of trajectories, as shares of the default's."""
    lines = ["| problem | calls | " + " | ".join(f"n = {n}" for n in NUMBERS) + " |", "|---" * (2 + len(NUMBERS)) + "|"]
    for name, rows in record["trajectories"].items():
        for nfe in (5, 10):
            cells = []
            for n in NUMBERS:
                row = next((r for r in rows if r["nfe"] == nfe and r["n"] == n), None)
                if row is None:
                    cells.append("")
                    continue
                shares = [row["calibrated"][key] / row["default"][key] for key in ("rms", "geometric")]
                cells.append(f"{shares[0]:.2f} / {shares[1]:.2f}" + (" (default)" if row["kept"] == "default" else ""))
            lines.append(f"| {name} | {nfe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_quality(record: dict[str, Any]) -> str:
    """Distances and shares, what exact trajectories have, and paired differences from the default."""
    lines = [
        "| problem | calls | measure | default | calibrated | beside it | consistent | beside it | exact trajectories | floor |",
        "|---" * 10 + "|",
    ]
    measures = (
        ("frechet", 1.0, 2, "Fréchet"), ("kernel", 1e3, 2, "kernel × 10³"), ("precision", 1.0, 3, "precision"),
        ("recall", 1.0, 3, "recall"),
    )  # fmt: skip
    for name, rows in record["quality"].items():
        for row in rows:
            others = [how for how in row["solvers"] if how != "default"]
            for key, scale, digits, words in measures:

                def shown(of: dict[str, Any], key: str = key, scale: float = scale, digits: int = digits) -> str:
                    return f"{scale * of[key]:.{digits}f} ± {scale * of[f'{key}_error']:.{digits}f}"

                cells = [shown(row["solvers"]["default"])]
                for how in others:
                    more = row["more"][how][key]
                    cells.append(shown(row["solvers"][how]))
                    cells.append(f"{scale * more['value']:+.{digits}f} ± {scale * more['error']:.{digits}f}")
                cells += [shown(row["exact"]), shown(row["solvers"]["default"]["floor"])]
                lines.append(f"| {name} | {row['nfe']} | {words} | " + " | ".join(cells) + " |")
            apart = {how: (x, f"{x:.2f}") for how, x in row["apart"].items()}
            off = {how: (x["rms"], _error(x["rms"])) for how, x in row["error"].items()}
            for words, of in (("features of the same latent, RMS", apart), ("image of the same latent, RMS", off)):
                cells = [of["default"][1]]
                for how in others:
                    cells += [of[how][1], f"× {of[how][0] / of['default'][0]:.2f}"]
                lines.append(f"| {name} | {row['nfe']} | {words} | " + " | ".join((*cells, "0", "")) + " |")
    return "\n".join(lines)


TABLES = {
    "unseen": (table_unseen, "unseen"), "round-trips": (table_round_trips, "unseen"), "cost": (table_cost, "unseen"),
    "trajectories": (table_trajectories, "trajectories"), "quality": (table_quality, "quality"),
}  # fmt: skip


def figure(record: dict[str, Any]) -> Figure:
    """Errors against calls, a column a problem, sampling above and encoding below; and against trajectories."""
    found = record.get("unseen", {})
    columns = max(1, len(found))
    drawn = Figure(figsize=(2.9 * columns + 0.6, 8.2), layout="constrained")
    panels = drawn.subplots(3, columns, squeeze=False)
    for column, (name, result) in enumerate(found.items()):
        for axes, direction in zip(panels[:2, column], DIRECTIONS, strict=True):
            rows = [row for row in result["rows"] if row["direction"] == direction]
            at = [row["nfe"] for row in rows]
            for how, colour in (("default", "tab:blue"), ("calibrated", "black")):
                for key, words, look in (("rms", "RMS", "-"), ("geometric", "geometric mean", "--")):
                    values = [row[how][key] for row in rows]
                    axes.plot(at, values, look, color=colour, marker="o", ms=3, lw=1.1, label=f"{how}, {words}")
            if direction == "sample":
                contested = [(nfe, peer[1]) for nfe in CONTESTED if (peer := best_peer(result, nfe))]
                axes.plot(
                    [nfe for nfe, _ in contested],
                    [e for _, e in contested],
                    "s",
                    color="tab:red",
                    ms=4.5,
                    label="best peer, RMS",
                )
                axes.set_title(f"{name}, D = {result['dimension']}", fontsize=9)
            axes.set(yscale="log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([4, 5, 10, 15, 20])
            axes.grid(alpha=0.3)
            axes.set_xlabel("calls", fontsize=8)
        axes, rows = panels[2, column], record.get("trajectories", {}).get(name, [])
        axes.set_visible(bool(rows))
        for nfe, colour in ((5, "tab:green"), (10, "tab:purple")):
            own = [row for row in rows if row["nfe"] == nfe]
            for key, style in (("rms", "-"), ("geometric", "--")):
                shares = [row["calibrated"][key] / row["default"][key] for row in own]
                axes.plot(
                    [row["n"] for row in own],
                    shares,
                    style,
                    color=colour,
                    marker="o",
                    ms=3.5,
                    label=f"{nfe} calls, {key}",
                )
        axes.axhline(1.0, color="0.6", ls=":")
        axes.set(xscale="log", yscale="log", xlabel="trajectories given")
        axes.set_xticks(NUMBERS, list(map(str, NUMBERS)))
        axes.set_yticks([0.1, 0.2, 0.5, 1.0, 2.0], ["0.1", "0.2", "0.5", "1", "2"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes, words in zip(
        panels[:, 0],
        ("sampling: error of images", "encoding: error of latents", "share of the default's error"),
        strict=True,
    ):
        axes.set_ylabel(words, fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, fontsize=7, ncols=5, loc="outside upper center")
    for axes in [axes for axes in panels[2] if axes.get_visible()][:1]:
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles, labels, fontsize=7, ncols=4, loc="outside lower center")
    return drawn


def show(record: dict[str, Any]) -> None:
    """The figure, and the tables into the page, from the record alone."""
    output_folder(ROOT / "docs/figures")
    save_figure(figure(record), ROOT / "docs/figures/calibration.png")
    into_page("calibration.md", {name: make(record) for name, (make, part) in TABLES.items() if part in record})


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="on which")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for calibration.json")
    parser.add_argument("--again", action="store_true", help="run what is recorded too")
    parser.add_argument("--figures-only", action="store_true", help="draw the figure and the tables from the record")
    options = parser.parse_args()
    path = output_folder(options.out) / "calibration.json"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LatentWarning)
    known = json.loads((ROOT / "benchmarks/results/peers.json").read_text("utf-8"))["problems"]
    for part, name in () if options.figures_only else itertools.product(options.parts, options.problems):
        if part == "quality" and name not in NETWORKS:
            continue  # mixtures are no pictures worth judging
        had = None if options.again else _recorded(path).get(part, {}).get(name)

        def save(found: Any, part: str = part, name: str = name) -> None:
            # Read again: another run may have recorded its problems in the meantime.
            record = _recorded(path) | {"study": "calibration", "peers": peers.versions(), "targets": TARGETS}
            record[part] = {n: x for n in PROBLEMS if (x := (record.get(part, {}) | {name: found}).get(n)) is not None}
            write_json(path, record)

        try:
            if part == "unseen":
                unseen(name, known, had or {}, save)
            elif part == "trajectories":
                trajectories(name, had or [], save)
            elif had is None:
                distances(name, save)
        except OSError as error:
            print(f"{name}: not run, {error}", flush=True)
    show(json.loads(path.read_text("utf-8")))


def _recorded(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


if __name__ == "__main__":
    main()
