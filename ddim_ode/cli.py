"""``ddim-ode``: the package at a terminal.

Exit codes: 0, all well; 1, the work was done but some samples failed (they are named); 2, the request could not
be carried out, and no result was written; 130, interrupted; 143, training stopped by SIGTERM, its state saved.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm

import ddim_ode
from ddim_ode import data, datasets, plotting
from ddim_ode.calibration import SAMPLES, calibrate, check_calibration
from ddim_ode.checking import check
from ddim_ode.codes import Code, is_code, load_code
from ddim_ode.comparison import by_name, check_budgets, circumstances, compare, reference, refuse_unbudgeted
from ddim_ode.diffusion.generative import Generative
from ddim_ode.field import EpsilonField
from ddim_ode.files import output_folder, to_json, write_json
from ddim_ode.grid import Grid, grids
from ddim_ode.latents import attribute_direction, gaussianity, move_latent
from ddim_ode.likelihood import EXACT_UP_TO, log_density
from ddim_ode.metrics import mse
from ddim_ode.models.checkpoints import bundled, load, save_model
from ddim_ode.models.pipelines import ModelWarning
from ddim_ode.models.unet import GaussianResidual
from ddim_ode.noise import noise
from ddim_ode.quality import EfficientNetLite0
from ddim_ode.reconstruction import reconstruct
from ddim_ode.sampling import (
    DEFAULTS,
    GRID,
    LatentWarning,
    both_ways,
    check_code,
    decode,
    encode,
    interpolate,
    plan,
    sample,
)
from ddim_ode.schedule import NoiseSchedule, whole
from ddim_ode.solution import Solution, Status
from ddim_ode.solvers import Adaptive, Scipy, Solver, TorchDiffEq, get, solvers
from ddim_ode.solvers.calibrated import Calibrated, load_solver
from ddim_ode.training import TrainingOptions, begin, train

__all__ = ["main"]

_FAILURES = {
    Status.NONFINITE: "non-finite",
    Status.MAX_STEPS: "max_steps reached",
    Status.STALLED: "steps too small to go on",
    Status.UNCONVERGED: "equations not solved to their tolerance",
}
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever stands in for one may not have the method
            stream.reconfigure(errors="replace")  # a terminal without σ shows ?
    options = _parser().parse_args(arguments)
    options.made = []
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"ddim-ode: warning: {message}", file=sys.stderr)
            return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"ddim-ode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ddim-ode: interrupted", file=sys.stderr)
        return 130
    finally:
        for folder in options.made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


# -- commands -----------------------------------------------------------------------------------
def _compare(o: argparse.Namespace) -> int:
    field, dtype = _field(o), _DTYPES[o.dtype]
    # A solver or a budget given twice is measured once.
    given = {name: name if name == "default" else _solver(o, name) for name in _split(o.solvers)}
    methods = by_name(list(given.values()))
    names = list(methods)
    refuse_unbudgeted(methods, "--solvers")
    _refuse_force(o, methods.values())
    budgets = list(dict.fromkeys(_whole(x, "--nfe") for x in _split(o.nfe)))
    _whole(o.reference_nfe, "--reference-nfe", get("ab4-rk").nfe(1))  # for the reference itself would call it nfe
    if not names or not budgets:
        raise ValueError("compare needs at least one name in --solvers and one budget in --nfe")
    images = _images(o, field, _whole(o.n_images, "--n-images"))
    latent = noise(_shape(field), o.n, o.seed).to(field.device or "cpu")
    check_budgets(field, methods, budgets, o.grid, "--nfe")
    out = _folder(o, o.out)
    with tqdm(total=1 + len(names) * len(budgets), desc="compare", disable=None, leave=False) as bar:

        def advance(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        advance("reference")
        exact = reference(field, latent, nfe=o.reference_nfe)
        every = list(given.values())
        found = compare(field, latent, images, every, budgets, grid=o.grid, dtype=dtype, exact=exact, advance=advance)
    record = {"command": "compare", "model": o.model, "seed": o.seed} | found.record | _calibrated(given, methods)
    write_json(out / "results.json", record)
    plotting.save_figure(plotting.error_figure(record), out / "error.png")
    plotting.save_figure(plotting.round_trip_figure(record), out / "round_trip.png")
    written = ["results.json", "error.png", "round_trip.png"]
    if len(_picture_shape(field)) == 3 and _picture_shape(field)[0] in (1, 3):
        written += _sheets(field, found, exact.x, images, names, budgets, out)
    if o.json:
        print(to_json(record))
    else:
        _print_comparison(record)
        print(f"\nwritten to {out}: {', '.join(written)}")
    return 1 if any(row["failed"] for row in record["rows"]) else 0


def _sheets(
    field: EpsilonField, found: Any, exact: Tensor, images: Tensor, names: list[str], budgets: list[int], out: Path
) -> list[str]:
    """The two sheets of pictures: samples beside the reference's, reconstructions beside the originals."""
    shown = min(4, exact.shape[0], images.shape[0])
    pictures = lambda x: _pictures(field, x[:shown])
    columns = [f"{nfe} calls" for nfe in budgets]
    for kind, first, label, made in (
        ("samples", exact, "reference", found.samples),
        ("reconstructions", images, "original", found.reconstructions),
    ):
        rows: list[tuple[str, list[Tensor]]] = [(label, [pictures(first)] * len(budgets))]
        for name in names:
            blank = torch.ones_like(rows[0][1][0])
            rows.append((name, [pictures(made[name, nfe]) if (name, nfe) in made else blank for nfe in budgets]))
        title = "The same latents" if kind == "samples" else "The same images, encoded and decoded (calls each way)"
        plotting.save_figure(plotting.sheet_figure(rows, columns, title), out / f"{kind}.png")
    return ["samples.png", "reconstructions.png"]


def _print_comparison(record: dict[str, Any]) -> None:
    exact = record["reference"]
    there, back = (
        f"{d['solver']} on {d['grid']}" for d in (record["defaults"]["sample"], record["defaults"]["encode"])
    )
    print(
        f"{record['samples']} samples and {record['images']} images; grid {record['grid']}; "
        f"default: {there} (encoding: {back})"
    )
    print(f"reference: {exact['methods'][0]}; {exact['methods'][1]} differs by {exact['rms_difference']:.1e} RMS\n")
    budgets = list(dict.fromkeys(row["nfe"] for row in record["rows"]))
    for title, key, form in (
        ("RMS error of samples", "rms", ".2e"),
        ("Round trip, MSE on [0, 1]", "round_trip_mse", ".2e"),
        ("Seconds to sample", "seconds", ".2f"),
    ):
        print(f"{title:<26}" + "".join(f"{n:>9} calls" for n in budgets))
        for name in dict.fromkeys(row["solver"] for row in record["rows"]):
            cells = [row[key] for row in record["rows"] if row["solver"] == name]
            print(f"  {name:<24}" + "".join(f"{'–' if c is None else format(c, form):>15}" for c in cells))
        print()
    _print_ways(record)


