r"""Models for discrete data: the best predictor where the data are known, and the U-Net as a predictor of classes.

Both are callable as ``model(x, t)``, classes (B, \*d) and 0-based labels (B,) to logits (B, K, \*d), for
:class:`ddim_ode.diffusion.discrete.DiscreteField`. For pixel d Bayes' rule says

.. math:: q(x_0^d = k | x_t) \propto q(x_t^d | x_0^d = k)\, q(x_0^d = k | x_t^{\ne d}), \qquad
          q(x_t^d | x_0^d = k) = \alpha_t [x_t^d = k] + (1 - \alpha_t) / K .
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ddim_ode.diffusion.categorical import indicators
from ddim_ode.models.unet import UNet
from ddim_ode.schedule import NoiseSchedule, whole

__all__ = ["DiscreteUNet", "EmpiricalLogits"]


class EmpiricalLogits:
    r"""The best predictor of a finite data set: log q(x_0^d = k | x_t) for each dimension, by Bayes' rule over its points.

    Parameters
    ----------
    data : Tensor
        Points, classes (N, \*d).
    schedule : NoiseSchedule
        A discrete schedule.
    classes : int
        K.
    weights : array_like, optional
        Their probabilities, (N,), which are normalised; by default all are alike. With all K^D points any distribution is one.

    Notes
    -----
    A call costs one product of (B, K·D) and (K·D, N) matrices each way. Classes that no point has are given −∞.
    """

    def __init__(self, data: Tensor, schedule: NoiseSchedule, classes: int, weights: ArrayLike | None = None) -> None:
        self.classes = whole(classes, "classes", 2)
        if data.ndim < 2 or data.shape[0] < 1 or data.is_floating_point():
            raise ValueError(f"data must be classes (N, *d), but have shape {tuple(data.shape)} in {data.dtype}")
        if not bool(((data >= 0) & (data < classes)).all()):
            raise ValueError(f"data must hold 0 to {classes - 1}, but span {int(data.min())} to {int(data.max())}")
        p = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)
        if p.shape != (len(data),) or not np.all(np.isfinite(p) & (p >= 0.0)) or not p.sum() > 0.0:
            raise ValueError(f"weights must be {len(data)} numbers, none negative and not all 0, but got {weights!r}")
        self.shape = tuple(data.shape[1:])
        self._points = indicators(data, classes).flatten(1)
        self._prior = torch.from_numpy(p / p.sum()).log()
        self._alphas = torch.tensor(schedule.alphas_cumprod)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        points, prior, alphas = (v.to(x.device) for v in (self._points, self._prior, self._alphas))
        alpha = alphas.index_select(0, t).unsqueeze(1)
        size = points.shape[1] // self.classes
        alike = indicators(x, self.classes).flatten(1) @ points.T  # dimensions in which x_t and a point agree
        other = ((1.0 - alpha) / self.classes).log()
        same = (alpha + (1.0 - alpha) / self.classes).log()
        found = (alike * same + (size - alike) * other + prior).softmax(dim=1)
        return (found @ points).log().reshape(x.shape[0], self.classes, *x.shape[1:])


class DiscreteUNet(nn.Module):
    r"""A U-Net whose output F is what the other pixels say: logits log q(x_t^d | x_0^d = k) + F_k(x_t, t).

    Near the data x_t^d itself says nearly all, by a factor that is known; it need not be learned.

    Parameters
    ----------
    classes : int
        K.
    schedule : NoiseSchedule
        The discrete schedule that it is trained with.
    channels : int
        Channels C of an image, (C, H, W).
    **config
        As for :class:`ddim_ode.models.unet.UNet`, which here has K·C channels.
    """

    alphas: Tensor

    def __init__(self, classes: int, schedule: NoiseSchedule, channels: int = 1, **config: object) -> None:
        super().__init__()
        self.classes = whole(classes, "classes", 2)
        self.network = UNet(classes * channels, **config)  # type: ignore[arg-type]
        self.shape = (channels, *self.network.shape[1:])
        self.register_buffer("alphas", torch.tensor(schedule.alphas_cumprod), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        known = indicators(x, self.classes)
        parameter = next(self.network.parameters())
        context = self.network(known.flatten(1, 2).to(parameter.dtype), t)
        alpha = self.alphas.index_select(0, t).reshape(-1, 1, 1, 1, 1)
        return (alpha * known + (1.0 - alpha) / self.classes).log() + context.reshape(known.shape)
