r"""The deterministic schedulers of diffusers, and the settings of each that compete in ``peers.py``.

A scheduler's state is x̄ times a scale that depends on its kind, and its σ at step i is where that kind keeps it:

========== ===================== ==========================================
kind       state                 σ
========== ===================== ==========================================
sigmas     x̄/√(1 + σ²)           ``sigmas[i]``; with ``use_flow_sigmas`` the state is x̄/(1 + σ) and σ/(1 + σ) is kept
exploding  x̄                     ``sigmas[i]``, or ``sigmas_interpol[i]`` at a midpoint
table      x̄/√(1 + σ²)           from ``alphas_cumprod[t]``
angles     x̄/√(1 + σ²)           ``betas[i] / alphas[i]``, which are sine and cosine
========== ===================== ==========================================
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.contenders import Setting, Task, steps_for
from ddim_ode import Grid, NoiseSchedule

__all__ = ["LEFT_OUT", "left_out", "settings"]

_STOCHASTIC = "adds noise at every step"
_FLOW = "for flow-matching velocities, and starts at an infinite sigma"
_TOKENS = "for discrete tokens"
_DISTILLED = "for distilled models of their own kind"
_INVERSE = "encodes: runs from data to noise"

#: Schedulers that do not compete, and why.
LEFT_OUT = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _DISTILLED + " (consistency models)",
    "CogVideoXDPMScheduler": _STOCHASTIC,
    "ConsistencyDecoderScheduler": _DISTILLED,
    "CosineDPMSolverMultistepScheduler": _STOCHASTIC,
    "DDIMInverseScheduler": _INVERSE,
    "DDIMParallelScheduler": "DDIMScheduler, step for step",
    "DDPMParallelScheduler": _STOCHASTIC,
    "DDPMScheduler": _STOCHASTIC,
    "DDPMWuerstchenScheduler": _STOCHASTIC,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DPMSolverSDEScheduler": _STOCHASTIC,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "EulerAncestralDiscreteScheduler": _STOCHASTIC,
    "FlowMapEulerDiscreteScheduler": _DISTILLED + " (flow maps)",
    "FlowMatchEulerDiscreteScheduler": _FLOW + "; its step is EulerDiscreteScheduler's",
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _STOCHASTIC,
    "HeliosDMDScheduler": _DISTILLED,
    "HeliosScheduler": _FLOW,
    "KDPM2AncestralDiscreteScheduler": _STOCHASTIC,
    "KarrasVeScheduler": _STOCHASTIC,
    "LCMScheduler": _STOCHASTIC,
    "LTXEulerAncestralRFScheduler": _STOCHASTIC,
    "MiniMaxH3Scheduler": _FLOW,
    "PiflowScheduler": _DISTILLED,
    "RFD4ProteinaScheduler": _FLOW,
    "RePaintScheduler": "for inpainting, and stochastic",
    "SCMScheduler": _DISTILLED + " (consistency models)",
    "ScoreSdeVeScheduler": _STOCHASTIC,
    "ScoreSdeVpScheduler": _STOCHASTIC,
    "UnCLIPScheduler": _STOCHASTIC,
    "VQDiffusionScheduler": _TOKENS,
}

Options = dict[str, Any]


def left_out() -> dict[str, str]:
    """Every scheduler class of the installed version that does not compete, and why."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = [getattr(diffusers.schedulers, name, None) for name in dir(diffusers.schedulers)]
    names = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, SchedulerMixin)}
    names -= {"SchedulerMixin", *(name for name, _ in _competing(NoiseSchedule.linear()))}
    return {name: LEFT_OUT.get(name, "not looked at: newer than this study") for name in sorted(names)}


