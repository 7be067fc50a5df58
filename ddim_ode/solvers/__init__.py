"""Solvers by name, and the contract for bringing your own."""

from __future__ import annotations

import difflib

from ddim_ode.solvers.adaptive import Adaptive
from ddim_ode.solvers.base import Clock, Solver, arctan, asinh, clock, flow
from ddim_ode.solvers.implicit import ImplicitMidpoint, Inverse
from ddim_ode.solvers.ipndm import Ipndm
from ddim_ode.solvers.multistep import DATA, NOISE, Flow, Gaussian, Linear, Multistep, fit_gaussian
from ddim_ode.solvers.references import Scipy, TorchDiffEq
from ddim_ode.solvers.reversible import AsynchronousLeapfrog, McCallumFoster, TwoStep
from ddim_ode.solvers.runge_kutta import BS32, DOP853, DOPRI5, EES25, HEUN, KUTTA3, MIDPOINT, RK4, RungeKutta, Tableau
from ddim_ode.solvers.single_step import DPM2S, DPM3S, DPMPP2S, SingleStep

__all__ = [
    "Adaptive",
    "AsynchronousLeapfrog",
    "Clock",
    "DATA",
    "Flow",
    "Gaussian",
    "ImplicitMidpoint",
    "Inverse",
    "Ipndm",
    "Linear",
    "McCallumFoster",
    "Multistep",
    "NOISE",
    "RungeKutta",
    "Scipy",
    "SingleStep",
    "Solver",
    "Tableau",
    "TorchDiffEq",
    "TwoStep",
    "arctan",
    "asinh",
    "clock",
    "fit_gaussian",
    "flow",
    "get",
    "solvers",
]

_AB = "Adams–Bashforth on eq. 14; ρAB-DEIS of Zhang & Chen 2022, LMS of Karras et al.'s σ"
_DEIS = "tAB-DEIS, Zhang & Chen 2022, exact integrals"
_DEISX = "tAB-DEIS on x̂₀, with DPM-Solver++'s linear part: benchmarks/defaults.py"
_ARCTAN = "Adams–Bashforth in the clock arctan σ: benchmarks/defaults.py"
_DPMPP = "DPM-Solver++ multistep, Lu et al. 2022, exact integrals for its finite differences"

_ABM = "Adams–Bashforth–Moulton on eq. 14; the corrector shares the next call, as in UniPC"
_PECE = "Adams–Bashforth–Moulton on eq. 14, PECE: Hairer, Nørsett & Wanner 1993, III.1"
_UNIPC = "UniPC, Zhao et al. 2023, exact integrals for its B(h)"
_FLOW = "Adams–Bashforth on rectified flow's velocity in its own time, Liu, Gong & Liu 2023"

_DOWN = "the default for sampling: a flow's velocity, Adams–Bashforth–Moulton; benchmarks/defaults.py"
_UP = "the same near σ = 0, for encoding on 100 calls and more; benchmarks/defaults.py"
_ALF = "the default for encoding: ALF (Mutze 2013; MALI, Zhuang et al. 2021) on rectified flow; benchmarks/defaults.py"

_MEMBERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Multistep(1, label="ddim", source="eq. 13, Song, Meng & Ermon 2020; Adams–Bashforth 1"),
        Multistep(1, clock="variance", quantity="score", label="pf-euler", source="eq. 15, after Song et al. 2021"),
        *(Multistep(k, label=f"ab{k}", source=_AB) for k in (2, 3, 4)),
        *(Multistep(k, clock="t", label=f"deis{k}", source=_DEIS) for k in (2, 3, 4)),
        *(Multistep(k, clock="t", linear=DATA, label=f"deisx{k}", source=_DEISX) for k in (2, 3, 4)),
        *(Multistep(k, clock="arctan", label=f"arctan{k}", source=_ARCTAN) for k in (2, 3, 4)),
        *(Multistep(k, clock="log", linear=DATA, label=f"dpmpp{k}m", source=_DPMPP) for k in (2, 3)),
        *(Multistep(k - 1, corrector="free", label=f"abm{k}", source=_ABM) for k in (2, 3, 4)),
        *(Multistep(k - 1, corrector="pece", label=f"abm{k}-pece", source=_PECE) for k in (2, 3, 4)),
        *(Multistep(k, clock="log", linear=DATA, corrector="free", label=f"unipc{k}", source=_UNIPC) for k in (2, 3)),
        *(Multistep(k, clock="flow", linear=Flow(), label=f"flow{k}", source=_FLOW) for k in (2, 3)),
        Multistep(4, clock="paced", linear=Flow(0.15), corrector="free", label="flowdown5", source=_DOWN),
        Multistep(3, clock=arctan(0.1), linear=Flow(0.02), corrector="free", label="flowup4", source=_UP),
        Ipndm(),
        DPM2S,
        DPM3S,
        DPMPP2S,
        *(RungeKutta(tableau) for tableau in (MIDPOINT, HEUN, KUTTA3, RK4, EES25)),
        RungeKutta(HEUN, euler_at_zero=True),
        RungeKutta(EES25, "arctan"),
        TwoStep(),
        TwoStep(gamma=1.0),
        *(McCallumFoster(RungeKutta(tableau)) for tableau in (MIDPOINT, RK4)),
        AsynchronousLeapfrog(),
        AsynchronousLeapfrog(flow(), Flow(), label="alf-flow", source=_ALF),
        ImplicitMidpoint(),
        Inverse(Multistep(1, label="ddim", source="eq. 13, Song, Meng & Ermon 2020; Adams–Bashforth 1")),
        *(Adaptive(tableau) for tableau in (BS32, DOPRI5, DOP853)),
        *(TorchDiffEq(method) for method in ("dopri5", "dopri8")),
        *(Scipy(method) for method in ("DOP853", "LSODA")),
    )
}


def solvers() -> list[Solver]:
    """All named solvers, each with ``.name``, ``.order`` (with its default start), ``.nfe_per_step``, ``.source``."""
    return list(_MEMBERS.values())


def get(solver: str | Solver) -> Solver:
    """A solver by name, or itself.

    Parameters
    ----------
    solver : str or Solver
        A name from :func:`solvers`. The name of a multistep member of k > 1 with ``-rk`` behind it starts by Runge–Kutta and
        keeps its full order; ``mf-`` and ``inverse-`` before the name of a one-step method make it reversible, by a
        second state or by iteration. A solver is returned as it is.

    Raises
    ------
    ValueError
        If no solver has that name.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str):
        if solver in _MEMBERS:
            return _MEMBERS[solver]
        member = _MEMBERS.get(solver.removesuffix("-rk"))
        if isinstance(member, Multistep) and member.k > 1:
            return member.with_start("rk")
        for prefix, make in (("mf-", McCallumFoster), ("inverse-", Inverse)):
            if solver.startswith(prefix) and solver != prefix:
                return make(get(solver.removeprefix(prefix)))
        if solver.startswith(("ddpm", "ddim-eta", "ddim-deviations")):  # what a run by Generative calls itself
            raise ValueError(
                f"unknown solver {solver!r}: sampling with noise is chosen by eta=, 1 for DDPM, or sigma_hat=True, at the terminal "
                "--eta and --sigma-hat; or give a Generative"
            )
        close = difflib.get_close_matches(solver, _MEMBERS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown solver {solver!r}: {hint}known solvers are {', '.join(_MEMBERS)}")
    raise TypeError(f"solver must be a name or a Solver, but got {type(solver).__name__}")
