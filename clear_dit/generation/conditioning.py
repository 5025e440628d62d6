"""What a transformer is given besides latents and noise level: recorded from the stock pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..pipelines.cascade.resolution import Resolution
from ..pipelines.text import Texts
from .denoising import denoise

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

# Arguments of a forward by name, of one image or of a batch: embeddings, masks, position ids,
# guidance, shapes; tensors, lists of them, and plain values.
Conditioning = Mapping[str, Any]


class _Recorded(BaseException):
    """The arguments of a forward, by name: it ends the call as soon as there is one to see.

    No `Exception`, of which a modular pipeline's blocks say each that they failed.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


def record(
    pipe: CLEARPipeline,
    prompts: list[str],
    *,
    height: int,
    width: int,
    guidance: float,
    texts: Texts | None = None,
) -> dict[str, Any]:
    """The arguments of the transformer's first forward in a call, which then ends.

    The transformer itself computes nothing, and neither it nor the pipeline is changed: the call
    has a shallow copy of both.

    Args:
        pipe: with text encoders.
        prompts: of one call, see `in_calls`.
        height, width: in pixels.
        guidance: its strength.
        texts: what is encoded is looked up in, and kept for later calls.

    Raises:
        ValueError: the pipeline cannot do this size.
    """
    signature = inspect.signature(type(pipe.transformer).forward)
    _, *arguments = signature.parameters.values()
    signature = signature.replace(parameters=arguments)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Recorded(dict(signature.bind(*args, **kwargs).arguments))

    stop.__signature__ = signature  # type: ignore[attr-defined]
    stand_in, call = copy.copy(pipe.transformer), copy.copy(pipe)
    stand_in.__dict__["forward"] = stop
    call.__dict__["transformer"] = stand_in
    try:
        denoise(
            call,
            prompts,
            [0] * len(prompts),
            height=height,
            width=width,
            steps=2,  # some schedules have no single one
            guidance=guidance,
            cascade=False,
            resolution=lambda height, width: Resolution(),
            texts=texts,
        )
    except _Recorded as recorded:
        return recorded.given
    raise AssertionError("a call without a forward")


def conditioning_of(
    pipe: CLEARPipeline,
    prompt: str,
    *,
    height: int,
    width: int,
    guidance: float,
    texts: Texts | None = None,
) -> Conditioning:
    """What the transformer is given for one prompt in a pass of its own.

    Padding that the model has a mask for is cut off, and position ids are exact, whatever the
    pipeline's dtype: what the model's family reads from the arguments.

    Args:
        pipe, height, width, texts: see `record`.
        guidance: its strength, where that is an argument of the transformer.

    Returns:
        A batch of one image.

    Raises:
        ValueError: the pipeline cannot do this size, or padding stands before text.
    """
    recipe, model = pipe.recipe, pipe.transformer
    strength = recipe.guidance.of_one_pass(model.config, guidance)
    given = record(pipe, [prompt], height=height, width=width, guidance=strength, texts=texts)
    reading = pipe.family.read(model, given, None)
    if reading is not None:
        if reading.text_mask is not None and not reading.text_mask.all():
            raise ValueError(f"{pipe.family.title}: a prompt's padding stands before its text.")
        given |= reading.changes
    denoiser = recipe.denoiser
    of_step = {denoiser.latents, denoiser.time, *denoiser.kept, "return_dict"}
    return {name: value for name, value in given.items() if name not in of_step}


def moved(
    conditioning: Conditioning, device: torch.device, dtype: torch.dtype | None = None
) -> Conditioning:
    """The same on a device, and floating-point tensors in a dtype, but for position ids."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(one(name, each) for each in value)
        if not isinstance(value, torch.Tensor):
            return value
        casts = value.is_floating_point() and not _is_position(name)
        return value.to(device, dtype if casts else None)

    return {name: one(name, value) for name, value in conditioning.items()}


def stacked(rows: Sequence[Conditioning]) -> Conditioning:
    """A batch of several images, whose tensors have the same shapes.

    Args:
        rows: of one image each.
    """

    def one(name: str) -> Any:
        values = [row[name] for row in rows]
        first = values[0]
        if isinstance(first, list):
            return [each for value in values for each in value]
        if not isinstance(first, torch.Tensor):
            return first
        # FLUX.1 and Chroma have the same position ids for all of a batch.
        return first if _is_position(name) and first.ndim == 2 else torch.cat(values)

    return {name: one(name) for name in rows[0]}


def _is_position(name: str) -> bool:
    return name.endswith("_ids")
