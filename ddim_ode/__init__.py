"""DDIM sampling as what it is: one ordinary differential equation in σ and x̄, and its solvers."""

from ddim_ode.calibration import calibrate
from ddim_ode.checking import Report, check
from ddim_ode.codes import Code, load_code
from ddim_ode.dense import Dense
from ddim_ode.diffusion.generative import Generative
from ddim_ode.field import EpsilonField
from ddim_ode.grid import Grid, grids
from ddim_ode.integrate import integrate
from ddim_ode.latents import Gaussianity, attribute_direction, gaussianity, move_latent
from ddim_ode.likelihood import Likelihood, log_density
from ddim_ode.models.checkpoints import load
from ddim_ode.models.pipelines import ModelWarning
from ddim_ode.noise import noise
from ddim_ode.quality import EfficientNetLite0, Features, Quality, SampleSizeWarning, quality
from ddim_ode.sampling import LatentWarning, RoundTrip, decode, encode, interpolate, round_trip, sample, slerp
from ddim_ode.schedule import NoiseSchedule
from ddim_ode.solution import Outcome, Solution, Status, Step
from ddim_ode.solvers import (
    DATA,
    NOISE,
    Adaptive,
    AsynchronousLeapfrog,
    Clock,
    Flow,
    Gaussian,
    ImplicitMidpoint,
    Inverse,
    Ipndm,
    Linear,
    McCallumFoster,
    Multistep,
    RungeKutta,
    Scipy,
    SingleStep,
    Solver,
    Tableau,
    TorchDiffEq,
    TwoStep,
    fit_gaussian,
    solvers,
)
from ddim_ode.solvers.calibrated import Calibrated, load_solver

__all__ = [
    "DATA", "NOISE", "Adaptive", "AsynchronousLeapfrog", "Calibrated", "Clock", "Code", "Dense", "EfficientNetLite0",
    "EpsilonField", "Features", "Flow", "Gaussian", "Gaussianity", "Generative", "Grid", "ImplicitMidpoint",
    "Inverse", "Ipndm", "LatentWarning", "Likelihood", "Linear", "McCallumFoster", "ModelWarning", "Multistep",
    "NoiseSchedule", "Outcome", "Quality", "Report", "RoundTrip", "RungeKutta", "SampleSizeWarning", "Scipy",
    "SingleStep", "Solution", "Solver", "Status", "Step", "Tableau", "TorchDiffEq", "TwoStep",
    "attribute_direction", "calibrate", "check", "decode", "encode", "fit_gaussian", "gaussianity", "grids", "integrate",
    "interpolate", "load", "load_code", "load_solver", "log_density", "move_latent", "noise", "quality", "round_trip", "sample",
    "slerp", "solvers",
]  # fmt: skip

__version__ = "0.1.0"
