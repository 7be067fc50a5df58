r"""Proposition 1: eq. 14 is the probability-flow ODE of the variance-exploding SDE, and Euler's steps on the two differ.

The SDE is :math:`d\bar x = \sqrt{d\sigma^2/dt}\, dw`; its probability-flow ODE is
:math:`d\bar x = -\tfrac12 \nabla \log p_\sigma(\bar x)\, d\sigma^2`.

- *fields*: the two right-hand sides, per unit of σ, at draws of p_σ over all noise levels. The score is the gradient of log p_σ by
  automatic differentiation, and knows nothing of ε.
- *euler*: eq. 13 (Euler in σ) and eq. 15 (Euler in σ²/2), from one latent, against the exact trajectory: both at order 1, with
  constants of their own.

Run from the root of a checkout::

    python -m benchmarks.proposition1 [--short] [--figures-only]

It takes a few minutes, and needs scikit-learn for the digits. The record is ``proposition1.json``; the figure is drawn from it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import ddim_ode
from benchmarks.folders import add_folders, folders, recorded
from benchmarks.problems import digits_mixture, problem
from ddim_ode import Grid, NoiseSchedule
from ddim_ode.comparison import circumstances
from ddim_ode.files import write_json
from ddim_ode.metrics import rms
from ddim_ode.noise import noise
from ddim_ode.plotting import STYLE, save_figure

STEPS = (25, 50, 100, 200, 400, 800, 1600, 3200, 6400)
#: Grids that a number of steps makes twice as fine throughout: even in asinh(σ/0.02), in arctan σ, in t.
GRIDS = ("asinh", "arctan", "t")
MAPS = {"ddim": "eq. 13, Euler in σ", "pf-euler": "eq. 15, Euler in σ²/2"}


def fields(draws: int) -> dict[str, Any]:
    """The largest relative difference of the two right-hand sides, level by level."""
    mixture = digits_mixture()
    schedule = NoiseSchedule.linear()
    levels = np.geomspace(schedule.sigma_min, schedule.sigma_max, 41)
    clean = mixture.sample(draws, torch.Generator().manual_seed(0))
    rows = []
    for n, sigma in enumerate(levels.tolist()):
        x_bar = (clean + sigma * noise(mixture.shape, draws, n)).requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_density(x_bar, sigma).sum(), x_bar)
        flow = -0.5 * score * (2.0 * sigma)  # dσ²/dσ
        eps = mixture(x_bar.detach(), sigma)
        size = eps.square().mean().sqrt()
        rows.append({"sigma": sigma, "relative": float((flow - eps).abs().max() / size), "size": float(size)})
    return {"draws": draws, "rows": rows}


def euler(steps: tuple[int, ...], samples: int) -> list[dict[str, Any]]:
    """Errors of both maps, their orders and their constants."""
    out = []
    for name in ("gaussian", "digits"):
        task = problem(name, samples, seed=3)
        for grid in GRIDS:
            for solver in MAPS:
                errors = []
                for n in steps:
                    nodes = Grid.make(grid, task.field.schedule, n)
                    run = ddim_ode.sample(task.field, task.latent, grid=nodes, solver=solver)
                    errors.append(float(rms(run.x, task.exact).square().mean().sqrt()))
                found = np.array(errors)
                out.append(
                    {
                        "problem": name, "grid": grid, "solver": solver, "steps": steps, "rms": errors,
                        "order": float(np.log2(found[:-1] / found[1:])[-1]), "constant": float(found[-1] * steps[-1]),
                        "reference_difference": task.difference,
                    }
                )  # fmt: skip
    return out


def draw(record: dict[str, Any]) -> Figure:
    """Left the fields' difference, right the two maps' errors."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.4), layout="constrained")
        left, *right = figure.subplots(1, 3)
        rows = record["fields"]["rows"]
        left.loglog(
            [r["sigma"] for r in rows], [max(r["relative"], 1e-17) for r in rows], "o-", color="black", markersize=3
        )
        left.set(xlabel="σ", title="eq. 14 − probability flow, relative", ylim=(1e-17, 1e-6))
        for panel, name in zip(right, ("gaussian", "digits"), strict=True):
            for row in record["euler"]:
                if row["problem"] == name and row["grid"] in ("asinh", "arctan"):
                    style = {"ddim": "o-", "pf-euler": "s--"}[row["solver"]]
                    colour = {"asinh": "tab:blue", "arctan": "tab:orange"}[row["grid"]]
                    panel.loglog(
                        row["steps"],
                        row["rms"],
                        style,
                        color=colour,
                        markersize=4,
                        label=f"{row['solver']}, {row['grid']}",
                    )
            panel.set(xlabel="steps", title=f"{name}: RMS error")
        right[0].legend(fontsize=7)
    return figure


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_folders(parser, "fewer steps and samples: seconds, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, figures = folders(options)
    path = out / "proposition1.json"
    if not options.figures_only:
        steps = STEPS[:4] if options.short else STEPS
        record: dict[str, Any] = {"study": "proposition1", "circumstances": circumstances(None, torch.float64)}
        record |= {"fields": fields(8 if options.short else 64), "euler": euler(steps, 4 if options.short else 16)}
        write_json(path, record)
    record = json.loads(recorded(path).read_text("utf-8"))
    worst = max(row["relative"] for row in record["fields"]["rows"])
    print(f"the fields differ by {worst:.1e} at most, relative to their size")
    for row in record["euler"]:
        print(
            f"{row['problem']:>9} on {row['grid']:<7} {MAPS[row['solver']]:<22} error {row['rms'][-1]:.2e} at "
            f"{row['steps'][-1]} steps, order {row['order']:.2f}, constant {row['constant']:.3g}"
        )
    save_figure(draw(record), figures / "proposition1.png")


if __name__ == "__main__":
    main()
