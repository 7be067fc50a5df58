r"""The paper's noise predictor: the U-Net of Ho et al. (2020), with two things a CPU is glad of.

The module names are those of the authors' release, so that its state dictionaries load by name.
`patch` folds p × p pixels into channels before the first layer, and :class:`GaussianResidual` lets the
network predict only what the best linear denoiser leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddim_ode.schedule import NoiseSchedule, whole

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


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Time(nn.Module):
    """The time embedding as the blocks want it: through two layers, each with its nonlinearity."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, channels), nn.Linear(channels, channels)])

    def forward(self, time: Tensor) -> Tensor:
        return functional.silu(self.dense[1](functional.silu(self.dense[0](time))))


class _ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, time_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
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
        self.proj_out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


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


class _Level(nn.Module):
    """One resolution: blocks, and attention after each of them or nowhere."""

    def __init__(self, blocks: Sequence[_ResnetBlock], attentions: Sequence[_AttnBlock]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)

    def run(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        x = self.block[i](x, time)
        return self.attn[i](x) if len(self.attn) else x


class _Down(_Level):
    """A level, then a downsampling or nothing; returns every state on the way, the last of which goes on."""

    def __init__(
        self, blocks: Sequence[_ResnetBlock], attentions: Sequence[_AttnBlock], downsample: _Downsample | None
    ) -> None:
        super().__init__(blocks, attentions)
        self.downsample = downsample

    def forward(self, x: Tensor, time: Tensor) -> list[Tensor]:
        states = []
        for i in range(len(self.block)):
            x = self.run(i, x, time)
            states.append(x)
        return states if self.downsample is None else [*states, self.downsample(x)]


class _Middle(nn.Module):
    def __init__(self, block_1: _ResnetBlock, attn_1: _AttnBlock, block_2: _ResnetBlock) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = block_1, attn_1, block_2

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, time)), time)


