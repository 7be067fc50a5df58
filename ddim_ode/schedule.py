r"""Noise schedules: the relation between α, σ and t.

The paper's :math:`\alpha_t` is the cumulative product that most code calls ``alphas_cumprod``.
Everything in this package happens in

.. math:: \bar x = x / \sqrt{\alpha}, \qquad \sigma = \sqrt{(1 - \alpha) / \alpha},

so a schedule here is one smooth increasing function :math:`\sigma(t)` with :math:`\sigma(0) = 0`, its
inverse, and the number a network expects as its time label. All of it is float64 on the host.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from functools import cached_property
from numbers import Real
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator, make_interp_spline
from torch import Tensor

__all__ = ["NoiseSchedule"]

Array = NDArray[np.float64]


def whole(value: Any, name: str, least: int = 1) -> int:
    """A whole number of at least `least`, or a ValueError that names it."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but got {value!r}")
    return number


def is_number(value: Any) -> bool:
    """Whether it is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_numbers(given: Any) -> Array:
    """What was given, as float64; one NaN, if there is anything but numbers in it."""
    if isinstance(given, Tensor):
        given = given.detach().cpu().tolist()  # in bfloat16 too, which numpy has not got
    try:
        found = np.asarray(given)
    except (TypeError, ValueError):  # rows of several lengths
        return np.array([math.nan])
    return found.astype(np.float64) if found.dtype.kind in "fiu" else np.array([math.nan])


class NoiseSchedule(ABC):
    r"""A smooth, increasing map from time to noise level, :math:`\sigma : [0, T] \to [0, \sigma_T]`.

    Make one with a class method: :meth:`linear` (the paper's), :meth:`scaled_linear`, :meth:`cosine`,
    :meth:`from_alphas_cumprod`, :meth:`continuous`, :meth:`edm` or :meth:`flow`.

    Attributes
    ----------
    config : dict
        The maker's name under ``"kind"`` and its arguments: plain data, for records and files;
        :meth:`from_config` makes the schedule again.
    T : float
        The end of time: the number of trained steps of a discrete schedule, else the largest time.
    discrete : bool
        Whether the network was trained at the integers 1…T only.
    t_min, sigma_min, sigma_max : float
        The first time a network knows, its noise level, and the last noise level.

    Notes
    -----
    Times count as the paper counts: t = 0 is the data and has σ = 0. A network's label is another
    matter: see :meth:`label`.
    """

    config: dict[str, Any]
    T: float
    discrete: bool
    t_min: float

    # -- what a schedule has to know ------------------------------------------------------------
    @abstractmethod
    def _sigma(self, t: Array) -> Array: ...

    @abstractmethod
    def _t(self, sigma: Array) -> Array: ...

    @abstractmethod
    def _label(self, t: Array) -> Array: ...

    @abstractmethod
    def _slope(self, t: Array) -> Array: ...

    # -- what everyone asks ---------------------------------------------------------------------
    @cached_property
    def sigma_min(self) -> float:
        return self.sigma(self.t_min)

    @cached_property
    def sigma_max(self) -> float:
        return self.sigma(self.T)

    @overload
    def sigma(self, t: float) -> float: ...
    @overload
    def sigma(self, t: Array) -> Array: ...
    def sigma(self, t: Any) -> Any:
        """Noise level σ at time t.

        Parameters
        ----------
        t : float or array_like
            Times in [0, T]; fractions are welcome.

        Returns
        -------
        float or ndarray
            σ, float64, of the shape of `t`. Exact (to rounding) at the trained steps.

        Raises
        ------
        ValueError
            If a time lies outside [0, T].
        """
        values = self._within(t, "t", self.T)
        return _like(t, self._sigma(values))

    @overload
    def t(self, sigma: float) -> float: ...
    @overload
    def t(self, sigma: Array) -> Array: ...
    def t(self, sigma: Any) -> Any:
        """Time t at noise level σ, the inverse of :meth:`sigma`.

        Parameters
        ----------
        sigma : float or array_like
            Noise levels in [0, sigma_max].

        Returns
        -------
        float or ndarray
            Fractional times, float64, of the shape of `sigma`.

        Raises
        ------
        ValueError
            If a noise level lies outside [0, sigma_max].
        """
        values = self._within(sigma, "sigma", self.sigma_max)
        return _like(sigma, self._t(values))

    @overload
    def label(self, sigma: float) -> float: ...
    @overload
    def label(self, sigma: Array) -> Array: ...
    def label(self, sigma: Any) -> Any:
        """The network's time label at noise level σ.

        For a discrete schedule this is 0-based and fractional, t(σ) − 1: the networks of the field were
        trained with label 0 at the paper's t = 1. Below the first trained noise level, σ = 0 included,
        the label is that of the first trained level.

        Parameters
        ----------
        sigma : float or array_like
            Noise levels in [0, sigma_max].

        Returns
        -------
        float or ndarray
            Labels, float64, of the shape of `sigma`.
        """
        values = self._within(sigma, "sigma", self.sigma_max)
        return _like(sigma, self._label(np.maximum(self._t(values), self.t_min)))

    def alpha(self, t: Any) -> Any:
        r"""The paper's :math:`\alpha_t = 1 / (1 + \sigma_t^2)`, with :math:`\alpha_0 = 1`."""
        sigma = np.asarray(self.sigma(t))
        return _like(t, 1.0 / (1.0 + sigma * sigma))

    def slope(self, t: Any) -> Any:
        """dσ/dt at time t; infinite at t = 0 where σ starts like √t."""
        values = self._within(t, "t", self.T)
        with np.errstate(divide="ignore"):
            return _like(t, self._slope(values))

    def __repr__(self) -> str:
        return f"<NoiseSchedule {self.config['kind']}: T={self.T:g}, sigma {self.sigma_min:.6g}…{self.sigma_max:.6g}>"

    @staticmethod
    def _within(value: ArrayLike, name: str, end: float) -> Array:
        values = np.asarray(value, dtype=np.float64)
        # A last place or two over the end is rounding, not a mistake.
        if values.size and not (values.min() >= 0.0 and values.max() <= end * (1.0 + 1e-12)):
            raise ValueError(f"{name} must lie in [0, {end:.10g}], the span of this schedule, but got {value!r}")
        return np.minimum(values, end)

    # -- makers ---------------------------------------------------------------------------------
    @staticmethod
    def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        r"""The paper's schedule: β linear in t, :math:`\alpha_t = \prod_{s \le t} (1 - \beta_s)` [1]_.

        Parameters
        ----------
        T : int
            Number of trained steps.
        beta_start, beta_end : float
            β_1 and β_T, both in (0, 1).

        References
        ----------
        .. [1] Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020.
        """
        T, beta_start, beta_end = whole(T, "T", 2), float(beta_start), float(beta_end)
        betas = np.linspace(beta_start, beta_end, T)
        return _from_betas(betas, {"kind": "linear", "T": T, "beta_start": beta_start, "beta_end": beta_end})

    @staticmethod
    def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
        r"""√β linear in t: the schedule of latent diffusion models.

        Parameters
        ----------
        T : int
            Number of trained steps.
        beta_start, beta_end : float
            β_1 and β_T, both in (0, 1).
        """
        T, beta_start, beta_end = whole(T, "T", 2), float(beta_start), float(beta_end)
        betas = np.linspace(max(beta_start, 0.0) ** 0.5, max(beta_end, 0.0) ** 0.5, T) ** 2
        return _from_betas(betas, {"kind": "scaled_linear", "T": T, "beta_start": beta_start, "beta_end": beta_end})

    @staticmethod
    def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        r""":math:`\alpha_t \propto \cos^2\left(\frac{t/T + s}{1 + s} \frac{\pi}{2}\right)`, β clipped [1]_.

        Parameters
        ----------
        T : int
            Number of trained steps.
        s : float
            Offset that keeps β from vanishing at t = 0.
        max_beta : float
            Largest β; it keeps σ_T finite.

        References
        ----------
        .. [1] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021.
        """
        T, s, max_beta = whole(T, "T", 2), float(s), float(max_beta)
        f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
        betas = np.minimum(1.0 - f[1:] / f[:-1], max_beta)
        return _from_betas(betas, {"kind": "cosine", "T": T, "s": s, "max_beta": max_beta})

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: ArrayLike | Tensor) -> NoiseSchedule:
        r"""The schedule of a table :math:`\alpha_1 > \dots > \alpha_T`, as checkpoints store it.

        Parameters
        ----------
        alphas_cumprod : array_like
            Strictly decreasing, inside (0, 1), of length T ≥ 2; `alphas_cumprod[0]` is the paper's α_1.
            A torch tensor will do. Give it in float64 where you can: float32 leaves σ_1 with
            three good digits.

        Raises
        ------
        ValueError
            If the table is not decreasing inside (0, 1); a last entry of 0 (zero terminal SNR) means
            σ_T = ∞, which eq. 14 cannot start from.
        """
        if isinstance(alphas_cumprod, Tensor):
            alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64).numpy()
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        return _Discrete(table, {"kind": "from_alphas_cumprod", "alphas_cumprod": table.ravel().tolist()})

    @staticmethod
    def continuous(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> NoiseSchedule:
        r"""Continuous variance-preserving: :math:`\sigma^2 = e^{\beta_{min} t + (\beta_{max}-\beta_{min}) t^2/2} - 1` [1]_.

        Time runs over [0, 1] and is itself the network's label.

        Parameters
        ----------
        beta_min, beta_max : float
            Ends of the linear β(t), 0 < beta_min < beta_max.
        t_min : float
            The smallest time the network was trained at.

        References
        ----------
        .. [1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021.
        """
        return _Continuous(float(beta_min), float(beta_max), float(t_min))

    @staticmethod
    def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
        """σ is time: the schedule of EDM-style networks, whose label is σ itself [1]_.

        Parameters
        ----------
        sigma_min, sigma_max : float
            The smallest and the largest noise level the network was trained at, 0 < sigma_min < sigma_max.

        References
        ----------
        .. [1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
        """
        return _SigmaIsTime(float(sigma_min), float(sigma_max))

    @staticmethod
    def flow(t_min: float = 1e-3, t_max: float = 0.999) -> NoiseSchedule:
        r"""Flow matching: x = (1 − t) x₀ + t ε, so :math:`\sigma = t / (1 - t)`; the network's label is t itself [1]_.

        Parameters
        ----------
        t_min, t_max : float
            Ends of what is asked of the network, 0 < t_min < t_max < 1. At t = 1, pure noise, σ would be infinite:
            the last σ is t_max/(1 − t_max), and x there is noise up to a share of 1 − t_max.

        References
        ----------
        .. [1] Liu, Gong, Liu, "Flow Straight and Fast", 2023; Lipman et al., "Flow Matching for Generative Modeling", 2023.
        """
        return _Flow(float(t_min), float(t_max))

    @staticmethod
    def from_config(config: dict[str, Any]) -> NoiseSchedule:
        """The schedule that has this :attr:`config`.

        Raises
        ------
        ValueError
            If the kind is not one of this class's makers, or its arguments are not that maker's.
        """
        arguments = dict(config)
        kind = arguments.pop("kind", None)
        if kind not in _MAKERS:
            raise ValueError(f"config names the schedule kind {kind!r}; this version knows {', '.join(_MAKERS)}")
        try:
            return getattr(NoiseSchedule, kind)(**arguments)
        except TypeError as error:
            raise ValueError(f"config does not fit the schedule kind {kind!r}: {error}") from error

    # -- tables of a discrete schedule ----------------------------------------------------------
    @property
    def alphas_cumprod(self) -> Array:
        """Table α_1…α_T (discrete schedules only)."""
        raise AttributeError(f"{self!r} is continuous: it has no table alphas_cumprod; use alpha(t)")

    @property
    def betas(self) -> Array:
        """Table β_1…β_T, β_t = 1 − α_t/α_{t−1} (discrete schedules only)."""
        table = np.concatenate(([1.0], self.alphas_cumprod))
        return 1.0 - table[1:] / table[:-1]


_MAKERS = ("linear", "scaled_linear", "cosine", "from_alphas_cumprod", "continuous", "edm", "flow")


class _Discrete(NoiseSchedule):
    """A table of σ_1…σ_T and a smooth curve through it.

    σ² starts linearly in t, so log(σ²/t) is smooth down to t = 0: a quintic spline through it is exact at
    the nodes in relative terms, four times differentiable, and carries on below t = 1 by itself. Tables on
    which that spline is not monotone (a kink, float32 noise) get a monotone cubic instead.
    """

    discrete = True
    t_min = 1.0

    def __init__(self, alphas_cumprod: Array, config: dict[str, Any]) -> None:
        _check_table(alphas_cumprod)
        self.config = config
        self.T = float(alphas_cumprod.size)
        self._alphas_cumprod = alphas_cumprod.copy()
        self._alphas_cumprod.setflags(write=False)
        steps = np.arange(1.0, self.T + 1.0)
        # −expm1(log α) and not 1 − α: near α = 1 the difference would lose the digits the table has.
        self._table = np.sqrt(-np.expm1(np.log(alphas_cumprod)) / alphas_cumprod)
        log_variance = 2.0 * np.log(self._table)
        self._fit(steps, log_variance)

    def _fit(self, steps: Array, log_variance: Array) -> None:
        degree = min(5, steps.size - 1)
        degree -= 1 - degree % 2  # odd degrees only
        spline = make_interp_spline(steps, log_variance - np.log(steps), k=degree)
        derivative = spline.derivative()
        probe = np.concatenate((np.linspace(0.05, 1.0, 20), np.linspace(1.0, self.T, 16 * steps.size)))
        if np.all(derivative(probe) + 1.0 / probe > 0.0):
            self._curve, self._curve_slope, self._first = spline, derivative, None
            return
        self._curve = PchipInterpolator(np.log(steps), log_variance)
        self._curve_slope = self._curve.derivative()
        self._first = 1.0  # d log σ² / d log t below t = 1, where a table says nothing: σ² starts linearly

    def _log_variance(self, t: Array) -> Array:
        u = np.log(t)
        if self._first is None:
            return self._curve(t) + u
        return self._curve(np.maximum(u, 0.0)) + self._first * np.minimum(u, 0.0)

    def _log_variance_slope(self, t: Array) -> Array:
        if self._first is None:
            return self._curve_slope(t) + 1.0 / t
        return np.where(t < 1.0, self._first, self._curve_slope(np.maximum(np.log(t), 0.0))) / t

    def _slope(self, t: Array) -> Array:
        inside = np.maximum(t, np.finfo(np.float64).tiny)
        return np.where(t > 0.0, 0.5 * self._sigma(t) * self._log_variance_slope(inside), np.inf)

    @property
    def alphas_cumprod(self) -> Array:
        return self._alphas_cumprod

    def _sigma(self, t: Array) -> Array:
        positive = np.maximum(t, np.finfo(np.float64).tiny)
        sigma = np.exp(0.5 * self._log_variance(positive))
        node = np.rint(t).astype(np.int64)
        sigma = np.where((t == node) & (node > 0), self._table[np.maximum(node, 1) - 1], sigma)
        return np.where(t > 0.0, sigma, 0.0)

    def _t(self, sigma: Array) -> Array:
        tiny = np.finfo(np.float64).tiny
        target = 2.0 * np.log(np.maximum(sigma, math.sqrt(tiny)))
        # The bracket is known from the table; Newton's method inside it, bisection where a step leaves it.
        right = np.searchsorted(self._table, sigma)
        low = np.where(right == 0, 0.0, right).astype(np.float64)
        high = np.minimum(right + 1.0, self.T)
        hit = sigma == self._table[np.minimum(right, self._table.size - 1)]
        inside = (sigma / self._table[0]) ** 2
        t = np.where(right == 0, np.clip(inside, tiny, 1.0), 0.5 * (low + high))
        low = np.where(right == 0, tiny, low)
        for _ in range(60):
            excess = self._log_variance(t) - target
            low, high = np.where(excess < 0.0, t, low), np.where(excess > 0.0, t, high)
            step = t - excess / self._log_variance_slope(t)
            step = np.where((step >= low) & (step <= high), step, 0.5 * (low + high))
            # Below a few 1e-14 the curve's own rounding is all that is left.
            if np.all((np.abs(step - t) <= 3e-14 * t) | (excess == 0.0) | hit):
                break
            t = np.where(excess == 0.0, t, step)
        t = np.where(hit, np.minimum(right + 1.0, self.T), t)
        return np.where(sigma > 0.0, t, 0.0)

    def _label(self, t: Array) -> Array:
        return t - 1.0


class _Continuous(NoiseSchedule):
    discrete = False
    T = 1.0

    def __init__(self, beta_min: float, beta_max: float, t_min: float) -> None:
        if not 0.0 < beta_min < beta_max:
            raise ValueError(
                f"beta_min and beta_max must satisfy 0 < beta_min < beta_max, but got {beta_min}, {beta_max}"
            )
        if not beta_min + beta_max < 1400.0:
            raise ValueError(
                f"beta_min = {beta_min:g} and beta_max = {beta_max:g} make sigma_T infinite in float64, and eq. 14 cannot "
                "start there: make beta_max smaller"
            )
        if not 0.0 < t_min < 1.0:
            raise ValueError(f"t_min must lie in (0, 1), but got {t_min}")
        self.config = {"kind": "continuous", "beta_min": beta_min, "beta_max": beta_max, "t_min": t_min}
        self.t_min = t_min
        self._b0, self._b1 = beta_min, beta_max - beta_min

    def _sigma(self, t: Array) -> Array:
        return np.sqrt(np.expm1(self._b0 * t + 0.5 * self._b1 * t * t))

    def _t(self, sigma: Array) -> Array:
        exponent = np.log1p(sigma * sigma)
        return 2.0 * exponent / (self._b0 + np.sqrt(self._b0**2 + 2.0 * self._b1 * exponent))

    def _label(self, t: Array) -> Array:
        return t

    def _slope(self, t: Array) -> Array:
        sigma = self._sigma(t)
        return 0.5 * (self._b0 + self._b1 * t) * (1.0 + sigma * sigma) / sigma


class _SigmaIsTime(NoiseSchedule):
    discrete = False

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0.0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, but got {sigma_min}, {sigma_max}"
            )
        self.config = {"kind": "edm", "sigma_min": sigma_min, "sigma_max": sigma_max}
        self.T, self.t_min = float(sigma_max), float(sigma_min)

    def _sigma(self, t: Array) -> Array:
        return t

    def _t(self, sigma: Array) -> Array:
        return sigma

    def _label(self, t: Array) -> Array:
        return t

    def _slope(self, t: Array) -> Array:
        return np.ones_like(t)