def _calibrate(o: argparse.Namespace) -> int:
    field = _field(o)
    budgets = list(dict.fromkeys(_whole(x, "--nfe", 2) for x in _split(o.nfe)))
    if not budgets:
        raise ValueError("calibrate needs at least one budget in --nfe")
    count = _whole(SAMPLES if o.n is None else o.n, "--n", 4)
    options: dict[str, Any] = {"direction": o.direction, "refine": o.refine, "batch_size": o.batch_size}
    options |= {"reference_nfe": o.reference_nfe, "seed": o.seed}
    if o.latent is not None:
        options |= {"latents": _latent(o, field), "n": o.n}
    if o.images is not None:
        options["images"] = _images(o, field, count)
    if o.latent is None and o.images is None:
        options["n"] = count
    options["network"] = _features(o, field)
    for nfe in budgets:
        try:
            check_calibration(field, nfe, **options)
        except ValueError as error:
            raise ValueError(f"--nfe {nfe}: {error}") from error
    # Solvers of both ways have room in one folder.
    way = "-encode" if o.direction == "encode" else ""
    results, drawn = f"results{way}.json", f"calibration{way}.png"
    out = _folder(o, o.out)
    rows: list[dict[str, Any]] = []
    record = {"command": "calibrate", "model": o.model, "direction": o.direction, "latent": o.latent, "data": o.images}
    record |= {"refine": o.refine, "consistent": o.consistent, "rows": rows} | circumstances(field, torch.float64)
    with tqdm(total=len(budgets), desc="calibrate", unit="solver", disable=None, leave=False) as bar:
        for nfe in budgets:
            advance = lambda what, nfe=nfe: bar.set_postfix_str(f"{nfe} calls: {what}")
            try:
                made = calibrate(field, nfe, consistent=o.consistent, advance=advance, **options)
            except ValueError as error:  # of this budget: the others stand, and are written
                rows.append({"nfe": nfe, "error": str(error)})
            else:
                made.save(out / f"calibrated{way}-{nfe}.json")
                rows.append(
                    {"nfe": nfe, "error": None, "file": f"calibrated{way}-{nfe}.json", "sha256": made.sha256}
                    | made.record
                )
                write_json(out / results, record)
            bar.update()
    done = [row for row in rows if row["error"] is None]
    if not done:
        raise ValueError(f"--nfe {rows[0]['nfe']}: {rows[0]['error']}")
    write_json(out / results, record)
    plotting.save_figure(plotting.calibration_figure(record), out / drawn)
    if o.json:
        print(to_json(record))
    else:
        _print_calibration(done)
        print(f"\nwritten to {out}: {', '.join((*(row['file'] for row in done), results, drawn))}")
    for row in rows:
        if row["error"] is not None:
            print(f"ddim-ode: --nfe {row['nfe']}: {row['error']}", file=sys.stderr)
        elif row["trajectories"]["dropped"]:
            lost = ", ".join(map(str, row["trajectories"]["dropped"]))
            print(
                f"ddim-ode: --nfe {row['nfe']}: non-finite in reference trajectories {lost}, left out", file=sys.stderr
            )
    return int(any(row["error"] is not None or row["trajectories"]["dropped"] for row in rows))


def _features(o: argparse.Namespace, field: EpsilonField) -> EfficientNetLite0 | None:
    """What sees features of samples, if it is here and they are pictures; of latents there are none to see."""
    if o.direction == "encode":
        return None
    shape = _picture_shape(field)
    if len(shape) != 3 or shape[0] not in (1, 3):
        why = f"samples of shape {shape} are no pictures"
    else:
        try:
            return EfficientNetLite0()
        except ImportError as error:
            why = str(error)
    print(f"ddim-ode: note: distances of features are left out: {why}", file=sys.stderr)
    return None


def _print_calibration(rows: list[dict[str, Any]]) -> None:
    halves = rows[0]["trajectories"]
    print(
        f"{rows[0]['direction']}: RMS errors on {halves['fitted']} trajectories that were fitted to and {halves['held_back']} "
        "that were held back; calls are of one sample each\n"
    )
    print(f"{'':<41}{'default':^20}{'kept':^29}{'reference':^20}")
    heads = ("fitted", "held back", "fitted", "held back", "gap", "calls", "differs", "all calls", "seconds")
    widths = (9, 11, 9, 11, 9, 10, 10, 12, 9)
    line = lambda cells: "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    print(f"{'nfe':>5}  {'kept':<34}" + line(heads))
    for row in rows:
        default, kept = (_stage(row, name) for name in ("default", row["kept"]))
        exact = row["reference"]
        errors = [format(stage[half], ".1e") for stage in (default, kept) for half in ("fitted", "held_back")]
        cells = (*errors, f"{row['gap']:.2f}", exact["calls"], f"{exact['rms_difference']:.0e}", row["calls"])
        way = "to" if row["direction"] == "encode" else "from"
        kept_ = row["kept"] + ("" if row["leap"] is None else f", {way} σ {row['leap']:.3g}")
        print(f"{row['nfe']:>5}  {kept_:<34}" + line((*cells, f"{row['seconds']:.1f}")))
    print()
    for row in rows:
        at = f"at {row['nfe']} calls"
        default, kept = (_stage(row, name)["held_back"] for name in ("default", row["kept"]))
        if row["kept"] == "default":
            print(f"{at} the default was kept: nothing was better, beyond chance, on what was held back")
        else:
            words = "of the default's error on what was held back, which also chose it"
            print(f"{at} {kept / default:.2g} {words}; {row['base']} fitted")
        if "features" in row:
            seen = row["features"]
            print(
                f"    features are {seen['default']:.3g} from the reference's by the default, {seen['kept']:.3g} by it"
            )
    if "features" in rows[0]:
        print(f"features: RMS distances of those of {rows[0]['features']['network']}")


def _stage(row: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in row["stages"] if stage["stage"] == name)


def _sample(o: argparse.Namespace) -> int:
    field = _field(o)
    if o.latent is None:
        latent = noise(_shape(field), 16 if o.n is None else o.n, o.seed).to(field.device or "cpu")
    else:
        latent = _latent(o, field)
    chosen, named = _generative(o), _named(o)
    options = _run_options(o, field, "sample", chosen or named)
    _check_out(o, _picture_shape(field), len(latent))
    run = sample(field, latent, n=o.n, seed=o.seed, **options)
    if o.latent is not None and (chosen is None or not chosen.stochastic):
        o.seed = None  # nothing was drawn
    data.write_images(o.out, _pictures(field, run.x))
    return _report(o, field, {"sample": run})


def _decode(o: argparse.Namespace) -> int:
    field = _field(o)
    coded = Path(o.latent).is_file() and is_code(o.latent)
    if coded:
        code = load_code(o.latent, field.device or "cpu")
        options = _code_options(o)
        # Refused here, before a folder is made, if it cannot be decoded so.
        check_code(field, code, force=o.force, **options)
        count = len(code.latent)
    else:
        named = _toleranced(o)
        if o.force and not isinstance(named, Calibrated):
            raise ValueError(
                f"--force is for codes and calibrated solvers, and neither {o.latent} nor --solver is one: leave it out"
            )
        latent, options = _latent(o, field), _run_options(o, field, "sample", named)
        count = len(latent)
    _check_out(o, _picture_shape(field), count)
    run = decode(field, code, force=o.force, progress=True, **options) if coded else decode(field, latent, **options)
    data.write_images(o.out, _pictures(field, run.x))
    return _report(o, field, {"decode": run})


def _code_options(o: argparse.Namespace) -> dict[str, Any]:
    """What is asked of a code's decoding besides what it says itself."""
    if o.batch_size is not None:
        _whole(o.batch_size, "--batch-size")
    asked = {"steps": o.steps, "nfe": o.nfe, "solver": _toleranced(o), "grid": o.grid, "batch_size": o.batch_size}
    return asked if o.dtype is None else asked | {"dtype": _DTYPES[o.dtype]}


def _encode(o: argparse.Namespace) -> int:
    field = _field(o)
    images, options = _images(o, field, None), _run_options(o, field, "encode", _named(o))
    _check_out(o, None)
    run = encode(field, images, **options)
    if Path(o.out).suffix == ".npy":
        data.write_array(o.out, run.x, "latent")
    else:
        Code.of(field, run).save(o.out)
    return _report(o, field, {"encode": run})


