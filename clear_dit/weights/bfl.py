"""Where diffusers' attention weights of FLUX are in Black Forest Labs' own layout, and back.

BFL's checkpoints, and programs that load them as they are (ComfyUI), have query, key and value
fused in one weight, row upon row; a single block has the feed-forward's first layer below them, and
its second beside the output's. Chroma's names are the same. A name's place is given by rows of the
fused tensor; `into_bfl` and `from_bfl` are each other's inverse, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

# diffusers' name in a block -> BFL's, and which of the fused parts it is; None is the whole.
_QKV = ("q", "k", "v")
_DOUBLE: dict[str, tuple[str, int | None]] = {
    **{f"attn.to_{part}": ("img_attn.qkv", i) for i, part in enumerate(_QKV)},
    **{f"attn.add_{part}_proj": ("txt_attn.qkv", i) for i, part in enumerate(_QKV)},
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
}
_SINGLE: dict[str, tuple[str, int | None]] = {
    **{f"attn.to_{part}": ("linear1", i) for i, part in enumerate(_QKV)},
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "attn.norm_q": ("norm.query_norm", None),
    "attn.norm_k": ("norm.key_norm", None),
}
_STACKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_NAME = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)\.(weight|bias)")


class Place(NamedTuple):
    """Where a tensor is in BFL's layout.

    Attributes:
        key: BFL's name: "double_blocks.0.img_attn.qkv.weight".
        start: its first row there.
        stop: the row after its last; None is the end.
    """

    key: str
    start: int = 0
    stop: int | None = None

    @property
    def rows(self) -> slice:
        """Of the tensor of BFL's layout."""
        return slice(self.start, self.stop)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of that tensor."""
        return self.start == 0 and self.stop is None


def place_in_bfl(name: str, channels: int) -> Place | None:
    """The place of a tensor of diffusers' FLUX; None where the map does not have it.

    Args:
        name: diffusers', "transformer_blocks.0.attn.to_q.weight": of query, key, value, output and
            norms of both streams, and of a single block's feed-forward.
        channels: of the model, 3072 for FLUX.1.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stack, number, inside, kind = match.groups()
    bfl_stack, names = _STACKS[stack]
    if inside not in names:
        return None
    bfl, part = names[inside]
    key = f"{bfl_stack}.{number}.{bfl}.{'scale' if 'norm' in bfl else kind}"
    if part is None:
        return Place(key)
    return Place(key, part * channels, (part + 1) * channels if part < 3 else None)


def into_bfl(
    tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], channels: int
) -> dict[str, torch.Tensor]:
    """Tensors in BFL's layout with diffusers' in their places; what they leave is the base's.

    Args:
        tensors: by diffusers' names.
        base: by BFL's names, at least those that are touched; left alone.
        channels: of the model.

    Returns:
        The touched tensors, by BFL's names, each in its base's dtype and place.

    Raises:
        ValueError: a name the map does not have, or a shape that is not its place's.
    """
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place = place_in_bfl(name, channels)
        if place is None or place.key not in base:
            raise ValueError(f"into_bfl: BFL's layout of this model has no place for {name!r}.")
        whole = fused.setdefault(place.key, base[place.key].clone())
        if whole[place.rows].shape != tensor.shape:
            raise ValueError(
                f"into_bfl: {name} has shape {tuple(tensor.shape)}, its place in {place.key} "
                f"{tuple(whole[place.rows].shape)}."
            )
        whole[place.rows] = tensor
    return fused


def from_bfl(
    state: Mapping[str, torch.Tensor], names: Iterable[str], channels: int
) -> dict[str, torch.Tensor]:
    """Tensors of diffusers' names out of BFL's layout: views.

    Args:
        state: by BFL's names.
        names: diffusers'.
        channels: of the model.

    Raises:
        ValueError: a name the map, or the state, does not have.
    """
    found = {}
    for name in names:
        place = place_in_bfl(name, channels)
        if place is None or place.key not in state:
            raise ValueError(f"from_bfl: BFL's layout of this model has no place for {name!r}.")
        found[name] = state[place.key][place.rows]
    return found
