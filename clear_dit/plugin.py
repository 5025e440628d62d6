"""apply_clear and remove_clear: CLEAR on whole models, one processor per layer, and back."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from .chunking import chunk_feed_forward, is_chunked
from .compat import names_from
from .ip_adapter import FluxIPAdapterAttnProcessor, LayerProcessor
from .processor import CLEARProcessor, FluxAttnProcessor
from .state import ClearState, attention_layers
from .tracker import WindowTracker

(FluxTransformer2DModel,) = names_from(
    "diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel"
)
FluxControlNetModel, FluxMultiControlNetModel = names_from(
    "diffusers.models.controlnets.controlnet_flux",
    "FluxControlNetModel",
    "FluxMultiControlNetModel",
)

logger = logging.getLogger(__name__)

TRANSFORMERS = (FluxTransformer2DModel,)
MODELS = (FluxTransformer2DModel, FluxControlNetModel)


def apply_clear(
    pipe_or_model: Any,
    radius: int = 16,
    down_factor: int = 1,
    weights: str | os.PathLike[str] | None = None,
    impl: str = "auto",
    proportional_base: int | None = None,
) -> None:
    """Replace the attention of every layer of a FLUX model by CLEAR's local attention.

    A pipeline's ControlNets are included: they attend over the whole picture too. In large pictures
    feed-forward layers run chunk by chunk, which takes less memory (`chunk_feed_forward`). A second
    call replaces the settings; `remove_clear` still goes back to what was there before the first.
    Nothing is changed if anything is refused.

    Args:
        pipe_or_model: a pipeline with a FLUX transformer, the transformer itself, or a ControlNet.
        radius: of the disc an image token attends to, in tokens.
        down_factor: side of a pooling cell, in tokens; 1 is the variant without pooled keys.
        weights: fine-tuned weights for these settings, a path or a hub repository: see
            `load_clear_weights`. They are the transformer's; a ControlNet keeps its own. None
            leaves the model's weights as they are.
        impl: one of `auto, triton, flex, tiled, reference`.
        proportional_base: see `CLEARProcessor`.

    Raises:
        ValueError: an unsupported model, a setting out of its range, weights that do not fit.
        OSError: the weights cannot be found.
    """
    settings = CLEARProcessor(
        radius=radius, down_factor=down_factor, impl=impl, proportional_base=proportional_base
    )
    models = models_of(pipe_or_model, "apply_clear")
    if weights is None:
        for model in models:
            install(model, settings)
        return
    from .weights import find_weights, load_checked, open_checked

    transformer = transformer_of(pipe_or_model, "apply_clear(weights=...)")
    path = find_weights(weights, settings.radius, settings.down_factor)
    with open_checked(transformer, path, settings) as file:
        for model in models:
            install(model, settings)
        load_checked(transformer, file)


def remove_clear(pipe_or_model: Any) -> bool:
    """Put the processors back that were there before CLEAR, and the weights bit for bit.

    Layers whose processor somebody else replaced since are left alone. IP-adapters that were loaded
    or unloaded since stay so.

    Args:
        pipe_or_model: what `apply_clear` or `set_attn_processor` was called on.

    Returns:
        Whether there was anything to remove.
    """
    removed = [_remove(model) for model in models_of(pipe_or_model, "remove_clear")]
    logger.info("CLEAR %s", "removed" if any(removed) else "was not applied: nothing to remove")
    return any(removed)


def _remove(model: nn.Module) -> bool:
    state = ClearState.on(model)
    if state is not None:
        state.reconcile(model)
        state.restore_weights(model)
        state.detach()
        chunk_feed_forward(model, None)
    removed = state is not None
    for name, attn in attention_layers(model).items():
        if isinstance(attn.processor, CLEARProcessor):
            original = state.processors.get(name) if state is not None else None
            attn.set_processor(original if original is not None else FluxAttnProcessor())
            removed = True
    return removed


def transformer_of(pipe_or_model: Any, who: str) -> nn.Module:
    """The transformer of a pipeline, or the model itself, without torch.compile's wrapper.

    Raises:
        ValueError: the class is not supported.
    """
    model = getattr(pipe_or_model, "transformer", pipe_or_model)
    return _supported(model, TRANSFORMERS, who)


def models_of(pipe_or_model: Any, who: str) -> list[nn.Module]:
    """A pipeline's transformer and its ControlNets, or the model itself; as `transformer_of`."""
    found = []
    if hasattr(pipe_or_model, "transformer"):
        found.append(transformer_of(pipe_or_model, who))
        pipe_or_model = getattr(pipe_or_model, "controlnet", None)
    if isinstance(pipe_or_model, FluxMultiControlNetModel):
        found += [_supported(net, MODELS, who) for net in pipe_or_model.nets]
    elif pipe_or_model is not None:
        found.append(_supported(pipe_or_model, MODELS, who))
    return found


def _supported(model: Any, classes: tuple[type[nn.Module], ...], who: str) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, classes):
        raise ValueError(
            f"{who}: supported models are {' and '.join(cls.__name__ for cls in classes)}, alone "
            f"or in a pipeline; got {type(model).__name__}."
        )
    return model


def install(model: nn.Module, settings: CLEARProcessor) -> None:
    """Give every layer a processor of its own with these settings, sharing one tracker.

    Pooling weights the model already has stay, where the new down_factor equals the old.
    """
    state = ClearState.on(model) or ClearState.attach(model)
    state.reconcile(model)
    state.tracker = WindowTracker(settings.radius, settings.down_factor)
    layers = attention_layers(model)
    for name, attn in layers.items():
        old = attn.processor
        if not isinstance(old, CLEARProcessor):
            state.processors[name] = old
        has_adapter = isinstance(old, FluxIPAdapterAttnProcessor)
        adapter = old if has_adapter else getattr(old, "adapter", None)
        new = LayerProcessor(settings, state.tracker, adapter)
        if new.spatial_weight is not None:
            like = attn.norm_q.weight  # on the meta device under sequential offloading
            weight = new.spatial_weight
            weight.data = weight.data.to(
                device=None if like.is_meta else like.device, dtype=like.dtype
            )
            trained = getattr(old, "spatial_weight", None)
            if trained is not None and trained.shape == weight.shape:
                weight.data.copy_(trained.data)
        attn.set_processor(new)
        state.installed[name] = new
    if not is_chunked(model):
        chunk_feed_forward(model)
    logger.info("CLEAR applied to %d attention layers: %s", len(layers), settings.extra_repr())