def _reconstruct(o: argparse.Namespace) -> int:
    field = _field(o)
    given = {name: name if name == "default" else _toleranced(o, name) for name in _split(o.solvers)}
    methods = by_name(list(given.values()))
    budgets = list(dict.fromkeys(_whole(x, "--nfe") for x in _split(o.nfe)))
    if not given or not budgets:
        raise ValueError("reconstruct needs at least one name in --solvers and one budget in --nfe")
    if o.batch_size is not None:
        _whole(o.batch_size, "--batch-size")
    _whole(o.n_images, "--n-images")
    _refuse_force(o, methods.values())
    if not any(isinstance(method, _TOLERANT) for method in methods.values()):
        for option in ("rtol", "atol"):
            if getattr(o, option) is not None:
                raise ValueError(f"--{option} is for solvers that choose their own steps, and --solvers names none")
    images = _images(o, field, o.n_images)
    if o.grid is not None:
        Grid.make(o.grid, field.schedule, 2)
    out = _folder(o, o.out)
    along = min(budgets, key=lambda nfe: abs(math.log(nfe / 20.0)))
    with tqdm(total=2 + len(methods) * len(budgets), desc="reconstruct", disable=None, leave=False) as bar:

        def advance(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        found = reconstruct(
            field,
            images,
            list(given.values()),
            budgets,
            grid=o.grid,
            along=along,
            batch_size=o.batch_size,
            advance=advance,
        )
    record = {"command": "reconstruct", "model": o.model, "data": o.images} | found.record | _calibrated(given, methods)
    if field.codec is not None:
        # What the codec loses by itself is told apart: the methods are judged by what they add.
        record["codec_mse"] = mse(_originals(o, field, len(images)), _pictures(field, images)).tolist()
    write_json(out / "results.json", record)
    written = ["results.json", "errors.png", "along.png", f"distribution-{along}.png"]
    plotting.save_figure(plotting.reconstruction_figure(record), out / "errors.png")
    plotting.save_figure(plotting.along_figure(record), out / "along.png")
    plotting.save_figure(plotting.distribution_figure(record, along), out / f"distribution-{along}.png")
    if len(_picture_shape(field)) == 3 and _picture_shape(field)[0] in (1, 3):
        plotting.save_figure(_lost_sheet(field, found, images, along), out / f"reconstructions-{along}.png")
        written.append(f"reconstructions-{along}.png")
    if len(found.encodings) == 1:
        (key,) = found.encodings
        Code.of(field, found.encodings[key]).save(out / "codes.safetensors")
        data.write_images(out / "reconstructions.npz", _pictures(field, found.reconstructions[key]))
        written += ["codes.safetensors", "reconstructions.npz"]
    if o.json:
        print(to_json(record))
    else:
        _print_reconstruction(record)
        print(f"\nwritten to {out}: {', '.join(written)}")
    lost = False
    for row in record["rows"]:
        for status, which in (("failed", row["failed"]), ("not solved to its tolerance", row.get("unconverged"))):
            if which:
                lost = lost or status == "failed"
                budget = "" if row["nfe"] is None else f" at {row['nfe']}"
                print(
                    f"ddim-ode: {row['solver']}{budget}: {status} in images {', '.join(map(str, which))}",
                    file=sys.stderr,
                )
    return 1 if lost else 0


def _lost_sheet(field: EpsilonField, found: Any, images: Tensor, nfe: int) -> Any:
    """Originals, what each method brings back at one budget, and the difference × 10 about mid-grey."""
    shown = min(6, len(images))
    originals = _pictures(field, images[:shown])
    rows = [("original", [originals, torch.zeros_like(originals)])]
    for (name, budget), x in found.reconstructions.items():
        if budget in (nfe, None):
            back = _pictures(field, x[:shown])
            rows.append((name, [back, 10.0 * (back - originals)]))
    return plotting.sheet_figure(rows, ["image", "difference × 10"], f"Encoded and decoded by {nfe} calls each way")


def _print_reconstruction(record: dict[str, Any]) -> None:
    exact, rows = record["reference"], record["rows"]
    there, back = (
        f"{d['solver']} on {d['grid']}" for d in (record["defaults"]["encode"], record["defaults"]["sample"])
    )
    print(f"{record['images']} images; grid {record['grid']}; default: {there}, and {back} from the latent alone")
    print(
        f"reference latents: {exact['methods'][0]}; {exact['methods'][1]} differs by {exact['rms_difference']:.1e} RMS"
    )
    if "codec_mse" in record:
        print(f"the codec loses {sum(record['codec_mse']) / len(record['codec_mse']):.3e} by itself")
    # A solver that chooses its own steps has no budget, and a column of its own.
    budgets = list(dict.fromkeys(row["nfe"] for row in sorted(rows, key=lambda row: row["nfe"] is None)))
    names = list(dict.fromkeys(row["solver"] for row in rows))
    found = {(row["solver"], row["nfe"]): row for row in rows}
    calls = lambda row: f"{row['encode_calls']:.0f}+{row['decode_calls']:.0f};{row['states']}"
    number = lambda key: lambda row: "–" if row[key] is None else format(row[key], ".2e")
    for title, cell in (
        ("Round trip, MSE on [0, 1]", number("round_trip_mse")),
        ("The same from the latent alone", number("alone_mse")),
        ("Round trip, float32 state", number("float32_mse")),
        ("Latent, RMS error", number("latent_rms")),
        ("Decoding the true latent, RMS", number("decode_rms")),
        ("Calls there + back; states", calls),
        ("A second state's error grows by", number("growth")),
    ):
        print(f"\n{title:<32}" + "".join(f"{'tolerance' if n is None else n:>12}" for n in budgets))
        for name in names:
            cells = [found.get((name, nfe)) for nfe in budgets]
            shown = ["–" if row is None or row["encode_calls"] is None else cell(row) for row in cells]
            if set(shown) != {"–"}:
                print(f"  {name:<30}" + "".join(f"{text:>12}" for text in shown))
    _print_ways(record)


def _print_ways(record: dict[str, Any]) -> None:
    """What went the way that a calibrated solver does not."""
    ways = {row["solver"]: row for row in record["rows"] if row["encoder"] is not None}
    for name in record.get("calibrated", {}):
        if name in ways:
            print(f"{name}: round trips are encoded by {ways[name]['encoder']} and decoded by {ways[name]['decoder']}")


def _interpolate(o: argparse.Namespace) -> int:
    pairs, points = _whole(o.pairs, "--pairs"), _whole(o.points, "--points", 2)
    field = _field(o)
    runs: dict[str, Solution] = {}
    if o.images is None:
        options = _run_options(o, field, "sample", _named(o))
        _check_out(o, _picture_shape(field), pairs * points, moving=True)
        ends = noise(_shape(field), 2 * pairs, o.seed).to(field.device or "cpu")
    else:
        images, o.seed = _images(o, field, None), None  # nothing is drawn
        if len(images) < 2 * pairs:
            raise ValueError(f"--pairs {pairs} needs {2 * pairs} images, but {o.images} holds {len(images)}")
        there, options = _both_options(o, field)
        _check_out(o, _picture_shape(field), pairs * points, moving=True)
        runs["encode"] = encode(field, images[: 2 * pairs], **there)
        ends = runs["encode"].x
    run = interpolate(field, ends[0::2], ends[1::2], points, **options)
    pictures = _pictures(field, run.x)
    if Path(o.out).suffix in data.ANIMATIONS and not Path(o.out).is_dir():
        frames = pictures.unflatten(0, (pairs, points)).transpose(0, 1)
        # There and back, without showing the ends twice
        data.write_animation(o.out, torch.cat([frames, frames[1:-1].flip(0)]), columns=pairs)
    else:
        data.write_images(o.out, pictures, columns=points)
    return _report(o, field, runs | {"interpolate": run})


def _train(o: argparse.Namespace) -> int:
    if "RANK" not in os.environ:
        return _train_here(o)
    # torchrun: one process a device, or several on the CPU.
    if o.device == "cuda":
        o.device = f"cuda:{os.environ['LOCAL_RANK']}"
    distributed.init_process_group("nccl" if o.device.startswith("cuda") else "gloo")
    try:
        return _train_here(o)
    finally:
        distributed.destroy_process_group()


def _train_here(o: argparse.Namespace) -> int:
    device, images = _device(o.device), _dataset(o)
    schedule = NoiseSchedule.linear() if o.schedule == "linear" else NoiseSchedule.cosine()
    multipliers = [_whole(x, "--multipliers") for x in _split(o.multipliers)]
    attention = [_whole(x, "--attention") for x in _split(o.attention)]
    options = TrainingOptions(
        steps=o.steps, batch_size=o.batch_size, lr=o.lr, warmup=o.warmup, cooldown=o.cooldown, ema=o.ema, clip=o.clip,
        gamma=o.gamma, label_power=o.label_power, flip=o.flip, seed=o.seed, autocast=not o.no_autocast, compile=o.compile,
    )  # fmt: skip
    out = _folder(o, o.out)
    network, description = begin(
        images, schedule, rank=o.rank, seed=o.seed, width=o.width, multipliers=multipliers, blocks=o.blocks,
        attention=attention, groups=o.groups, dropout=o.dropout, patch=o.patch,
    )  # fmt: skip
    described = out / "network.json"
    if described.exists():
        before = json.loads(described.read_text("utf-8"))
        plain = json.loads(json.dumps(description))  # tuples become lists
        rest = (before.get("residual") or {}).get("rest", math.nan)
        if isinstance(network, GaussianResidual) and math.isclose(rest, network.rest, rel_tol=1e-6):
            # Another machine's linear algebra differs in the last places; the run's own number stands.
            plain["residual"]["rest"] = network.rest = rest
        if before != plain:
            raise ValueError(
                f"{out} holds a run of another network or data set: give another --out, or the options of {described}"
            )
        description = plain
    shape = tuple(images.shape[1:])
    whole(o.save_every, "save_every")
    # Before the first checkpoint: a run is never without what it is a run of.
    write_json(described, description)

    def on_save(average: torch.nn.Module, step: int) -> None:
        save_model(out / "model.safetensors", average, description | {"training": {"step": step, "data": o.data}})
        field = EpsilonField(average, schedule, shape=shape)
        data.write_images(out / "samples.png", sample(field, n=16, seed=0, nfe=20, batch_size=16).x)

    first = int(os.environ.get("RANK", "0")) == 0
    caught: list[tuple[int, float]] = []
    reached = 0

    def catch(number: int, _: Any) -> None:
        # A launcher passes on what the terminal has sent already: only a signal much later means "at once".
        if caught and time.monotonic() - caught[0][1] > 10.0:
            raise KeyboardInterrupt
        caught.append((number, time.monotonic()))

    with tqdm(total=o.steps, desc="train", unit="step", disable=None if first else True) as bar:

        def progress(step: int, loss: float) -> None:
            nonlocal reached
            reached = step
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            train(
                network,
                images,
                schedule,
                out,
                options,
                device=device,
                save_every=o.save_every,
                on_save=on_save,
                progress=progress,
                stop=lambda: bool(caught),
            )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if 0 < reached < o.steps:  # by a signal, to this process or to another of the run
            if first:
                print(f"ddim-ode: stopped at step {reached}; the same command goes on from there", file=sys.stderr)
            return 128 + (caught[0][0] if caught else signal.SIGTERM)
    if not first:
        return 0
    print(f"written to {out}: model.safetensors, checkpoint.pt, log.csv, network.json, samples.png")
    return 0


def _check(o: argparse.Namespace) -> int:
    field = _field(o)
    report = check(field, _images(o, field, _whole(str(o.n), "--n")), seed=o.seed)
    if o.json:
        findings = [asdict(finding) for finding in report.findings]
        record = {"command": "check", "model": o.model, "ok": report.ok, "nfe": report.nfe, "notes": field.notes}
        print(to_json(record | {"findings": findings, "seed": o.seed} | circumstances(field)))
    else:
        print(report)
    return 0 if report.ok else 1


def _data(o: argparse.Namespace) -> int:
    rows = []
    for name in datasets.datasets():
        folder = datasets.find(name)
        rows.append({"name": name, "folder": None if folder is None else str(folder), "how": datasets.how(name)})
    if o.json:
        print(to_json(rows))
        return 0
    print(f"looked in: {', '.join(str(root) for root in datasets.roots())}")
    for row in rows:
        print(f"{row['name']:<14} " + (row["folder"] or f"not here: {row['how']}"))
    return 0


def _solvers(o: argparse.Namespace) -> int:
    named = (
        "name",
        "order",
        "measured",
        "nfe_per_step",
        "start",
        "exact",
        "states",
        "adaptive",
        "iterative",
        "paired",
        "differentiable",
        "source",
    )
    rows = [{name: getattr(solver, name) for name in named} for solver in solvers()]
    if o.json:
        print(json.dumps(rows))
        return 0
    print(
        f"{'name':<20}{'order':>6}{'measured':>14}{'calls a step':>14}{'states':>8}  {'start':<24}{'exact for':<16}source"
    )
    for row in rows:
        found = (row["measured"] or {}).get("measured_order")
        span = "–" if found is None else f"{found[0]:.2f}–{found[1]:.2f}"
        calls = "iterates" if row["iterative"] else row["nfe_per_step"]
        print(
            f"{row['name']:<20}{row['order']:>6}{span:>14}{calls:>14}{row['states']:>8}  {row['start']:<24}"
            f"{row['exact']:<16}{row['source']}"
        )
    print(
        "\nThe order is that of the default start; a multistep name with -rk behind it starts by Runge–Kutta and has full order. "
        "Measured orders are\nthe least and the greatest over three families of grids in both directions (python -m "
        "benchmarks.convergence); an adaptive solver's are those\nof its steps."
    )
    return 0


def _attribute(o: argparse.Namespace) -> int:
    n, moved = _whole(o.n, "--n"), _whole(o.moved, "--moved")
    strengths = _strengths(o.strengths)
    if o.source == o.target:
        raise ValueError(f"--from and --to are both {o.source}: name two classes")
    field = _field(o)
    up, down = _both_options(o, field)
    images, labels = datasets.labelled(o.images, "test", _range(o.data_range))
    _check_images(o, field, images)
    if len(_picture_shape(field)) != 3 or _picture_shape(field)[0] not in (1, 3):
        raise ValueError(f"samples of shape {_picture_shape(field)} are no pictures: attribute draws a sheet of them")
    members = {name: np.flatnonzero(labels == c) for name, c in (("from", o.source), ("to", o.target))}
    for name, wanted, what in (("from", n + moved, f"{n} for the direction, {moved} to move"), ("to", n, f"{n}")):
        if len(members[name]) < wanted:
            classes = ", ".join(f"{c} ({k})" for c, k in zip(*np.unique(labels, return_counts=True), strict=True))
            raise ValueError(
                f"--{name} {o.source if name == 'from' else o.target} needs {wanted} images of that class ({what}), but "
                f"{o.images} holds {len(members[name])}: its classes are {classes}"
            )
    # Those that are moved had no part in the direction.
    which = np.concatenate([members["from"][:n], members["to"][:n], members["from"][n : n + moved]])
    out = _folder(o, o.out)
    pictures = data.as_tensor(images[which]).to(field.device or "cpu")
    there = encode(field, pictures if field.codec is None else field.codec.encode(pictures), **up)
    latent = _encoded(there)
    with warnings.catch_warnings():
        # Samples that failed are named in the end, and a coarse encoder's latents may look odd.
        warnings.simplefilter("ignore", LatentWarning)
        direction = attribute_direction(latent[: 2 * n], labels[which][: 2 * n], of=o.target, against=o.source)
        whole = [i for i in range(2 * n, len(which)) if there.status[i] is Status.SUCCESS]
        if not whole:
            raise ValueError(f"none of the {moved} images to move could be encoded by this model")
        starts = latent[whole]
        back = decode(field, torch.cat([move_latent(starts, direction, s) for s in strengths]), **down)
    made = _pictures(field, back.x)
    runs = {"encode": there, "decode": back}
    found = {
        "images": o.images, "from": o.source, "to": o.target, "n": n, "strengths": strengths, "which": which.tolist(),
        "labels": labels[which].tolist(), "moved": which[whole].tolist(),
        "direction_rms": float(direction.double().square().mean().sqrt()),
        "status": {what: [s.name for s in run.status] for what, run in runs.items()},
    }  # fmt: skip
    write_json(out / "results.json", _record(o, field, runs) | found)
    data.write_array(out / "latents.npz", latent, "latent")
    data.write_array(out / "direction.npz", direction, "direction")
    data.write_images(out / "moved.npz", made)
    shown = slice(0, 8)
    rows = [("original", [pictures[whole][shown]])]
    rows += [(f"strength {s:g}", [m[shown]]) for s, m in zip(strengths, made.split(len(whole)), strict=True)]
    title = f"Class {o.source} to class {o.target}: means of {n} latents each"
    plotting.save_figure(plotting.sheet_figure(rows, [""], title), out / "attribute.png")
    return _report(o, field, runs, found)


def _strengths(text: str) -> list[float]:
    try:
        strengths = [float(part) for part in _split(text)]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ValueError(f"--strengths takes numbers, such as 0,0.5,1, but got {text!r}")
    return strengths


def _latents(o: argparse.Namespace) -> int:
    runs: dict[str, Solution] = {}
    written = ["results.json", "latents.png"]
    if o.latent is not None:
        if o.images is not None:
            raise ValueError("--latent and --images are two things to judge: give one of them")
        latent = _read_latent(o, whole=True).to(_device(o.device))
        out = _folder(o, o.out)
        record: dict[str, Any] = {"command": o.command, "latent": o.latent} | circumstances()
    else:
        field = _field(o)
        images, options = _images(o, field, None), _run_options(o, field, "encode", _named(o))
        out = _folder(o, o.out)
        runs["encode"] = encode(field, images, **options)
        latent, record = _encoded(runs["encode"]), _record(o, field, runs)
        written.append("latents.npz")
    report = gaussianity(latent)
    found = report.record()
    write_json(out / "results.json", record | found)
    plotting.save_figure(plotting.gaussianity_figure({"latents": found}), out / "latents.png")
    if runs:
        data.write_array(out / "latents.npz", latent, "latent")
    if o.json:
        # The tables of single dimensions are in the file.
        print(to_json(record | {k: v for k, v in found.items() if k != "dimension"} | {"out": str(o.out)}))
    else:
        print(f"{report}\n\nwritten to {out}: {', '.join(written)}")
    if not runs and report.left_out:
        print(f"ddim-ode: latents: non-finite in samples {', '.join(map(str, report.left_out))}", file=sys.stderr)
    return _failures(runs) or int(bool(report.left_out))


def _likelihood(o: argparse.Namespace) -> int:
    count, probes = _whole(o.n, "--n"), None if o.probes is None else _whole(o.probes, "--probes")
    field = _field(o)
    images = _read_images(o, field, count)
    if images.dtype == np.uint8 and field.codec is None:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(field.device or "cpu")
    else:  # densities alone: of floats, or of latents
        x = _images(o, field, count)
    options = _run_options(o, field, "encode", _named(o)) | {
        "sigma": o.sigma,
        "probes": probes,
        "trace": o.trace,
        "seed": o.seed,
    }
    path = Path(o.out)
    if o.out.endswith(("/", os.sep)) or path.is_dir() or path.suffix != ".json":
        raise ValueError(f"--out {o.out}: likelihoods are written as .json")
    _folder(o, path.parent)
    found = log_density(field, x, **options)
    means = {"log_density": found.mean_log_density, "bits": found.mean_bits}
    result: dict[str, Any] = {
        "sigma": float(found.encoding.grid.sigmas[0]), "trace": found.trace, "probes": found.probes, "vjps": found.vjps,
        "log_density": found.log_density.tolist(), "trace_error": found.trace_error.tolist(),
        "bits": None if found.bits is None else found.bits.tolist(),
        "mean": {name: None if mean is None else mean._asdict() for name, mean in means.items()},
        "status": [status.name for status in found.status],
    }  # fmt: skip
    runs = {"likelihood": found.encoding}
    write_json(path, _record(o, field, runs) | result)
    mean, unit = (found.mean_bits, "bits per dimension") if found.mean_bits else (found.mean_log_density, "nats")
    trace = "exact trace" if found.trace == "exact" else f"of it by the trace: {_number(mean.trace_error)}"
    line = f"{_number(mean.value)} ± {_number(mean.error)} {unit} over {mean.n} images ({trace}; {found.vjps} products)"
    return _report(o, field, runs, result, line)


def _number(value: float) -> str:
    """Four digits behind the point, or – for what is not known."""
    return format(value, ".4f") if math.isfinite(value) else "–"


# -- what they share ----------------------------------------------------------------------------
def _field(o: argparse.Namespace) -> EpsilonField:
    options = _model_options(o.model_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelWarning)  # they are among the notes
        try:
            field = load(o.model, device=_device(o.device), **options)
        except (TypeError, RuntimeError) as error:  # JSON of the wrong type, found where it is used
            if not options:
                raise
            raise ValueError(f"--model-options {o.model_options} do not fit {o.model}: {error}") from error
    for note in field.notes:
        print(f"ddim-ode: note: {note}", file=sys.stderr)
    return field


def _model_options(text: str | None) -> dict[str, Any]:
    """``--model-options``: arguments of ``load`` as JSON, or ``@`` and a file of it."""
    if text is None:
        return {}
    try:
        options = json.loads(Path(text[1:]).read_text("utf-8") if text.startswith("@") else text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'--model-options is not JSON ({error}): write it as \'{{"prediction": "sample"}}\''
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"--model-options must be a JSON object, but is {text}")
    known = {*inspect.signature(load).parameters, *inspect.signature(EpsilonField).parameters}
    known -= {"model", "device", "options", "condition", "null_condition", "dtype", "autocast"}
    for name in options:
        if name not in known:
            raise ValueError(f"--model-options does not know {name!r}: it has {', '.join(sorted(known))}")
        if name in ("channels_last", "compile") and not isinstance(options[name], bool):
            raise ValueError(f"--model-options wants true or false for {name}, but has {json.dumps(options[name])}")
    if "schedule" in options:
        try:
            options["schedule"] = NoiseSchedule.from_config(options["schedule"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"--model-options has no schedule in {options['schedule']!r}: {error}") from error
    return options


def _picture_shape(field: EpsilonField) -> tuple[int, ...]:
    """The shape of what is shown, (C, H, W) for images."""
    return _shape(field) if field.codec is None else field.codec.shape


def _pictures(field: EpsilonField, x: Tensor) -> Tensor:
    """What x shows: x itself, or what a latent-diffusion model's decoder makes of it."""
    return x if field.codec is None else field.codec.decode(x)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # a number must come back, which the meta device has not got
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _shape(field: EpsilonField) -> tuple[int, ...]:
    if field.shape is None:
        raise ValueError("this model does not say the shape of its samples")
    return field.shape


def _generative(o: argparse.Namespace) -> Generative | None:
    """The paper's stochastic sampling, if ``--eta`` or ``--sigma-hat`` asks for it."""
    if o.eta is None and not o.sigma_hat:
        return None
    if o.solver is not None:
        raise ValueError(f"--eta and --sigma-hat choose the sampler: leave out --solver {o.solver}")
    for option in ("rtol", "atol"):
        if getattr(o, option) is not None:
            raise ValueError(
                f"--{option} is for solvers that choose their own steps: leave it out with --eta and --sigma-hat"
            )
    return Generative(1.0 if o.eta is None else o.eta, o.sigma_hat)


def _run_options(o: argparse.Namespace, field: EpsilonField, direction: str, solver: Solver | None) -> dict[str, Any]:
    """What a run by `solver` is asked to be; refused here, before a folder is made for it, if it cannot be."""
    if o.batch_size is not None:
        _whole(o.batch_size, "--batch-size")
    if solver is not None and solver.adaptive and o.grid is not None:
        raise ValueError(
            f"--grid {o.grid} lays out steps, but {solver.name} chooses its own by its tolerances: leave one of them out"
        )
    plan(field, direction, solver, o.grid, o.steps, o.nfe)
    return {
        "steps": o.steps,
        "nfe": o.nfe,
        "solver": solver,
        "grid": o.grid,
        "dtype": _DTYPES[o.dtype or "float64"],
        "batch_size": o.batch_size,
        "progress": True,
    }


def _both_options(o: argparse.Namespace, field: EpsilonField) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of encoding and of decoding: what is calibrated for one way has the default go the other."""
    there, back = both_ways(field, _named(o))
    return _run_options(o, field, "encode", there), _run_options(o, field, "sample", back)


#: Solvers that have tolerances of their own.
_TOLERANT = (Adaptive, TorchDiffEq, Scipy)


def _toleranced(o: argparse.Namespace, name: str | None = None) -> Any:
    """The solver `name`, one of several, or that of ``--solver``, at the tolerances that were given."""
    named = name or o.solver
    solver = None if named is None else _solver(o, named)
    tolerances = {option: getattr(o, option) for option in ("rtol", "atol") if getattr(o, option) is not None}
    if not tolerances or (name is not None and not isinstance(solver, _TOLERANT)):
        return solver
    if not isinstance(solver, _TOLERANT):
        named = ", ".join(s.name for s in solvers() if s.adaptive)
        raise ValueError(
            f"--{next(iter(tolerances))} is for solvers that choose their own steps, named by --solver: {named}"
        )
    return replace(solver, **tolerances)


def _solver(o: argparse.Namespace, name: str) -> Solver:
    """A solver by its name, or a calibrated one by its file."""
    return load_solver(name, force=o.force) if name.endswith(".json") else get(name)


def _named(o: argparse.Namespace) -> Solver | None:
    """The solver of a run."""
    solver = _toleranced(o)
    _refuse_force(o, [solver])
    return solver


def _refuse_force(o: argparse.Namespace, methods: Iterable[Solver | None]) -> None:
    if o.force and not any(isinstance(method, Calibrated) for method in methods):
        raise ValueError("--force is for calibrated solvers of another model, and none is named: leave it out")


def _calibrated(given: dict[str, Any], methods: dict[str, Solver | None]) -> dict[str, Any]:
    """The files of calibrated solvers, by what rows call them: their names say no more than direction and calls."""
    files = {
        row: {"file": name, "sha256": solver.sha256}
        for row, method in methods.items()
        for name, solver in given.items()
        if isinstance(solver, Calibrated) and solver == method
    }
    return {"calibrated": files} if files else {}


def _images(o: argparse.Namespace, field: EpsilonField, count: int | None) -> Tensor:
    """What a model takes for images: those of ``--images``, else the bundled ones; latents of them, if it takes those."""
    tensor = _originals(o, field, count)
    return tensor if field.codec is None else field.codec.encode(tensor)


def _originals(o: argparse.Namespace, field: EpsilonField, count: int | None = None) -> Tensor:
    return data.as_tensor(_read_images(o, field, count)).to(field.device or "cpu")


def _read_images(o: argparse.Namespace, field: EpsilonField, count: int | None) -> data.Images:
    images = data.bundled_images() if o.images is None else datasets.images(o.images, "test", _range(o.data_range))
    _check_images(o, field, images)
    return images[:count]


def _check_images(o: argparse.Namespace, field: EpsilonField, images: Any) -> None:
    shape = _picture_shape(field)
    if images.shape[1:] != shape:
        whose = "the bundled images" if o.images is None else f"the images of {o.images}"
        hint = ": name others by --images, such as cifar10:test" if o.images is None else ""
        raise ValueError(f"{whose} are {images.shape[1:]} (C, H, W), but the model takes {shape}{hint}")


def _latent(o: argparse.Namespace, field: EpsilonField) -> Tensor:
    latent, shape = _read_latent(o), _shape(field)
    if latent.shape[1:] != shape:
        raise ValueError(f"the latents are {tuple(latent.shape[1:])}, but the model takes {shape}")
    return latent.to(field.device or "cpu")


def _read_latent(o: argparse.Namespace, whole: bool = False) -> Tensor:
    """The latents of a file; `whole`: NaN in place of a code's that failed."""
    if Path(o.latent).is_file() and is_code(o.latent):
        code = load_code(o.latent)
        return _without(code.latent, code.status) if whole else code.latent
    latent = data.read_array(o.latent)
    if latent.dtype.kind != "f":
        raise ValueError(f"{o.latent} must hold float latents, but its dtype is {latent.dtype}: is it an image?")
    return torch.from_numpy(latent)


def _dataset(o: argparse.Namespace) -> Any:
    images = datasets.images(o.data, data_range=_range(o.data_range))
    if not np.isfinite(images).all():
        raise ValueError(f"{o.data} holds images with NaN or infinity among them: leave them out before training")
    return data.to_uint8(data.as_tensor(images))


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--data-range takes two numbers, such as 0,1, but got {text!r}") from error
    return low, high


def _check_out(o: argparse.Namespace, shape: tuple[int, ...] | None, count: int = 0, *, moving: bool = False) -> None:
    """Refuse an output that could not be written, before any work.

    `shape` is that of one of the `count` images, None for latents; `moving` says that they can be an animation.
    """
    path = Path(o.out)
    folder = o.out.endswith(("/", os.sep)) or path.is_dir() or not path.suffix
    if shape is None:
        if folder or path.suffix not in (".safetensors", ".npz", ".npy"):
            raise ValueError(
                f"--out {o.out}: codes are written as .safetensors or .npz, and their latents alone as .npy"
            )
    elif not folder and path.suffix not in (".png", ".npz", ".npy", *(data.ANIMATIONS if moving else ())):
        raise ValueError(
            f"--out {o.out}: images are written as .png (a sheet), .npz or .npy, or into a folder/"
            + (f"; paths also as {', '.join(data.ANIMATIONS)} (an animation)" if moving else "")
        )
    elif (folder or path.suffix not in (".npz", ".npy")) and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"--out {o.out}: samples of shape {shape} are no picture; write .npz")
    if moving and not folder and path.suffix in data.ANIMATIONS:
        data.check_animation(path)
    made = _folder(o, path if folder else path.parent)
    others = {p.name for p in data.pictures(made)} - set(data.picture_names(count)) if folder else set()
    if others:
        raise ValueError(
            f"--out {o.out}: that folder holds other pictures, such as {min(others)}, that would be taken for images "
            "of this run: name another folder"
        )


def _folder(o: argparse.Namespace, path: str | Path) -> Path:
    """The folder of an output; what of it was not there is noted, for :func:`main` to remove if it stays empty."""
    path = Path(path)
    whole = path.absolute()
    o.made += [p for p in (whole, *whole.parents) if not os.path.lexists(p)]
    return output_folder(path)


def _record(o: argparse.Namespace, field: EpsilonField, runs: dict[str, Solution]) -> dict[str, Any]:
    """What was run, by what, where: plain data."""
    record: dict[str, Any] = {"command": o.command, "model": o.model, "nfe": sum(run.nfe for run in runs.values())}
    if "seed" in o:
        record["seed"] = o.seed
    for what, run in runs.items():
        record[what] = {"solver": run.solver, "grid": run.grid.name, "steps": run.grid.steps, "nfe": run.nfe}
        if isinstance(run.method, Generative):
            record[what] |= {"eta": run.method.eta, "sigma_hat": run.method.sigma_hat}
        if isinstance(run.method, Calibrated):
            record[what] |= {"file": o.solver, "sha256": run.method.sha256}
        if run.outcome is not None:
            record[what] |= {name: getattr(run.outcome, name) for name in ("accepted", "rejected")}
            record[what] |= {"sample_nfe": run.outcome.nfe}
            own = {name: getattr(run.outcome, name) for name in ("residual", "contraction")}
            record[what] |= {name: value for name, value in own.items() if value is not None}
            own = {name: getattr(run.method, name) for name in ("rtol", "atol", "tol") if hasattr(run.method, name)}
            record[what] |= own
    # A code is decoded in its own dtype.
    return record | circumstances(field, next(iter(runs.values())).x_bar.dtype)


def _report(
    o: argparse.Namespace,
    field: EpsilonField,
    runs: dict[str, Solution],
    found: dict[str, Any] | None = None,
    line: str | None = None,
) -> int:
    failed = {what: [i for i, s in enumerate(run.status) if s is not Status.SUCCESS] for what, run in runs.items()}
    count = len(list(runs.values())[-1].status)
    calls = sum(run.nfe for run in runs.values())
    if o.json:
        record = _record(o, field, runs) | (found or {})
        print(to_json(record | {"samples": count, "failed": failed, "out": str(o.out)}))
    else:
        print(f"{count} samples, {calls} model calls: {o.out}" + (f"\n{line}" if line else ""))
    return _failures(runs)


def _failures(runs: dict[str, Solution]) -> int:
    """Name the samples that failed; the exit code."""
    for what, run in runs.items():
        for status, words in _FAILURES.items():
            which = [i for i, s in enumerate(run.status) if s is status]
            if which:
                print(f"ddim-ode: {what}: {words} in samples {', '.join(map(str, which))}", file=sys.stderr)
    return 0 if all(run.success for run in runs.values()) else 1


def _encoded(run: Solution) -> Tensor:
    """The latents of a run, NaN where it failed: a state on its way is no latent."""
    return _without(run.x, run.status)


def _without(latent: Tensor, status: Sequence[Status]) -> Tensor:
    failed = torch.tensor([s not in (Status.SUCCESS, Status.UNCONVERGED) for s in status], device=latent.device)
    return latent.masked_fill(failed.reshape(-1, *(1,) * (latent.ndim - 1)), math.nan)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(value: str | int, name: str, least: int = 1) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} takes whole numbers of at least {least}, but got {value!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddim-ode", description="DDIM sampling as one ordinary differential equation."
    )
    parser.add_argument("--version", action="version", version=ddim_ode.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run, command=name)
        return made

    def model(p: argparse.ArgumentParser, dtype: bool = True) -> None:
        p.add_argument(
            "--model",
            default="fashion-mnist",
            help=f"a bundled name ({', '.join(bundled())}), a diffusers folder, or a file of weights",
        )
        p.add_argument(
            "--model-options",
            metavar="JSON",
            help="what else ddim_ode.load takes, as JSON, or @file: schedule, prediction, …",
        )
        p.add_argument("--device", default="cpu", help="where the network runs, such as cuda")
        if dtype:
            p.add_argument(
                "--dtype",
                default="float64",
                choices=_DTYPES,
                help="the state's dtype (default: float64; for a code its own); the network keeps its own",
            )
        p.add_argument("--json", action="store_true", help="print a JSON record instead of words")

    def seed(p: argparse.ArgumentParser) -> None:
        p.add_argument("--seed", type=int, default=0, help="seed of latents; image i depends on (seed, i) alone")

    def images(p: argparse.ArgumentParser, *names: str, help: str, **options: Any) -> None:
        text = help.format("a data set's name, a PNG, a folder, .npz, .npy or idx")
        p.add_argument(*(names or ("--images",)), help=text, **options)
        p.add_argument("--data-range", metavar="LOW,HIGH", help="what floats among them span, if not -1,1")

    def force(p: argparse.ArgumentParser, also: str = "") -> None:
        p.add_argument(
            "--force", action="store_true", help=f"run a calibrated solver with another model than its own{also}"
        )

    def method(p: argparse.ArgumentParser, out: str, forced: str = "") -> None:
        model(p)
        p.add_argument(
            "--solver",
            help="see 'ddim-ode solvers', or a calibrated solver's .json "
            f"(default: {DEFAULTS['sample'].solver}; encoding {DEFAULTS['encode'].solver})",
        )
        force(p, forced)
        p.add_argument(
            "--grid",
            help=f"one of {', '.join(grids())} ({DEFAULTS['sample'].grid}, encoding {DEFAULTS['encode'].grid}; with a solver {GRID})",
        )
        p.add_argument("--nfe", type=int, help="budget of model calls, each way (default: 50)")
        p.add_argument("--steps", type=int, help="steps instead, each way: what solvers that iterate take")
        p.add_argument(
            "--rtol",
            type=float,
            help="relative tolerance of an adaptive solver (default: 1e-5): in units of data, of each sample; with "
            "torchdiffeq-* and scipy-*, of the state x√(1 + σ²) over the batch",
        )
        p.add_argument("--atol", type=float, help="its absolute tolerance (default: 1e-5), in the same units")
        p.add_argument("--batch-size", type=int, help="samples at once (default: all)")
        p.add_argument("--out", default=out, help=f"where to write (default: {out})")

    p = command("compare", _compare, "Compare solvers: error against calls, round trips, pictures.")
    model(p)
    p.add_argument(
        "--solvers",
        default="default,ddim,pf-euler,heun,ab2,ab3,deis3,dpmpp2m",
        help="names, or .json of calibrated solvers, comma-separated",
    )
    force(p)
    p.add_argument("--nfe", default="5,10,20,50", help="budgets of model calls, comma-separated")
    p.add_argument("--grid", help=f"one of {', '.join(grids())} (default: {GRID}; that of default is its own)")
    p.add_argument("--n", type=int, default=16, help="samples")
    images(p, help="images to round-trip: {} (default: bundled ones)")
    seed(p)
    p.add_argument("--n-images", type=int, default=8, help="how many of them")
    p.add_argument("--reference-nfe", type=int, default=400, help="calls for each of the two reference solutions")
    p.add_argument("--out", default="out/compare", help="folder (default: out/compare)")

    p = command("calibrate", _calibrate, "Fit solvers to a model, one a budget of calls.")
    model(p, dtype=False)
    p.add_argument("--nfe", default="5,10,20", help="model calls of each solver, comma-separated (default: 5,10,20)")
    p.add_argument("--direction", choices=DEFAULTS, default="sample", help="which way they go (default: sample)")
    p.add_argument("--n", type=int, help="trajectories, of which a third is held back (default: 48)")
    seed(p)
    p.add_argument("--latent", help="latents (.npz or .npy) instead of drawn ones")
    images(p, help="for encoding, images: {} (default: what the model makes of the latents)")
    p.add_argument(
        "--refine",
        type=int,
        default=4,
        help="derivatives of the last stage, at most; its calls grow as nfe² (default: 4)",
    )
    p.add_argument(
        "--consistent", action="store_true", help="keep what is exact for constant ε: colours stay, accuracy is less"
    )
    p.add_argument(
        "--reference-nfe",
        type=int,
        help="calls of the reference; half as many check it (default: 400, or 4 nfe where that is more; doubled where that does not do)",
    )
    p.add_argument("--batch-size", type=int, default=64, help="trajectories at once (default: 64)")
    p.add_argument("--out", default="out/calibrated", help="folder (default: out/calibrated)")

    p = command("sample", _sample, "Draw samples.")
    method(p, "out/samples.png")
    p.add_argument("--n", type=int, help="how many (default: 16)")
    seed(p)
    p.add_argument("--latent", help="latents (.npz or .npy) instead of drawn ones")
    p.add_argument("--eta", type=float, help="the paper's eq. 16 in place of a solver: 0 is DDIM, 1 DDPM")
    p.add_argument("--sigma-hat", action="store_true", help="DDPM with the larger noise, for --eta 1")

    p = command("encode", _encode, "Encode images to their latents x_T.")
    method(p, "out/latents.npz")
    images(p, help="{} (default: bundled ones)")

    p = command("decode", _decode, "Decode latents to images.")
    method(p, "out/decoded.png", "; decode a code by another model, solver or grid than made it")
    p.set_defaults(dtype=None)
    p.add_argument("--latent", required=True, help="what encode has written, or latents (.npz or .npy)")

    p = command(
        "reconstruct", _reconstruct, "Encode images, decode them again, and measure what was lost, by many methods."
    )
    model(p, dtype=False)
    images(p, "--data", "--images", dest="images", help="{} (default: bundled ones)")
    p.add_argument(
        "--solvers",
        "--solver",
        default="default,ddim,dpmpp2m,ees25,o-belm,bdia,mf-midpoint,alf",
        help="names, or .json of calibrated solvers, comma-separated; see 'ddim-ode solvers'",
    )
    force(p)
    p.add_argument(
        "--nfe",
        default="10,20,50",
        help="budgets of model calls each way, comma-separated; steps, for methods that iterate",
    )
    p.add_argument("--grid", help=f"one of {', '.join(grids())} (default: {GRID}; that of default is its own)")
    p.add_argument("--n-images", type=int, default=16, help="how many of them (default: 16)")
    p.add_argument("--rtol", type=float, help="relative tolerance of the adaptive solvers among them")
    p.add_argument("--atol", type=float, help="their absolute tolerance")
    p.add_argument("--batch-size", type=int, help="images at once (default: all)")
    p.add_argument("--out", default="out/reconstruct", help="folder (default: out/reconstruct)")

    p = command("interpolate", _interpolate, "Decode spherical paths between latents.")
    method(p, "out/interpolation.png")
    images(p, help="encode these, {}, and go from the first to the second, and so on (default: drawn latents)")
    seed(p)
    p.add_argument("--pairs", type=int, default=4, help="paths")
    p.add_argument("--points", type=int, default=10, help="images a path, ends included")

    p = command("train", _train, "Train a noise predictor by eq. 5; go on from where a run in --out stopped.")
    defaults = TrainingOptions()
    images(p, "--data", default="fashion-mnist", help="{}; floats are rounded to 8 bits")
    p.add_argument("--out", default="out/train", help="folder (default: out/train)")
    p.add_argument("--device", default="cpu", help="where, such as cuda")
    p.add_argument("--schedule", default="linear", choices=("linear", "cosine"), help="noise schedule, T = 1000")
    p.add_argument("--steps", type=int, default=defaults.steps, help="updates in all")
    p.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images an update")
    p.add_argument("--lr", type=float, default=defaults.lr, help="learning rate after the warm-up")
    p.add_argument("--warmup", type=int, default=defaults.warmup, help="updates over which it rises")
    p.add_argument(
        "--cooldown", type=float, default=defaults.cooldown, help="share of the run over which it falls to 0"
    )
    p.add_argument("--ema", type=float, default=defaults.ema, help="decay of the weights' moving average")
    p.add_argument("--clip", type=float, default=defaults.clip, help="largest gradient norm")
    p.add_argument(
        "--gamma", type=float, default=defaults.gamma, help="exponent p of γ_t = (1 + σ²/s²)^p; 0 is the paper's γ = 1"
    )
    p.add_argument("--label-power", type=float, default=defaults.label_power, help="labels are (T−1)u^q; 1 is uniform")
    p.add_argument("--flip", action="store_true", help="mirror half the images left to right")
    p.add_argument("--seed", type=int, default=defaults.seed, help="seed of everything random")
    p.add_argument(
        "--save-every", type=int, default=500, help="updates between checkpoints, log lines and sample sheets"
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: a slow start, and worth trying on a GPU; on a CPU it gains little (docs/training.md)",
    )
    p.add_argument("--no-autocast", action="store_true", help="train in float32 rather than bfloat16 autocast")
    p.add_argument(
        "--rank", type=int, default=256, help="principal directions of the Gaussian part; 0: predict ε itself"
    )
    p.add_argument("--width", type=int, default=32, help="channels of the first level")
    p.add_argument("--multipliers", default="1,2,4", help="channels of each level, in widths")
    p.add_argument("--blocks", type=int, default=1, help="residual blocks a level")
    p.add_argument("--attention", default="7", help="inner resolutions with self-attention")
    p.add_argument("--groups", type=int, default=8, help="groups of the group norms")
    p.add_argument("--dropout", type=float, default=0.0, help="dropout rate")
    p.add_argument("--patch", type=int, default=1, help="pixels a side folded into channels")

    p = command(
        "check", _check, "Compare what is declared of a model (labels, prediction, range, …) with what it does."
    )
    model(p)
    seed(p)
    images(p, help="images it was trained for: {} (default: bundled ones)")
    p.add_argument("--n", type=int, default=48, help="how many of them")

    p = command("data", _data, "Say which data sets are here, and how to get the others.")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command("solvers", _solvers, "List the solvers: order, calls, source.")
    p.add_argument("--json", action="store_true", help="print JSON")

    p = command(
        "attribute", _attribute, "Move images from one class to another, along the difference of latents' means."
    )
    method(p, "out/attribute")
    images(
        p,
        default="fashion-mnist",
        help="images with labels, {}: a data set's name or folder, or an .npz of images and labels (default: fashion-mnist)",
    )
    p.add_argument("--from", dest="source", type=int, required=True, help="class of the images that are moved")
    p.add_argument("--to", dest="target", type=int, required=True, help="class that they are moved to")
    p.add_argument("--n", type=int, default=64, help="images of each class that make the direction")
    p.add_argument("--moved", type=int, default=8, help="images that are moved, others than those")
    p.add_argument(
        "--strengths", default="0,0.5,1,1.5", help="how far, comma-separated: 1 is as far as the means are apart"
    )

    p = command("latents", _latents, "Judge whether latents are draws of N(0, I).")
    method(p, "out/latents")
    p.add_argument("--latent", help="latents (.npz or .npy): no model is loaded")
    images(p, help="or images to encode first: {} (default: bundled ones)")

    p = command("likelihood", _likelihood, "Measure bits per dimension of images, and their log-density.")
    method(p, "out/likelihood.json")
    images(p, help="{} (default: bundled ones); of floats only log-densities are given")
    p.add_argument("--n", type=int, default=16, help="how many of them (default: 16)")
    p.add_argument(
        "--sigma", type=float, help="noise level that they are taken to lie at (default: the schedule's least)"
    )
    p.add_argument("--trace", choices=("exact", "hutchinson"), help=f"(default: exact up to {EXACT_UP_TO} dimensions)")
    p.add_argument(
        "--probes", type=int, help="vectors of an estimated trace, each one backward pass a call (default: 4)"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="seed of probes and dequantisation; image i depends on (seed, i) alone"
    )
    return parser