def settings(schedule: NoiseSchedule) -> Iterator[Setting]:
    """All settings of all deterministic schedulers.

    Options that start with @ are not the constructor's: ``@timesteps`` and ``@sigmas`` are nodes for ``set_timesteps`` by
    a rule's name, ``@trained_betas`` the same for the constructor, ``@step`` goes to ``step``, and ``@denoised`` says that
    one more call leads from the last σ to 0.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    for name, options in _competing(schedule):
        told = " ".join(f"{k.removeprefix('@')}={_short(v)}" for k, v in options.items()) or "as it comes"
        custom = not options.keys().isdisjoint(("@timesteps", "@sigmas", "@trained_betas"))
        yield Setting("diffusers", name, told, partial(_run, name, options), custom)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- what is swept ------------------------------------------------------------------------------
_SPACINGS: list[Options] = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
]
_RULES: list[Options] = [{f"use_{rule}_sigmas": True} for rule in ("karras", "exponential", "beta")]
_CUSTOM: list[Options] = [{"@timesteps": "quadratic"}, {"@timesteps": "rectified"}, {"@timesteps": "asinh"}]
_NODES = ("quadratic", "rectified", "asinh", "karras", "log")
_FLOORS = ("rectified to 0.01", "rectified to 0.02", "rectified to 0.03")
_ENDS: list[Options] = [
    {"final_sigmas_type": "zero"},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "@denoised": True},
]
_ORDERS: list[Options] = [
    {"solver_order": 1},
    *({"solver_order": k, "solver_type": kind} for k in (2, 3) for kind in ("midpoint", "heun")),
]


def _product(*parts: list[Options]) -> Iterator[Options]:
    for chosen in itertools.product(*parts):
        yield {key: value for part in chosen for key, value in part.items()}


def _either(name: str, *values: Any) -> list[Options]:
    return [{name: value} for value in values]


def _competing(schedule: NoiseSchedule) -> Iterator[tuple[str, Options]]:
    """Scheduler classes and their options, without the model's own."""
    # The largest of their flow sigmas is 0.999 before the shift; this shift takes it to this model's sigma_T.
    flow: list[Options] = [{"use_flow_sigmas": True, "flow_shift": schedule.sigma_max / 999.0}]
    to_sigma_min: list[Options] = [{}, {"@denoised": True}]
    lower, final = _either("lower_order_final", True, False), _either("euler_at_final", False, True)
    swept: dict[str, list[Iterator[Options]]] = {
        "DPMSolverMultistepScheduler": [
            _product(
                [{"algorithm_type": "dpmsolver++"}], _ORDERS, lower, _ENDS[:1],
                _SPACINGS + _RULES + _CUSTOM + flow + _either("use_lu_lambdas", True),
            ),
            # That its last step is Euler's is so anyway where it ends at zero; noise prediction cannot end there.
            _product(
                _either("algorithm_type", "dpmsolver++", "dpmsolver"), _ORDERS, lower, final, _ENDS[1:],
                _SPACINGS + _RULES + _CUSTOM + flow + _either("use_lu_lambdas", True),
            ),
        ],
        "DPMSolverSinglestepScheduler": [
            _product([{"algorithm_type": "dpmsolver++"}], _ORDERS, [{"lower_order_final": True}], _ENDS[:1],
                     [{}, *_RULES, *_CUSTOM, *flow]),
            _product(_either("algorithm_type", "dpmsolver++", "dpmsolver"), _ORDERS, lower, _ENDS[1:],
                     [{}, *_RULES, *_CUSTOM, *flow]),
        ],
        "DEISMultistepScheduler": [
            _product(_either("solver_order", 1, 2, 3), lower, to_sigma_min, _SPACINGS + _RULES + flow)
        ],
        "UniPCMultistepScheduler": [
            _product(
                _either("predict_x0", True, False), _either("solver_type", "bh1", "bh2"), _either("solver_order", 2, 3), lower,
                _either("disable_corrector", [], [0]), _ENDS[:2], _SPACINGS + _RULES,
            ),
            _product(
                _either("predict_x0", True, False), _either("solver_type", "bh1", "bh2"),
                _either("solver_order", 1, 2, 3, 4), lower, _either("disable_corrector", [], [0]),
                [{"use_flow_sigmas": True, "@sigmas": nodes} for nodes in ("rectified", "asinh", "quadratic")],
            ),
        ],
        "SASolverScheduler": [
            _product(
                _either("algorithm_type", "data_prediction", "noise_prediction"), _either("predictor_order", 2, 3, 4),
                _either("corrector_order", 1, 2, 3, 4), lower, to_sigma_min, _SPACINGS + _RULES + flow,
            )
        ],
        "EulerDiscreteScheduler": [
            _product(_ENDS[:2], _SPACINGS + _RULES + [{"use_karras_sigmas": True, "timestep_spacing": "trailing"}]),
            _product(_either("@sigmas", *_NODES, *_FLOORS)),
        ],
        "HeunDiscreteScheduler": [_product(_SPACINGS + _RULES + _CUSTOM)],
        "KDPM2DiscreteScheduler": [_product(_SPACINGS + _RULES)],
        "LMSDiscreteScheduler": [_product([{"@step": {"order": k}} for k in (2, 3, 4)], _SPACINGS + _RULES)],
        "DDIMScheduler": [_product(_SPACINGS, _either("set_alpha_to_one", True, False))],
        "CogVideoXDDIMScheduler": [
            _product(_SPACINGS, _either("set_alpha_to_one", True, False), [{"snr_shift_scale": 1.0}])
        ],
        "PNDMScheduler": [
            _product(_either("skip_prk_steps", True, False), _SPACINGS, _either("set_alpha_to_one", True, False))
        ],
        "TCDScheduler": [
            _product([{"@step": {"eta": 0.0}}], [{"original_inference_steps": 50}, {"original_inference_steps": 1000}, *_CUSTOM])
        ],
        "IPNDMScheduler": [_product([{}, *_either("@trained_betas", *_NODES, *_FLOORS)])],
        "EDMEulerScheduler": [_product(_edm(schedule))],
        "EDMDPMSolverMultistepScheduler": [_product(_ORDERS, lower, _edm(schedule))],
    }  # fmt: skip
    for name, parts in swept.items():
        for options in itertools.chain(*parts):
            yield name, options


