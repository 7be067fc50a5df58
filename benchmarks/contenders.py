r"""What competes in ``peers.py``: every deterministic sampler of each released package, at each setting worth trying.

A setting turns latents into data with at most so many model calls. All are given one model, ε at real-valued σ, and
walk their own nodes in their own coordinates; σ is what the sampler itself believes it to be. Where a sampler ends
above σ = 0, one more call may take it there by x̄ − σ ε(x̄, σ): such settings say ``denoised``.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import released
from ddim_ode import EpsilonField, Grid, NoiseSchedule

__all__ = ["PACKAGES", "Setting", "Task", "azula", "k_diffusion", "torchdiffeq"]


class Task:
    r"""The model that everyone is given, and the latents; it counts what it is asked.

    Parameters
    ----------
    field : EpsilonField
        ε.
    latent : Tensor
        x_T, (B, \*d).
    """

    def __init__(self, field: EpsilonField, latent: Tensor) -> None:
        self.field, self.latent, self.schedule, self.calls = field, latent, field.schedule, 0

    def eps(self, x_bar: Tensor, sigma: Any) -> Tensor:
        """ε(x̄, σ). A σ above σ_T, which rounding or another schedule's end may give, is σ_T."""
        self.calls += 1
        return self.field(x_bar, min(float(sigma), self.schedule.sigma_max))

    def denoised(self, x_bar: Tensor, sigma: Any) -> Tensor:
        """x̄ − σ ε(x̄, σ)."""
        return x_bar - float(sigma) * self.eps(x_bar, sigma)

    def start(self, sigma: Any) -> Tensor:
        """x̄ at the σ where a sampler starts."""
        return self.latent * math.hypot(1.0, float(sigma))


@dataclass(frozen=True)
class Setting:
    """One way to sample: ``run(task, budget)`` gives data, or raises where the budget does not pay for it.

    `custom` settings walk nodes that no option of the package makes: they were worked out here and handed to it.
    """

    package: str
    sampler: str
    options: str
    run: Callable[[Task, int], Tensor]
    custom: bool = False

    @property
    def name(self) -> str:
        return f"{self.package}/{self.sampler}: {self.options}"


def steps_for(calls: Callable[[int], int], budget: int, least: int = 1) -> int:
    """The most steps that `budget` calls pay for, where `calls(steps)`, which rises, says what they take."""
    found = least - 1 + bisect_right(range(least, budget + 1), budget, key=calls)
    if found < least:
        raise ValueError(f"{budget} calls do not pay for a run")
    return found


