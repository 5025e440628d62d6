"""What the transformers of every family are called with, and CLEAR without hooks.

Tensors without values cannot be read: where the tokens are follows from the window. Masks of padded
text are left out, so that all of the text counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention.layout import Layout
from ..attention.positions import Extension
from ..attention.processor import CLEARProcessor
from ..attention.tracker import Forward
from ..errors import RequestError, first_line
from ..families.table import family_of
from ..kernels.window import Window
from ..plugin import install
from ..weights.forward import other_attributes
from ..weights.state import Call, ClearState
from .fake import IMPL, quiet

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


@contextmanager
def positions_for(model: nn.Module, window: Window, inputs: dict[str, Any]) -> Iterator[None]:
    """Within it a model has positions for an image; extended ones where its own end before.

    As in a cascade, where they are interpolated or computed: it takes the same operations.

    Raises:
        RequestError: they cannot reach so far.
    """
    with ExitStack() as stack:
        try:
            check_positions(model, window, inputs)
        except ValueError:
            farthest = float(max(window.height, window.width))
            extension = Extension("interpolation", (farthest, farthest))
            try:
                for name, positions in family_of(model).extended(model, extension).items():
                    stack.enter_context(other_attributes(name, {model: positions}))
                check_positions(model, window, inputs)
            except ValueError as error:
                raise RequestError(first_line(error)) from error
        yield


def check_positions(model: nn.Module, window: Window, inputs: dict[str, Any]) -> None:
    """Refuse an image for which a model has no positions.

    Raises:
        ValueError: its positions end before.
    """
    # Masks and lengths would be read by their values, which few have.
    hidden = [name for name, value in inputs.items() if "mask" in name or "lens" in name]
    plain = inputs | {name: None for name in hidden if inputs[name].is_meta}
    family_of(model).read(model, plain, (window.height, window.width))


@contextmanager
def told_layout(model: nn.Module, window: Window) -> Iterator[None]:
    """Within it a model's forwards under CLEAR do not read where the tokens are."""
    state = ClearState.on(model)
    assert state is not None
    assert state.tracker is not None
    call = Call(state.tracker, Forward(layout_of(model, window)), IMPL, {})
    vars(state)["read"] = lambda model, args, kwargs: call
    try:
        yield
    finally:
        del vars(state)["read"]


def layout_of(model: nn.Module, window: Window) -> Layout:
    """How the tokens of an image are laid out in a model's layers."""
    size = window.text_length, window.height, window.width
    name = type(model).__name__
    if name == "ZImageTransformer2DModel":
        text, rows, columns = size
        padding = -(rows * columns) % Z_IMAGE_MULTIPLE
        return Layout(text + -text % Z_IMAGE_MULTIPLE, rows, columns, padding, image_first=True)
    return Layout(*size, image_first=name in IMAGE_FIRST)


