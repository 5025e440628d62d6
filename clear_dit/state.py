"""What CLEAR remembers about a model it was applied to.

It lives in one forward pre-hook on the model. That is PyTorch's own kind of hook and not diffusers'
`ModelHook`, which replaces `module.forward`: a copy of a model hooked that way runs the original's
weights, and removing the hook also drops what accelerate wrapped around `forward` later.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .grid import Layout, layout_from_ids, unrounded_ids
from .ip_adapter import FluxIPAdapterAttnProcessor, LayerProcessor
from .kernels.attention import select_impl
from .processor import FluxAttnProcessor
from .tracker import WindowTracker

logger = logging.getLogger(__name__)


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The attention modules of a FLUX model by name, such as "transformer_blocks.0.attn"."""
    return {
        f"{stack}.{index}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(model, stack))
    }


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
        self.installed: dict[str, LayerProcessor] = {}
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
        # First of all hooks: others may take a part of the tokens away (patch parallelism).
        state._handle = model.register_forward_pre_hook(state, with_kwargs=True, prepend=True)
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

    def reconcile(self, model: nn.Module) -> None:
        """Follow diffusers where it loaded or unloaded an IP-adapter since CLEAR was applied.

        Loading gives the double blocks stock processors that hold the IP-adapter; both loading and
        unloading make CLEAR's processors again without their settings. Where no layer has one of
        CLEAR's any more, that was somebody's choice, and is left alone.
        """
        layers = attention_layers(model)
        ours = any(isinstance(attn.processor, LayerProcessor) for attn in layers.values())
        if not (self.installed and ours):
            return
        for name, attn in layers.items():
            current, installed = attn.processor, self.installed[name]
            if isinstance(current, FluxIPAdapterAttnProcessor):
                self._install_again(name, attn, current)
            elif isinstance(current, LayerProcessor) and current.blank:
                if installed.adapter is None:
                    attn.set_processor(installed)
                else:
                    self._install_again(name, attn, None)

    def _install_again(self, name: str, attn: Any, adapter: Any) -> None:
        """The layer's processor with another IP-adapter, or with none."""
        old = self.installed[name]
        new = LayerProcessor(old, self.tracker, adapter)
        new.spatial_weight = old.spatial_weight
        attn.set_processor(new)
        self.installed[name] = new
        self.processors[name] = FluxAttnProcessor() if adapter is None else adapter

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
        self.reconcile(model)
        if not self._runs(model):
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
        if getattr(model, "union", False):  # such a ControlNet puts a token for its mode first
            layout = layout._replace(text_length=layout.text_length + 1)
        expected = layout.image_length + layout.reference_length
        received = given["hidden_states"].shape[1]
        if received != expected:
            raise ValueError(
                f"CLEAR: {source} means {layout.rows} x {layout.columns} = {layout.image_length} "
                f"image tokens{layout.and_references}, but hidden_states has {received}. Are "
                "height and width those of these latents?"
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

    def _runs(self, model: nn.Module) -> bool:
        """Whether CLEAR still runs in the model; reports layers that somebody else took over."""
        layers = attention_layers(model)
        others = {
            name: attn.processor
            for name, attn in layers.items()
            if attn.processor is not self.installed[name]
        }
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