def _edm(schedule: NoiseSchedule) -> list[Options]:
    kinds = [{"sigma_schedule": "karras", "rho": rho} for rho in (3.0, 5.0, 7.0)] + [{"sigma_schedule": "exponential"}]
    ends: list[Options] = [
        {"sigma_min": low, "sigma_max": schedule.sigma_max} for low in (schedule.sigma_min, 0.02, 0.05, 0.1)
    ]
    ends += [
        {"sigma_min": low, "sigma_max": schedule.sigma_max, "final_sigmas_type": "sigma_min"} for low in (0.02, 0.03)
    ]
    return list(_product(kinds, ends))


# -- how it is run ------------------------------------------------------------------------------
def _nodes(rule: str, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """σ_T down to 0, `steps` + 1 of them; "rectified" is even in σ/(1 + σ), down to 0 or what it says."""
    if not rule.startswith("rectified"):
        return Grid.make(rule, schedule, steps).sigmas
    low = float(rule.partition(" to ")[2] or 0.0)
    u = np.linspace(schedule.sigma_max / (1.0 + schedule.sigma_max), low / (1.0 + low), steps + 1)
    return u / (1.0 - u)


def _calls(name: str, options: Options) -> Callable[[int], int]:
    """Model calls of so many steps, as each class counts its steps."""
    if name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"):
        return lambda n: 2 * n - 1
    if name == "PNDMScheduler":
        return (lambda n: n + 1) if options["skip_prk_steps"] else (lambda n: n + 9)
    return lambda n: n + bool(options.get("@denoised"))


def _model(name: str, schedule: NoiseSchedule) -> Options:
    """What every class is told of the model, in its own words."""
    if name.startswith("EDM") or name == "IPNDMScheduler":
        return {}
    told: Options = {"num_train_timesteps": int(schedule.T), "trained_betas": schedule.betas.tolist()}
    if name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "HeunDiscreteScheduler"):
        told["clip_sample"] = False
    return told | ({"tau_func": lambda t: 0.0} if name == "SASolverScheduler" else {})


