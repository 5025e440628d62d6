"""apply_clear and remove_clear: CLEAR on a whole model, one processor per layer, and back.

What has to be remembered lives in one forward pre-hook on the transformer. It is PyTorch's own kind
of hook and not diffusers' `ModelHook`, which replaces `module.forward`: a copy of a model hooked
that way runs the original's weights, and removing the hook also drops what accelerate wrapped
around `forward` later.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .compat import names_from
from .grid import Layout, WindowTracker, layout_from_ids, unrounded_ids
from .kernels.attention import select_impl
from .processor import CLEARProcessor, FluxAttnProcessor

FluxIPAdapterAttnProcessor, FluxTransformer2DModel = names_from(
    "diffusers.models.transformers.transformer_flux",
    "FluxIPAdapterAttnProcessor",
    "FluxTransformer2DModel",
)

logger = logging.getLogger(__name__)

SUPPORTED = (FluxTransformer2DModel,)


def apply_clear(
    pipe_or_model: Any,
    radius: int = 16,
    down_factor: int = 1,
    weights: str | os.PathLike[str] | None = None,
    impl: str = "auto",
    proportional_base: int | None = None,
) -> None:
    """Replace the attention of every layer of a FLUX transformer by CLEAR's local attention.

    A second call replaces the settings; `remove_clear` still goes back to what was there before the
    first. Nothing is changed if anything is refused.

    Args:
        pipe_or_model: a pipeline with a FLUX transformer, or the transformer itself.
        radius: of the disc an image token attends to, in tokens.
        down_factor: side of a pooling cell, in tokens; 1 is the variant without pooled keys.
        weights: fine-tuned weights for these settings, a path or a hub repository: see
            `load_clear_weights`. None leaves the model's weights as they are.
        impl: one of `auto, triton, flex, tiled, reference`.
        proportional_base: see `CLEARProcessor`.

    Raises:
        ValueError: an unsupported model, a setting out of its range, weights that do not fit.
        OSError: the weights cannot be found.
    """
    settings = CLEARProcessor(
        radius=radius, down_factor=down_factor, impl=impl, proportional_base=proportional_base
    )
    model = transformer_of(pipe_or_model, "apply_clear")
    if weights is None:
        install(model, settings, "apply_clear")
        return
    from .weights import find_weights, load_checked, open_checked

    path = find_weights(weights, settings.radius, settings.down_factor)
    with open_checked(model, path, settings) as file:
        install(model, settings, "apply_clear")
        load_checked(model, file)


def remove_clear(pipe_or_model: Any) -> bool:
    """Put the processors back that were there before CLEAR, and the weights bit for bit.

    Layers whose processor somebody else replaced since are left alone.

    Args:
        pipe_or_model: what `apply_clear` or `set_attn_processor` was called on.

    Returns:
        Whether there was anything to remove.
    """
    model = transformer_of(pipe_or_model, "remove_clear")
    state = ClearState.on(model)
    if state is not None:
        state.restore_weights(model)
        state.detach()
    removed = state is not None
    for name, attn in attention_layers(model).items():
        if isinstance(attn.processor, CLEARProcessor):
            original = state.processors.get(name) if state is not None else None
            attn.set_processor(original if original is not None else FluxAttnProcessor())
            removed = True
    logger.info("CLEAR %s", "removed" if removed else "was not applied: nothing to remove")
    return removed


def transformer_of(pipe_or_model: Any, who: str) -> nn.Module:
    """The transformer of a pipeline, or the model itself, without torch.compile's wrapper.

    Raises:
        ValueError: the class is not supported.
    """
    model = getattr(pipe_or_model, "transformer", pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, SUPPORTED):
        raise ValueError(
            f"{who}: supported models are {', '.join(cls.__name__ for cls in SUPPORTED)} and "
            f"pipelines with one; got {type(model).__name__}."
        )
    return model


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The attention modules of a FLUX transformer by name, such as "transformer_blocks.0.attn"."""
    return {
        f"{stack}.{index}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(model, stack))
    }


def install(model: nn.Module, settings: CLEARProcessor, who: str) -> None:
    """Give every layer a processor of its own with these settings, sharing one tracker.

    Pooling weights the model already has stay, where the new down_factor equals the old.
    """
    layers = attention_layers(model)
    adapters = [n for n, a in layers.items() if isinstance(a.processor, FluxIPAdapterAttnProcessor)]
    if adapters:
        raise ValueError(
            f"{who}: IP-adapters are not supported yet, and {len(adapters)} layers have one "
            f"(first: {adapters[0]}). Call unload_ip_adapter() first."
        )
    state = ClearState.on(model) or ClearState.attach(model)
    tracker = WindowTracker(settings.radius, settings.down_factor)
    for name, attn in layers.items():
        old = attn.processor
        if not isinstance(old, CLEARProcessor):
            state.processors[name] = old
        new = CLEARProcessor(**settings.settings)
        new.tracker = tracker
        if new.spatial_weight is not None:
            like = attn.norm_q.weight  # on the meta device under sequential offloading
            new.to(device=None if like.is_meta else like.device, dtype=like.dtype)
            trained = getattr(old, "spatial_weight", None)
            if trained is not None and trained.shape == new.spatial_weight.shape:
                new.spatial_weight.data.copy_(trained.data)
        attn.set_processor(new)
        state.installed[name] = new
    state.tracker = tracker
    logger.info("CLEAR applied to %d attention layers: %s", len(layers), settings.extra_repr())


