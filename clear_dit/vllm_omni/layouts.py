"""Where the image is among the tokens of a call.

vLLM-Omni's attention layers are not told the grid of an image. The transformer is: its arguments
have position ids or sizes. So the forward of the transformers named here is wrapped, once one of
them is made with this backend, and what its arguments say holds until it returns.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ..attention.grid import layout_from_ids
from ..attention.layout import Layout
from ..errors import RequestError

Arguments = Mapping[str, Any]
_current: ContextVar[Layout | None] = ContextVar("clear_dit_layout", default=None)
_WRAPPED = "_clear_dit_tells_layout"


def current_layout() -> Layout | None:
    """That of the transformer which is at work; None where none is, or none of `READERS`."""
    return _current.get()


def from_ids(arguments: Arguments) -> Layout:
    """Of FLUX.1 and FLUX.2: text, image, and the reference images of Kontext and FLUX.2."""
    return layout_from_ids(arguments["txt_ids"], arguments["img_ids"])


def from_shapes(arguments: Arguments) -> Layout:
    """Of Qwen-Image: one image, and the same for the whole batch."""
    shapes = [
        tuple(one) if isinstance(one, list) else (one,) for one in arguments["img_shapes"] or ()
    ]
    images = {tuple(map(tuple, each)) for each in shapes}
    if len(images) != 1 or [len(image) for image in images] != [1]:
        raise RequestError(
            "CLEAR: Qwen-Image takes one image of one size in a batch, without others to edit or "
            f"layers; got img_shapes={arguments['img_shapes']}."
        )
    ((frames, rows, columns),) = images.pop()
    if frames != 1:
        raise RequestError(f"CLEAR: takes images, got {frames} frames.")
    return Layout(arguments["encoder_hidden_states"].shape[1], rows, columns)


_MODELS = "vllm_omni.diffusion.models"
# Of these transformers attention is over text, image and reference images, in this order.
READERS: dict[tuple[str, str], Callable[[Arguments], Layout]] = {
    (f"{_MODELS}.flux.flux_transformer", "FluxTransformer2DModel"): from_ids,
    (f"{_MODELS}.flux.flux_transformer", "FluxKontextTransformer2DModel"): from_ids,
    (f"{_MODELS}.flux2.flux2_transformer", "Flux2Transformer2DModel"): from_ids,
    (f"{_MODELS}.flux2_klein.flux2_klein_transformer", "Flux2Transformer2DModel"): from_ids,
    (f"{_MODELS}.qwen_image.qwen_image_transformer", "QwenImageTransformer2DModel"): from_shapes,
}


def wrap_transformers() -> None:
    """Let the transformers whose modules are imported tell their layout; each once."""
    for (module, name), read in READERS.items():
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and not hasattr(cls.__dict__.get("forward"), _WRAPPED):
            cls.forward = _telling(cls.forward, read)


def _telling(
    forward: Callable[..., Any], read: Callable[[Arguments], Layout]
) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        before = _current.set(read(given.arguments))
        try:
            return forward(*args, **kwargs)
        finally:
            _current.reset(before)

    setattr(told, _WRAPPED, True)
    return told
