"""The format of CLEAR weights: which parameters they are, and what a file must hold.

It is that of the published checkpoints (https://huggingface.co/Huage001/CLEAR): safetensors with
the transformer's own names, "transformer_blocks.0.attn.to_q.weight", and with a down_factor also
"transformer_blocks.0.attn.processor.spatial_weight". Files for far keys say so in their metadata
and may hold "....processor.far_weight" and ".far_offset"; the published ones say nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..attention.processor import LEARNED, CLEARProcessor
from ..families.table import attention_layers, family_of, heads_of
from ..kernels.cells import FAR_LEVELS

logger: logging.Logger = logging.getLogger(__name__)

# By the names that safetensors has for them.
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def parameters_by_key(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters CLEAR weights replace, by their name in a file; under a LoRA, the base."""
    parameters = {}
    family = family_of(model)
    for name, attn in family.layers(model).items():
        for projection in family.tuned_names(attn):
            linear = _without_lora(attn.get_submodule(projection))
            for kind in ("weight", "bias"):
                if getattr(linear, kind, None) is not None:
                    parameters[f"{name}.{projection}.{kind}"] = getattr(linear, kind)
    return parameters


def pooling_by_key(model: nn.Module) -> dict[str, nn.Parameter]:
    """What CLEAR's own processors have learned of pooled keys, by its name in a file."""
    return {
        f"{name}.processor.{learned}": getattr(attn.processor, learned)
        for name, attn in attention_layers(model).items()
        for learned in LEARNED
        if getattr(attn.processor, learned, None) is not None
    }


def pooling_shapes(model: nn.Module, down_factor: int, far: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of what may be learned of pooled keys, by its name in a file.

    Args:
        down_factor: side of a pooling cell, in tokens.
        far: whether there are far keys.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, attn in attention_layers(model).items():
        if down_factor > 1:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)
            shapes[f"{name}.processor.spatial_weight"] = shape
        if far:
            shapes[f"{name}.processor.far_weight"] = (FAR_LEVELS, 2, 2)
            shapes[f"{name}.processor.far_offset"] = (FAR_LEVELS, heads_of(attn))
    return shapes


def keys_of_far(file: Any) -> list[str]:
    """Names of what a safetensors file holds that is learned of far keys."""
    learned = (".processor.far_weight", ".processor.far_offset")
    return [key for key in list(file.keys()) if key.endswith(learned)]


def learned_of_far(file: Any) -> bool:
    """Whether a safetensors file holds what is learned of far keys."""
    return bool(keys_of_far(file))


def made_for_far(file: Any) -> bool:
    """Whether a safetensors file of CLEAR weights was made for far keys."""
    return learned_of_far(file) or (file.metadata() or {}).get("far") == "true"


def _without_lora(module: nn.Module) -> nn.Module:
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def refuse_unsuitable(model: nn.Module, who: str, merged_lora: bool = False) -> None:
    """Refuse models whose projections cannot be read and written as they are.

    Args:
        merged_lora: whether a LoRA may be merged into them.

    Raises:
        ValueError: fused projections, merged LoRA, quantised, sharded or absent parameters.
    """
    family = family_of(model)
    for name, attn in family.layers(model).items():
        if family.is_fused(attn):
            raise ValueError(
                f"{who}: {name} has fused projections; call unfuse_qkv_projections() first."
            )
        for projection in family.tuned_names(attn):
            if not merged_lora and getattr(attn.get_submodule(projection), "merged", False):
                raise ValueError(
                    f"{who}: a LoRA is merged into {name}.{projection}; call unfuse_lora() first."
                )
            linear = _without_lora(attn.get_submodule(projection))
            weight = getattr(linear, "weight", None)
            if weight is None:
                raise _quantised(who, f"{name}.{projection}", type(linear), "without a weight")
            if weight.ndim != 2:  # FSDP's part of it
                key = f"{name}.{projection}.weight"
                raise _quantised(who, key, type(weight), f"of shape {tuple(weight.shape)}")
    for key, parameter in parameters_by_key(model).items():
        if parameter.is_meta:
            raise ValueError(
                f"{who}: {key} has no values here (meta device or sequential offloading); do this "
                "before offloading is enabled."
            )
        plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        if not plain or not parameter.is_floating_point():
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter)
            raise _quantised(who, key, kind, str(parameter.dtype))


