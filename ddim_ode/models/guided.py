r"""The U-Net of improved-diffusion and guided-diffusion, with their module names, so that their weights load by name.

The differences from :class:`ddim_ode.models.unet.UNet` are in the details: cosines before sines in the embedding,
time as scale and shift of the second norm, multi-head attention, blocks that resample, class labels, and twice the
output channels where a variance was learned with the noise [1]_ [2]_.

References
----------
.. [1] Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021.
.. [2] Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddim_ode.schedule import whole

__all__ = ["GuidedUNet", "read_config"]


def _embedding(t: Tensor, dim: int) -> Tensor:
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequencies = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000.0) / half))
    angles = t.unsqueeze(1) * frequencies
    return functional.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, dim % 2))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class _Block(nn.Module):
    def __init__(
        self, channels: int, out: int, emb: int, dropout: float, scale_shift: bool, resample: str | None = None
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(_norm(out), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._resampled(self.in_layers[1](self.in_layers[0](x)))
        h, x = self.in_layers[2](h), self._resampled(x)
        e = self.emb_layers(emb).unsqueeze(-1).unsqueeze(-1)
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class _Attention(nn.Module):
    """Heads are split before queries, keys and values in the older of the two orders, after it in the newer."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = (y.reshape(batch, self.heads, -1, flat.shape[2]) for y in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch, self.heads, -1, flat.shape[2]).chunk(3, dim=2)
        q, k, v = (y.transpose(2, 3) for y in (q, k, v))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, -1)
        return (flat + self.proj_out(h)).reshape(x.shape)


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class _First(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class _Stage(nn.ModuleList):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb)
        return x


class GuidedUNet(nn.Module):
    """improved-diffusion's and guided-diffusion's U-Net.

    Parameters
    ----------
    channels : int
        Image channels.
    width : int
        Channels of the first level; level i has ``width * multipliers[i]``.
    multipliers : tuple of float
        One entry a level.
    blocks : int
        Residual blocks a level on the way down (one more on the way up).
    attention : tuple of int
        Levels with attention, 0 the full resolution.
    learned_variance : bool
        Whether the output has twice the channels; the first half is the noise.
    classes : int, optional
        Number of classes, for a class-conditional network.
    heads : int
        Heads an attention layer, if `head_channels` is not given.
    head_channels : int, optional
        Channels a head.
    scale_shift : bool
        Whether time scales and shifts the second norm; else it is added before it.
    resample_blocks : bool
        Whether residual blocks resample; else convolutions do.
    new_order : bool
        Whether queries, keys and values are split before heads.
    dropout : float
        Dropout rate.
    label_scale : float
        What labels are multiplied by: 1000/T for improved-diffusion's models of other T ("rescale_timesteps").

    Notes
    -----
    ``forward(x, t)`` or ``forward(x, t, classes)`` returns the noise alone, (B, channels, H, W).
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 128,
        multipliers: tuple[float, ...] = (1, 2, 2, 2),
        blocks: int = 3,
        attention: tuple[int, ...] = (1, 2),
        learned_variance: bool = True,
        classes: int | None = None,
        heads: int = 4,
        head_channels: int | None = None,
        scale_shift: bool = True,
        resample_blocks: bool = False,
        new_order: bool = False,
        dropout: float = 0.0,
        label_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(new_order, bool):
            raise ValueError(f"new_order must be true or false, but got {new_order!r}")
        number = isinstance(label_scale, Real) and not isinstance(label_scale, bool)
        if not number or not 0.0 < label_scale < math.inf:
            raise ValueError(f"label_scale must be a positive number, such as 1000 / T, but got {label_scale!r}")
        self.width, self.channels, self.label_scale = width, channels, label_scale
        emb = 4 * width

        def block(start: int, end: int, resample: str | None = None) -> _Block:
            return _Block(start, end, emb, dropout, scale_shift, resample)

        def attend(now: int) -> _Attention:
            name, given = ("heads", heads) if head_channels is None else ("head_channels", head_channels)
            count = whole(given, name)
            if now % count:
                raise ValueError(f"{name} = {given} does not divide the {now} channels of an attention layer")
            return _Attention(now, count if head_channels is None else now // count, new_order)

        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb) if classes is not None else None

        sizes = [int(width * multiplier) for multiplier in multipliers]
        now = sizes[0]
        stages, skips = [_Stage([_First(channels, now, 3, padding=1)])], [now]
        for level, size in enumerate(sizes):
            for _ in range(blocks):
                layers: list[nn.Module] = [block(now, size)]
                now = size
                if level in attention:
                    layers.append(attend(now))
                stages.append(_Stage(layers))
                skips.append(now)
            if level < len(sizes) - 1:
                stages.append(_Stage([block(now, now, "down") if resample_blocks else _Down(now)]))
                skips.append(now)
        self.input_blocks = nn.ModuleList(stages)

        self.middle_block = _Stage([block(now, now), attend(now), block(now, now)])

        stages = []
        for level, size in reversed(list(enumerate(sizes))):
            for i in range(blocks + 1):
                layers = [block(now + skips.pop(), size)]
                now = size
                if level in attention:
                    layers.append(attend(now))
                if level and i == blocks:
                    layers.append(block(now, now, "up") if resample_blocks else _Up(now))
                stages.append(_Stage(layers))
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(
            _norm(now), nn.SiLU(), nn.Conv2d(now, channels * (2 if learned_variance else 1), 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        emb = self.time_embed(_embedding(t * self.label_scale, self.width).to(x.dtype))
        if self.label_emb is not None:
            if classes is None:
                raise ValueError("this network is class-conditional: give the field condition=, a class a sample")
            emb = emb + self.label_emb(classes)
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat((h, skips.pop()), dim=1), emb)
        out = self.out(h)
        return out if out.shape[1] == self.channels else out.chunk(2, dim=1)[0]


def read_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`GuidedUNet` that a state dictionary tells: all but heads, their order and dropout."""
    width, first = state["time_embed.0.weight"].shape[1], state["input_blocks.0.0.weight"]
    if first.shape[1] == 6:
        raise ValueError(
            "a network of 6 input channels takes a small image beside x, for super-resolution: wrap it by hand, docs/models.md"
        )
    # Each level but the finest ends in an upsampling on the way up: a convolution, or a block behind the first.
    ups = sorted({int(key.split(".")[1]) for key in state if key.startswith("output_blocks.")})
    convolutions = {
        key.split(".")[1] for key in state if key.startswith("output_blocks.") and key.endswith(".conv.weight")
    }
    resampling = {
        key.split(".")[1]
        for key in state
        if key.startswith("output_blocks.") and key.endswith(".in_layers.0.weight") and key.split(".")[2] != "0"
    }
    levels = len(convolutions | resampling) + 1
    blocks = len(ups) // levels - 1
    sizes, attention = [], []
    for level in range(levels):
        at = 1 + level * (blocks + 1)
        sizes.append(state[f"input_blocks.{at}.0.in_layers.2.weight"].shape[0])
        if f"input_blocks.{at}.1.qkv.weight" in state:
            attention.append(level)
    return {
        "channels": first.shape[1],
        "width": width,
        "multipliers": tuple(size / width for size in sizes),
        "blocks": blocks,
        "attention": tuple(attention),
        "learned_variance": state["out.2.weight"].shape[0] == 2 * first.shape[1],
        "classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        "scale_shift": state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * sizes[0],
        "resample_blocks": bool(resampling),
    }
