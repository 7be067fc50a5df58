"""Figures from records: nothing is computed here."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import chi2, norm
from torch import Tensor

from ddim_ode.data import to_uint8
from ddim_ode.files import replacing

__all__ = [
    "STYLE",
    "along_figure",
    "calibration_figure",
    "distribution_figure",
    "error_figure",
    "gaussianity_figure",
    "reconstruction_figure",
    "round_trip_figure",
    "save_figure",
    "sheet_figure",
]

_MARKERS = "osD^vP*X<>hd"

#: One look for every figure; a colour map with more than ten distinct entries.
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


def error_figure(record: dict[str, Any]) -> Figure:
    """Error of the samples against model calls, log–log, a line a solver."""
    figure, axes = _axes("Model calls", "RMS error against the reference")
    _lines(axes, record["rows"], "calls", "rms")
    floor = record["reference"]["rms_difference"]
    axes.axhline(floor, color="0.5", linestyle=":", linewidth=1.0)
    axes.annotate(
        "the two references differ", (0.01, floor), xycoords=("axes fraction", "data"), va="bottom", color="0.4"
    )
    axes.set_title(f"{record['samples']} samples, same latents{_on(record)}")
    return figure


def round_trip_figure(record: dict[str, Any]) -> Figure:
    """Mean squared error of encode-then-decode against model calls each way, log–log, a line a solver."""
    figure, axes = _axes("Model calls each way", "Round trip: MSE per dimension on [0, 1]")
    # A default that goes back by both its states is exact up to rounding: at the foot of the figure, not thirty decades down.
    rows = [
        row | {"round_trip_mse": row["round_trip_mse"] and max(row["round_trip_mse"], 1e-16)} for row in record["rows"]
    ]
    _lines(axes, rows, "calls", "round_trip_mse")
    axes.set_title(f"{record['images']} images{_on(record)}")
    return figure


#: What a reconstruction study measures against calls, and what it is called.
_ERRORS = {
    "round_trip_mse": "round trip, MSE on [0, 1]",
    "alone_mse": "from the latent alone, MSE on [0, 1]",
    "latent_rms": "latent, RMS",
    "decode_rms": "decoding the true latent, RMS",
}


def reconstruction_figure(record: dict[str, Any]) -> Figure:
    """Four errors of a reconstruction study against model calls there and back, log–log, a line a method."""
    rows = [row | {"calls": row["encode_calls"] + row["decode_calls"]} for row in record["rows"] if row["encode_calls"]]
    # Exact round trips are rounding's square, thirty decades down: drawn at the foot of the panel.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 7.2), layout="constrained")
        panels = np.asarray(figure.subplots(2, 2)).ravel()
        styles = _styles([row["solver"] for row in rows])
        for panel, (key, title) in zip(panels, _ERRORS.items(), strict=True):
            values = [row[key] for row in rows if row[key]]
            floor = max(min(values, default=1e-12), 1e-16 if key.endswith("mse") else 1e-12)
            for name, style in styles.items():
                points = [(row["calls"], row[key]) for row in rows if row["solver"] == name and row[key] is not None]
                if points:
                    x, y = zip(*points, strict=True)
                    panel.plot(x, np.maximum(y, floor), label=name, **style)
            panel.set(xscale="log", yscale="log", title=title)
            calls = {row["calls"] for row in rows}
            ticks = [t for t in (10, 20, 50, 100, 200, 500, 1000, 2000) if 0.7 * min(calls) <= t <= 1.4 * max(calls)]
            panel.set_xticks(ticks, [str(t) for t in ticks])
            panel.minorticks_off()
            # What blows up would squeeze all others.
            panel.set_ylim(floor / 3.0, min(10.0, 3.0 * max(values, default=1.0)))
        difference = record["reference"]["rms_difference"]
        if difference:
            panels[2].axhline(difference, color="0.5", linestyle=":", linewidth=1.0)
        figure.supxlabel("model calls, there and back", fontsize=9)
        figure.legend(*panels[2].get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(f"{record['images']} images encoded and decoded", fontsize=10)
    return figure


def along_figure(record: dict[str, Any]) -> Figure:
    """Error of the state against σ on the way up and on the way back, a line a method."""
    along = record["along"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        styles = _styles([row["solver"] for row in along["rows"]])
        for panel, way in ((left, "encode"), (right, "decode")):
            for row in along["rows"]:
                errors = [np.nan if e is None else max(e, 1e-8) for e in row[way]["rms"]]
                panel.plot(row[way]["sigmas"], errors, label=row["solver"], **styles[row["solver"]])
            panel.set_xscale("symlog", linthresh=1e-2)
            panel.set(yscale="log", xlabel="σ", title="encoding, σ rises" if way == "encode" else "decoding, σ falls")
        left.set(ylabel="RMS error of x", ylim=(1e-6, 10.0))
        right.invert_xaxis()
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
        figure.suptitle(f"{along['nfe']} calls each way (steps, for methods that iterate)", fontsize=10)
    return figure


def distribution_figure(record: dict[str, Any], nfe: int) -> Figure:
    """What images lose by each method at one budget: a box an error, whiskers to the least and the most."""
    rows = [row for row in record["rows"] if row["nfe"] in (nfe, None) and row["each"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 1.2 + 0.34 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, key in zip(panels, ("alone_mse", "latent_rms"), strict=True):
            values = [[x for x in row["each"][key] if x is not None and np.isfinite(x)] for row in rows]
            panel.boxplot(
                values, orientation="horizontal", whis=(0, 100), widths=0.6, medianprops={"color": "black"},
                tick_labels=[row["solver"] for row in rows],
            )  # fmt: skip
            panel.set(xscale="log", title=_ERRORS[key])
        panels[0].invert_yaxis()
        figure.suptitle(f"{record['images']} images, {nfe} calls each way", fontsize=10)
    return figure


def calibration_figure(record: dict[str, Any]) -> Figure:
    """Errors of a calibration by stage, on what was fitted to and on what was held back: a panel a budget."""
    rows = [row for row in record["rows"] if row["error"] is None]
    across = min(len(rows), 4)
    down = math.ceil(len(rows) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 0.9 + 2.7 * across), 0.9 + 3.1 * down), layout="constrained")
        panels = np.asarray(figure.subplots(down, across, sharey=True, squeeze=False)).ravel()
        for panel, row in zip(panels, rows, strict=False):
            names = [stage["stage"] for stage in row["stages"]]
            places = np.arange(len(names))
            for half, label, style in (
                ("held_back", "held back", {"color": "black", "marker": "o", "linewidth": 2.2}),
                ("fitted", "fitted to", {"color": "tab:blue", "marker": "s", "linestyle": "--"}),
            ):
                # What diverged has no number.
                values = [np.nan if stage[half] is None else stage[half] for stage in row["stages"]]
                panel.plot(places, values, label=label, **style)
            kept = names.index(row["kept"])
            panel.plot(
                [kept], [row["stages"][kept]["held_back"]], "o", markersize=12, fillstyle="none", color="tab:red",
                markeredgewidth=1.6, label="kept",
            )  # fmt: skip
            if row["reference"]["rms_difference"]:
                panel.axhline(
                    row["reference"]["rms_difference"], color="0.5", linestyle=":",
                    label="the reference's two resolutions differ",
                )  # fmt: skip
            panel.set_xticks(places, [name.replace(" and ", "\nand ") for name in names], rotation=35, ha="right")
            panel.set(yscale="log", title=f"{row['nfe']} calls", xlim=(-0.4, len(names) - 0.6))
        for panel in panels[len(rows) :]:
            panel.remove()
        for panel in panels[::across]:
            panel.set_ylabel("RMS error")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4 if across > 2 else 2)
        halves = rows[0]["trajectories"]
        what = "images" if record["direction"] == "sample" else "latents"
        figure.suptitle(
            f"Error of {what}: {halves['fitted']} trajectories fitted to, {halves['held_back']} held back",
            fontsize=10,
        )
    return figure


def sheet_figure(rows: Sequence[tuple[str, Sequence[Tensor]]], columns: Sequence[str], title: str) -> Figure:
    """Labelled rows of image strips: one strip a column, each of images (n, C, H, W) in [−1, 1]."""
    with matplotlib.rc_context(STYLE):
        strips = [[_strip(to_uint8(cell)) for cell in cells] for _, cells in rows]
        height, width = strips[0][0].shape[:2]
        wide = 1.9 * max(1.0, width / height / 4.0)
        figure = Figure(
            figsize=(1.0 + wide * len(columns), 0.5 + (wide * height / width + 0.08) * len(rows)), layout="constrained"
        )
        grid = np.asarray(figure.subplots(len(rows), len(columns), squeeze=False))
        for i, (name, _) in enumerate(rows):
            for j, column in enumerate(columns):
                axes = grid[i, j]
                axes.imshow(strips[i][j], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                axes.spines[:].set_visible(False)
                if i == 0:
                    axes.set_title(column, fontsize=9)
                if j == 0:
                    axes.set_ylabel(name, rotation=0, ha="right", va="center")
        figure.suptitle(title, fontsize=10)
        return figure


def gaussianity_figure(records: dict[str, dict[str, Any]]) -> Figure:
    """Sets of latents by name, a row each, from :meth:`ddim_ode.Gaussianity.record`.

    Norms beside the density of χ²_D/D; moments of each dimension in standard errors; of pictures, the variance of each
    pixel and the correlations of pixels some way apart; of other latents, those of neighbours.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.0, 0.5 + 2.8 * len(records)), layout="constrained")
        panels = np.asarray(figure.subplots(len(records), 4, squeeze=False))
        for (name, record), (norms, moments, variance, correlations) in zip(records.items(), panels, strict=True):
            _norms(norms, record)
            norms.set_ylabel(name)
            _dimensions(moments, record)
            found = record["dimension"].get("variance")
            if found is None or len(record["shape"]) != 3:
                variance.remove()
            else:
                _map(variance, np.asarray(found).mean(axis=0), (0.0, 2.0), "variance of each pixel")
            if record["correlations"] is None:
                _neighbours(correlations, record)
            else:
                apart = np.array(record["correlations"], dtype=float)
                down, across = (length // 2 for length in apart.shape)
                apart[down, across] = np.nan  # 1, beside which nothing else would show
                most = max(0.1, float(np.nanmax(np.abs(apart), initial=0.0)))
                _map(correlations, apart, (-most, most), "correlation, by pixels apart")
                correlations.set_xticks([0, across, 2 * across], [-across, 0, across])
                correlations.set_yticks([0, down, 2 * down], [-down, 0, down])
    return figure


def _norms(axes: Axes, record: dict[str, Any]) -> None:
    found, size = np.asarray(record["norm"]), math.prod(record["shape"])
    wide = 5.0 * math.sqrt(2.0 / size)
    x = np.linspace(max(0.0, 1.0 - wide), 1.0 + wide, 400)
    axes.plot(x, size * chi2.pdf(size * x, size), color="black", label="draws of N(0, I): χ²_D/D")
    if len(found) >= 8:
        axes.hist(found, bins="auto", density=True, color="tab:blue", alpha=0.5)
    axes.plot(found, np.zeros(len(found)), "|", color="tab:blue", markersize=12, label=f"{len(found)} latents")
    axes.set(xlabel="norm²/D", yticks=[])
    axes.legend(loc="upper left", fontsize=7)
    axes.margins(y=0.3)


def _dimensions(axes: Axes, record: dict[str, Any]) -> None:
    n = record["n"]
    # Mean and standard deviation of each over n draws of N(0, 1), as in ddim_ode/latents.py
    drawn = {
        "mean": lambda: (0.0, 1.0 / n),
        "variance": lambda: (1.0, 2.0 / (n - 1)),
        "skewness": lambda: (0.0, 6.0 * (n - 2) / ((n + 1) * (n + 3))),
        "kurtosis": lambda: (-6.0 / (n + 1), 24.0 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))),
    }
    edges = np.linspace(-8.0, 8.0, 65)
    for name, values in record["dimension"].items():
        expected, second = drawn[name]()
        off = (np.asarray(values, dtype=float).ravel() - expected) / math.sqrt(second)
        # What lies beyond is counted in the outermost bins.
        heights, _ = np.histogram(off[np.isfinite(off)].clip(-7.99, 7.99), edges, density=True)
        axes.stairs(heights, edges, label=name, linewidth=1.2)
    axes.plot(edges, norm.pdf(edges), color="black", linewidth=1.0)
    axes.set(xlabel="each dimension, in standard errors", yticks=[])
    axes.legend(loc="upper left", fontsize=7)
    axes.margins(y=0.3)


