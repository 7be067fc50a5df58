r"""The paper's noise predictor: the U-Net of Ho et al. (2020), with two things a CPU is glad of.

The module names are those of the authors' release, so that its state dictionaries load by name.
`patch` folds p × p pixels into channels before the first layer, and :class:`GaussianResidual` lets the
network predict only what the best linear denoiser leaves.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddim_ode.schedule import NoiseSchedule

__all__ = ["UNet", "GaussianResidual", "timestep_embedding"]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of labels `t` (B,) into (B, dim), computed in float32 or better."""
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequencies = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angles = t.unsqueeze(1) * frequencies
    return functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, dim % 2))


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class _ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, time_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.temb_proj(time).unsqueeze(-1).unsqueeze(-1)
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class _AttnBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class _Level(nn.Module):
    """One resolution: blocks, attention after each of them or nowhere, and a resampling or nothing."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)

    def run(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        x = self.block[i](x, time)
        return self.attn[i](x) if len(self.attn) else x


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """U-Net over images: residual blocks, group norm, self-attention, sinusoidal time embedding [1]_.

    Parameters
    ----------
    channels : int
        Image channels.
    resolution : int
        Height and width. The inner resolutions resolution / patch / 2^i must be whole.
    width : int
        Channels of the first level; level i has ``width * multipliers[i]``.
    multipliers : tuple of int
        One entry a level.
    blocks : int
        Residual blocks a level on the way down (one more on the way up).
    attention : tuple of int
        Inner resolutions that get self-attention after each block.
    groups : int
        Groups of the group norms; must divide every width.
    dropout : float
        Dropout rate inside residual blocks.
    patch : int
        Pixels a side folded into channels before the first layer (1: none).

    Notes
    -----
    ``UNet(3, 32, 128, (1, 2, 2, 2), 2, (16,), 32, 0.1)`` is the paper's CIFAR-10 network.
    ``forward(x, t)`` takes images (B, channels, resolution, resolution) and 0-based labels (B,).

    References
    ----------
    .. [1] Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, appendix B.
    """

    def __init__(
        self,
        channels: int = 1,
        resolution: int = 28,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 3),
        blocks: int = 1,
        attention: tuple[int, ...] = (7,),
        groups: int = 8,
        dropout: float = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        inner = resolution // patch
        if resolution % patch or inner % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"resolution {resolution} with patch {patch} cannot be halved {len(multipliers) - 1} times: "
                "use fewer multipliers, another patch, or padded images"
            )
        self.config = {
            "channels": channels,
            "resolution": resolution,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "groups": groups,
            "dropout": dropout,
            "patch": patch,
        }
        self.shape = (channels, resolution, resolution)
        self.width, self.patch = width, patch
        time = 4 * width

        def block(from_channels: int, to_channels: int) -> _ResnetBlock:
            return _ResnetBlock(from_channels, to_channels, time, groups, dropout)

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, time), nn.Linear(time, time)])
        self.conv_in = nn.Conv2d(channels * patch**2, width, 3, padding=1)

        now, skips = width, [width]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            made, attentions = [], []
            for _ in range(blocks):
                made.append(block(now, width * multiplier))
                now = width * multiplier
                skips.append(now)
                if inner in attention:
                    attentions.append(_AttnBlock(now, groups))
            stage = _Level(made, attentions)
            if level < len(multipliers) - 1:
                stage.downsample = _Downsample(now)
                skips.append(now)
                inner //= 2
            self.down.append(stage)

        self.mid = nn.Module()
        self.mid.block_1 = block(now, now)
        self.mid.attn_1 = _AttnBlock(now, groups)
        self.mid.block_2 = block(now, now)

        stages: list[nn.Module] = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            made, attentions = [], []
            for _ in range(blocks + 1):
                made.append(block(now + skips.pop(), width * multiplier))
                now = width * multiplier
                if inner in attention:
                    attentions.append(_AttnBlock(now, groups))
            stage = _Level(made, attentions)
            if level > 0:
                stage.upsample = _Upsample(now)
                inner *= 2
            stages.insert(0, stage)
        self.up = nn.ModuleList(stages)

        self.norm_out = _norm(now, groups)
        self.conv_out = nn.Conv2d(now, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = timestep_embedding(t, self.width).to(x.dtype)
        time = self.temb.dense[1](functional.silu(self.temb.dense[0](time)))
        time = functional.silu(time)  # every block wants it so
        h = self.conv_in(functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for stage in self.down:
            for i in range(len(stage.block)):
                h = stage.run(i, h, time)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, time)), time)
        for stage in reversed(self.up):
            for i in range(len(stage.block)):
                h = stage.run(i, torch.cat((h, skips.pop()), dim=1), time)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return functional.pixel_shuffle(h, self.patch) if self.patch > 1 else h


class GaussianResidual(nn.Module):
    r"""Noise prediction as the Gaussian optimum plus a learned residual.

    For data N(m, s² I) the best noise predictor is σ(x̄ − m)/(σ² + s²). With F the wrapped network,

    .. math:: \epsilon_\theta(x, t) = \frac{\sigma\,(\bar x - m)}{\sigma^2 + s^2}
              + \frac{s}{\sqrt{\sigma^2 + s^2}}\, F(x', t), \qquad \bar x = x \sqrt{1 + \sigma^2},

    where x' is :math:`(\bar x - m) / \sqrt{\sigma^2 + s^2}`, of unit variance at every σ. Where σ is large the
    first term is nearly all of ε, so the network is not asked to copy its input to four digits.

    Parameters
    ----------
    network : Module
        ``network(x, t)``.
    schedule : NoiseSchedule
        A discrete schedule; its σ(t) is stored as a cubic Hermite table, so that fractional labels stay smooth.
    mean : Tensor
        m, the mean image of the data, (*d).
    std : float
        s, the data's standard deviation about `mean`.
    """

    table: Tensor
    mean: Tensor

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, mean: Tensor, std: float) -> None:
        super().__init__()
        self.network = network
        nodes = np.arange(1.0, schedule.T + 1.0)
        log_sigma = np.log(schedule.sigma(nodes))
        h = 1e-3
        inner = np.clip(nodes, nodes[0] + h, nodes[-1] - h)  # the end slopes, one step of h inside
        slope = (np.log(schedule.sigma(inner + h)) - np.log(schedule.sigma(inner - h))) / (2 * h)
        table = torch.tensor(np.stack((log_sigma, slope), axis=1))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("mean", mean.to(torch.float32))
        self.std = float(std)

    def sigma(self, t: Tensor) -> Tensor:
        """σ at the 0-based labels `t` (B,), float64."""
        t = t.to(torch.float64).clamp(0.0, self.table.shape[0] - 1.0)
        left = t.floor().clamp(max=self.table.shape[0] - 2.0)
        u = t - left
        index = left.to(torch.int64)
        (y0, m0), (y1, m1) = (self.table.index_select(0, i).unbind(1) for i in (index, index + 1))
        cubic = y0 + u * (m0 + u * (3 * (y1 - y0) - 2 * m0 - m1 + u * (2 * (y0 - y1) + m0 + m1)))
        return cubic.exp()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.sigma(t).reshape(-1, *(1,) * (x.ndim - 1))
        total = (sigma**2 + self.std**2).sqrt()
        dtype = x.dtype
        unit = x * ((1 + sigma**2).sqrt() / total).to(dtype) - self.mean.to(dtype) * (1 / total).to(dtype)
        residual = self.network(unit, t).to(dtype)
        return unit * (sigma / total).to(dtype) + residual * (self.std / total).to(dtype)
