"""DDIM sampling as what it is: one ordinary differential equation in σ and x̄, and its solvers."""

from ddim_ode.checking import Report, check
from ddim_ode.dense import Dense
from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid, grids
from ddim_ode.integrate import integrate
from ddim_ode.likelihood import Likelihood, log_density
from ddim_ode.models.checkpoints import load
from ddim_ode.models.pipelines import ModelWarning
from ddim_ode.sampling import LatentWarning, RoundTrip, decode, encode, interpolate, noise, round_trip, sample, slerp
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solution import Outcome, Solution, Status, Step
from ddim_ode.solvers import (
    DATA,
    NOISE,
    Adaptive,
    Clock,
    Flow,
    Gaussian,
    Ipndm,
    Linear,
    Multistep,
    RungeKutta,
    Scipy,
    SingleStep,
    Solver,
    Tableau,
    TorchDiffEq,
    fit_gaussian,
    solvers,
)

__all__ = [
    "DATA", "NOISE", "Adaptive", "Clock", "Dense", "EpsilonField", "Flow", "Gaussian", "Grid", "Ipndm",
    "LatentWarning", "Likelihood", "Linear", "ModelWarning", "Multistep", "NoiseSchedule", "Outcome", "Report", "RoundTrip",
    "RungeKutta", "Scipy", "SingleStep", "Solution", "Solver", "Status", "Step", "Tableau", "TorchDiffEq", "check",
    "decode", "encode", "fit_gaussian", "grids", "integrate", "interpolate", "load", "log_density", "noise", "round_trip",
    "sample", "slerp", "solvers",
]  # fmt: skip

__version__ = "0.1.0"