def _neighbours(axes: Axes, record: dict[str, Any]) -> None:
    rows = [m for m in record["moments"] if m["over"] == "correlation of neighbours"]
    axes.errorbar([m["name"] for m in rows], [m["found"] for m in rows], [m["error"] for m in rows], fmt="o", capsize=4)
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.set(ylim=(-1.05, 1.05), xlabel="correlation of neighbours")


def _map(axes: Axes, values: np.ndarray, limits: tuple[float, float], title: str) -> None:
    drawn = axes.imshow(values, cmap="RdBu_r", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlabel=title)
    axes.grid(visible=False)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all; the ending decides the format."""
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def _on(record: dict[str, Any]) -> str:
    """The grids, for a title: the default pair has its own."""
    own = any(row["solver"] == "default" for row in record["rows"])
    return f", grid {record['grid']}" + (" (default: its own)" if own else "")


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    return figure, axes


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A look for each method, the default's the boldest."""
    names = list(dict.fromkeys(names))
    colours = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        bold = {"color": "black", "linewidth": 2.2, "zorder": 5} if name == "default" else {"color": colours(i)}
        looks[name] = {"marker": _MARKERS[i % len(_MARKERS)]} | bold
    return looks


def _lines(axes: Axes, rows: list[dict[str, Any]], x: str, y: str) -> None:
    with matplotlib.rc_context(STYLE):
        for name, style in _styles([row["solver"] for row in rows]).items():
            points = [row for row in rows if row["solver"] == name and row[x]]
            values = [np.nan if row[y] is None else row[y] for row in points]
            axes.plot([row[x] for row in points], values, label=name, **style)
        ticks = sorted({row[x] for row in rows if row[x]})
        axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _strip(images: np.ndarray) -> np.ndarray:
    n, channels, height, width = images.shape
    strip = images.transpose(2, 0, 3, 1).reshape(height, n * width, channels)
    return strip[..., 0] if channels == 1 else strip
