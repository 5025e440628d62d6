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

from ..attention.ip_adapter import FluxIPAdapterAttnProcessor, LayerProcessor
from ..attention.processor import LEARNED, CLEARProcessor, FluxAttnProcessor
from ..attention.text_padding import valid_text
from ..attention.tracker import WindowTracker
from ..families.table import attention_layers, family_of, head_dim_of
from ..kernels.choice import select_impl
from ..kernels.triton.device import kernels_of
from .originals import Originals
from .saved import marked

logger = logging.getLogger(__name__)

# What runs is not what the weights were made for.
FAR_WITH_LOCAL_WEIGHTS = (
    "far=True, but the CLEAR weights that are loaded were made for local attention: on the demo, "
    "r=4, 32 prompts, images are then 20.4 dB from full attention's, with the model's own weights "
    "27.9 dB. Leave out far, and they run as they were made; or run far keys without weights."
)
LOCAL_WITH_FAR_WEIGHTS = (
    "far=False, down_factor or a radius of 1 leaves far keys out, but the CLEAR weights that are "
    "loaded were made for them: on the demo, r=4, 32 prompts, images are then 17.8 dB from full "
    "attention's, with far keys 31.7 dB. Leave these settings out, and they run as they were made."
)
WITHOUT_LEARNED = (
    "the CLEAR weights that are loaded learned how far keys are pooled, but the processors set "
    "since then do not know; call apply_clear instead of set_attn_processor."
)


class ClearState:
    """What CLEAR remembers about one model; as a forward pre-hook it also reads the forward.

    Attributes:
        tracker: shared by the processors of all layers; None while only weights were loaded.
        processors: those that were there before CLEAR, by layer name.
        installed: those of CLEAR, by layer name.
        originals: parameters as they were before CLEAR weights were loaded.
        weights_far: whether those CLEAR weights were made for far keys; None where there are none.
        learned: what they learned of far keys, on the CPU, by its name in a file.
    """

    def __init__(self) -> None:
        self.tracker: WindowTracker | None = None
        self.processors: dict[str, Any] = {}
        self.installed: dict[str, CLEARProcessor] = {}
        self.originals = Originals()
        self.weights_far: bool | None = None
        self.learned: dict[str, torch.Tensor] = {}
        self._handle: RemovableHandle | None = None
        self._warned = False
        self._said_of_far: str | None = None

    @classmethod
    def on(cls, model: nn.Module) -> ClearState | None:
        """The state of a model, None if it has none."""
        return next((hook for hook in model._forward_pre_hooks.values() if type(hook) is cls), None)

    @classmethod
    def attach(cls, model: nn.Module) -> ClearState:
        """A new state on a model that has none."""
        state = cls()
        entry = marked(model)
        if entry is not None:  # it came with CLEAR weights
            state.originals, state.weights_far = originals_of(model), entry["far"]
        # First of all hooks: others may take a part of the tokens away (patch parallelism).
        state._handle = model.register_forward_pre_hook(state, with_kwargs=True, prepend=True)
        return state

    def detach(self) -> None:
        """Stop being the model's hook."""
        if self._handle is not None:
            self._handle.remove()

    def restore_weights(self, model: nn.Module) -> None:
        """Put the original parameters back; see `Originals.put_back`."""
        self.originals.put_back(model, "remove_clear")
        self.learned.clear()
        self.weights_far = None

    @torch.compiler.disable
    def decide_far(self, model: nn.Module) -> None:
        """Tell the processors there are whether the loaded weights were made for far keys.

        Warns, once, where what runs is not what those were made for.
        """
        layers = attention_layers(model)
        for attn in layers.values():
            if isinstance(attn.processor, CLEARProcessor):
                attn.processor.decide_far(self.weights_far)
        first, message = next(iter(layers.values())).processor, None
        if self.weights_far is not None and isinstance(first, CLEARProcessor):
            if first.has_far_keys != self.weights_far:
                message = LOCAL_WITH_FAR_WEIGHTS if self.weights_far else FAR_WITH_LOCAL_WEIGHTS
            elif self.learned and first.far_weight is None:
                message = WITHOUT_LEARNED
        if message not in (None, self._said_of_far):
            logger.warning(message)
        self._said_of_far = message

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
                if getattr(installed, "adapter", None) is None:
                    attn.set_processor(installed)
                else:
                    self._install_again(name, attn, None)

    def _install_again(self, name: str, attn: Any, adapter: Any) -> None:
        """The layer's processor with another IP-adapter, or with none."""
        old = self.installed[name]
        new = LayerProcessor(old, self.tracker, adapter)
        for learned in LEARNED:
            setattr(new, learned, getattr(old, learned))
        attn.set_processor(new)
        self.installed[name] = new
        self.processors[name] = FluxAttnProcessor() if adapter is None else adapter

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.decide_far(model)  # processors set since then were not told
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
        settings, family = next(iter(self.installed.values())), family_of(model)
        reading = family.read(model, given, settings.grid)
        if reading is None:
            return None
        layout = reading.layout
        if settings.references == "local" and family.reference_grids and layout.reference_length:
            grids = family.reference_grids(given, layout)
            layout = layout._replace(local_references=grids)
        impl = self._chosen_impl(model, reading.like)
        self.tracker.announce(layout, impl, valid_text(reading.text_mask))
        if not reading.changes:
            return None
        bound = signature.bind(model, *args, **kwargs)
        bound.arguments.update(reading.changes)
        return bound.args[1:], bound.kwargs

    def _chosen_impl(self, model: nn.Module, like: torch.Tensor) -> str:
        """The implementation that will run, also chosen (and logged) here for compiled blocks.

        like: a tensor of the device and dtype the layers run in.
        """
        impl = next(iter(self.installed.values())).impl
        if impl != "auto":
            return impl
        assert self.tracker is not None
        query = like.new_empty(1, 1, 1, head_dim_of(model))
        needs_grad = torch.is_grad_enabled()
        far, pooled = self.tracker.far_levels > 0, self.tracker.down_factor > 1
        kernels = kernels_of(far, pooled, needs_grad)
        return select_impl(impl, query, needs_grad=needs_grad, kernels=kernels)

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


def originals_of(model: nn.Module) -> Originals:
    """What CLEAR weights replaced in a model; empty where it has none."""
    state = ClearState.on(model)
    return Originals(lost=marked(model) is not None) if state is None else state.originals
