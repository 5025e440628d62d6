"""FLUX.1 in the layout of its authors' checkpoints, with ComfyUI's places for patches.

Written from the architecture: double blocks of two streams with one joint attention, single blocks
with attention and feed-forward side by side, adaptive norms, rotary positions of three numbers.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from .attention import optimized_attention
from .patcher import within_wrappers


class Embed(nn.Module):
    def __init__(self, wide, channels):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(wide, channels), nn.Linear(channels, channels)

    def forward(self, x):
        return self.out_layer(silu(self.in_layer(x)))


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Norms(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query_norm, self.key_norm = Scale(channels), Scale(channels)


class Lin(nn.Module):
    def __init__(self, channels, parts):
        super().__init__()
        self.lin, self.parts = nn.Linear(channels, parts * channels), parts

    def forward(self, vec):
        return self.lin(silu(vec))[:, None].chunk(self.parts, dim=-1)


class StreamAttention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.norm = Norms(channels // heads)


def project(qkv, norm, heads):
    """Query, key, value, (batch, heads, tokens, head_dim) each."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def rotate(x, angles):
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def attend(q, k, v, pe, mask, options):
    q, k = rotate(q, pe), rotate(k, pe)
    return optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options
    )


def plain_norm(x):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class DoubleBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Lin(channels, 6))
            setattr(self, f"{stream}_attn", StreamAttention(channels, heads))
            mlp = nn.Sequential(
                nn.Linear(channels, 4 * channels),
                nn.GELU(approximate="tanh"),
                nn.Linear(4 * channels, channels),
            )
            setattr(self, f"{stream}_mlp", mlp)

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None):
        streams, parts = {"txt": txt, "img": img}, []
        mods = {name: getattr(self, f"{name}_mod")(vec) for name in streams}
        for name, x in streams.items():
            shift, scale = mods[name][:2]
            attn = getattr(self, f"{name}_attn")
            qkv = attn.qkv((1 + scale) * plain_norm(x) + shift)
            parts.append(project(qkv, attn.norm, self.heads))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        out = attend(q, k, v, pe, attn_mask, transformer_options)
        attended = dict(zip(streams, out.tensor_split([txt.shape[1]], dim=1), strict=True))
        for name, x in streams.items():
            _, _, gate, shift, scale, gate_mlp = mods[name]
            x = x + gate * getattr(self, f"{name}_attn").proj(attended[name])
            mlp = getattr(self, f"{name}_mlp")
            streams[name] = x + gate_mlp * mlp((1 + scale) * plain_norm(x) + shift)
        return streams["img"], streams["txt"]


class SingleBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.channels = heads, channels
        self.linear1 = nn.Linear(channels, 7 * channels)
        self.linear2 = nn.Linear(5 * channels, channels)
        self.norm, self.modulation = Norms(channels // heads), Lin(channels, 3)

    def forward(self, x, vec, pe, attn_mask=None, transformer_options=None):
        shift, scale, gate = self.modulation(vec)
        projected = self.linear1((1 + scale) * plain_norm(x) + shift)
        qkv, mlp = projected.tensor_split([3 * self.channels], dim=-1)
        q, k, v = project(qkv, self.norm, self.heads)
        out = attend(q, k, v, pe, attn_mask, transformer_options)
        return x + gate * self.linear2(torch.cat([out, gelu(mlp, approximate="tanh")], dim=-1))


class Last(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.linear = nn.Linear(channels, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * plain_norm(x) + shift)


def sinusoid(time):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = 1000 * time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def token_ids(rows, columns, batch, group=0.0):
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0], ids[..., 1], ids[..., 2] = (
        group, torch.arange(rows)[:, None], torch.arange(columns),
    )  # fmt: skip
    return ids.reshape(1, -1, 3).repeat(batch, 1, 1)


def patches_of(x, size):
    """(batch, channels, height, width) to (batch, tokens, channels * size^2), padded to whole."""
    down, right = -x.shape[-2] % size, -x.shape[-1] % size
    x = nn.functional.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # b c h p w q
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), x.shape[2], x.shape[4]


class Flux(nn.Module):
    """FLUX.1: 2 double and 2 single blocks unless asked otherwise."""

    def __init__(
        self, in_channels=16, channels=32, heads=2, context=32, pooled=32, double=2, single=2,
        axes=(4, 6, 6), guidance=True,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.axes = 2, axes
        self.img_in, self.txt_in = nn.Linear(in_channels, channels), nn.Linear(context, channels)
        self.time_in, self.vector_in = Embed(256, channels), Embed(pooled, channels)
        self.guidance_in = Embed(256, channels) if guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(channels, heads) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(channels, heads) for _ in range(single))
        self.final_layer = Last(channels, in_channels)

    def forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = transformer_options or {}
        return within_wrappers(self, options).execute(
            x, timestep, context, y, guidance, ref_latents, control, options, **kwargs
        )

    def _forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        batch, channels, height, width = x.shape
        img, rows, columns = patches_of(x, self.patch_size)
        ids, own = token_ids(rows, columns, batch), img.shape[1]
        for ref in ref_latents or ():
            more, *size = patches_of(ref, self.patch_size)
            img = torch.cat([img, more], dim=1)
            ids = torch.cat([ids, token_ids(*size, batch, group=1.0)], dim=1)
        out = self._blocks(
            img, ids, context, timestep, y, guidance, (transformer_options or {}).copy(),
            kwargs.get("attention_mask"),
        )[:, :own]  # fmt: skip
        out = out.unflatten(1, (rows, columns)).unflatten(3, (channels, 2, 2))
        out = out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return out[..., :height, :width]

    def _blocks(self, img, img_ids, txt, timestep, y, guidance, options, mask):
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(sinusoid(timestep)) + self.vector_in(y)
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(sinusoid(guidance))
        txt_ids = torch.zeros(*txt.shape[:2], 3)
        for patch in options.get("patches", {}).get("post_input", ()):
            given = {"img": img, "txt": txt, "img_ids": img_ids, "txt_ids": txt_ids}
            given = patch(given | {"transformer_options": options})
            img, txt, img_ids, txt_ids = (
                given[name] for name in ("img", "txt", "img_ids", "txt_ids")
            )
        ids = torch.cat([txt_ids, img_ids], dim=1)
        pe = torch.cat(
            [
                ids[..., axis, None]
                / 10000 ** (torch.arange(0, wide, 2, dtype=torch.float64) / wide)
                for axis, wide in enumerate(self.axes)
            ],
            dim=-1,
        ).float()[:, None]
        options |= {"total_blocks": len(self.double_blocks), "block_type": "double"}
        for index, block in enumerate(self.double_blocks):
            options["block_index"] = index
            img, txt = block(img, txt, vec, pe, mask, options)
        x = torch.cat([txt, img], dim=1)
        options |= {
            "total_blocks": len(self.single_blocks), "block_type": "single",
            "img_slice": [txt.shape[1], x.shape[1]],
        }  # fmt: skip
        for index, block in enumerate(self.single_blocks):
            options["block_index"] = index
            x = block(x, vec, pe, mask, options)
        return self.final_layer(x[:, txt.shape[1] :], vec)
