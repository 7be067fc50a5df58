r"""How accurate the package is per model call, beside every released peer at its best setting.

Everyone samples the same latents of the same problems with the same model at the same budgets of calls, in one run.
Every deterministic sampler of each package is run at every setting worth trying (``contenders.py``), and the best
setting of each package is picked per problem and budget *by the error it is then reported with*: no user could pick
better. Ours are the default, with nothing named, and a few named members on the default grid; nothing of ours is picked here::

    python -m benchmarks.peers [--problems digits fashion …] [--seed 2] [--figures-only]

The digits mixture gets the whole sweep. Other mixtures get, at each budget, what came within a factor :data:`WITHIN` of
its package's best there, as many settings as :data:`CALLS` pay for, and the best of every sampler; the bundled networks what
did so on any mixture. About three quarters of an hour on one thread, in parts if need be: ``peers.json`` keeps the problems that
a run does not name. Problems whose data are missing say so.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import ddim_ode
from benchmarks.contenders import PACKAGES, Task
from benchmarks.folders import into_page
from benchmarks.problems import MIXTURES, PROBLEMS, Problem, problem
from ddim_ode.comparison import circumstances
from ddim_ode.files import output_folder, write_json
from ddim_ode.metrics import rms
from ddim_ode.plotting import save_figure
from ddim_ode.sampling import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (5, 10, 20, 50)
#: Latents of each problem.
SAMPLES = {"digits": 64, "network": 6, "network-cifar10": 3}
OTHERS = 16
#: Members of ours that run beside the default, on the paper's quadratic grid.
NAMED = ("ddim", "ab3", "deis3", "dpmpp2m", "heun")
#: Our default's error over that of the best peer: at most.
TARGETS = {"mixture": {5: 0.75, 10: 0.5, 20: 0.5, 50: 0.5}, "network": dict.fromkeys(BUDGETS, 0.8)}
#: What a setting must have come within, of its package's best on another problem, to be run on one that is not swept whole;
#: and the model calls that all such settings of a package may take there, at each budget.
WITHIN, CALLS = 3.0, {"mixture": 400, "network": 150}
SWEPT_WHOLE = "digits"


def _sort(name: str) -> str:
    return "network" if name.startswith("network") else "mixture"


# -- measuring ----------------------------------------------------------------------------------
def measure(run: Callable[[Task, int], Tensor], task: Task, exact: Tensor, budget: int) -> dict[str, Any]:
    """One run: ``calls``, and ``rms``, ``median`` and ``worst`` over the samples, or NaN and why in ``failed``."""
    task.calls = 0
    failed = None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each = rms(run(task, budget), exact)
        if not each.isfinite().all():
            failed = "not finite"
        elif task.calls > budget:
            failed = "took more calls than the budget"
    except Exception as error:  # what a peer refuses, or stumbles over, is a result
        failed = f"{type(error).__name__}: {error}".split("\n")[0][:120]
    row: dict[str, Any] = {"nfe": budget, "calls": task.calls}
    if failed:
        return row | {"rms": math.nan, "median": math.nan, "worst": math.nan, "failed": failed}
    return row | {"rms": float(each.square().mean().sqrt()), "median": float(each.median()), "worst": float(each.max())}


def ours(task: Problem) -> list[dict[str, Any]]:
    """The default on its own grid, and named members on the paper's quadratic one."""

    def sampled(run: Task, budget: int, **options: Any) -> Tensor:
        before = run.field.nfe
        solution = ddim_ode.sample(run.field, run.latent, nfe=budget, **options)
        run.calls = run.field.nfe - before
        return solution.x

    rows = []
    for name in ("default", *NAMED):
        options = {} if name == "default" else {"solver": name}
        for budget in BUDGETS:
            found = measure(
                lambda run, nfe, o=options: sampled(run, nfe, **o),  # type: ignore[misc]
                Task(task.field, task.latent), task.exact, budget,
            )  # fmt: skip
            rows.append({"solver": name} | found)
    return rows