# -- k-diffusion --------------------------------------------------------------------------------
def k_diffusion(schedule: NoiseSchedule) -> Iterator[Setting]:
    """Its deterministic samplers (ancestral and SDE ones with eta = 0, where they differ from others), on its sigma rules.

    Left out: ``euler_ancestral`` and ``dpm_2_ancestral``, which with eta = 0 are ``euler`` and ``dpm_2``.
    """
    package = released.k_diffusion()
    s, high = package.sampling, schedule.sigma_max
    grids: dict[str, Callable[..., Tensor]] = {}
    table = torch.from_numpy(schedule.sigma(np.arange(1.0, schedule.T + 1.0))).float()
    grids["model's own"] = package.external.DiscreteSchedule(table, quantize=False).get_sigmas
    for low in (schedule.sigma_min, 0.02, 0.05, 0.1):
        ends = {"sigma_min": low, "sigma_max": high}
        for rho in (2.0, 3.0, 4.0, 5.0, 7.0):
            grids[f"karras rho={rho:g} sigma_min={low:.2g}"] = partial(s.get_sigmas_karras, rho=rho, **ends)
        grids[f"exponential sigma_min={low:.2g}"] = partial(s.get_sigmas_exponential, **ends)
        for rho in (0.7, 1.4, 2.0):
            grids[f"polyexponential rho={rho:g} sigma_min={low:.2g}"] = partial(
                s.get_sigmas_polyexponential, rho=rho, **ends
            )
    for last in (1e-3, 1e-2):
        # beta_d such that the schedule starts at this model's sigma_T.
        grids[f"vp eps_s={last:g}"] = partial(
            s.get_sigmas_vp, beta_d=2.0 * (math.log1p(high**2) - 0.1), beta_min=0.1, eps_s=last
        )
    # A grid is a plain tensor to its samplers: it may as well end at sigma_min, where a step to 0 would be too long.
    rules = [(rule, grid) for rule, grid in grids.items() if rule.endswith(("sigma_min=0.01", "sigma_min=0.02"))]
    grids |= {f"{rule}, no 0": lambda n, grid=grid: grid(n + 1)[:-1] for rule, grid in rules}
    still: dict[str, Any] = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}
    # By what tells settings apart: the function, its calls a step, and its options.
    samplers: dict[tuple[str, str], tuple[Callable[..., Tensor], int, dict[str, Any]]] = {
        ("euler", ""): (s.sample_euler, 1, {}),
        ("heun", ""): (s.sample_heun, 2, {}),
        ("dpm_2", ""): (s.sample_dpm_2, 2, {}),
        **{("lms", f"order={k} "): (s.sample_lms, 1, {"order": k}) for k in (2, 3, 4)},
        ("dpmpp_2m", ""): (s.sample_dpmpp_2m, 1, {}),
        ("dpmpp_2s_ancestral", "eta=0 "): (s.sample_dpmpp_2s_ancestral, 2, still),
        ("dpmpp_sde", "eta=0 "): (s.sample_dpmpp_sde, 2, still),
        **{
            ("dpmpp_2m_sde", f"eta=0 {kind} "): (s.sample_dpmpp_2m_sde, 1, still | {"solver_type": kind})
            for kind in ("midpoint", "heun")
        },
        ("dpmpp_3m_sde", "eta=0 "): (s.sample_dpmpp_3m_sde, 1, still),
    }

    def model(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, sigma: task.denoised(x, sigma[0])

    def on_grid(
        sampler: Callable[..., Tensor],
        each: int,
        options: dict[str, Any],
        grid: Callable[[int], Tensor],
        task: Task,
        budget: int,
    ) -> Tensor:
        # The last step of those that take two calls is Euler's where it leads to 0.
        saved = each - 1 if float(grid(2)[-1]) == 0.0 else 0
        sigmas = grid(steps_for(lambda n: each * n - saved, budget))
        return sampler(model(task), task.start(sigmas[0]), sigmas, disable=True, **options)

    for (name, told), (sampler, each, options) in samplers.items():
        for rule, grid in grids.items():
            run = partial(on_grid, sampler, each, options, grid)
            yield Setting("k-diffusion", name, told + rule, run, custom=rule.endswith("no 0"))

    def fast(low: float, finish: bool, task: Task, budget: int) -> Tensor:
        x = s.sample_dpm_fast(model(task), task.start(high), low, high, budget - finish, disable=True, **still)
        return task.denoised(x, low) if finish else x

    def adaptive(low: float, finish: bool, order: int, h_init: float, task: Task, budget: int) -> Tensor:
        """A tolerance whose run fits the budget, as small as halving finds among sixths of decades."""
        found, tolerances = None, np.logspace(-4.0, 2.0, 37).tolist()
        while tolerances:
            middle = len(tolerances) // 2
            task.calls, rtol = 0, tolerances[middle]
            try:
                found = s.sample_dpm_adaptive(
                    _capped(model(task), task, budget - finish), task.start(high), low, high, disable=True,
                    order=order, rtol=rtol, atol=0.156 * rtol, h_init=h_init, **still,
                ), task.calls  # fmt: skip
                tolerances = tolerances[:middle]
            except _TooMany:
                tolerances = tolerances[middle + 1 :]
        if found is None:
            raise ValueError(f"no tolerance up to 100 fits {budget} calls")
        x, task.calls = found  # what the search spent is not counted
        return task.denoised(x, low) if finish else x

    for low, finish in (
        (1e-3, False),
        (schedule.sigma_min, False),
        (0.02, False),
        (schedule.sigma_min, True),
        (0.03, True),
    ):
        end = f"sigma_min={low:.2g}{' denoised' if finish else ''}"
        yield Setting("k-diffusion", "dpm_fast", end, partial(fast, low, finish))
        for order, h_init in itertools.product((2, 3), (0.05, 1.0)):
            run = partial(adaptive, low, finish, order, h_init)
            yield Setting(
                "k-diffusion", "dpm_adaptive", f"order={order} h_init={h_init:g} {end}, tolerance to fit", run
            )


class _TooMany(Exception):
    """A run that spends more than its budget."""


def _capped(model: Callable[[Tensor, Tensor], Tensor], task: Task, budget: int) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, sigma: Tensor) -> Tensor:
        if task.calls >= budget:
            raise _TooMany
        return model(x, sigma)

    return call


