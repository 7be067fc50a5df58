r"""Explicit methods as tables of numbers: what any of them does on one grid, and what a calibration changes of it.

With :math:`z = (c + \sigma)\epsilon - \bar x`, what a :class:`~ddim_ode.solvers.multistep.Flow` stores of an evaluation, a method
that asks for ε once at each of the levels σ_0, …, σ_{N−1}, in order, is on them

.. math:: \bar x_{n+1} = P_n \bar x_n + \sum_{j \le n} w_{nj}\, z_{n-j},

whatever it is called: the states in which it asks are sums of the first one and of all evaluations before, and so are these.
:func:`table` reads the numbers off the running solver. At the noisy end no model has to be asked: a :class:`Leap` goes there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim_ode.field import EpsilonField, differences
from ddim_ode.files import to_json, write_json
from ddim_ode.grid import Grid
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solvers.base import Field, Solver
from ddim_ode.solvers.multistep import Flow

__all__ = ["PART", "Calibrated", "Leap", "Table", "load_solver", "table"]

Array = NDArray[np.float64]

#: The linear part that tables are written in. Any would do: with a free P and all evaluations they say the same.
PART = Flow(0.15)

#: The version of the file's layout; readers refuse later ones.
FORMAT = 1

#: What of a field a calibration holds for, out of :meth:`EpsilonField.describe`: neither dtypes nor conditions.
HOLDS_FOR = (
    "weights", "shape", "prediction", "coordinates", "label", "guidance_scale", "clip", "threshold", "schedule",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A method on one grid.

    Attributes
    ----------
    sigmas : tuple of float
        Where it asks for ε, and last where it ends: N + 1 levels.
    propagators : tuple of float
        P_n, N numbers.
    weights : tuple of tuple of float
        w_nj of each step, newest first; step n has n + 1 of them at most.
    """

    sigmas: tuple[float, ...]
    propagators: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        numbers = lambda values: tuple(float(value) for value in values)
        object.__setattr__(self, "sigmas", numbers(self.sigmas))
        object.__setattr__(self, "propagators", numbers(self.propagators))
        object.__setattr__(self, "weights", tuple(map(numbers, self.weights)))
        steps = len(self.sigmas) - 1
        if steps < 1 or len(self.propagators) != steps or len(self.weights) != steps:
            raise ValueError(
                f"a table over {len(self.sigmas)} sigmas needs {steps} propagators and rows of weights, but has "
                f"{len(self.propagators)} and {len(self.weights)}"
            )
        for n, row in enumerate(self.weights):
            if not 1 <= len(row) <= n + 1:
                raise ValueError(f"row {n} of the weights must have 1 to {n + 1} numbers, but has {len(row)}")
        every = (*self.sigmas, *self.propagators, *(w for row in self.weights for w in row))
        if not np.all(np.isfinite(every)):
            raise ValueError("a table's numbers must be finite, but there is NaN or infinity among them")

    @property
    def steps(self) -> int:
        """N."""
        return len(self.propagators)

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """Its levels as nodes."""
        return Grid(np.array(self.sigmas), schedule, "calibrated")


def table(solver: Solver, grid: Grid) -> Table:
    """What a solver does on a grid, found by running it on symbols.

    Parameters
    ----------
    solver : Solver
        Of fixed steps, linear in ε, such as any of the package's that have a budget.
    grid : Grid
        Its nodes.

    Raises
    ------
    ValueError
        If it asks for ε twice at one level, or not in order.
    """
    calls = solver.calls(grid)
    asked: list[float] = []
    states: list[Tensor] = []

    def symbols(x_bar: Tensor, sigma: float) -> Tensor:
        # The state is the row of its coefficients: of the first state, then of z_0, z_1, …; ε follows from z being the next.
        asked.append(sigma)
        states.append(x_bar)
        z = torch.zeros_like(x_bar)
        z[:, len(asked)] = 1.0
        return (z + x_bar) / (PART.c + sigma)

    x_bar = torch.zeros((1, calls + 1), dtype=torch.float64)
    x_bar[:, 0] = 1.0
    state = solver.init(symbols, x_bar, grid)
    for n in range(grid.steps):
        x_bar, state, _ = solver.step(symbols, x_bar, n, state)
    sigmas = np.array([*asked, float(grid.sigmas[-1])])
    steps = np.diff(sigmas)
    if not np.all(steps > 0.0 if grid.encoding else steps < 0.0):
        raise ValueError(f"{solver.name} does not ask for ε once at each level, in order, and has no such table")
    rows = torch.cat((*states, x_bar)).numpy()
    propagators = rows[1:, 0] / rows[:-1, 0]
    moved = rows[1:, 1:] - propagators[:, None] * rows[:-1, 1:]
    weights = []
    for n, row in enumerate(moved):
        own = row[n::-1]  # newest first
        last = np.flatnonzero(np.abs(own) > 1e-14 * np.abs(own).max())
        weights.append(tuple(own[: 1 + int(last[-1]) if last.size else 1]))
    return Table(tuple(sigmas), tuple(propagators), tuple(weights))


