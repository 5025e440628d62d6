"""The processors `apply_clear` installs, and what IP-adapters do to them.

diffusers gives every double block of a model with IP-adapters a `FluxIPAdapterAttnProcessor`. Here
a layer's processor keeps that one and computes its part beside local attention: queries of the
image attend to the few tokens of the image prompt (arXiv 2308.06721), linear as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..compat import names_from
from .norm_rope import Rotary
from .processor import CLEARProcessor, FluxAttnProcessor
from .tracker import WindowTracker

FluxIPAdapterAttnProcessor: Any
(FluxIPAdapterAttnProcessor,) = names_from(
    "diffusers.models.transformers.transformer_flux", "FluxIPAdapterAttnProcessor"
)


class LayerProcessor(CLEARProcessor):
    """A `CLEARProcessor` that belongs to one layer, and works for its IP-adapters too.

    diffusers makes processors again as `processor.__class__()` when it loads or unloads
    IP-adapters. Made so, without settings, it is `blank`: `weights/reconcile.py` replaces it.

    Args:
        settings: the processor whose settings this one takes.
        tracker: that of all layers of a model.
        adapter: the layer's IP-adapters: to_k_ip, to_v_ip and scale are used as they are there.
    """

    def __init__(
        self,
        settings: CLEARProcessor | None = None,
        tracker: WindowTracker | None = None,
        adapter: Any = None,
    ) -> None:
        super().__init__(**({} if settings is None else settings.settings))
        self.blank: bool = settings is None
        self.adapter = adapter
        if tracker is not None:
            self.tracker = tracker

    @classmethod
    def for_layer(
        cls, settings: CLEARProcessor, tracker: WindowTracker, old: Any
    ) -> LayerProcessor:
        """The processor that takes the place of `old`, whose IP-adapters it keeps."""
        has_adapter = isinstance(old, FluxIPAdapterAttnProcessor)
        return cls(settings, tracker, old if has_adapter else getattr(old, "adapter", None))

    def stock(self) -> Any:
        """What it takes the place of."""
        return FluxAttnProcessor() if self.adapter is None else self.adapter

    def _get_name(self) -> str:
        return CLEARProcessor.__name__

    @property
    def scale(self) -> list[float]:
        """Strength of each IP-adapter; `set_ip_adapter_scale` sets it."""
        return self.adapter.scale

    @scale.setter
    def scale(self, scale: list[float]) -> None:
        self.adapter.scale = scale

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        ip_hidden_states: list[torch.Tensor] | None = None,
    ) -> Any:
        """`CLEARProcessor.__call__`; with IP-adapters a third tensor follows image and text.

        Args:
            ip_hidden_states: for every IP-adapter the image prompts, (prompts, images, tokens,
                channels). As in diffusers, the blocks add what it contributes after the
                feed-forward.

        Raises:
            ValueError: there are IP-adapters, but no image prompt.
        """
        branch = None
        if self.adapter is not None:
            if ip_hidden_states is None:
                raise ValueError(
                    "CLEARProcessor: the model has IP-adapters, but got no image prompt; pass "
                    "ip_adapter_image or ip_adapter_image_embeds, or call unload_ip_adapter()."
                )
            branch = functools.partial(_image_prompt, self.adapter, attn, ip_hidden_states)
        return self._attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, branch
        )


def _image_prompt(
    adapter: Any, attn: Any, prompts: list[torch.Tensor], query: torch.Tensor
) -> torch.Tensor:
    """What IP-adapters contribute; query: (batch, image, heads, head_dim), projected only."""
    query = attn.norm_q(query).transpose(1, 2)  # [batch, heads, image, head_dim]
    total = torch.zeros_like(query)
    for prompt, scale, to_key, to_value in zip(
        prompts, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, strict=True
    ):
        # As in diffusers: where there are more prompts than samples, a sample has several.
        key, value = (  # [batch, heads, images * tokens, head_dim]
            project(prompt).reshape(len(query), -1, *query.shape[1::2]).transpose(1, 2)
            for project in (to_key, to_value)
        )
        total = total + scale * scaled_dot_product_attention(query, key, value)
    return total.transpose(1, 2).flatten(2)
