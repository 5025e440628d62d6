"""What is learned of pooled keys, a layer's own: where it is made, and in which dtype and place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.processor import LEARNED, CLEARProcessor
from ..families.table import attention_layers, heads_of


def settle(model: Any, attn: Any, old: Any = None) -> None:
    """What a layer's new processor learns goes where the layer's weights are.

    Args:
        model: of diffusers, whose `dtype` is what its layers compute in, however weights are
            stored: quantised, or cast for each call (`enable_layerwise_casting`).
        attn: one of its layers, with a new processor of CLEAR's.
        old: its processor before, whose values it takes where the shapes are the same.

    Raises:
        ValueError: those values are sharded.
    """
    own = (module for module in attn.children() if module is not attn.processor)
    # Some quantised layers have buffers alone, and what FSDP flattens has nothing.
    tensors = (tensor for part in own for tensor in (*part.parameters(), *part.buffers()))
    device = next((tensor.device for tensor in tensors), model.device)
    if device.type == "meta":  # under sequential offloading
        device = None
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    for name in LEARNED:
        weight, trained = getattr(attn.processor, name), getattr(old, name, None)
        if weight is None:
            continue
        if trained is not None and not _is_whole(trained, weight.ndim):
            raise ValueError(
                f"CLEAR: {name} of the layers is sharded ({type(trained.data).__name__} of shape "
                f"{tuple(trained.shape)}), and would be lost; do this on the plain model, before."
            )
        weight.data = weight.data.to(device=device, dtype=dtype)
        if trained is not None and trained.shape == weight.shape:
            weight.data.copy_(trained.data)


def _is_whole(parameter: torch.Tensor, dimensions: int) -> bool:
    """Whether it is all there: FSDP flattens its parts, or has DTensors or views in their place."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    return plain and parameter.ndim == dimensions


def give_learned(name: str, attn: Any, learned: dict[str, torch.Tensor], old: Any) -> None:
    """Give a layer's new processor, which has far keys, what is known to be learned of them.

    Args:
        name: of the layer.
        attn: the layer.
        learned: what the loaded weights hold of it, by its name in a file; empty where nothing.
        old: its processor before: what it has counts, it may have been trained further.
    """
    prefix = f"{name}.processor."
    if getattr(old, "far_weight", None) is not None:
        attn.processor.add_far_parameters(heads_of(attn))
    elif f"{prefix}far_weight" in learned:
        attn.processor.add_far_parameters(heads_of(attn))
        for kind in ("far_weight", "far_offset"):
            getattr(attn.processor, kind).data.copy_(learned[prefix + kind])


def make_far_trainable(model: nn.Module) -> None:
    """Let every layer learn how its far keys are pooled, and what is added to their scores.

    Its processor gets the parameters `far_weight` and `far_offset`, which at first change nothing;
    where it has them, from a file, they stay. They are saved with the model's CLEAR weights.

    Args:
        model: a family's transformer, whose layers have far keys.

    Raises:
        ValueError: a layer has no far keys, or layers share one processor.
    """
    layers = attention_layers(model)
    for name, attn in layers.items():
        processor = attn.processor
        if not isinstance(processor, CLEARProcessor) or not processor.has_far_keys:
            raise ValueError(
                f"make_far_trainable: {name} has no far keys; call apply_clear(..., far=True)."
            )
    refuse_shared(model, "make_far_trainable: to learn of far keys")
    for attn in layers.values():
        if attn.processor.far_weight is None:
            attn.processor.add_far_parameters(heads_of(attn))
            settle(model, attn)


def refuse_shared(model: nn.Module, who: str) -> None:
    """Refuse layers that share a processor, where each needs parameters of its own.

    Raises:
        ValueError: they do.
    """
    processors = [attn.processor for attn in attention_layers(model).values()]
    if len({id(processor) for processor in processors}) < len(processors):
        raise ValueError(
            f"{who} each layer needs a CLEARProcessor of its own, but they share one; call "
            "apply_clear."
        )