@dataclass(frozen=True)
class Leap:
    r"""A step at the noisy end that asks no model: there data are to the noise what their Gaussian is.

    .. math:: \bar x' = g\,\bar x + \sum_i (g_i - g)\, v_i\, (v_i \cdot \bar x) + b

    is how eq. 14 moves the data of a Gaussian, along its leading directions and all others, and b puts the mean right. Wang &
    Vastola (2024) call it teleportation.

    Parameters
    ----------
    top : float
        The σ_T it was made for.
    gain : float
        g, along all other directions.
    gains : tuple of float
        g_i.
    directions : str
        v_i, (r, D), orthonormal, as float16 in base 64.
    shift : str
        b, (D,), as float32 in base 64.
    """

    top: float
    gain: float
    gains: tuple[float, ...]
    directions: str
    shift: str

    @staticmethod
    def of(top: float, gain: float, gains: Array, directions: Array, shift: Array) -> Leap:
        """From arrays: (r,), (r, D), (D,)."""
        packed = lambda x, kind: base64.b64encode(np.ascontiguousarray(x, dtype=kind).tobytes()).decode()
        return Leap(float(top), float(gain), tuple(gains.tolist()), packed(directions, "<f2"), packed(shift, "<f4"))

    def on(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The step for states of this form; what it holds goes to their device here, once.

        Raises
        ------
        ValueError
            If they have another size than what it was made for.
        """
        shift = _unpacked(self.shift, "<f4")
        if len(shift) != math.prod(like.shape[1:]):
            raise ValueError(
                f"this solver steps over the noisy end of samples of {len(shift)} numbers, and not of shape {tuple(like.shape[1:])}"
            )
        place = lambda x: torch.as_tensor(x, dtype=torch.float64).to(like.device, like.dtype)
        directions = place(_unpacked(self.directions, "<f2").reshape(len(self.gains), -1))
        more, b = place(np.array(self.gains) - self.gain), place(shift).reshape(like.shape[1:])

        def leap(x_bar: Tensor) -> Tensor:
            along = (more * (x_bar.flatten(1) @ directions.T)) @ directions
            return self.gain * x_bar + along.reshape(x_bar.shape) + b

        return leap

    def __repr__(self) -> str:
        return f"Leap(gain={self.gain:.6g}, {len(self.gains)} directions)"


def _unpacked(text: str, kind: str) -> Array:
    return np.frombuffer(base64.b64decode(text), kind).astype(np.float64)


@dataclass(frozen=True, repr=False)
class Calibrated(Solver):
    r"""A solver for one model, one grid and one direction: :func:`ddim_ode.calibrate` makes it, :func:`ddim_ode.load_solver` reads it.

    It brings its grid: ``sample(field, solver=solver)`` names neither grid nor calls. Another model, schedule, guidance scale or
    shape of samples is refused, unless `force` is set (``dataclasses.replace(solver, force=True)``).

    Parameters
    ----------
    numbers : Table
        What it does.
    model : str
        What the field said of itself, as JSON.
    leap : Leap, optional
        What it goes from the schedule's σ_T to its first level with, or from its last to σ_T on the way up, if those are not σ_T.
    force : bool
        Whether to run with any model, conditions and shape.

    Attributes
    ----------
    record : dict
        How it came about: base, stages and their errors, reference, calls spent, versions.
    """

    numbers: Table
    model: str
    leap: Leap | None = None
    force: bool = False
    record: dict[str, Any] = field(default_factory=dict, compare=False)

    nfe_per_step = 1
    order = 1
    source = "fitted to trajectories of its model, docs/calibration.md"
    start = "fitted"
    exact = "nothing"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"calibrated{'-encode' if self.encodes else ''}{self.numbers.steps}"

    @property
    def states(self) -> int:  # type: ignore[override]
        return 1 + max(map(len, self.numbers.weights))

    @property
    def encodes(self) -> bool:
        """Whether it goes up."""
        return self.numbers.sigmas[-1] > self.numbers.sigmas[0]

    def own_grid(self, schedule: NoiseSchedule) -> Grid:
        nodes = self.numbers.grid(schedule)
        if self.leap is None:
            return nodes
        place = len(nodes.sigmas) if self.encodes else 0
        return Grid(np.insert(nodes.sigmas, place, self.leap.top), schedule, nodes.name)

    def between(self, grid: Grid) -> tuple[int, int]:
        if self.leap is None:
            return 0, grid.steps
        return (0, grid.steps - 1) if self.encodes else (1, grid.steps)

    def nfe(self, steps: int) -> int:
        return steps - (self.leap is not None)

    def stages(self, grid: Grid) -> Array:
        return np.array(self.numbers.sigmas[:-1])

    def check_field(self, field: EpsilonField) -> None:
        if self.force:
            return
        own = json.loads(self.model)
        differ = differences({k: v for k, v in own.items() if k in HOLDS_FOR}, {
            k: v for k, v in field.describe().items() if k in HOLDS_FOR
        })  # fmt: skip
        if self.leap is not None and field.condition is not None:
            differ.append("there are conditions, and it leaps over the noisy end as if there were none")
        if differ:
            raise ValueError(
                f"{self.name} was calibrated for another model: {'; '.join(differ)}. Calibrate for this one, or run it all the "
                "same: dataclasses.replace(solver, force=True), at the terminal --force"
            )

    def steps(self, nfe: int) -> int:
        if nfe < self.numbers.steps:
            raise ValueError(f"{self.name} takes {self.numbers.steps} calls, but nfe is {nfe}: calibrate for so many")
        return self.numbers.steps + (self.leap is not None)

    def init(self, field: Field, x_bar: Tensor, grid: Grid) -> Any:
        shape = json.loads(self.model).get("shape")
        if shape not in (None, list(x_bar.shape[1:])) and not self.force:
            raise ValueError(
                f"{self.name} was calibrated for samples of shape {tuple(shape)}, and not {tuple(x_bar.shape[1:])}: calibrate for these"
            )
        own = self.own_grid(grid.schedule).sigmas
        if grid.sigmas.size != own.size or not np.allclose(grid.sigmas, own, rtol=1e-9, atol=0.0):
            raise ValueError(
                f"{self.name} runs on the grid it was calibrated on, and not on {grid!r}: leave the grid out"
            )
        return None if self.leap is None else self.leap.on(x_bar), ()

    def step(self, field: Field, x_bar: Tensor, n: int, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        leap, history = state
        # A leap comes before all calls, or after them.
        n -= leap is not None and not self.encodes
        if not 0 <= n < self.numbers.steps:
            return leap(x_bar), state, None
        sigma, weights = self.numbers.sigmas[n], self.numbers.weights[n]
        history = (PART.stored(x_bar, field(x_bar, sigma), sigma), *history)
        moved = PART.advance(x_bar, self.numbers.propagators[n], weights, history[: len(weights)])
        longest = max(map(len, self.numbers.weights[n + 1 :]), default=1)
        return moved, (leap, history[: longest - 1]), None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a ``.json`` file, whole or not at all.

        Raises
        ------
        ValueError
            If the ending is another.
        OSError
            If the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"solvers are written as .json, but the file is {path}")
        write_json(path, self._about() | {"sha256": self.sha256})

    @property
    def sha256(self) -> str:
        """What its file says of itself, record included: two solvers of one name are told apart by it."""
        return _sum(self._about())

    def _about(self) -> dict[str, Any]:
        numbers = {"sigmas": self.numbers.sigmas, "propagators": self.numbers.propagators}
        about: dict[str, Any] = {"format": FORMAT, "kind": "calibrated", "name": self.name}
        about |= numbers | {"weights": self.numbers.weights, "c": PART.c, "model": json.loads(self.model)}
        return about | {"leap": None if self.leap is None else asdict(self.leap), "record": self.record}


def load_solver(path: str | os.PathLike[str], *, force: bool = False) -> Calibrated:
    """Read what :meth:`Calibrated.save` has written.

    Parameters
    ----------
    path : path
        The ``.json`` file.
    force : bool
        Whether it may run with another model than its own.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is no such file, is cut short or changed, or was written by a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no solver at {path}: there is no such file")
    try:
        about = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no solver, or is cut short: {error}") from error
    if not isinstance(about, dict) or about.get("kind") != "calibrated":
        raise ValueError(f"{path} is no solver: Calibrated.save writes them")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written in layout {about.get('format')!r}, and this version reads {FORMAT}: use a later ddim_ode"
        )
    said = about.pop("sha256", None)
    if said != _sum(about):
        raise ValueError(f"{path} is damaged: what it holds is not what was written")
    if about["c"] != PART.c:
        raise ValueError(f"{path} is in terms of c = {about['c']!r}, and this version knows {PART.c!r} only")
    numbers = Table(*(_tuples(about[name]) for name in ("sigmas", "propagators", "weights")))
    packed = about.get("leap")
    leap = None if packed is None else Leap(**{name: _tuples(value) for name, value in packed.items()})
    return Calibrated(numbers, json.dumps(about["model"], sort_keys=True), leap, force, about["record"])


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _sum(about: dict[str, Any]) -> str:
    """SHA-256 of the contents, whatever their order and spaces."""
    plain = json.dumps(json.loads(to_json(about)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
