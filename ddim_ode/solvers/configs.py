"""Solvers as plain data, for files that must know by what they were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ddim_ode.diffusion.generative import Generative
from ddim_ode.solvers import base, multistep, reversible, runge_kutta, single_step
from ddim_ode.solvers.adaptive import Adaptive
from ddim_ode.solvers.calibrated import Calibrated, Leap, Table
from ddim_ode.solvers.implicit import ImplicitMidpoint, Inverse
from ddim_ode.solvers.ipndm import Ipndm
from ddim_ode.solvers.references import Scipy, TorchDiffEq

__all__ = ["from_config", "to_config"]

_CLASSES: dict[Any, Any] = {
    kind.__name__: kind
    for kind in (
        Adaptive, Calibrated, Generative, ImplicitMidpoint, Inverse, Ipndm, Leap, Scipy, TorchDiffEq, multistep.Multistep, multistep.Flow,
        reversible.AsynchronousLeapfrog, reversible.McCallumFoster, reversible.TwoStep, runge_kutta.RungeKutta,
        runge_kutta.Tableau, runge_kutta.Inside, single_step.SingleStep, Table,
    )
}  # fmt: skip
_CLOCKS: dict[str, Callable[[float], base.Clock]] = {
    make.__name__: make for make in (base.arctan, base.asinh, base.flow)
}
_PARTS = {"NOISE": multistep.NOISE, "DATA": multistep.DATA}


def to_config(solver: Any) -> Any:
    """A solver of this package as plain data, from which :func:`from_config` makes it again.

    Raises
    ------
    ValueError
        If it, or a part of it, is none of the package's, or holds tensors, as a Gaussian part does.
    """
    if solver is None or isinstance(solver, (bool, int, float, str)):
        return solver
    if isinstance(solver, tuple):
        return [to_config(item) for item in solver]
    for name, part in _PARTS.items():
        if solver is part:
            return {"kind": name}
    if isinstance(solver, base.Clock) and solver.origin is not None:
        for name, make in _CLOCKS.items():
            if solver.origin[0] is make:
                return {"kind": "clock", "name": name, "c": solver.origin[1]}
    name = type(solver).__name__
    if _CLASSES.get(name) is not type(solver):
        raise ValueError(
            f"a {name} cannot be written as plain data, for it holds tensors or functions, or is not of this package"
        )
    own = (f.name for f in dataclasses.fields(solver) if f.compare)  # the others are of a run
    return {"kind": name} | {field: to_config(getattr(solver, field)) for field in own}


def from_config(config: Any) -> Any:
    """The solver of a config.

    Raises
    ------
    ValueError
        If it is not a config of this version's solvers.
    """
    if isinstance(config, list):
        return tuple(from_config(item) for item in config)
    if not isinstance(config, dict):
        return config
    rest = dict(config)
    kind = rest.pop("kind", None)
    try:
        if kind in _PARTS:
            return _PARTS[kind]
        if kind == "clock":
            return _CLOCKS[rest["name"]](rest["c"])
        return _CLASSES[kind](**{name: from_config(value) for name, value in rest.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{kind!r} is no solver of this version, or has not these options: {error}") from error