def contest(package: str, task: Problem, chosen: Callable[[str, int], bool]) -> dict[str, Any]:
    """Every chosen setting of a package at every budget: the best, the best of each sampler, and those that came close."""
    try:
        settings = list(PACKAGES[package](task.field.schedule))
    except ImportError as error:
        return {"missing": f"not installed ({error})"}
    todo = [(setting, budget) for budget in BUDGETS for setting in settings if chosen(setting.name, budget)]
    model, failed = Task(task.field, task.latent), Counter[str]()
    rows: dict[int, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    for setting, budget in tqdm(todo, desc=package, leave=False, disable=None):
        row = measure(setting.run, model, task.exact, budget)
        if "failed" in row:
            failed[f"{setting.sampler}: {row['failed']}"] += 1
        else:
            own = {"custom": True} if setting.custom else {}
            rows[budget].append({"sampler": setting.sampler, "setting": setting.options} | own | row)
    for found in rows.values():
        found.sort(key=lambda row: row["rms"])
    return {
        "settings": len(settings),
        "runs": len(todo),
        "best": [_best(budget, [row for row in found if "custom" not in row]) for budget, found in rows.items()],
        "least_median": [
            min((row["median"] for row in found if "custom" not in row), default=math.nan) for found in rows.values()
        ],
        "best_custom": [_best(budget, found) for budget, found in rows.items()],
        "samplers": [row for found in rows.values() for row in _first_of_each(found, 1)],
        "close": {str(budget): _close(found) for budget, found in rows.items()},
        "failed": dict(failed),
    }


def _best(budget: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[0] if rows else {"nfe": budget} | _NOTHING


_NOTHING: dict[str, Any] = dict.fromkeys(("sampler", "setting", "calls")) | dict.fromkeys(
    ("rms", "median", "worst"), math.nan
)


def _first_of_each(rows: Iterable[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    seen, kept = Counter[str](), []
    for row in rows:
        if seen[row["sampler"]] < n:
            kept.append(row)
        seen[row["sampler"]] += 1
    return kept


def _close(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Errors of the settings that a later problem may run, best first; of those that did the same to ten digits, one."""
    different = list({(row["sampler"], f"{row['rms']:.9e}"): row for row in reversed(rows)}.values())[::-1]
    near = [row for row in different if row["rms"] <= WITHIN * rows[0]["rms"]]
    near = near[: CALLS["mixture"] // near[0]["nfe"]] if near else []
    near += [row for row in _first_of_each(different, 1) if row not in near]
    return {f"{row['sampler']}: {row['setting']}": row["rms"] for row in near}


def chooser(name: str, package: str, done: dict[str, Any]) -> Callable[[str, int], bool]:
    """Which settings of a package a problem gets, from what other problems found; all where they found nothing."""
    if name == SWEPT_WHOLE:
        return lambda setting, budget: True
    network = _sort(name) == "network"
    others = (SWEPT_WHOLE, *MIXTURES) if network else (SWEPT_WHOLE,)
    kept: dict[int, set[str]] = {}
    for budget in BUDGETS:
        ratio: dict[str, float] = {}
        for other in others:
            close = done.get(other, {}).get("packages", {}).get(package, {}).get("close", {}).get(str(budget), {})
            for setting, error in close.items():
                ratio[setting] = min(ratio.get(setting, math.inf), error / min(close.values()))
        ranked = sorted(ratio, key=lambda setting: ratio[setting])
        near = [setting for setting in ranked if ratio[setting] <= WITHIN][: CALLS[_sort(name)] // budget]
        if not network:  # and the best of every sampler, which is among those kept of the problem that is swept whole
            best = done.get(SWEPT_WHOLE, {}).get("packages", {}).get(package, {}).get("samplers", ())
            near += [f"{row['sampler']}: {row['setting']}" for row in best if row["nfe"] == budget]
        kept[budget] = {f"{package}/{setting}" for setting in near}
    if not any(kept.values()):
        return lambda setting, budget: True
    return lambda setting, budget: setting in kept[budget]


def study(name: str, seed: int, done: dict[str, Any]) -> dict[str, Any]:
    """One problem: ours, every package, and who is ahead."""
    began = time.perf_counter()
    samples = SAMPLES.get(name, OTHERS)
    try:
        task = problem(name, samples, seed)
    except (OSError, ImportError) as error:
        return {"missing": f"{type(error).__name__}: {error}".split("\n")[0]}
    own = ours(task)
    packages = {package: contest(package, task, chooser(name, package, done)) for package in PACKAGES}
    return {
        "samples": samples,
        "seed": seed,
        "reference_difference": task.difference,
        **circumstances(task.field, torch.float64),
        "defaults": DEFAULTS["sample"]._asdict(),
        "seconds": round(time.perf_counter() - began, 1),
        "ours": own,
        "packages": packages,
        "ratios": ratios(name, own, packages),
    }


def again(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The problem with our rows anew, on the same latents; the peers' stay as they were recorded."""
    if "missing" in found:
        return found
    task = problem(name, found["samples"], found["seed"])
    own = ours(task)
    return found | {
        "defaults": DEFAULTS["sample"]._asdict(),
        "ours": own,
        "ours_recorded": circumstances(task.field, torch.float64),
        "ratios": ratios(name, own, found["packages"]),
    }


def _known(error: float | None) -> bool:
    """Whether there is an error: NaN is none, and null in a record."""
    return error is not None and math.isfinite(error)


def ratios(name: str, own: list[dict[str, Any]], packages: dict[str, Any]) -> list[dict[str, Any]]:
    """Our default's error over the best peer's, by budget: at its own options, and with nodes of ours as well."""
    targets = TARGETS[_sort(name)]
    rows: list[dict[str, Any]] = []
    for i, budget in enumerate(BUDGETS):
        default = next(row["rms"] for row in own if row["solver"] == "default" and row["nfe"] == budget)
        row: dict[str, Any] = {"nfe": budget, "target": targets[budget]}
        for kind, end in (("best", ""), ("best_custom", "_custom")):
            errors = {
                package: best["rms"]
                for package, found in packages.items()
                for best in found.get(kind, ())
                if best["nfe"] == budget and _known(best["rms"])
            }
            peer = min(errors, key=lambda package: errors[package]) if errors else None
            ratio = math.nan if peer is None else default / errors[peer]
            row |= {f"peer{end}": peer, f"ratio{end}": ratio}
        medians = [found["least_median"][i] for found in packages.values() if "least_median" in found]
        own_median = next(r["median"] for r in own if r["solver"] == "default" and r["nfe"] == budget)
        # NaN where nobody could run.
        row["ratio_median"] = own_median / min((x for x in medians if _known(x)), default=math.nan)
        rows.append(row | {"met": None if row["peer"] is None else row["ratio"] <= targets[budget]})
    return rows


# -- showing ------------------------------------------------------------------------------------
def figure(record: dict[str, Any]) -> Figure:
    """Error against calls: a panel a problem, each package's best settings and our default."""
    done = {name: found for name, found in record["problems"].items() if "missing" not in found}
    columns = min(3, max(1, len(done)))
    rows = max(1, math.ceil(len(done) / columns))
    drawn = Figure(figsize=(3.4 * columns + 1.4, 3.1 * rows), layout="constrained")
    panels = drawn.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes in panels[len(done) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels, done.items(), strict=False):
        lines = [
            (package, result.get("best", []), {"marker": marker, "lw": 1.4})
            for marker, (package, result) in zip("osD^", found["packages"].items(), strict=True)
        ]
        default = [row for row in found["ours"] if row["solver"] == "default"]
        lines.append(("ddim_ode, default", default, {"marker": "v", "lw": 2.2, "color": "black"}))
        for label, points, look in lines:
            errors = [math.nan if row["rms"] is None else row["rms"] for row in points]
            axes.plot([row["nfe"] for row in points], errors, label=label, ms=4.5, **look)
        least = min(row["rms"] for _, points, _ in lines for row in points if row["rms"] is not None)
        axes.axhline(found["reference_difference"], color="0.5", ls=":", lw=1.0)
        axes.set_ylim(bottom=least / 3.0)
        axes.set(xscale="log", yscale="log", title=f"{name}, {found['samples']} latents")
        axes.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[::columns]:
        axes.set_ylabel("RMS error")
    for axes in panels[max(0, len(done) - columns) : len(done)]:
        axes.set_xlabel("Model calls, at most")
    if done:
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return drawn


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: errors by problem and budget, and the settings behind each best."""
    names = list(PACKAGES)
    lines = [
        "| problem | calls | default | "
        + " | ".join(names)
        + " | default / best peer | target | with nodes handed to it | medians |"
    ]
    lines.append("|---" * (len(names) + 7) + "|")
    settings = ["", "| problem | calls | package | sampler | setting |", "|---|---|---|---|---|"]
    for name, found in record["problems"].items():
        if "missing" in found:
            lines.append(f"| {name} | | not run: {found['missing']} |" + " |" * (len(names) + 4))
            continue
        for ratio in found["ratios"]:
            budget = ratio["nfe"]
            default = next(r["rms"] for r in found["ours"] if r["solver"] == "default" and r["nfe"] == budget)
            cells = [f"**{_cell(default)}**"]
            for package in names:
                result = found["packages"].get(package, {"missing": "not run"})
                if "missing" in result:
                    cells.append(result["missing"])
                    continue
                best, any_ = (next(row for row in result[k] if row["nfe"] == budget) for k in ("best", "best_custom"))
                cells.append(_cell(best["rms"]))
                for row in (best, any_) if any_ != best else (best,):
                    if row["sampler"]:
                        told = f"{row['setting']}, nodes handed to it" if row.get("custom") else row["setting"]
                        settings.append(f"| {name} | {budget} | {package} | {row['sampler']} | {told} |")
            missed = "" if ratio["met"] else " (missed)"
            other = ratio["ratio_custom"]
            cells += ["–" if ratio["ratio"] is None else f"{ratio['ratio']:.2f}{missed}", f"{ratio['target']:g}"]
            cells.append("–" if other is None else f"{other:.2f} ({ratio['peer_custom']})")
            cells.append("–" if ratio["ratio_median"] is None else f"{ratio['ratio_median']:.2f}")
            lines.append(f"| {name} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines + settings)


def _cell(error: float | None) -> str:
    return "failed" if error is None else f"{error:.2g}" if error < 1e-3 else f"{error:.4f}"


def show(record: dict[str, Any]) -> None:
    """Draw the figure and write the tables into the page, from the record alone."""
    output_folder(ROOT / "docs/figures")
    save_figure(figure(record), ROOT / "docs/figures/peers.png")
    into_page("peers.md", {"peers": table(record)})


def versions() -> dict[str, str | None]:
    """Of every peer."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _left_out() -> dict[str, str]:
    try:
        from benchmarks.contenders_diffusers import left_out

        return left_out()
    except ImportError:
        return {}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="which to run")
    parser.add_argument("--seed", type=int, default=2, help="of the latents")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for peers.json")
    parser.add_argument("--ours-only", action="store_true", help="keep the peers' record, and run ours again beside it")
    parser.add_argument("--figures-only", action="store_true", help="draw the figure and the tables from the record")
    options = parser.parse_args(argv)
    path = output_folder(options.out) / "peers.json"
    torch.set_num_threads(1)
    for name in () if options.figures_only else options.problems:
        recorded = _recorded(path)
        found = again(name, recorded[name]) if options.ours_only else study(name, options.seed, recorded)
        # Read again: another run may have recorded its problems in the meantime.
        known = _recorded(path) | {name: found}
        record = {
            "study": "peers",
            **circumstances(),
            "peers": versions(),
            "budgets": BUDGETS,
            "targets": TARGETS,
            "left_out": _left_out(),
            "problems": {n: known[n] for n in PROBLEMS if n in known},
        }
        write_json(path, record)
        print(_summary(name, found), flush=True)
    # From the file, after a run as with --figures-only: what is drawn is what was recorded.
    show(json.loads(path.read_text("utf-8")))


def _recorded(path: Path) -> dict[str, Any]:
    """The problems of a record, if there is one."""
    return json.loads(path.read_text("utf-8"))["problems"] if path.exists() else {}


def _summary(name: str, found: dict[str, Any]) -> str:
    if "missing" in found:
        return f"{name}: not run ({found['missing']})"
    told = ", ".join(f"{row['ratio']:.2f} at {row['nfe']} ({row['peer']})" for row in found["ratios"])
    return f"{name}, {found['seconds']:.0f} s: default over best peer {told}"


if __name__ == "__main__":
    main()