class _Flow(NoiseSchedule):
    discrete = False

    def __init__(self, t_min: float, t_max: float) -> None:
        if not 0.0 < t_min < t_max < 1.0:
            raise ValueError(f"t_min and t_max must satisfy 0 < t_min < t_max < 1, but got {t_min}, {t_max}")
        self.config = {"kind": "flow", "t_min": t_min, "t_max": t_max}
        self.T, self.t_min = t_max, t_min

    def _sigma(self, t: Array) -> Array:
        return t / (1.0 - t)

    def _t(self, sigma: Array) -> Array:
        return sigma / (1.0 + sigma)

    def _label(self, t: Array) -> Array:
        return t

    def _slope(self, t: Array) -> Array:
        return (1.0 - t) ** -2.0


def _from_betas(betas: Array, config: dict[str, Any]) -> NoiseSchedule:
    if betas.size and betas[-1] == 1.0:
        raise ValueError(
            f"the last beta of {config} is 1: sigma_T would be infinite and eq. 14 cannot start there; cap it below 1, or "
            "drop that step and use from_alphas_cumprod"
        )
    if not (betas.size >= 2 and np.all((betas > 0.0) & (betas < 1.0))):
        raise ValueError(f"a schedule needs T >= 2 and every beta inside (0, 1), but got {config}")
    return _Discrete(np.exp(np.cumsum(np.log1p(-betas))), config)