class _Up(_Level):
    """A level whose blocks take the last of `skips` each, then an upsampling or nothing."""

    def __init__(
        self, blocks: Sequence[_ResnetBlock], attentions: Sequence[_AttnBlock], upsample: _Upsample | None
    ) -> None:
        super().__init__(blocks, attentions)
        self.upsample = upsample

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor) -> Tensor:
        for i in range(len(self.block)):
            x = self.run(i, torch.cat((x, skips.pop()), dim=1), time)
        return x if self.upsample is None else self.upsample(x)


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
    in_channels : int, optional
        Channels of the input, if they are not those of the output.

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
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "channels": channels,
            "resolution": resolution,
            "width": width,
            "blocks": blocks,
            "groups": groups,
            "patch": patch,
        }
        for name, value in counts.items():
            whole(value, name)
        if width < 4:
            raise ValueError(f"width must be at least 4, for a time embedding of sines and cosines, but got {width}")
        if not multipliers or any(width * whole(m, "each multiplier") % groups for m in multipliers):
            raise ValueError(f"groups = {groups} must divide every width, {width} times {tuple(multipliers)}")
        inner = resolution // patch
        if resolution % patch or inner % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"resolution {resolution} with patch {patch} cannot be halved {len(multipliers) - 1} times: "
                "use fewer multipliers, another patch, or padded images"
            )
        self.shape = (channels, resolution, resolution)
        self.width, self.patch = width, patch
        time = 4 * width

        def block(from_channels: int, to_channels: int) -> _ResnetBlock:
            return _ResnetBlock(from_channels, to_channels, time, groups, dropout)

        self.temb = _Time(width, time)
        self.conv_in = nn.Conv2d((in_channels or channels) * patch**2, width, 3, padding=1)

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
            last = level == len(multipliers) - 1
            self.down.append(_Down(made, attentions, None if last else _Downsample(now)))
            if not last:
                skips.append(now)
                inner //= 2

        self.mid = _Middle(block(now, now), _AttnBlock(now, groups), block(now, now))

        stages: list[_Up] = []
        for level, multiplier in reversed(list(enumerate(multipliers))):
            made, attentions = [], []
            for _ in range(blocks + 1):
                made.append(block(now + skips.pop(), width * multiplier))
                now = width * multiplier
                if inner in attention:
                    attentions.append(_AttnBlock(now, groups))
            stages.insert(0, _Up(made, attentions, _Upsample(now) if level > 0 else None))
            inner *= 2
        self.up = nn.ModuleList(stages)

        self.norm_out = _norm(now, groups)
        self.conv_out = _zeroed(nn.Conv2d(now, channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.temb(timestep_embedding(t, self.width).to(x.dtype))
        h = self.conv_in(functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for stage in self.down:
            skips += stage(skips[-1], time)
        h = self.mid(skips[-1], time)
        for stage in reversed(self.up):
            h = stage(h, skips, time)
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return functional.pixel_shuffle(h, self.patch) if self.patch > 1 else h


class GaussianResidual(nn.Module):
    r"""Noise prediction as the Gaussian optimum plus a learned residual.

    For data N(m, C) with :math:`C = U \Lambda U^T + \lambda_0 (I - U U^T)` the best denoiser and noise predictor are linear,

    .. math:: \hat x_0 = m + C (C + \sigma^2)^{-1} (\bar x - m), \qquad
              \hat\epsilon = \sigma (C + \sigma^2)^{-1} (\bar x - m), \qquad \bar x = x \sqrt{1 + \sigma^2}.

    With F the wrapped network and s² the mean variance,

    .. math:: \epsilon_\theta(x, t) = \hat\epsilon + \frac{s}{\sqrt{\sigma^2 + s^2}}\,
              F\!\left(\frac{\bar x - m}{\sqrt{\sigma^2 + s^2}},\ \frac{\hat x_0 - m}{s},\ t\right),

    the two images stacked as channels, each of about unit variance. Where σ is large the linear part is nearly all
    of ε; and a convolution, which is the same everywhere, is told what only a map from all pixels to all pixels knows.

    Parameters
    ----------
    network : Module
        ``network(x, t)`` from twice the channels, (B, 2C, H, W), to (B, C, H, W).
    schedule : NoiseSchedule
        A discrete schedule; its σ(t) is stored as a cubic Hermite table, so that fractional labels stay smooth.
    mean : Tensor
        m, the mean image of the data, (C, H, W).
    variance : Tensor
        Λ, the leading variances, (k,).
    basis : Tensor
        U, their directions, (C·H·W, k).
    rest : float
        λ₀, the mean variance of the other directions.
    """

    table: Tensor
    mean: Tensor
    variance: Tensor
    basis: Tensor

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, mean: Tensor, variance: Tensor, basis: Tensor, rest: float
    ) -> None:
        super().__init__()
        self.network = network
        nodes = np.arange(1.0, schedule.T + 1.0)
        sigma = schedule.sigma(nodes)
        log_sigma, slope = np.log(sigma), schedule.slope(nodes) / sigma
        table = torch.tensor(np.stack((log_sigma, slope), axis=1))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("mean", mean.to(torch.float32))
        self.register_buffer("variance", variance.to(torch.float32))
        self.register_buffer("basis", basis.to(torch.float32))
        self.rest = float(rest)

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
        # The linear part is exact only if it is not rounded: whatever autocast does to the network, not here.
        with torch.autocast(x.device.type, enabled=False):
            size = self.mean.numel()
            spread = (self.variance.sum() + self.rest * (size - self.variance.numel())) / size  # s²
            sigma = self.sigma(t).to(x.dtype).unsqueeze(1)
            total = sigma * sigma + spread
            away = x.flatten(1) * (1 + sigma * sigma).sqrt() - self.mean.flatten()
            # C (C + σ²)⁻¹ and σ (C + σ²)⁻¹ along the basis, beyond what they are across it.
            across = self.rest + sigma * sigma
            along = self.variance + sigma * sigma
            turned = away @ self.basis
            denoised = (
                self.rest / across * away + ((self.variance / along - self.rest / across) * turned) @ self.basis.T
            )
            eps = sigma / across * away + ((sigma / along - sigma / across) * turned) @ self.basis.T
            inputs = torch.stack((away / total.sqrt(), denoised / spread.sqrt()), dim=1)
            inputs = inputs.reshape(x.shape[0], 2 * x.shape[1], *x.shape[2:])
        residual = self.network(inputs, t).flatten(1).to(x.dtype)
        return (eps + (spread / total).sqrt() * residual).reshape(x.shape)
