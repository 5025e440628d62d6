"""What the transformers of every family are called with, without values, and CLEAR without hooks.

Tensors without values cannot be read: where the tokens are follows from the window, and masks of
padded text are left out, so that all of the text counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention.layout import Layout
from ..attention.processor import CLEARProcessor
from ..attention.tracker import Forward
from ..kernels.window import Window
from ..plugin import install
from ..weights.state import ClearState
from .fake import IMPL, flux_inputs, quiet

# Of Z-Image's images and captions.
Z_IMAGE_MULTIPLE = 32
IMAGE_FIRST = (
    "SD3Transformer2DModel",
    "HunyuanImageTransformer2DModel",
    "ErnieImageTransformer2DModel",
)


@contextmanager
def clear_applied(model: nn.Module, window: Window) -> Iterator[None]:
    """Within it every attention layer over the image has CLEAR, and knows where its tokens are."""
    with quiet():
        far = window.far_levels > 0
        install([model], CLEARProcessor(window.radius, window.down_factor, IMPL, far=far))
    state = ClearState.on(model)
    assert state is not None
    tracker = state.tracker
    assert tracker is not None
    state.detach(model)
    with tracker.under_way(Forward(layout_of(model, window))):
        yield


def layout_of(model: nn.Module, window: Window) -> Layout:
    """How the tokens of an image are laid out in a model's layers."""
    size = window.text_length, window.height, window.width
    name = type(model).__name__
    if name == "ZImageTransformer2DModel":
        text, rows, columns = size
        padding = -(rows * columns) % Z_IMAGE_MULTIPLE
        return Layout(text + -text % Z_IMAGE_MULTIPLE, rows, columns, padding, image_first=True)
    return Layout(*size, image_first=name in IMAGE_FIRST)


def model_inputs(
    model: nn.Module, window: Window, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Arguments of a forward at batch 1."""
    config: Any = model.config
    empty = partial(torch.empty, device=device, dtype=dtype)
    return INPUTS[type(model).__name__](config, window, empty)


def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A forward of a model with `model_inputs`."""
    if type(model).__name__ == "ErnieImageTransformer2DModel":
        # Its own asks torch.autocast, which does not know tensors without values.
        model.pos_embed.forward = partial(_angles, model.head_dim)
    with _ValuesChoose():
        model(**inputs)


def _angles(head_dim: int, ids: torch.Tensor) -> torch.Tensor:
    return ids.new_empty(*ids.shape[:-1], 1, head_dim)


class _ValuesChoose(TorchDispatchMode):
    """Lets a mask that has values choose between tensors that have none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.where.self and args[1].is_meta:
            args = (args[0].to("meta"), *args[1:])
        return func(*args, **(kwargs or {}))


def _flux(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    example = empty(0)
    return flux_inputs(config, window, example.dtype, str(example.device))


def _chroma(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return {
        "hidden_states": empty(1, window.image_length, config.in_channels),
        "encoder_hidden_states": empty(1, window.text_length, config.joint_attention_dim),
        "timestep": empty(1),
        "img_ids": empty(window.image_length, 3, dtype=torch.float32),
        "txt_ids": empty(window.text_length, 3, dtype=torch.float32),
    }


def _flux2(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return _chroma(config, window, empty) | {
        "guidance": empty(1) if config.guidance_embeds else None,
        "img_ids": empty(window.image_length, 4, dtype=torch.float32),
        "txt_ids": empty(window.text_length, 4, dtype=torch.float32),
    }


def _sd3(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, empty, config.patch_size),
        "encoder_hidden_states": empty(1, window.text_length, config.joint_attention_dim),
        "pooled_projections": empty(1, config.pooled_projection_dim),
        "timestep": empty(1),
    }


def _qwen_image(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return {
        "hidden_states": empty(1, window.image_length, config.in_channels),
        "encoder_hidden_states": empty(1, window.text_length, config.joint_attention_dim),
        "timestep": empty(1),
        "img_shapes": [[(1, window.height, window.width)]],
    }


def _z_image(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    (patch,) = config.all_patch_size
    return {
        "x": [_latents(config, window, empty, patch)[0].unsqueeze(1)],
        "t": empty(1),
        "cap_feats": [empty(window.text_length, config.cap_feat_dim)],
    }


def _hunyuan_image(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    # Text of both encoders as of the first: the model puts them together by their masks' values.
    text = window.text_length
    return {
        "hidden_states": _latents(config, window, empty, config.patch_size[0]),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, text, config.text_embed_dim),
        "encoder_attention_mask": empty(1, text, dtype=torch.bool),
        "guidance": empty(1) if config.guidance_embeds else None,
    }


def _cogview4(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, empty, config.patch_size),
        "encoder_hidden_states": empty(1, window.text_length, config.text_embed_dim),
        "timestep": empty(1),
        "original_size": empty(1, 2),
        "target_size": empty(1, 2),
        "crop_coords": empty(1, 2),
    }


def _krea2(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    text = window.text_length
    return {
        "hidden_states": empty(1, window.image_length, config.in_channels),
        "encoder_hidden_states": empty(1, text, config.num_text_layers, config.text_hidden_dim),
        "timestep": empty(1),
        "position_ids": empty(text + window.image_length, 3, dtype=torch.float32),
    }


def _flux3(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return _chroma(config, window, empty) | {
        "img_ids": empty(window.image_length, 4, dtype=torch.float32),
        "txt_ids": empty(window.text_length, 4, dtype=torch.float32),
        "target_timestep": empty(1) if config.flow_map else None,
    }


def _qwen_image21(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    text, image = window.text_length, window.image_length
    return {
        "hidden_states": empty(1, image, config.in_channels),
        "encoder_hidden_states": empty(1, text, config.context_in_dim),
        "timestep": empty(1),
        "img_shapes": [[(1, window.height, window.width)]],
        # Its values say where the image is: four tokens to a place.
        "img_mask": (torch.arange(text + image // 4) >= text)[None],
    }


def _ernie_image(config: Any, window: Window, empty: Any) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, empty, config.patch_size),
        "timestep": empty(1),
        "text_bth": empty(1, window.text_length, config.text_in_dim),
        "text_lens": empty(1, dtype=torch.int64),
    }


def _latents(config: Any, window: Window, empty: Any, patch: int) -> torch.Tensor:
    return empty(1, config.in_channels, window.height * patch, window.width * patch)


INPUTS = {
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "CogView4Transformer2DModel": _cogview4,
    "Krea2Transformer2DModel": _krea2,
    "Flux3Transformer2DModel": _flux3,
    "QwenImage21Transformer2DModel": _qwen_image21,
    "LongCatImageTransformer2DModel": _chroma,
    "ErnieImageTransformer2DModel": _ernie_image,
}