def _check_table(alphas_cumprod: Array) -> None:
    if alphas_cumprod.ndim != 1 or alphas_cumprod.size < 2:
        raise ValueError(f"alphas_cumprod must be a table of T >= 2 numbers, but its shape is {alphas_cumprod.shape}")
    if not np.all(np.isfinite(alphas_cumprod)):
        raise ValueError("alphas_cumprod must be finite, but it holds NaN or infinity")
    if alphas_cumprod[-1] <= 0.0 < alphas_cumprod[0]:
        raise ValueError(
            f"alphas_cumprod ends at {alphas_cumprod[-1]:g} (zero terminal SNR): sigma_T would be infinite and eq. 14 "
            "cannot start there; drop that last step, alphas_cumprod[:-1], and sample from the step before it"
        )
    if alphas_cumprod[0] >= 1.0:
        raise ValueError(
            f"alphas_cumprod[0] = {alphas_cumprod[0]:g} would make sigma_1 zero or imaginary: the table must start at the "
            "paper's alpha_1 < 1 (alpha_0 = 1 is implied), in float64 if float32 or less has rounded it to 1"
        )
    if not np.all(np.diff(alphas_cumprod) < 0.0):
        at = int(np.argmax(np.diff(alphas_cumprod) >= 0.0))
        raise ValueError(
            f"alphas_cumprod must decrease strictly, but entry {at + 1} ({alphas_cumprod[at + 1]!r}) is not below "
            f"entry {at} ({alphas_cumprod[at]!r})"
        )


def _like(value: Any, result: Array) -> Any:
    """A float for a scalar, an array for an array."""
    return float(result) if np.ndim(value) == 0 else result