# -- azula --------------------------------------------------------------------------------------
def azula(schedule: NoiseSchedule) -> Iterator[Setting]:
    """Its deterministic samplers, on its schedules and on this model's own.

    Its samplers step evenly in the schedule's time, so that the schedule is the grid. Left out: ``DDPMSampler``, stochastic,
    and ``PCSampler``, whose corrector is stochastic (and which without it is ``EulerSampler``).
    """
    package = released.azula()
    a, top = package.noise, schedule.sigma_max

    class Denoiser(package.denoise.Denoiser):  # type: ignore[name-defined]
        def __init__(self, task: Task, nodes: Any) -> None:
            super().__init__()
            self.task, self.schedule = task, nodes

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            alpha, sigma = self.schedule(t)
            return package.denoise.DiracPosterior(mean=self.task.denoised(x_t / alpha, sigma / alpha))

    class Own(a.Schedule):  # type: ignore[name-defined]
        """The schedule of the model itself from σ_T to a σ, even in its time."""

        def __init__(self, sigma_min: float) -> None:
            self.t_min = float(schedule.t(sigma_min))

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            level = torch.as_tensor(schedule.sigma((self.t_min + (schedule.T - self.t_min) * t).numpy()))
            alpha = (1.0 + level**2).rsqrt()
            return alpha, alpha * level

    def on(
        nodes: Any, make: Callable[..., Any], options: dict[str, Any], finish: bool, task: Task, budget: int
    ) -> Tensor:
        twice = make.__name__ == "HeunSampler"
        n = steps_for(lambda n: (2 * n if twice else n) + finish, budget)
        sampler = make(Denoiser(task, nodes), steps=n, silent=True, dtype=torch.float64, **options)
        (alpha_1, sigma_1), (alpha_0, sigma_0) = (nodes(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0))
        x = sampler(alpha_1 * task.start(sigma_1 / alpha_1))
        return task.denoised(x / alpha_0, sigma_0 / alpha_0) if finish else x

    samplers: list[tuple[str, dict[str, Any]]] = [
        ("DDIMSampler", {"eta": 0.0}),
        ("EulerSampler", {}),
        ("ItoSampler", {"eta": 0.0}),
        ("HeunSampler", {}),
    ]
    multistep = ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler", "REABSampler")
    samplers += [(name, {"order": k}) for name in multistep for k in (2, 3, 4)]
    # Where it ends is worth much: what noise is left costs less than a last step that is too long.
    ends = [(low, False) for low in (1e-6, 1e-3, 3e-3, schedule.sigma_min, 0.015, 0.02, 0.03)]
    ends += [(low, True) for low in (schedule.sigma_min, 0.03, 0.1)]
    for low, finish in ends:
        # alpha_min such that sigma/alpha at time 1 is this model's sigma_T.
        preserving = {"alpha_min": math.sqrt((1.0 + low**2) / (1.0 + top**2)), "sigma_min": low}
        straight = {"alpha_min": 1.0 / top, "sigma_min": low}
        schedules = {
            "VESchedule": a.VESchedule(low, top),
            "VPSchedule": a.VPSchedule(**preserving),
            "CosineSchedule": a.CosineSchedule(**preserving),
            "RectifiedSchedule": a.RectifiedSchedule(**straight),
            **{f"DecaySchedule gamma={g:g}": a.DecaySchedule(gamma=g, **straight) for g in (0.8, 0.5, 0.2, 0.1, 0.03)},
            "model's own schedule": Own(low),
        }
        for (name, options), (at, nodes) in itertools.product(samplers, schedules.items()):
            told = "".join(f"{k}={v:g} " for k, v in options.items())
            told += f"{at} sigma_min={low:.2g}{' denoised' if finish else ''}"
            run = partial(on, nodes, getattr(package.sample, name), options, finish)
            yield Setting("azula", name, told, run, custom=at == "model's own schedule")