class Empty:
    """Makes tensors without values.

    Args:
        dtype, device: of the tensors, where a call does not say another dtype.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype = dtype
        self.device = device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Latents, text, or whatever is taken for them."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def filled(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of one number."""
        return self(*shape, dtype=dtype)

    def read(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of which a model reads the values: it has them."""
        return values

    def image_ids(self, window: Window, channels: int) -> torch.Tensor:
        """(tokens, channels): of an image row by row, rows in the second channel, then columns."""
        return self(window.image_length, channels, dtype=torch.float32)


class Random(Empty):
    """Makes tensors with values: of random numbers, the same every time, or what they are for."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(dtype, device)
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        noise = torch.randn(*shape, generator=self._generator, dtype=torch.float32)
        return noise.to(self.device, dtype or self.dtype)

    def filled(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype or self.dtype, device=self.device)

    def read(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device)

    def image_ids(self, window: Window, channels: int) -> torch.Tensor:
        ids = torch.zeros(
            window.height, window.width, channels, dtype=torch.float32, device=self.device
        )
        ids[..., 1] = torch.arange(window.height, device=self.device)[:, None]
        ids[..., 2] = torch.arange(window.width, device=self.device)
        return ids.flatten(0, 1)


def model_inputs(model: nn.Module, window: Window, make: Empty, batch: int = 1) -> dict[str, Any]:
    """Arguments of a forward."""
    config: Any = model.config
    inputs = INPUTS[type(model).__name__](config, window, make)
    return {name: _repeated(value, batch) for name, value in inputs.items()}


def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A forward of a model with `model_inputs` without values."""
    if type(model).__name__ == "ErnieImageTransformer2DModel":
        # Its own asks torch.autocast, which does not know tensors without values.
        own: Any = model
        own.pos_embed.forward = partial(_angles, own.head_dim)
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


def _repeated(value: Any, batch: int) -> Any:
    """An argument at batch 1 for several; position ids have no batch."""
    if isinstance(value, list):
        return value * batch
    has_batch = isinstance(value, torch.Tensor) and len(value) == 1
    return value.expand(batch, *value.shape[1:]) if has_batch else value


def _flux(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return _chroma(config, window, make) | {
        "pooled_projections": make(1, config.pooled_projection_dim),
        "guidance": make.filled(3.5, 1) if config.guidance_embeds else None,
    }


def _chroma(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return {
        "hidden_states": make(1, window.image_length, config.in_channels),
        "encoder_hidden_states": make(1, window.text_length, config.joint_attention_dim),
        "timestep": make.filled(0.5, 1),
        "img_ids": make.image_ids(window, 3),
        "txt_ids": make.filled(0, window.text_length, 3, dtype=torch.float32),
    }


def _flux2(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return _chroma(config, window, make) | {
        "guidance": make.filled(4.0, 1) if config.guidance_embeds else None,
        "img_ids": make.image_ids(window, 4),
        "txt_ids": make.filled(0, window.text_length, 4, dtype=torch.float32),
    }


def _sd3(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, make, config.patch_size),
        "encoder_hidden_states": make(1, window.text_length, config.joint_attention_dim),
        "pooled_projections": make(1, config.pooled_projection_dim),
        "timestep": make.filled(500, 1),
    }


def _qwen_image(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return {
        "hidden_states": make(1, window.image_length, config.in_channels),
        "encoder_hidden_states": make(1, window.text_length, config.joint_attention_dim),
        "timestep": make.filled(0.5, 1),
        "img_shapes": [[(1, window.height, window.width)]],
    }


def _z_image(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    (patch,) = config.all_patch_size
    return {
        "x": [_latents(config, window, make, patch)[0].unsqueeze(1)],
        "t": make.filled(0.5, 1),
        "cap_feats": [make(window.text_length, config.cap_feat_dim)],
    }


def _hunyuan_image(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    # Text of both encoders as of the first: the model puts them together by their masks' values.
    text = window.text_length
    return {
        "hidden_states": _latents(config, window, make, config.patch_size[0]),
        "timestep": make.filled(500, 1),
        "encoder_hidden_states": make(1, text, config.text_embed_dim),
        "encoder_attention_mask": make.filled(1, 1, text, dtype=torch.bool),
        "guidance": make.filled(3.5, 1) if config.guidance_embeds else None,
    }


def _cogview4(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, make, config.patch_size),
        "encoder_hidden_states": make(1, window.text_length, config.text_embed_dim),
        "timestep": make.filled(500, 1),
        "original_size": make.filled(1024, 1, 2),
        "target_size": make.filled(1024, 1, 2),
        "crop_coords": make.filled(0, 1, 2),
    }


def _krea2(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    text = window.text_length
    text_ids = make.filled(0, text, 3, dtype=torch.float32)
    return {
        "hidden_states": make(1, window.image_length, config.in_channels),
        "encoder_hidden_states": make(1, text, config.num_text_layers, config.text_hidden_dim),
        "timestep": make.filled(0.5, 1),
        "position_ids": torch.cat([text_ids, make.image_ids(window, 3)]),
    }


def _flux3(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return _chroma(config, window, make) | {
        "img_ids": make.image_ids(window, 4),
        "txt_ids": make.filled(0, window.text_length, 4, dtype=torch.float32),
        "target_timestep": make.filled(0.5, 1) if config.flow_map else None,
    }


def _qwen_image21(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    text, image = window.text_length, window.image_length
    return {
        "hidden_states": make(1, image, config.in_channels),
        "encoder_hidden_states": make(1, text, config.context_in_dim),
        "timestep": make.filled(0.5, 1),
        "img_shapes": [[(1, window.height, window.width)]],
        # Its values say where the image is: four tokens to a place.
        "img_mask": make.read((torch.arange(text + image // 4) >= text)[None]),
    }


def _ernie_image(config: Any, window: Window, make: Empty) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, window, make, config.patch_size),
        "timestep": make.filled(500, 1),
        "text_bth": make(1, window.text_length, config.text_in_dim),
        "text_lens": make.filled(window.text_length, 1, dtype=torch.int64),
    }


def _latents(config: Any, window: Window, make: Empty, patch: int) -> torch.Tensor:
    return make(1, config.in_channels, window.height * patch, window.width * patch)


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