def _quantised(who: str, what: str, kind: type, detail: str) -> ValueError:
    return ValueError(
        f"{who}: {what} is quantised or sharded ({kind.__name__}, {detail}); do this on the plain "
        "model, before."
    )


def check_header(
    who: str, file: Any, shapes: dict[str, tuple[int, ...]], settings: CLEARProcessor
) -> None:
    """Names, shapes, dtypes and metadata, which need no tensor to be read."""
    keys = set(file.keys())
    pooled = next((key for key in sorted(keys) if key.endswith(".processor.spatial_weight")), None)
    factor = 1 if pooled is None else (*file.get_slice(pooled).get_shape(), 0, 0, 0, 0)[3]
    if factor != settings.down_factor and not keys.isdisjoint(shapes):
        raise ValueError(
            f"{who} is for down_factor={factor}, but the model runs "
            f"down_factor={settings.down_factor}; call apply_clear(..., down_factor={factor}) or "
            "choose another file."
        )
    missing, unexpected = shapes.keys() - keys, keys - shapes.keys()
    if missing or unexpected:
        raise ValueError(
            f"{who} holds weights for another model: {listed(missing)} missing, "
            f"{listed(unexpected)} unexpected."
        )
    wrong = {key for key in keys if tuple(file.get_slice(key).get_shape()) != shapes[key]}
    if wrong:
        key = min(wrong)
        raise ValueError(
            f"{who} holds weights for another model: {len(wrong)} of {len(keys)} tensors have "
            f"another shape ({key} has {tuple(file.get_slice(key).get_shape())}, the model "
            f"{shapes[key]})."
        )
    for key in sorted(keys):
        dtype = file.get_slice(key).get_dtype()
        if dtype not in FILE_DTYPES:
            raise ValueError(
                f"{who}: {key} must have one of the dtypes {', '.join(FILE_DTYPES)}, got {dtype}."
            )
    header = file.metadata() or {}
    for name in ("radius", "down_factor"):
        if name in header and not header[name].isdecimal():
            raise ValueError(f"{who}: the metadata's {name} is not a number: {header[name]!r}.")
    if header.get("down_factor", str(factor)) != str(factor):
        raise ValueError(
            f"{who}: the metadata says down_factor={header['down_factor']}, the tensors {factor}."
        )
    if header.get("far", "true") not in ("true", "false"):
        raise ValueError(f"{who}: the metadata's far is not true or false: {header['far']!r}.")
    if learned_of_far(file) and header.get("far") == "false":
        raise ValueError(f"{who}: the metadata says far=false, but there are tensors of far keys.")
    if header.get("far") == "true" and factor > 1:
        raise ValueError(f"{who}: the metadata says far=true, but it is for down_factor={factor}.")
    weight = header.get("pooled_weight", "one")
    if factor > 1 and weight != settings.pooled_weight:
        logger.warning(
            "%s was trained with pooled_weight=%r, the model runs pooled_weight=%r",
            who,
            weight,
            settings.pooled_weight,
        )
    if header.get("radius", str(settings.radius)) != str(settings.radii):
        logger.warning(
            "%s was trained with radius=%s, the model runs radius=%s",
            who,
            header.get("radius", settings.radius),
            settings.radii,
        )


def listed(keys: Collection[str]) -> str:
    """How many, and the first three."""
    if not keys:
        return "0 tensors"
    first = ", ".join(sorted(keys)[:3])
    return f"{len(keys)} tensors ({first}{', ...' if len(keys) > 3 else ''})"