# -- torchdiffeq --------------------------------------------------------------------------------
def torchdiffeq(schedule: NoiseSchedule) -> Iterator[Setting]:
    """Its fixed-grid methods on eq. 14, on grids of ours. The adaptive ones spend what they like, far beyond 50 calls."""
    from torchdiffeq import odeint

    methods: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in ("euler", "midpoint", "heun2", "heun3", "rk4")),
        # Below order 4 both take Runge–Kutta steps, whatever they are asked for.
        *(("explicit_adams", {"max_order": k}) for k in (4, 5, 6)),
        *(("implicit_adams", {"max_order": k}) for k in (4, 5, 6)),
    ]
    grids: list[tuple[str, dict[str, float]]] = [
        ("quadratic", {}), ("log", {}), ("asinh", {}), ("asinh", {"c": 0.05}),
        *(("karras", {"rho": rho}) for rho in (3.0, 5.0, 7.0)),
    ]  # fmt: skip

    def solve(eps: Callable[[Tensor, Any], Tensor], start: Tensor, nodes: Grid, method: str, options: Any) -> Tensor:
        times = torch.tensor(nodes.sigmas)
        return odeint(lambda t, y: eps(y, t), start, times, method=method, options=options)[-1]

    @cache
    def calls(method: str, order: int | None, steps: int) -> int:
        """Counted on a field that is zero, which gives implicit methods their fewest iterations."""
        count = 0

        def nothing(x: Tensor, sigma: Any) -> Tensor:
            nonlocal count
            count += 1
            return torch.zeros_like(x)

        nodes = Grid.make("quadratic", schedule, steps)
        solve(nothing, torch.ones(1, dtype=torch.float64), nodes, method, {"max_order": order} if order else {})
        return count

    def on(
        method: str, options: dict[str, Any], grid: str, rule: dict[str, float], share: float, task: Task, budget: int
    ) -> Tensor:
        n = steps_for(lambda n: calls(method, options.get("max_order"), n), budget)
        nodes = Grid.make(grid, schedule, max(1, int(n * share)), **rule)
        return solve(task.eps, task.start(schedule.sigma_max), nodes, method, options)

    for (method, options), (grid, rule) in itertools.product(methods, grids):
        # How often an implicit method iterates is known only afterwards: shares of the steps that might fit.
        for share in (1.0, 0.75, 0.5, 0.25) if method == "implicit_adams" else (1.0,):
            told = "".join(f"{k}={v:g} " for k, v in (options | rule).items())
            told += f"grid={grid}{f' share of the steps={share:g}' if share < 1.0 else ''}"
            yield Setting("torchdiffeq", method, told, partial(on, method, options, grid, rule, share))


def _diffusers(schedule: NoiseSchedule) -> Iterator[Setting]:
    from benchmarks.contenders_diffusers import settings

    return settings(schedule)


#: All packages, each with what makes its settings; making them fails with ImportError where the package is missing.
PACKAGES: dict[str, Callable[[NoiseSchedule], Iterator[Setting]]] = {
    "diffusers": _diffusers,
    "k-diffusion": k_diffusion,
    "azula": azula,
    "torchdiffeq": torchdiffeq,
}