class ClearState:
    """What CLEAR remembers about one model; as a forward pre-hook it also reads the position ids.

    Attributes:
        tracker: shared by the processors of all layers; None while only weights were loaded.
        processors: those that were there before CLEAR, by layer name.
        installed: those of CLEAR, by layer name.
        weights: parameters as they were before CLEAR weights were loaded, on the CPU, by name.
    """

    def __init__(self) -> None:
        self.tracker: WindowTracker | None = None
        self.processors: dict[str, Any] = {}
        self.installed: dict[str, CLEARProcessor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self._handle: RemovableHandle | None = None
        self._warned = False

    @classmethod
    def on(cls, model: nn.Module) -> ClearState | None:
        """The state of a model, None if it has none."""
        return next((hook for hook in model._forward_pre_hooks.values() if type(hook) is cls), None)

    @classmethod
    def attach(cls, model: nn.Module) -> ClearState:
        """A new state on a model that has none."""
        state = cls()
        state._handle = model.register_forward_pre_hook(state, with_kwargs=True)
        return state

    def detach(self) -> None:
        """Stop being the model's hook."""
        if self._handle is not None:
            self._handle.remove()

    def restore_weights(self, model: nn.Module) -> None:
        """Copy the saved parameters back."""
        from .weight_format import parameters_by_key, refuse_unsuitable

        if self.weights:
            refuse_unsuitable(model, "remove_clear")
        parameters = parameters_by_key(model)
        with torch.no_grad():
            for key, original in self.weights.items():
                parameters[key].copy_(original)
        self.weights.clear()

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.tracker is None:
            return None
        return self._before_forward(model, args, kwargs)

    @torch.compiler.disable
    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._check_layers(model):
            return None
        assert self.tracker is not None
        signature = inspect.signature(type(model).forward)
        given = signature.bind_partial(model, *args, **kwargs).arguments
        img_ids, txt_ids = given.get("img_ids"), given.get("txt_ids")
        if img_ids is None or txt_ids is None:
            return None  # the model itself complains
        grid = next(iter(self.installed.values())).grid
        if grid is None:
            layout, source = layout_from_ids(txt_ids, img_ids), "img_ids"
        else:
            layout, source = Layout(txt_ids.shape[-2], *grid), "the given grid"
        expected, received = layout.rows * layout.columns, given["hidden_states"].shape[1]
        if received != expected:
            raise ValueError(
                f"CLEAR: {source} means {layout.rows} x {layout.columns} = {expected} image "
                f"tokens, but hidden_states has {received}. Are height and width those of these "
                "latents?"
            )
        self.tracker.announce(layout, self._chosen_impl(given["hidden_states"]))
        exact = unrounded_ids(img_ids, layout)
        return None if exact is None else (args, kwargs | {"img_ids": exact})

    def _chosen_impl(self, hidden_states: torch.Tensor) -> str:
        """The implementation that will run, also chosen (and logged) here for compiled blocks."""
        impl = next(iter(self.installed.values())).impl
        if impl != "auto":
            return impl
        query = hidden_states.new_empty(1, 1, 1, 64)
        return select_impl(impl, query, needs_grad=torch.is_grad_enabled())

    def _check_layers(self, model: nn.Module) -> bool:
        """Whether CLEAR still runs in the model; repairs or reports what was done to its layers.

        Loading or unloading an IP-adapter re-creates the single blocks' processors as
        `processor.__class__()`, which loses their settings: a default CLEARProcessor of its own
        there is taken for one of those, unless the double blocks have such ones too.
        """
        layers = attention_layers(model)
        uses = Counter(id(attn.processor) for attn in layers.values())
        others, recreated = {}, {}
        for name, attn in layers.items():
            current = attn.processor
            if current is self.installed[name]:
                continue
            others[name] = current
            if type(current) is CLEARProcessor and _is_default(current) and uses[id(current)] == 1:
                recreated[name] = attn
        if recreated and all(name.startswith("single_") for name in recreated):
            for name, attn in recreated.items():
                attn.set_processor(self.installed[name])
                del others[name]
            logger.info("CLEAR settings restored in %d re-created processors", len(recreated))
        if 0 < len(others) < len(layers) and not self._warned:
            self._warned = True
            name, current = next(iter(others.items()))
            logger.warning(
                "%d of %d attention layers no longer have the CLEAR processor that apply_clear put "
                "there (%s has %s)",
                len(others),
                len(layers),
                name,
                type(current).__name__,
            )
        return len(others) < len(layers)


def _is_default(processor: CLEARProcessor) -> bool:
    return processor.settings == CLEARProcessor().settings