def _run(name: str, options: Options, task: Task, budget: int) -> Tensor:
    """Sample by a scheduler's own loop: ``set_timesteps``, then the model and ``step`` at each of its timesteps."""
    import diffusers

    schedule = task.schedule
    n = steps_for(_calls(name, options), budget, 4 if options.get("skip_prk_steps") is False else 1)
    made = _model(name, schedule) | {k: v for k, v in options.items() if not k.startswith("@")}
    if "@trained_betas" in options:
        made["trained_betas"] = np.sin(np.arctan(_nodes(options["@trained_betas"], schedule, n))).tolist()
    scheduler = getattr(diffusers, name)(**made)
    scheduler.set_timesteps(**_asked(name, options, schedule, n))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # as pipelines do: without it a repeated first timestep skips a step
    level, scale, output = _kind(name, scheduler)
    x = task.start(level(0)) * scale(level(0))
    before: dict[str, Any] = {}
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)  # some refuse to step without; what it returns, the model here does not need
        sigma = level(i)
        x_bar = x / scale(sigma)
        eps = task.eps(x_bar, sigma)
        x = scheduler.step(output(eps, x_bar, i), t, x, **before, **options.get("@step", {}), return_dict=False)[0]
    if options.get("@denoised"):
        sigma = level(len(scheduler.timesteps))
        return task.denoised(x / scale(sigma), sigma)
    return x


def _asked(name: str, options: Options, schedule: NoiseSchedule, steps: int) -> Options:
    """What ``set_timesteps`` is given."""
    if "@timesteps" in options:
        labels = np.rint(schedule.label(_nodes(options["@timesteps"], schedule, steps)[:-1])).astype(int)
        return {"timesteps": labels.tolist()}
    if "@sigmas" in options:
        sigmas = _nodes(options["@sigmas"], schedule, steps)
        flow = name == "UniPCMultistepScheduler"  # it takes flow sigmas, and appends the last itself
        return {"sigmas": sigmas[:-1] / (1.0 + sigmas[:-1]) if flow else sigmas}
    return {"num_inference_steps": steps}


def _kind(
    name: str, scheduler: Any
) -> tuple[Callable[[int], float], Callable[[float], float], Callable[[Tensor, Tensor, int], Tensor]]:
    """σ at step i; the state over x̄ by σ; and what the scheduler calls the model's output, from ε, x̄ and i."""
    preserving: Callable[[float], float] = lambda sigma: 1.0 / math.hypot(1.0, sigma)
    plain: Callable[[Tensor, Tensor, int], Tensor] = lambda eps, x_bar, i: eps
    if name == "IPNDMScheduler":

        def angle(i: int) -> float:
            return float(scheduler.betas[i]) / max(float(scheduler.alphas[i]), 1e-8)

        def velocity(eps: Tensor, x_bar: Tensor, i: int) -> Tensor:
            sine, cosine = float(scheduler.betas[i]), float(scheduler.alphas[i])
            return cosine * eps - sine * (x_bar - angle(i) * eps)

        return angle, preserving, velocity
    if name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler", "TCDScheduler"):

        def table(i: int) -> float:
            alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[i])])
            return math.sqrt((1.0 - alpha) / alpha)

        return table, preserving, plain
    if name.startswith("EDM"):
        data = scheduler.config.sigma_data

        def output(eps: Tensor, x_bar: Tensor, i: int) -> Tensor:
            sigma = float(scheduler.sigmas[i])
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
            return (x_bar - sigma * eps - skip * x_bar) / out

        return (lambda i: float(scheduler.sigmas[i])), (lambda sigma: 1.0), output
    if name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"):
        midpoints = name == "KDPM2DiscreteScheduler"

        def exploding(i: int) -> float:
            return float((scheduler.sigmas_interpol if midpoints and i % 2 else scheduler.sigmas)[i])

        return exploding, (lambda sigma: 1.0), plain
    if scheduler.config.use_flow_sigmas:

        def flow(i: int) -> float:
            u = float(scheduler.sigmas[i])
            return u / (1.0 - u)

        return flow, (lambda sigma: 1.0 / (1.0 + sigma)), plain
    return (lambda i: float(scheduler.sigmas[i])), preserving, plain
