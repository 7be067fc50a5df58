r"""Solvers fitted to a model: a few accurate trajectories of it buy what no fixed formula can.

A method of N calls on one grid is a table of numbers (:mod:`ddim_ode.solvers.calibrated`). Where the noise hides all of the data but
their Gaussian no model has to be asked: the calls begin, or encoding end, at the level below which that is worth one. The numbers are
fitted in three stages of which each starts from the best before it:

``coefficients``
    Step by step, on the states that the fitted steps before have led to, the weights of the last evaluations and the propagator that
    come nearest to the reference at the step's end: linear least squares, shrunk towards the unfitted member.
``grid``
    The levels, by Gauss–Newton on the ends of the trajectories; then the coefficients again; in turns.
``refined``
    Levels and all numbers together, by Gauss–Newton on the ends.

Sampling, the last step is held to leave no noise in data of one value. What the last two stages lessen is the mean over samples of the
RMS error at the end, by least squares that are weighted anew at each step: of few calls a sample near the border between two modes may
be off by a whole image, and plain squares would be about such samples alone. Derivatives with respect to a number are differences
between two runs of the rest of the trajectory: no gradient goes through the network, which may be anything. What is kept is what does
best on trajectories that nothing was fitted to; without an improvement there, the default.

Learned from Bespoke Non-Stationary solvers (Shaul et al. 2024: every solver is such a table), S4S (Frankel et al. 2025: coefficients
and levels in turns, then together), LD3 (Tong et al. 2024: levels by the end of the trajectory), GITS (Chen et al. 2024), and Wang &
Vastola (2024: the noisy end is that of a Gaussian).
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import null_space
from torch import Tensor

import ddim_ode
from ddim_ode.dense import Dense
from ddim_ode.field import EpsilonField, check_field
from ddim_ode.grid import Grid
from ddim_ode.integrate import check_state, integrate
from ddim_ode.metrics import rms
from ddim_ode.noise import POPULATION, check_seed, draw, noise
from ddim_ode.quality import Features
from ddim_ode.sampling import DEFAULTS, plan, sample
from ddim_ode.schedule import whole
from ddim_ode.solution import Status, Step
from ddim_ode.solvers import Solver, fit_gaussian, get
from ddim_ode.solvers.calibrated import HOLDS_FOR, PART, Calibrated, Leap, Table, table

__all__ = ["SAMPLES", "calibrate", "check_calibration"]

Array = NDArray[np.float64]

#: Trajectories when neither latents nor a number are given.
SAMPLES = 48
#: Evaluations that a step's fitted weights go back.
HISTORY = 5
#: What the shrinkage of least squares is chosen from, relative to the squares of what it is about.
SHRINKAGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: And that of a Gauss–Newton step.
DAMPING = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: Differences that are none: what float64 makes of hundreds of steps.
ROUNDING = 1e-8
#: What a step must leave of an error to be worth another.
ENOUGH = 0.99
#: Differences: of numbers, in units of the step, and of levels, in shares of the gap to the nearer neighbour.
_H, _MOVE = 1e-3, 1e-2
#: Nodes kept of a reference, for the states on its way.
_KEPT = 100
#: What trajectories are made by, in how many calls, and how often those are doubled at most where they do not do.
REFERENCE, REFERENCE_NFE, DOUBLINGS = "ab4-rk", 400, 2
#: What twice the calls may leave of the difference between two resolutions to be doubled again; where it is rounding, 0.7 stays at best.
CLOSER = 0.7
#: Members that are tried for a base beside the default, on the default's grid.
BASES = {"sample": ("flow3", "flow2"), "encode": ("flowup4",)}
#: Samples that the Gaussian of the noisy end is taken from, and the calls that the default makes them in.
SAMPLES_SEEN, SAMPLES_NFE = 256, 10
#: Its leading directions that are kept, each as many numbers as a sample has.
DIRECTIONS = 8
#: Levels that calls are tried to begin at, in units of the widest direction's spread.
LEAPS = (1.2, 2.0, 4.0, 8.0)


def calibrate(
    field: EpsilonField,
    nfe: int = 10,
    *,
    latents: Tensor | None = None,
    images: Tensor | None = None,
    n: int | None = None,
    seed: int = 0,
    direction: str = "sample",
    refine: int = 4,
    consistent: bool = False,
    reference_nfe: int | None = None,
    batch_size: int = 64,
    network: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[str], Any] = lambda what: None,
) -> Calibrated:
    r"""Fit a solver of `nfe` calls to a model.

    Parameters
    ----------
    field : EpsilonField
        ε. Gradients are not needed.
    nfe : int
        Calls of the solver, at least 2.
    latents : Tensor, optional
        x_T, (B, \*d), B ≥ 4, of the kind it will be used on. Without them, `n` (48) are drawn from `seed`.
    images : Tensor, optional
        For ``direction="encode"``: x_0 to encode, in place of latents. By default what the model makes of the latents is encoded.
    n, seed : int
        As for :func:`ddim_ode.sample`.
    direction : {"sample", "encode"}
        Which way.
    refine : int
        How often the last stage finds derivatives anew, at most. Each time costs about ``3 nfe²`` calls on every trajectory fitted to; 0
        leaves it out.
    consistent : bool
        Keep what is exact for constant ε: the coefficients of each step add up to the σ it goes. It costs accuracy, and keeps
        colours and means as they are.
    reference_nfe : int, optional
        Calls of the reference, checked by one of half as many: the two must differ by no more than a fifth of what the default is off
        by. By default 400, or four times `nfe` where that is more, and where those do not do twice and then four times as many, as
        long as the two come closer.
    batch_size : int
        Trajectories at once.
    network : callable, optional
        What sees features of images, as for :meth:`Features.of`: then distances between those of the solver's and of the reference's
        images are in the record. Encoding makes none.
    advance : callable
        Called with a few words before each piece of work.

    Returns
    -------
    Calibrated
        To be named as ``solver=``. Its ``record`` has the stages with their errors on both halves, which of them it is, what the
        reference was and how far it can be trusted, what it cost, energy at high frequencies against the reference's, versions.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call; and if the reference does not converge, or too few trajectories are
        left.
    """
    began = time.perf_counter()
    start, base, unfitted = check_calibration(
        field, nfe, latents=latents, images=images, n=n, seed=seed, direction=direction, refine=refine,
        reference_nfe=reference_nfe, batch_size=batch_size, network=network,
    )  # fmt: skip
    task = _Task(field, direction, batch_size)

    known, study, sees = _seeing(task, start, images is not None, reference_nfe, unfitted, consistent, advance)
    if sees:  # else the default is exact, as far as float64 can tell, and nothing is better
        if not consistent and field.condition is None:
            advance(f"noisy end, {SAMPLES_NFE} calls on {SAMPLES_SEEN} samples")
            study.far = _Far.of(task, study.fitted, seed)
        study.run(base, refine)
    return study.result(known, began, seed, network)


Unfitted = tuple[Solver, Grid]


def check_calibration(
    field: EpsilonField,
    nfe: int,
    *,
    latents: Tensor | None = None,
    images: Tensor | None = None,
    n: int | None = None,
    seed: int,
    direction: str,
    refine: int,
    reference_nfe: int | None,
    batch_size: int,
    network: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, list[Unfitted], Unfitted]:
    """Refuse what :func:`calibrate` refuses before any model call; where trajectories begin, members to fit, and the default."""
    check_field(field)
    nfe = whole(nfe, "nfe, the calls of a calibrated solver,", 2)
    whole(refine, "refine, the steps of refinement,", 0)
    if reference_nfe is not None:
        whole(reference_nfe, "reference_nfe", 4 * nfe)
    whole(batch_size, "batch_size")
    check_seed(seed)
    start = _starts(field, latents, images, n, seed, direction)
    if network is not None:
        if direction == "encode":
            raise ValueError("network sees images, and encoding makes latents: leave it out")
        # What it may be refused for, it is refused for on a blank picture, and not when all is done.
        shape = tuple(start.shape[1:]) if field.codec is None else field.codec.shape
        Features.of(torch.zeros((1, *shape), device=start.device), network)
    return start, *_bases(field, nfe, direction)


# -- what it is fitted to -----------------------------------------------------------------------
def _starts(
    field: EpsilonField, latents: Tensor | None, images: Tensor | None, n: int | None, seed: int, direction: str
) -> Tensor:
    """Latents, or images to encode, at least four."""
    if direction not in DEFAULTS:
        raise ValueError(f'direction must be "sample" or "encode", but got {direction!r}')
    if direction == "encode" and field.clips:
        raise ValueError("a field that clips or thresholds the predicted data cannot encode: make one without")
    if images is not None and direction == "sample":
        raise ValueError('images are what is encoded: leave them out, or say direction="encode"')
    if images is not None and latents is not None:
        raise ValueError("latents and images are two ways to say one thing: give one of them")
    given, name = (images, "images") if images is not None else (latents, "latents")
    if given is None:
        if field.shape is None:
            raise ValueError("n needs to know the shape of a sample: make the field with shape=(...), or give latents=")
        given = noise(field.shape, SAMPLES if n is None else whole(n, "n"), seed)
        given = given.to(field.device or "cpu")
        name = "n"
    else:
        check_state(field, given, name)
        if n is not None and n != given.shape[0]:
            raise ValueError(f"n = {n} contradicts the {given.shape[0]} {name} given: leave it out")
    if given.shape[0] < 4:
        raise ValueError(
            f"{name} must be 4 trajectories at least, two to fit to and two to hold back, but got {given.shape[0]}"
        )
    field.check_conditions(given.shape[0])
    return given.detach().double()


@dataclass(frozen=True, eq=False)
class _Half:
    """Some of the trajectories: where they start and end as x̄, the states between, and their rows among the conditions."""

    start: Tensor
    exact: Tensor
    path: Dense
    rows: Tensor

    def __getitem__(self, chosen: Tensor) -> _Half:
        path = replace(self.path, x_bar=self.path.x_bar[:, chosen])
        return _Half(self.start[chosen], self.exact[chosen], path, self.rows[chosen])

    def split(self, size: int) -> list[_Half]:
        return [self[chosen] for chosen in torch.arange(len(self.rows), device=self.start.device).split(size)]


@dataclass(frozen=True, eq=False)
class _Reference:
    """All trajectories, how far they can be trusted, and what they cost."""

    whole: _Half
    difference: float
    method: str
    nfe: int
    calls: int
    #: Which of those given are not finite.
    dropped: tuple[int, ...]

    def split(self) -> tuple[_Half, _Half]:
        """To fit to, and to hold back: a third, two at least."""
        count = len(self.whole.rows)
        held = max(2, round(count / 3))
        every = torch.arange(count, device=self.whole.start.device)
        return self.whole[every[: count - held]], self.whole[every[count - held :]]


def _reference(task: _Task, given: Tensor, are_images: bool, nfe: int) -> _Reference:
    """Trajectories from latents, or to them from images, and how far a run of half as many calls ends from what is known.

    That is what errors will be of: where runs down from the same latents end, or up from the same images; and where images were made
    of latents to be encoded, how far from those latents the encoding of them ends.
    """
    field, up = task.field, task.direction == "encode"
    before = task.calls
    first = given if are_images else given * math.sqrt(1.0 + field.schedule.sigma_max**2)
    end, path, fine = _accurate(task, first, nfe, are_images, keep=True)
    if up and not are_images:
        other, _, also = _accurate(task, end, nfe // 2, True)
        start, exact = end, first
    else:
        other, _, also = _accurate(task, first, nfe // 2, are_images)
        start, exact = first, end
    keep = torch.nonzero(fine & also).flatten()
    dropped = tuple(torch.nonzero(~(fine & also)).flatten().tolist())
    if len(keep) < 4:
        raise ValueError(
            f"{len(dropped)} of {len(first)} reference trajectories are not finite, and 4 at least are needed"
        )
    difference = float(((other - exact)[keep] / task.unit).square().mean().sqrt())
    every = _Half(start, exact, path, torch.arange(len(first), device=first.device))
    return _Reference(every[keep], difference, REFERENCE, nfe, task.calls - before, dropped)


def _seeing(
    task: _Task,
    start: Tensor,
    are_images: bool,
    given: int | None,
    unfitted: Unfitted,
    consistent: bool,
    advance: Callable[[str], Any],
) -> tuple[_Reference, _Study, bool]:
    """A reference that tells what the default is off by; a study that begins with that; False where both are exact in float64."""
    nfe = unfitted[0].nfe(unfitted[1].steps)
    tries = [given] if given is not None else [max(REFERENCE_NFE, 4 * nfe) * 2**more for more in range(DOUBLINGS + 1)]
    spent, before, why = 0, math.inf, ""
    for calls in tries:
        advance(f"reference, {calls} and {calls // 2} calls on {len(start)} trajectories")
        known = _reference(task, start, are_images, calls)
        spent += known.calls
        study = _Study(task, *known.split(), consistent, advance)
        default = study.judge("default", unfitted)
        sees = known.difference <= 0.2 * default.held
        if sees or known.difference <= ROUNDING:
            study.stages.append(default)
            return replace(known, calls=spent), study, sees
        why = (
            f"at {calls} and {calls // 2} calls its two resolutions differ by {known.difference:.2g} RMS, and the default at {nfe} calls "
            f"is off it by {default.held:.2g}"
        )
        if not known.difference < CLOSER * before:
            raise ValueError(
                f"the reference does not converge: {why}, and {calls // 2} calls were hardly worse: is the model rounded too coarsely, "
                "or are the data too narrow in some directions? A larger reference_nfe may do"
            )
        before = known.difference
        del known, study, default  # states of all trajectories: not kept beside the next ones
    raise ValueError(
        f"the reference does not converge, or not beyond what the default does: {why}: give a larger reference_nfe"
    )


def _accurate(task: _Task, first: Tensor, nfe: int, encodes: bool, keep: bool = False) -> tuple[Tensor, Dense, Tensor]:
    """Run all trajectories; their ends, states on their way, at every so many nodes and in single precision, and which succeeded."""
    method = get(REFERENCE)
    grid = Grid.make("asinh", task.field.schedule, method.steps(nfe), c=0.05)
    grid = grid.reversed() if encodes else grid
    every = max(1, grid.steps // _KEPT)
    kept = sorted({*range(0, grid.steps, every), grid.steps}) if keep else [0]
    ends, parts, good = [], [], []
    for rows in torch.arange(len(first), device=first.device).split(task.size):
        states = [first[rows].float()]

        def watch(step: Step, states: list[Tensor] = states) -> None:
            if step.index + 1 in kept:
                states.append(step.x_bar.float())

        run = integrate(task.field, first[rows], grid, method, rows=rows, callback=watch)
        task.calls += run.nfe * len(rows)
        ends.append(run.x_bar)
        parts.append(torch.stack(states))
        good += [status is Status.SUCCESS for status in run.status]
    path = Dense(grid.sigmas[kept], torch.cat(parts, dim=1), (None,) * len(kept), method.order)
    return torch.cat(ends), path, torch.tensor(good, device=first.device)


# -- the noisy end ------------------------------------------------------------------------------
class _Far:
    """What the leaps of a field are made from: directions of its samples with their spread, and where trajectories are."""

    def __init__(self, samples: Tensor, half: _Half, encodes: bool, top: float) -> None:
        self.gaussian = fit_gaussian(samples, rank=min(DIRECTIONS, samples[0].numel()))
        assert self.gaussian.basis is not None
        # As they are kept; not orthogonal to the last bit then, which the shift makes good on average.
        self.directions = self.gaussian.basis.T.numpy(force=True).astype("<f2").astype(np.float64)
        self.path = replace(half.path, x_bar=half.path.x_bar.double().mean(dim=1, keepdim=True))
        #: The mean of the trajectories where they end at σ_T.
        self.end = (half.exact if encodes else half.start).flatten(1).mean(dim=0).numpy(force=True)
        self.encodes, self.top = encodes, top

    @staticmethod
    def of(task: _Task, half: _Half, seed: int) -> _Far | None:
        """From samples made for the purpose; None where too few of them are finite, or all alike, to say anything."""
        field = task.field
        shape = tuple(half.start.shape[1:])
        latents = draw(shape, range(SAMPLES_SEEN), seed, 0, POPULATION).to(half.start.device)
        run = sample(field, latents, nfe=SAMPLES_NFE, batch_size=task.size)
        task.calls += SAMPLES_SEEN * SAMPLES_NFE
        good = torch.tensor([status is Status.SUCCESS for status in run.status], device=latents.device)
        samples = run.x_bar[good]
        if len(samples) < SAMPLES_SEEN // 2 or bool((samples == samples[0]).all()):
            return None
        return _Far(samples, half, task.direction == "encode", field.schedule.sigma_max)

    def levels(self) -> list[float]:
        """Where calls may begin, or end."""
        widest = math.sqrt(float(self.gaussian.variance[0]))
        return [level for times in LEAPS if (level := times * widest) < 0.7 * self.top]

    def leap(self, level: float) -> Leap:
        """From σ_T to a level, or from it to σ_T."""
        a, b = (level, self.top) if self.encodes else (self.top, level)
        gains = self.gaussian.propagator(np.array(a), b)
        # That of all other directions is the last; where there are none the last one's own does.
        gain, gains = float(gains[-1]), gains[: len(self.directions)]
        there = self.path(level).flatten().numpy(force=True)
        before, after = (there, self.end) if self.encodes else (self.end, there)
        moved = gain * before + ((gains - gain) * (self.directions @ before)) @ self.directions
        return Leap.of(self.top, gain, gains, self.directions, after - moved)


# -- running tables -----------------------------------------------------------------------------
History = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Program:
    """What a candidate does: its table, and its leap before or after."""

    numbers: Table
    leap: Leap | None
    encodes: bool

    def enter(self, x_bar: Tensor) -> Tensor:
        return x_bar if self.leap is None or self.encodes else self.leap.on(x_bar)(x_bar)

    def leave(self, x_bar: Tensor) -> Tensor:
        return x_bar if self.leap is None or not self.encodes else self.leap.on(x_bar)(x_bar)

    def run(self, evaluate: Any, start: Tensor, kept: list[tuple[Tensor, History]] | None = None) -> Tensor:
        return self.leave(_roll(evaluate, self.numbers, self.enter(start), 0, (), kept))


@dataclass(eq=False)
class _Task:
    """A field, a direction, and how many model evaluations it took so far, each of one sample."""

    field: EpsilonField
    direction: str
    size: int
    calls: int = 0

    @property
    def unit(self) -> float:
        """What an error of x̄ is divided by at the end: 1 for images, that of unit variance for latents."""
        return math.sqrt(1.0 + self.field.schedule.sigma_max**2) if self.direction == "encode" else 1.0

    def bind(self, half: _Half, sigmas: Sequence[float]) -> Callable[[Tensor, float], Tensor]:
        evaluate = self.field.bind(half.start, sigmas[:-1], half.rows)

        def counted(x_bar: Tensor, sigma: float) -> Tensor:
            self.calls += x_bar.shape[0]
            return evaluate(x_bar, sigma)

        return counted


def _ask(evaluate: Any, x_bar: Tensor, sigma: float, history: History) -> History:
    return PART.stored(x_bar, evaluate(x_bar, sigma), sigma), *history


def _advance(numbers: Table, n: int, x_bar: Tensor, history: History) -> Tensor:
    weights = numbers.weights[n]
    return PART.advance(x_bar, numbers.propagators[n], weights, history[: len(weights)])


def _roll(
    evaluate: Any,
    numbers: Table,
    x_bar: Tensor,
    n: int,
    history: History,
    kept: list[tuple[Tensor, History]] | None = None,
) -> Tensor:
    """From node n to the end; `kept` gets each state with the history that includes its own evaluation."""
    for i in range(n, numbers.steps):
        history = _ask(evaluate, x_bar, numbers.sigmas[i], history)
        if kept is not None:
            kept.append((x_bar, history))
        x_bar = _advance(numbers, i, x_bar, history)
    return x_bar


# -- what is fitted -----------------------------------------------------------------------------
#: The same member on the same grid is asked for with each number that is changed.
_plain = lru_cache(maxsize=64)(table)


@dataclass(frozen=True, eq=False)
class _Member:
    """An unfitted solver, on a grid, and what is added to its numbers: (N, 1 + HISTORY), P's first, in units of the steps.

    With `far` the grid does not reach σ_T, and a leap does.
    """

    base: Solver
    grid: Grid
    added: Array
    consistent: bool
    far: _Far | None = None

    @staticmethod
    def of(base: Solver, grid: Grid, consistent: bool) -> _Member:
        return _Member(base, grid, np.zeros((base.calls(grid), 1 + HISTORY)), consistent)

    def over(self, far: _Far, level: float) -> _Member:
        """The same between `level` and 0, its nodes where they were in the clock σ/(1 + σ) as shares of the way."""
        sigmas = self.grid.sigmas
        u = sigmas / (1.0 + sigmas) * (level / (1.0 + level)) / (far.top / (1.0 + far.top))
        new = u / (1.0 - u)
        new[-1 if far.encodes else 0] = level
        return replace(self, grid=Grid(new, self.grid.schedule, self.grid.name), far=far)

    @property
    def moving(self) -> slice:
        """Which nodes can move: all inner ones, and the one that a leap comes to or goes from."""
        if self.far is None:
            return slice(1, self.grid.steps)
        return slice(1, self.grid.steps + 1) if self.far.encodes else slice(0, self.grid.steps)

    def program(self) -> _Program:
        numbers = self.table()
        if self.far is None:
            return _Program(numbers, None, False)
        return _Program(numbers, self.far.leap(float(self.grid.sigmas.max())), self.far.encodes)

    def table(self) -> Table:
        plain = _plain(self.base, self.grid)
        if not self.added.any():
            return plain
        propagators, weights = list(plain.propagators), []
        for n, (scale, added) in enumerate(zip(_scales(plain), self.added, strict=True)):
            if not self.consistent:
                propagators[n] += scale * added[0]
            row = np.zeros(max(len(plain.weights[n]), min(HISTORY, n + 1)))
            row[: len(plain.weights[n])] = plain.weights[n]
            more = added[1 : 1 + min(HISTORY, n + 1)].copy()
            if self.consistent:
                more[0] = -more[1:].sum()
            row[: more.size] += scale * more
            weights.append(tuple(row))
        made = Table(plain.sigmas, tuple(propagators), tuple(weights))
        return _without_noise(made) if self.bound else made

    @property
    def bound(self) -> bool:
        """Whether the last step is held to leave no noise: sampling, and where all steps do not so anyway."""
        return not self.consistent and bool(self.grid.sigmas[0] > self.grid.sigmas[-1])

    def free(self) -> list[tuple[int, int]]:
        """Which of `added` can be chosen."""
        first = 2 if self.consistent else 0
        return [(n, j) for n in range(len(self.added)) for j in range(first, 1 + min(HISTORY, n + 1))]

    def plus(self, at: list[tuple[int, int]], amounts: Array) -> _Member:
        added = self.added.copy()
        for (n, j), amount in zip(at, amounts, strict=True):
            added[n, j] += amount
        return replace(self, added=added)

    def rooms(self) -> Array:
        """How far each node that can move is from its nearer neighbour, in the clock σ/(1 + σ)."""
        u = self.grid.sigmas / (1.0 + self.grid.sigmas)
        ends = np.array([u[0], u[-1]])
        if self.far is not None:  # where a leap ends, the next node is σ_T
            ends[-1 if self.far.encodes else 0] = self.far.top / (1.0 + self.far.top)
        gaps = np.abs(np.diff(np.concatenate((ends[:1], u, ends[1:]))))
        return np.minimum(gaps[:-1], gaps[1:])[self.moving]

    def moved(self, amounts: Array) -> _Member:
        """Nodes moved, by shares of their rooms, less than a half each."""
        new = self.grid.sigmas.copy()
        # Nodes that stay stay to the last bit: what a run does before the first change is not done again.
        at = np.arange(new.size)[self.moving][amounts != 0.0]
        u = new[at] / (1.0 + new[at]) + (amounts * self.rooms())[amounts != 0.0]
        new[at] = u / (1.0 - u)
        return replace(self, grid=Grid(new, self.grid.schedule, self.grid.name))

    def units(self, at: list[tuple[int, int]]) -> Array:
        """What the numbers `at` and the levels that can move are counted in."""
        return np.append(_scales(self.table())[[n for n, _ in at]], self.rooms())


def _noise_left(numbers: Table) -> tuple[Array, float]:
    r"""What a run makes of noise of unit size over data that are all 0, where :math:`\epsilon = \bar x/\sigma`.

    What its last step multiplies, (1 + its evaluations,), and the noise at its end, beyond what is there by its level. Over any other
    value x_0 it is the same, and all runs end at one multiple of x_0.
    """
    kept: list[tuple[Tensor, History]] = []
    start = torch.tensor(numbers.sigmas[0], dtype=torch.float64)
    end = _roll(lambda x_bar, sigma: x_bar / sigma, numbers, start, 0, (), kept)
    last, history = kept[-1]
    return torch.stack((last, *history)).numpy(), float(end - numbers.sigmas[-1])


def _without_noise(numbers: Table) -> Table:
    """The table whose last step is changed, by the least sum of squares, so that it leaves no noise in data of one value.

    What is nearest to trajectories in the mean of squares leaves a little of the noise in all of an image: it hardly counts there, and
    features see it first.
    """
    columns, left = _noise_left(numbers)
    columns = columns[: 1 + HISTORY]
    change = -left * columns / np.square(columns).sum()
    weights = np.array(numbers.weights[-1])
    weights[: len(change) - 1] += change[1:]
    propagators = (*numbers.propagators[:-1], numbers.propagators[-1] + float(change[0]))
    return replace(numbers, propagators=propagators, weights=(*numbers.weights[:-1], tuple(weights.tolist())))


def _scales(numbers: Table) -> Array:
    """How far each step goes in units of its start, which is what the weights of its evaluations add up to."""
    sigmas = np.array(numbers.sigmas)
    return np.abs(np.diff(sigmas)) / (PART.c + sigmas[:-1])


def _bases(field: EpsilonField, nfe: int, direction: str) -> tuple[list[Unfitted], Unfitted]:
    """Unfitted members of so many calls, and the first of them, the default."""
    default = plan(field, direction, None, None, None, nfe)
    grid = DEFAULTS[direction].grid
    found = [default, *(plan(field, direction, name, grid, None, nfe) for name in BASES[direction])]
    found = [(solver, nodes) for solver, nodes in found if solver.calls(nodes) == nfe]
    if default not in found:
        raise ValueError(f"nfe = {nfe} is no number of calls that {default[0].name} makes on whole steps: give another")
    return found, default


@dataclass(frozen=True, eq=False)
class _Judged:
    """A candidate with its RMS errors: over what was fitted to, over what was held back, and of each sample of both."""

    stage: str
    program: _Program
    fitted: float
    held: float
    own: Tensor
    each: Tensor
    calls: int
    member: _Member
    #: Where trajectories end: of what was fitted to, and of what was held back.
    own_ends: Tensor
    ends: Tensor

    @property
    def mean(self) -> float:
        """Over all samples, of their errors: what the descent lessens."""
        return float(torch.cat((self.own, self.each)).mean())

    @property
    def mean_held(self) -> float:
        """The same of what was held back."""
        return float(self.each.mean())

    def record(self) -> dict[str, Any]:
        return {"stage": self.stage, "fitted": self.fitted, "held_back": self.held, "calls_so_far": self.calls}

    def beats(self, other: _Judged) -> bool:
        """Whether it is better on what was held back, by more than chance: RMS, and the mean of logarithms beyond its error."""
        # No sample counts for more than a factor of a thousand.
        ratios = (self.each / other.each.clamp(min=1e-300)).clamp(1e-3, 1e3).log()
        spread = float(ratios.std(correction=1)) / math.sqrt(len(ratios))
        return self.held < other.held and float(ratios.mean()) + spread < 0.0


class _Study:
    """The stages, one after another, and what came of them."""

    def __init__(
        self,
        task: _Task,
        fitted: _Half,
        held: _Half,
        consistent: bool,
        advance: Callable[[str], Any],
    ) -> None:
        self.task, self.fitted, self.held, self.consistent, self.advance = task, fitted, held, consistent, advance
        self.far: _Far | None = None
        self.batches, self.held_batches = fitted.split(task.size), held.split(task.size)
        self.stages: list[_Judged] = []

    # -- errors
    def _errors(self, program: _Program, batches: list[_Half]) -> tuple[Tensor, Tensor]:
        """RMS of each sample, and where they end."""
        with torch.no_grad():
            ends = [program.run(self.task.bind(part, program.numbers.sigmas), part.start) for part in batches]
        end, exact = torch.cat(ends), torch.cat([part.exact for part in batches])
        return (rms(end, exact) / self.task.unit).nan_to_num(math.inf, math.inf), end

    def judge(self, stage: str, made: _Member | Unfitted) -> _Judged:
        """Run a candidate on both halves."""
        member = made if isinstance(made, _Member) else _Member.of(*made, self.consistent)
        program = member.program()
        total = lambda each: float(each.square().mean().sqrt())
        fitted, own_ends = self._errors(program, self.batches)
        held, ends = self._errors(program, self.held_batches)
        return _Judged(
            stage, program, total(fitted), total(held), fitted, held, self.task.calls, member, own_ends, ends
        )

    # -- the stages
    def run(self, bases: list[tuple[Solver, Grid]], refine: int) -> None:
        default = self.stages[0]
        tried = [default, *(self.judge("base", base) for base in bases[1:])]
        if self.far is not None:
            plain = [j.member for j in tried]
            tried += [self.judge("base", m.over(self.far, level)) for m in plain for level in self.far.levels()]
        first = min(tried, key=lambda j: j.mean)
        self.advance("coefficients by least squares")
        self.stages.append(self._coefficients(first.member, "coefficients"))
        for turn in range(2):
            self.advance(f"levels, turn {turn + 1}")
            best = min([first, *self.stages[1:]], key=lambda j: j.held)
            found = self._coefficients(self._descend(best.member, 3, levels_only=True), "coefficients and grid")
            if turn == 0:
                self.stages.append(found)
            elif found.held < self.stages[-1].held:
                self.stages[-1] = found
            if not found.held < 0.98 * best.held:
                break
        if refine:
            begin = min([first, *self.stages[1:]], key=lambda j: j.held).member
            self.stages.append(self.judge("refined", self._descend(begin, refine)))

    def _coefficients(self, member: _Member, stage: str) -> _Judged:
        """Least squares, step by step, at each shrinkage; the one that is best on what was held back."""
        plain = replace(member, added=np.zeros_like(member.added))
        found = [self.judge(stage, self.least_squares(plain, shrinkage)) for shrinkage in SHRINKAGE]
        return min(found, key=lambda j: j.held)

    def least_squares(self, member: _Member, shrinkage: float) -> _Member:
        r"""The member with numbers that bring each step of its own run nearest to the reference at the step's end.

        Of the regressors r_j, which are x̄ and the last evaluations in units of the step, and what is left, b, the θ that
        minimises :math:`|b - \sum_j \theta_j r_j|^2 + \rho \sum_j |r_j|^2 \theta_j^2`; of the last step, among those that leave no noise.
        """
        program = member.program()
        numbers = program.numbers
        scales, free = _scales(numbers), member.free()
        batches = self.batches
        with torch.no_grad():
            asks = [self.task.bind(part, numbers.sigmas) for part in batches]
            states: list[tuple[Tensor, History]] = [(program.enter(part.start), ()) for part in batches]
            for n in range(numbers.steps):
                own = [j for m, j in free if m == n]
                gram, against = np.zeros((len(own), len(own))), np.zeros(len(own))
                for i, (part, ask) in enumerate(zip(batches, asks, strict=True)):
                    x_bar, history = states[i]
                    history = _ask(ask, x_bar, numbers.sigmas[n], history)
                    states[i] = x_bar, history
                    if not own:
                        continue
                    last = n + 1 == numbers.steps and not (program.encodes and program.leap is not None)
                    wanted = part.exact if last else part.path(numbers.sigmas[n + 1]).to(x_bar.dtype)
                    left = (wanted - _advance(numbers, n, x_bar, history)).flatten(1)
                    columns = torch.stack([self._regressor(j, x_bar, history).flatten(1) for j in own]) * scales[n]
                    # A sample that has left where the network is finite has no say.
                    lost = ~(left.isfinite().all(dim=1) & columns.isfinite().all(dim=2).all(dim=0))
                    left, columns = (
                        left.masked_fill(lost[:, None], 0.0).flatten(),
                        columns.masked_fill(lost[:, None], 0.0).flatten(1),
                    )
                    gram += (columns @ columns.T).numpy(force=True)
                    against += (columns @ left).numpy(force=True)
                if own and np.isfinite(gram).all() and np.isfinite(against).all():
                    damped = gram + shrinkage * np.diag(np.diag(gram))
                    # Of the last step, only what leaves no noise.
                    bound = member.bound and n + 1 == numbers.steps
                    free_to = null_space(_noise_left(numbers)[0][None, : len(own)]) if bound else np.eye(len(own))
                    found = np.linalg.lstsq(free_to.T @ damped @ free_to, free_to.T @ against, rcond=1e-14)[0]
                    theta = (free_to @ found).astype(np.float64)
                    member = member.plus([(n, j) for j in own], theta)
                    numbers = member.table()
                states = [(_advance(numbers, n, x_bar, history), history) for x_bar, history in states]
        return member

    def _regressor(self, j: int, x_bar: Tensor, history: History) -> Tensor:
        """What the number j of a step multiplies, in units of the step."""
        if j == 0:
            return x_bar
        return history[j - 1] - history[0] if self.consistent else history[j - 1]

    def _descend(self, member: _Member, iterations: int, levels_only: bool = False) -> _Member:
        """Gauss–Newton steps on the ends, until they help what was held back no more.

        Derivatives cost hundreds of runs and a step costs a few, so they are used again, put right along each step by what the step
        did (Broyden 1965), until that gains too little.
        """
        now = best = self.judge("", member)
        since = 0
        if levels_only and member.moving.stop == member.moving.start:
            return member  # no level can move
        for i in range(iterations):
            self.advance(
                f"Gauss–Newton, derivatives {i + 1} of {iterations} at most: mean error {now.mean:.4g}, held back {now.mean_held:.4g}"
            )
            at = [] if levels_only else now.member.free()
            slopes, before = self._slopes(now.member, at), now
            while (found := self._step(now, at, slopes)) is not None and found[0].mean < 0.999 * now.mean:
                there, step = found
                enough = there.mean < ENOUGH * now.mean
                self._correct(slopes, step, there.own_ends - now.own_ends)
                more = there.member.units(at) / now.member.units(at)
                for slope in slopes:
                    slope *= torch.as_tensor(more, dtype=slope.dtype, device=slope.device)[:, None, None]
                now = there
                best, since = (now, 0) if now.mean_held < best.mean_held else (best, since + 1)
                if since == 2:
                    return best.member
                if not enough:
                    break
            if not now.mean < ENOUGH * before.mean:
                break
        return best.member

    def _correct(self, slopes: list[Tensor], step: Array, change: Tensor) -> None:
        """Make derivatives say of a step what it did, and of all directions across it what they said before."""
        share = (step / np.square(step).sum()).tolist()
        for slope, did in zip(slopes, change.split(self.task.size), strict=True):
            along = torch.as_tensor(step, dtype=slope.dtype, device=slope.device)
            missed = _finite((did / self.task.unit).flatten(1)).to(slope.dtype) - torch.einsum(
                "k,kbd->bd", along, slope
            )
            for own, part in zip(slope, share, strict=True):
                own.add_(missed, alpha=part)

    def _step(self, now: _Judged, at: list[tuple[int, int]], slopes: list[Tensor]) -> tuple[_Judged, Array] | None:
        """The best of the steps that these derivatives lead to, by how much they are damped; None: there is none."""
        count = len(slopes[0])
        hessian, gradient = np.zeros((count, count)), np.zeros(count)
        for slope, end, part in zip(slopes, now.own_ends.split(self.task.size), self.batches, strict=True):
            left = _finite(((end - part.exact) / self.task.unit).flatten(1))
            # One over the error of each sample.
            weight = left.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12).rsqrt()
            jacobian = (weight * slope).flatten(1)
            hessian += (jacobian @ jacobian.T).numpy(force=True)
            gradient += (jacobian @ (weight * left).flatten()).numpy(force=True)
        if not (np.isfinite(hessian).all() and np.isfinite(gradient).all()):
            return None
        tried = []
        for damping in DAMPING:
            # A floor, for what hardly counts at the ends must not be moved far for little.
            damped = hessian + damping * np.diag(np.diag(hessian) + 1e-3 * np.trace(hessian) / count)
            step = -np.linalg.lstsq(damped, gradient, rcond=None)[0].astype(np.float64)
            step[len(at) :] = np.clip(step[len(at) :], -0.45, 0.45)
            try:
                there = now.member.plus(at, step[: len(at)]).moved(step[len(at) :])
                tried.append((self.judge("", there), step))
            except ValueError:  # levels that no table is for
                continue
        return min(tried, key=lambda found: found[0].mean, default=None)

    def _slopes(self, member: _Member, at: list[tuple[int, int]]) -> list[Tensor]:
        """Derivatives of the ends of each batch, (K, b, D), by numbers `at` and by the levels that can move."""
        program = member.program()
        numbers = program.numbers
        knobs = [(member.plus([place], np.array([_H])).program(), _H) for place in at]
        levels = np.eye(member.moving.stop - member.moving.start)
        knobs += [(member.moved(_MOVE * level).program(), _MOVE) for level in levels]
        firsts = [_first_change(numbers, other.numbers) for other, _ in knobs]
        slopes = []
        with torch.no_grad():
            for part in self.batches:
                ask = self.task.bind(part, numbers.sigmas)
                kept: list[tuple[Tensor, History]] = []
                end = program.run(ask, part.start, kept)
                rows = []
                for first, (other, h) in zip(firsts, knobs, strict=True):
                    if first is None:
                        there = other.run(ask, part.start)
                    else:
                        x_bar, history = kept[first]
                        moved = _advance(other.numbers, first, x_bar, history)
                        there = other.leave(_roll(ask, other.numbers, moved, first + 1, history))
                    # Of a number whose change leads where the network is not finite nothing is known, and nothing comes of it.
                    rows.append(_finite(((there - end) / (h * self.task.unit)).flatten(1)))
                slopes.append(torch.stack(rows))
        return slopes

    # -- what came of it
    def result(
        self, known: _Reference, began: float, seed: int, network: Callable[[Tensor], Tensor] | None
    ) -> Calibrated:
        """The stage that is kept, as a solver with its record."""
        default = self.stages[0]
        kept = min((j for j in self.stages if j.beats(default)), key=lambda j: j.mean_held, default=default)
        field = self.task.field
        model = {name: value for name, value in field.describe().items() if name in HOLDS_FOR}
        model["shape"] = list(self.fitted.start.shape[1:])
        record: dict[str, Any] = {
            "kept": kept.stage,
            "direction": self.task.direction,
            "base": kept.member.base.name,
            "stages": [stage.record() for stage in self.stages],
            "leap": kept.program.numbers.sigmas[-1 if kept.program.encodes else 0] if kept.program.leap else None,
            "gap": kept.held / kept.fitted if kept.fitted > 0.0 else math.nan,
            "trajectories": {"fitted": len(self.fitted.rows), "held_back": len(self.held.rows), "dropped": list(known.dropped)},
            "seed": seed,
            "consistent": self.consistent,
            "reference": {
                "solver": known.method, "nfe": [known.nfe, known.nfe // 2], "rms_difference": known.difference, "calls": known.calls,
            },
            "calls": self.task.calls,
            "seconds": round(time.perf_counter() - began, 1),
            "high_frequencies": {
                stage: _high_frequencies(found.ends, self.held.exact)
                for stage, found in (("default", default), ("kept", kept))
            },
            "versions": {"ddim_ode": ddim_ode.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        if network is not None:
            record["features"] = self._features(network, default, kept)
        return Calibrated(kept.program.numbers, json.dumps(model, sort_keys=True), kept.program.leap, record=record)

    def _features(self, network: Callable[[Tensor], Tensor], default: _Judged, kept: _Judged) -> dict[str, Any]:
        """RMS distances, sample by sample, between the features of ends and of the reference's."""
        codec = self.task.field.codec
        shown = lambda x: x if codec is None else codec.decode(x)
        see = lambda x: Features.of(shown(x).clamp(-1.0, 1.0).float(), network)
        wanted = see(self.held.exact)
        far = lambda ends: float((see(ends).values - wanted.values).square().sum(dim=1).mean().sqrt())
        return {"network": wanted.network, "default": far(default.ends), "kept": far(kept.ends)}


def _finite(x: Tensor) -> Tensor:
    """Zero where it is not finite."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _first_change(a: Table, b: Table) -> int | None:
    """The first step that two tables make differently; None: they begin at different levels."""
    if a.sigmas[0] != b.sigmas[0]:
        return None
    for n in range(a.steps):
        same = a.propagators[n] == b.propagators[n] and a.weights[n] == b.weights[n]
        if not same or a.sigmas[n + 1] != b.sigmas[n + 1]:
            return n
    return a.steps - 1


def _high_frequencies(x: Tensor, exact: Tensor) -> float | None:
    """Energy above half the highest frequency of the last two axes, as a share of the reference's; None where there are not two."""
    if x.ndim < 4 or min(x.shape[-2:]) < 4:
        return None
    height, width = (torch.fft.fftfreq(size, device=x.device).abs() for size in x.shape[-2:])
    high = torch.maximum(height[:, None], width[None, :]) > 0.25
    energy = lambda y: float(torch.fft.fft2(y).abs().square()[..., high].sum())
    return energy(x) / energy(exact)
