"""Sampling, encoding, decoding, the round trip and interpolation: what a reader of the paper looks for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddim_ode.codes import Code
from ddim_ode.diffusion.generative import Generative
from ddim_ode.field import EpsilonField, check_field
from ddim_ode.grid import Grid, grids
from ddim_ode.integrate import check_state, integrate, to_dtype
from ddim_ode.metrics import mse
from ddim_ode.noise import noise
from ddim_ode.schedule import whole
from ddim_ode.solution import Solution, Status, Step
from ddim_ode.solvers import Inverse, Solver, get

__all__ = [
    "DEFAULTS",
    "LatentWarning",
    "RoundTrip",
    "check_code",
    "decode",
    "encode",
    "interpolate",
    "plan",
    "round_trip",
    "sample",
    "slerp",
]


class Default(NamedTuple):
    """What a direction does when nothing is named."""

    solver: str
    grid: str
    #: Options of the grid's rule.
    options: dict[str, float]


#: The pair of solver and grid measured most accurate per call, by direction: benchmarks/defaults.py, docs/solvers.md.
DEFAULTS = {"sample": Default("flowdown5", "flow", {}), "encode": Default("alf-flow", "flow-up", {})}

#: The grid of a solver that is named without one, both ways: the paper's for its CIFAR-10 figures.
GRID = "quadratic"

#: Model calls when neither `steps` nor `nfe` is given.
NFE = 50

GridLike = str | Grid | ArrayLike


def sample(
    field: EpsilonField,
    latent: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    nfe: int | None = None,
    solver: str | Solver | None = None,
    grid: GridLike | None = None,
    dtype: torch.dtype = torch.float64,
    batch_size: int | None = None,
    callback: Callable[[Step], Any] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    dense: bool = False,
    save_at: Sequence[float] | None = None,
    gradients: bool = False,
    checkpoint: bool = False,
    second: Tensor | None = None,
    eta: float | None = None,
    sigma_hat: bool = False,
    first: int = 0,
) -> Solution:
    r"""From latents x_T to data: eq. 14 from σ_T down to 0.

    Parameters
    ----------
    field : EpsilonField
        ε.
    latent : Tensor, optional
        x_T ~ N(0, I), (B, \*d). Without it, `n` latents are drawn from `seed`.
    n : int, optional
        How many latents to draw, if none are given.
    seed : int
        Seed of the drawn latents, and of the noise that is added where `eta` is not 0; image i depends on (seed, i) alone.
    steps : int, optional
        Number of steps.
    nfe : int, optional
        A budget of model calls instead: as many whole steps as it pays for. With neither, 50.
    solver : str or Solver, optional
        By default the one measured most accurate per call: see :data:`DEFAULTS`.
    grid : str, Grid or sequence of float, optional
        A rule's name (see :meth:`Grid.make`), a grid, or the σ themselves, in either direction.
    dtype : torch.dtype
        The state's dtype. The network keeps its own.
    batch_size : int, optional
        Split the work into batches of this size; the images stay the same.
    callback, progress, trajectory, dense, save_at, gradients, checkpoint
        As for :func:`integrate`. An adaptive solver without a grid has two nodes, so that a callback is called once, at
        the end, and progress moves once: name the nodes to be called at by `grid`.
    second : Tensor, optional
        The second state of the latents, (B, \*d), for a solver that keeps two: ``Solution.second`` of their encoding. It
        belongs to that run's nodes and solver: give ``grid=run.grid`` and the same solver, or a :class:`Code` to :func:`decode`.
    eta, sigma_hat
        The paper's stochastic sampling in place of a solver: η of eq. 16, 0 for ``ddim``, 1 for DDPM; and `sigma_hat` for
        DDPM's larger noise, of which the last step leaves some in the image, unless it leaves the first trained level.
        See :class:`Generative`, which is also a solver, and :data:`GRID`.
    first : int
        Index of the first image: what is drawn for the batch is what a larger batch would have from there on.

    Returns
    -------
    Solution
        ``.x`` in data space (x at the grid's last σ, if that is not 0), (B, \*d); ``.nfe``, ``.status``, ``.grid``.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call.

    Warns
    -----
    LatentWarning
        If a latent's spread is far from a unit Gaussian's, as an image's is.
    """
    solver = _chosen(solver, eta, sigma_hat)
    method, nodes = plan(field, "sample", solver, grid, steps, nfe)
    if latent is None:
        if n is None:
            raise ValueError("sample needs latents: give latent=, or n= to draw some")
        if field.shape is None:
            raise ValueError("n needs to know the shape of a sample: make the field with shape=(...), or give latent=")
        latent = noise(field.shape, n, seed, first=first).to(field.device or "cpu")
    else:
        check_state(field, latent, "latent")
        if n is not None and n != latent.shape[0]:
            raise ValueError(f"n = {n} contradicts the {latent.shape[0]} latents given: leave one out")
        if nodes.sigmas[0] > 0.9 * field.schedule.sigma_max:  # further down, x is partly an image
            _warn_if_not_latent(latent)
    _check_second(second, method, latent)
    with torch.set_grad_enabled(gradients or checkpoint):
        start = to_dtype(latent, dtype, nodes.sigmas[0]) * math.sqrt(1.0 + nodes.sigmas[0] ** 2)
    options: dict[str, Any] = {"callback": callback, "progress": progress, "trajectory": trajectory, "dense": dense}
    options |= {"save_at": save_at, "gradients": gradients, "checkpoint": checkpoint, "seed": seed, "first": first}
    return _in_batches(field, start, second, nodes, method, batch_size, options)


def _chosen(solver: str | Solver | None, eta: float | None, sigma_hat: bool) -> str | Solver | None:
    """The solver that these three name."""
    if eta is None and not sigma_hat:
        return solver
    if solver is not None:
        raise ValueError("eta and sigma_hat choose the sampler: leave solver out, or give it a Generative")
    return Generative(1.0 if eta is None else eta, sigma_hat)


def decode(field: EpsilonField, latent: Tensor | Code, *, force: bool = False, **options: Any) -> Solution:
    r"""From latents back to data.

    Parameters
    ----------
    field : EpsilonField
        ε.
    latent : Tensor or Code
        x_T, (B, \*d): then this is :func:`sample`. Or a :class:`Code`, which is decoded by the solver that made it over the same
        nodes and from both states, if it has two.
    force : bool
        Decode a code though the model is another, or `options` name another solver, which `eta` and `sigma_hat` do too, or
        another grid. A code of a solver that only encodes needs it: its latent alone is decoded, as :func:`sample` would.
    **options
        As for :func:`sample`. For a code ``dtype`` is by default that of its latents.

    Raises
    ------
    ValueError
        If the model, solver or grid is not that of the code, without `force`: it says what differs. And as for :func:`sample`.
    """
    if not isinstance(latent, Code):
        if force:
            raise ValueError("force is for codes, and a latent was given: leave it out")
        return sample(field, latent, **options)
    code, chosen = latent, check_code(field, latent, force=force, **options)
    keep = {name: value for name, value in options.items() if name not in (*_SOLVER, *_NODES)}
    run = sample(field, code.latent, **({"dtype": code.latent.dtype} | keep | chosen))
    return replace(run, status=tuple(before or after for before, after in zip(code.status, run.status, strict=True)))


_SOLVER = ("solver", "eta", "sigma_hat")
_NODES = ("grid", "steps", "nfe")


def check_code(field: EpsilonField, code: Code, *, force: bool = False, **options: Any) -> dict[str, Any]:
    """What :func:`decode` would give :func:`sample` for a code; it refuses what :func:`decode` does."""
    named = {name: options[name] for name in _NODES if options.get(name) is not None}
    differ = code.differences(field)
    chosen_solver = _chosen(options.get("solver"), options.get("eta"), options.get("sigma_hat", False))
    if both_ways(field, code.solver)[1] is None:
        if not force:
            also = f". It was also made otherwise: {'; '.join(differ)}" if differ else ""
            raise ValueError(
                f"this code was made by {code.solver.name}, which only encodes: decode its latent alone by another solver, "
                f"decode(field, code.latent, solver=...); so does force=True, by the default or the solver that is named{also}"
            )
        solver, nodes = plan(field, "sample", chosen_solver, *(named.get(name) for name in _NODES))
        return {"solver": solver, "grid": nodes}
    solver = get(chosen_solver or code.solver)
    solver.check_field(field)
    nodes = code.grid
    if solver.own_grid(field.schedule) is not None:
        nodes = plan(field, "sample", solver, *(named.get(name) for name in _NODES))[1]
    elif named:
        # What is not named is the code's own, and a budget is counted on the way up, as it was when the code was made.
        rule = named.get("grid", code.grid.name if code.grid.name in grids() else None)
        way = "sample" if solver.stochastic else "encode"  # there is no way up
        nodes = plan(field, way, solver, rule, named.get("steps"), named.get("nfe"))[1]
    nodes = nodes.reversed() if nodes.encoding else nodes
    same = solver == code.solver
    if not same:
        differ.append(
            f"solver is {solver.name}, was {code.solver.name}"
            + (" of other options" if solver.name == code.solver.name else "")
        )
    other_grid = not np.array_equal(nodes.sigmas, code.grid.sigmas[::-1])
    if other_grid:
        differ.append(f"the grid is {nodes!r}, was {code.grid!r} the other way")
    if differ and not force:
        raise ValueError(f"this code was made otherwise: {'; '.join(differ)}. force=True decodes it all the same")
    if not other_grid:
        # As nodes of this field's schedule, which under force may be another.
        nodes = Grid(code.grid.sigmas[::-1], field.schedule, code.grid.name)
    chosen: dict[str, Any] = {"solver": solver, "grid": nodes}
    if same and not other_grid:
        chosen["second"] = code.second
    return chosen


def encode(
    field: EpsilonField,
    images: Tensor,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    solver: str | Solver | None = None,
    grid: GridLike | None = None,
    dtype: torch.dtype = torch.float64,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
    batch_size: int | None = None,
    callback: Callable[[Step], Any] | None = None,
    progress: bool = False,
    trajectory: bool = False,
    dense: bool = False,
    save_at: Sequence[float] | None = None,
    gradients: bool = False,
    checkpoint: bool = False,
    second: Tensor | None = None,
) -> Solution:
    r"""From data to latents x_T: eq. 14 from σ = 0 up to σ_T. A grid named for both directions has the same nodes in both.

    Parameters
    ----------
    field : EpsilonField
        ε.
    images : Tensor
        x_0, (B, \*d); x at the grid's first σ, if that is not 0. An image that holds NaN or infinity fails, and the others
        are encoded.
    data_range : (float, float) or None
        What images (B, C, H, W) must lie in, up to rounding; None for no check, and none is made for a
        latent-diffusion model, whose latents have no range.
    steps, nfe, solver, grid, dtype, batch_size, callback, progress, trajectory, dense, save_at, gradients, checkpoint, second
        As for :func:`sample`; the default solver and grid are those of this direction.

    Returns
    -------
    Solution
        ``.x`` is the latent x_T, (B, \*d), of unit variance where the model fits the data.

    Raises
    ------
    ValueError, TypeError
        If an argument cannot be used, before any model call.
    """
    method, nodes = plan(field, "encode", solver, grid, steps, nfe)
    images, spoilt = set_aside(images)
    check_state(field, images, "images")
    _check_range(images, None if field.codec is not None else data_range)
    _check_second(second, method, images)
    with torch.set_grad_enabled(gradients or checkpoint):
        start = to_dtype(images, dtype, nodes.sigmas[-1]) * math.sqrt(1.0 + nodes.sigmas[0] ** 2)
    options: dict[str, Any] = {"callback": callback, "progress": progress, "trajectory": trajectory, "dense": dense}
    options |= {"save_at": save_at, "gradients": gradients, "checkpoint": checkpoint}
    run = _in_batches(field, start, second, nodes, method, batch_size, options)
    return fail(run, spoilt) if spoilt else run


def set_aside(images: Tensor) -> tuple[Tensor, list[int]]:
    """The images, copies of another in place of those that hold NaN or infinity, and which those are, if there are others."""
    if not isinstance(images, Tensor) or isinstance(images, FakeTensor) or images.ndim < 2:
        return images, []
    whole_ = images.detach().isfinite().flatten(1).all(dim=1)
    if bool(whole_.all()) or not bool(whole_.any()):
        return images, []  # with none to go on with it is a mistake, and refused
    keep = whole_.reshape(-1, *(1,) * (images.ndim - 1))
    # A copy is as easy to encode as what it is a copy of; zeros may be anything but.
    other = images[int(whole_.int().argmax())].expand_as(images)
    return torch.where(keep, images, other), torch.nonzero(~whole_).flatten().tolist()


def fail(run: Solution, which: list[int]) -> Solution:
    """The run with these samples failed before its first step."""
    status, sigma = list(run.status), list(run.sigma)
    for i in which:
        status[i], sigma[i] = Status.NONFINITE, float(run.grid.sigmas[0])
    outcome = None if run.outcome is None else replace(run.outcome, status=tuple(status), sigma=tuple(sigma))
    at = torch.tensor(which, device=run.x_bar.device)
    lost = lambda x, dim, value: None if x is None else x.index_fill(dim, at.to(x.device), value)
    pieces, first = [], 0
    for piece in run.dense:
        own = [i - first for i in which if 0 <= i - first < piece.x_bar.shape[1]]
        first += piece.x_bar.shape[1]
        inside = torch.tensor(own, dtype=torch.int64, device=piece.x_bar.device)
        pieces.append(replace(piece, x_bar=piece.x_bar.index_fill(1, inside, math.nan)))
    return replace(
        run,
        status=tuple(status),
        sigma=tuple(sigma),
        outcome=outcome,
        x_bar=run.x_bar.index_fill(0, at, 0.0),
        second=lost(run.second, 0, 0.0),
        trajectory=lost(run.trajectory, 1, math.nan),
        saved=lost(run.saved, 1, math.nan),
        dense=tuple(pieces),
    )


@dataclass(frozen=True, eq=False)
class RoundTrip:
    r"""Images encoded and decoded again.

    Attributes
    ----------
    encoding, decoding : Solution
        Both runs.
    latent, reconstruction : Tensor
        x_T and the images that came back, (B, \*d).
    mse : Tensor
        Mean squared error of each image per dimension, on [0, 1]: the paper's Table 2. (B,), float64; NaN where either
        direction failed.
    nfe : int
        Model calls of both directions together.
    status : tuple of Status
        One a sample; a sample whose encoding failed keeps that status.
    """

    encoding: Solution
    decoding: Solution
    mse: Tensor

    @property
    def latent(self) -> Tensor:
        return self.encoding.x

    @property
    def reconstruction(self) -> Tensor:
        return self.decoding.x

    @property
    def nfe(self) -> int:
        return self.encoding.nfe + self.decoding.nfe

    @property
    def status(self) -> tuple[Status, ...]:
        pairs = zip(self.encoding.status, self.decoding.status, strict=True)
        return tuple(there or back for there, back in pairs)


def round_trip(
    field: EpsilonField,
    images: Tensor,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    solver: str | Solver | None = None,
    back: str | Solver | None = None,
    grid: GridLike | None = None,
    dtype: torch.dtype = torch.float64,
    data_range: tuple[float, float] | None = (-1.0, 1.0),
    batch_size: int | None = None,
    progress: bool = False,
) -> RoundTrip:
    r"""Encode images and decode them again, §5.4 of the paper.

    Parameters
    ----------
    field : EpsilonField
        ε.
    images : Tensor
        x_0, (B, \*d).
    steps, nfe : int, optional
        Steps, or model calls, each way.
    solver, grid
        Used both ways; a solver alone runs on :data:`GRID`. A solver that keeps two states, as the default of encoding
        does, is run back over the same nodes from both: such a round trip is exact up to rounding, whatever the latent.
        For what the latent alone gives back, ``decode(field, encode(field, images).x)``. A solver calibrated for one way goes
        that way, and the default the other.
    back : str or Solver, optional
        The solver of the way back, if it is another than that of the way there: then the latent is all that it has.
    dtype, batch_size, progress
        As for :func:`sample`.
    data_range : (float, float) or None
        As for :func:`encode`; it also sets the scale of ``.mse``, (−1, 1) if None.

    Returns
    -------
    RoundTrip
    """
    if back is None and solver is not None:
        get(solver).check_field(field)
    there_by, back_by = both_ways(field, solver) if back is None else (solver, back)
    for direction, each in (("encode", there_by), ("sample", back_by)):
        plan(field, direction, each, grid, steps, nfe)
    options: dict[str, Any] = {"steps": steps, "nfe": nfe, "solver": back_by, "grid": grid, "dtype": dtype}
    options |= {"batch_size": batch_size, "progress": progress}
    there = encode(field, images, data_range=data_range, **options | {"solver": there_by})
    with warnings.catch_warnings():
        # A coarse encoder's latent may look odd; here that is a result, not a user's mistake.
        warnings.simplefilter("ignore", LatentWarning)
        if there.second is not None and back is None and back_by is there_by:
            options |= {
                "solver": there.method,
                "grid": there.grid.reversed(),
                "steps": None,
                "nfe": None,
                "second": there.second,
            }
        down = sample(field, there.x, **options)
    error = mse(images.detach(), down.x, data_range or (-1.0, 1.0))
    # What an iteration left unsolved is a result like others.
    fine = (Status.SUCCESS, Status.UNCONVERGED)
    pairs = zip(there.status, down.status, strict=True)
    lost = [i for i, pair in enumerate(pairs) if any(status not in fine for status in pair)]
    if lost:
        error[lost] = math.nan
    return RoundTrip(there, down, error)


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    r"""The spherical path between latents, appendix D.5, sample by sample.

    .. math:: \frac{\sin((1 - f)\theta)}{\sin\theta}\, a + \frac{\sin(f\theta)}{\sin\theta}\, b

    Parameters
    ----------
    a, b : Tensor
        (B, \*d); θ is the angle between them as vectors.
    fraction : float
        f: 0 gives a, 1 gives b.

    Raises
    ------
    ValueError
        If two latents point in opposite directions, where no path is the shortest, or one is zero.
    """
    dtype, a, b = torch.promote_types(a.dtype, b.dtype), a.double(), b.double()
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    lengths = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    if not isinstance(lengths, FakeTensor) and not bool((lengths > 0.0).all()):
        raise ValueError("a and b must point somewhere, but one of them holds a sample of zeros")
    cosine = (flat_a * flat_b).sum(1) / lengths
    if not isinstance(cosine, FakeTensor) and bool((cosine < -1.0 + 1e-12).any()):
        i = int(cosine.argmin())
        raise ValueError(
            f"a[{i}] and b[{i}] point in opposite directions, and every great circle joins them: go by a third latent"
        )
    theta = torch.arccos(cosine.clamp(-1.0, 1.0)).reshape(-1, *(1,) * (a.ndim - 1))
    sine = torch.sin(theta)
    straight = sine < 1e-6  # the two point the same way: the path is a line
    safe = torch.where(straight, torch.ones_like(sine), sine)
    left = torch.where(straight, torch.full_like(sine, 1.0 - fraction), torch.sin((1.0 - fraction) * theta) / safe)
    right = torch.where(straight, torch.full_like(sine, fraction), torch.sin(fraction * theta) / safe)
    return (left * a + right * b).to(dtype)


def interpolate(field: EpsilonField, a: Tensor, b: Tensor, n: int = 8, **options: Any) -> Solution:
    r"""Decode `n` points of the spherical path from latent `a` to latent `b`, both ends included.

    Parameters
    ----------
    field : EpsilonField
        ε.
    a, b : Tensor
        Latents x_T, (B, \*d): B pairs.
    n : int
        Points a path, at least 2.
    **options
        As for :func:`sample`.

    Returns
    -------
    Solution
        Of B · n samples, path after path.
    """
    n = whole(n, "n, the points of a path with both its ends,", 2)
    check_state(field, a, "a")
    check_state(field, b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, but have {tuple(a.shape)} and {tuple(b.shape)}")
    wanted = bool(options.get("gradients") or options.get("checkpoint"))
    with torch.set_grad_enabled(wanted):
        path = torch.stack([slerp(a.double(), b.double(), i / (n - 1)) for i in range(n)], dim=1).flatten(0, 1)
    return sample(field, path, **options)


# -- what they share ----------------------------------------------------------------------------
def both_ways(field: EpsilonField, solver: str | Solver | None) -> tuple[Solver | None, Solver | None]:
    """What encodes and what samples where one solver is named, None for the default: one that goes one way only has it go the other."""
    method = None if solver is None else get(solver)
    own = None if method is None else method.own_grid(field.schedule)
    return (method if own is None or own.encoding else None), (method if own is None or not own.encoding else None)


class LatentWarning(UserWarning):
    """A latent does not look like a draw from a unit Gaussian."""


def plan(
    field: EpsilonField,
    direction: str,
    solver: str | Solver | None,
    grid: GridLike | None,
    steps: int | None,
    nfe: int | None,
    default: Default | None = None,
) -> tuple[Solver, Grid]:
    """The solver and the grid of a run in `direction`, ``"sample"`` or ``"encode"``, from what its caller named.

    `default` stands in for that of the direction. The other arguments, and what is refused, are as for :func:`sample`.
    """
    check_field(field)
    default = default or DEFAULTS[direction]
    method = get(default.solver if solver is None else solver)
    if method.stochastic and direction == "encode":
        raise ValueError(
            f"{method.name} samples only, for noise that is added has no way back: encode by ddim, which is eta = 0"
        )
    if direction == "sample" and isinstance(method, Inverse):
        method = method.base  # which it is, on the way down
    if method.iterative and nfe is not None:
        raise ValueError(
            f"{method.name} iterates until its equations are solved, and has no budget of nfe: say how many steps"
        )
    if method.adaptive:
        if nfe is not None or (steps is not None and not isinstance(grid, str)):
            raise ValueError(
                f"{method.name} chooses its own steps by its tolerances, rtol and atol, and has no budget of steps or nfe: "
                "a grid, if one is given, says where it must stop on its way"
            )
        if isinstance(grid, str) and steps is None:
            raise ValueError(
                f"grid = {grid!r} needs steps= with {method.name}: the nodes where it must stop on its way"
            )
        grid = [field.schedule.sigma_max, 0.0] if grid is None else grid
    method.check_field(field)
    own = method.own_grid(field.schedule)
    if own is not None:
        return method, _only(method, own, direction, grid, steps, nfe)
    options: dict[str, float] = {}
    if grid is None:
        grid, options = (default.grid, default.options) if solver is None else (GRID, {})
    if steps is not None and nfe is not None:
        raise ValueError("steps and nfe are two ways to say one thing: give one of them")
    if nfe is not None:
        nfe = whole(nfe, "nfe", 0)
    turned = lambda nodes: nodes if nodes.encoding == (direction == "encode") else nodes.reversed()
    if isinstance(grid, str):
        if steps is not None:
            return method, turned(Grid.make(grid, field.schedule, steps, **options))
        if method.iterative:
            return method, turned(Grid.make(grid, field.schedule, NFE, **options))
        budget = NFE if nfe is None else nfe
        steps = method.steps(budget)
        nodes = turned(Grid.make(grid, field.schedule, steps, **options))
        # A run up from σ = 0 may cost a call more than one down to it.
        while method.calls(nodes) > budget and steps > 1:
            steps -= 1
            nodes = turned(Grid.make(grid, field.schedule, steps, **options))
        return method, nodes
    nodes = turned(grid if isinstance(grid, Grid) else Grid.explicit(grid, field.schedule))
    if steps is not None and steps != nodes.steps:
        raise ValueError(f"steps = {steps} contradicts the grid given, which has {nodes.steps}: leave one out")
    if nfe is not None and method.calls(nodes) > nfe:
        needed = method.calls(nodes)
        raise ValueError(
            f"nfe = {nfe} does not pay for the {nodes.steps} steps of the grid given: {method.name} takes {needed}"
        )
    return method, nodes


def _only(method: Solver, own: Grid, direction: str, grid: GridLike | None, steps: int | None, nfe: int | None) -> Grid:
    """The one grid of a solver that has no other; what is named beside it must be the same."""
    ways = {True: "encode", False: "sample"}
    if ways[own.encoding] != direction:
        raise ValueError(
            f"{method.name} was made to {ways[own.encoding]}, over its own grid, and cannot {direction}: name another solver"
        )
    for name, value, has in (("steps", steps, own.steps), ("nfe", nfe, method.calls(own))):
        if value is not None and value != has:
            raise ValueError(
                f"{name} = {value!r} contradicts {method.name}, which has {has}: leave it out, or name a solver that was made for it"
            )
    if grid is not None and not (isinstance(grid, Grid) and np.array_equal(grid.sigmas, own.sigmas)):
        raise ValueError(f"{method.name} brings its own grid: leave grid out")
    return own


def _in_batches(
    field: EpsilonField,
    start: Tensor,
    second: Tensor | None,
    grid: Grid,
    solver: Solver,
    batch_size: int | None,
    options: dict[str, Any],
) -> Solution:
    field.check_conditions(start.shape[0])
    batch_size = None if batch_size is None else whole(batch_size, "batch_size")
    if batch_size is None or batch_size >= start.shape[0]:
        return integrate(field, start, grid, solver, second=second, **options)
    solver.check_field(field)
    size = batch_size
    with torch.set_grad_enabled(start.requires_grad):
        starts = start.split(size)
    seconds: Any = [None] * len(starts) if second is None else second.split(size)
    parts = [
        integrate(
            field, part, grid, solver, rows=slice(i * size, i * size + part.shape[0]), second=seconds[i], **options
        )
        for i, part in enumerate(starts)
    ]
    return Solution.concatenate(parts)


def _check_second(second: Tensor | None, method: Solver, state: Tensor) -> None:
    """Refuse a second state that does not fit, before the batch is split; `integrate` looks at the rest."""
    if second is not None and not method.paired:
        raise ValueError(
            f"second is for solvers that keep two states, and {method.name} keeps one: leave it out, or name its solver"
        )
    if second is not None and getattr(second, "shape", None) != state.shape:
        raise ValueError(
            f"second must be a tensor of the shape of the state, {tuple(state.shape)}, but got "
            f"{tuple(second.shape) if isinstance(second, Tensor) else type(second).__name__}"
        )


def _warn_if_not_latent(latent: Tensor) -> None:
    size = math.prod(latent.shape[1:])
    if isinstance(latent, FakeTensor) or size < 32:
        return
    flat = latent.detach().flatten(1).double()
    spread, largest = flat.std(dim=1), flat.abs().amax(dim=1)
    # Latents of images with flat backgrounds are narrower than a draw; a factor of two is beyond any of them, and no
    # Gaussian of this size stays within [-1, 1] as an image does.
    odd = torch.nonzero((spread < 0.5) | (spread > 2.0) | (largest <= 1.0 + 1e-3)).flatten().tolist()
    if odd:
        i = odd[0]
        warnings.warn(
            f"latent {i} has standard deviation {float(spread[i]):.3g} and largest value {float(largest[i]):.3g}, unlike a draw "
            f"from a unit Gaussian{'' if len(odd) == 1 else f' (and so have {len(odd) - 1} more)'}: is it an image? "
            "encode() makes latents of images",
            LatentWarning,
            stacklevel=3,
        )


def _check_range(images: Tensor, data_range: tuple[float, float] | None) -> None:
    if data_range is None:
        return
    low, high = data_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"data_range must be two numbers that rise, such as (-1, 1), but got {data_range!r}")
    if images.ndim != 4 or isinstance(images, FakeTensor):
        return
    least, most = (float(x) for x in images.detach().aminmax())
    slack = 1e-3 * (high - low)
    if least < low - slack or most > high + slack:
        raise ValueError(
            f"images must lie in [{low:g}, {high:g}], but span {least:.4g}…{most:.4g}; images in 0…255 become x / 127.5 - 1, "
            "and data that is meant to leave the range is encoded with data_range=None"
        )
