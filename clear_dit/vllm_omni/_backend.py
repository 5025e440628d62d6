"""CLEAR as a diffusion attention backend of vLLM-Omni; imported by it, by name.

The module is private, as types of its classes are vLLM-Omni's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm_omni.diffusion.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
)
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from ..attention.layout import Layout
from ..errors import RequestError
from ..kernels.attention import local_attention
from . import NAME
from .layouts import READERS, current_layout, wrap_transformers
from .settings import Settings

# Fields of the metadata that say something else than: every token attends to every other.
_FIELDS = (
    *("attn_mask", "joint_attn_mask", "joint_query", "joint_key", "joint_value"),
    *("full_attn_spans", "query_ranges", "packed_padding"),
)
_EXTRA = ("cu_seqlens_q", "cu_seqlens_k", "valid_kv_length")
_DEGREES = ("ulysses_degree", "ring_degree", "allgather_degree", "sequence_parallel_size")


class CLEARBackend(AttentionBackend):
    """The backend that users name CLEAR."""

    supported_platforms: tuple[str, ...] = ("cuda", "rocm")

    @classmethod
    def validate_available(cls) -> None:
        """Refuse bad settings before a model is loaded."""
        Settings.of_environment()

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[CLEARImpl]:
        return CLEARImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> Any:
        raise NotImplementedError("CLEAR: metadata are vLLM-Omni's own.")

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # any


class CLEARImpl(AttentionImpl):
    """Attention of one layer. One whose role is "cross" has no image of its own: it stays dense.

    Raises:
        RequestError: causal attention, options of another backend, or a sequence shared by ranks.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        role: str = "self",
        **others: Any,
    ) -> None:
        if causal:
            raise RequestError(
                f"CLEAR: attention of an image is not causal; choose another backend for {role!r}."
            )
        if backend_kwargs:
            raise RequestError(f"CLEAR: has no such options, got {', '.join(backend_kwargs)}.")
        _refuse_sequence_parallel()
        self._scale, self._role = softmax_scale, role
        self._settings = Settings.of_environment()
        self._dense: AttentionImpl | None = None
        if role == "cross":
            dense = SDPABackend.get_impl_cls()
            self._dense = dense(
                num_heads=num_heads,
                head_size=head_size,
                softmax_scale=softmax_scale,
                num_kv_heads=num_kv_heads,
            )
        wrap_transformers()

    # The layout is no tensor: a compiled graph must not keep that of the image it was made with.
    @torch.compiler.disable
    def forward_cuda(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Attention among the tokens of a text and an image.

        Args:
            query: (batch, text + image + reference images, heads, head_dim), positions applied.
            key, value: the same of as many heads or fewer.

        Raises:
            RequestError: the image's grid is not known, or the tokens are not it.
        """
        if self._dense is not None:
            return self._dense.forward(query, key, value, attn_metadata)
        _refuse_restrictions(attn_metadata)
        layout = self._layout(query.shape[1], key.shape[1], attn_metadata)
        window = layout.window(self._settings.radius, 1, self._settings.far_levels)
        query, key, value = map(layout.to_local, (query, key, value))
        out = local_attention(
            query, key, value, window, scale=self._scale, impl=self._settings.impl
        )
        assert isinstance(out, torch.Tensor)
        return layout.to_layer(out)

    def _layout(self, queries: int, keys: int, metadata: AttentionMetadata | None) -> Layout:
        video = None if metadata is None else metadata.video_layout
        layout = current_layout() if video is None else _layout_of_video(video)
        if layout is None:
            names = ", ".join(sorted({name for _, name in READERS}))
            raise RequestError(
                f"CLEAR: the grid of the image is not known in a layer of role {self._role!r}. It "
                f"is in {names}; choose another backend for this model, or for this role, and no "
                "TeaCache."
            )
        if not queries == keys == layout.sequence_length:
            raise RequestError(
                f"CLEAR: {layout.text_length} tokens of text, {layout.rows} x {layout.columns} of "
                f"the image{layout.and_references} are {layout.sequence_length}, got {queries} "
                f"queries and {keys} keys in a layer of role {self._role!r}."
            )
        return layout


def _layout_of_video(video: Any) -> Layout:
    """What a model publishes of its sequence: a prefix, then frames x rows x columns."""
    if video.video_spans or video.latent_grid is None or video.latent_grid[0] != 1:
        raise RequestError(
            f"CLEAR: takes images, that is one frame; got a video of {video.latent_grid} tokens."
        )
    return Layout(video.prefix_len or 0, *video.latent_grid[1:])


def _refuse_restrictions(metadata: AttentionMetadata | None) -> None:
    if metadata is None:
        return
    found = [name for name in _FIELDS if getattr(metadata, name) is not None]
    found += [f"extra[{name!r}]" for name in _EXTRA if metadata.extra.get(name) is not None]
    if found:
        raise RequestError(
            f"CLEAR: takes prompts of one length without padding, each request for itself; got "
            f"{', '.join(found)}. Choose another backend."
        )


def _refuse_sequence_parallel() -> None:
    config = get_current_diffusion_config_or_none()
    parallel = getattr(config, "parallel_config", None)
    for name in _DEGREES:
        degree = getattr(parallel, name, None) or 1
        if degree > 1:
            raise RequestError(
                f"CLEAR: ranks cannot share an image's tokens here, got {name}={degree}; tensor "
                "parallelism and sharing of guidance work."
            )
