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

from ..attention.layout import Layout
from ..attention.processor import CLEARProcessor
from ..attention.tracker import Forward
from ..kernels.window import Window
from ..plugin import install
from ..weights.state import ClearState
from .fake import IMPL, flux_inputs, quiet

# Of Z-Image's images and captions.
Z_IMAGE_MULTIPLE = 32


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
    image_first = ("SD3Transformer2DModel", "HunyuanImageTransformer2DModel")
    return Layout(*size, image_first=name in image_first)


def model_inputs(
    model: nn.Module, window: Window, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Arguments of a forward at batch 1."""
    config: Any = model.config
    empty = partial(torch.empty, device=device, dtype=dtype)
    return INPUTS[type(model).__name__](config, window, empty)


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
}
