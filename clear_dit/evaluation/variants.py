"""Generating every variant of a request, whatever is missing of it, on one pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from ..attention.processor import CLEARProcessor
from ..errors import RequestError, first_line
from ..families.table import head_dim_of, transformer_of
from ..generation.checks import find_impl
from ..generation.denoising import decode, denoise
from ..kernels.triton.device import kernels_of
from ..pipelines.text import Texts
from ..plugin import apply_clear, remove_clear
from ..progress import bar_options
from ..versions import __version__
from ..weights.load import open_checked
from ..weights.state import originals_of
from .images import ImageSet
from .request import EvaluateRequest, Variant

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

logger: logging.Logger = logging.getLogger(__name__)

# Encoded prompts kept; those beyond (in FLUX, a thousand) are encoded again for every variant.
TEXT_CACHE_MB = 4096


def check_weights(pipe: CLEARPipeline, variants: tuple[Variant, ...]) -> None:
    """Refuse weights that do not fit, before anything is generated.

    Raises:
        RequestError: what does not fit, by name.
    """
    for variant in variants:
        if variant.weights is not None:
            assert variant.radius is not None
            try:
                if _is_lora(variant.weights):
                    with attention_of(pipe, variant):
                        continue
                settings = CLEARProcessor(
                    radius=variant.radius, down_factor=variant.down_factor, far=variant.far
                )
                with open_checked(pipe.transformer, variant.weights, settings):
                    pass
            except (ValueError, OSError, RuntimeError, ImportError) as error:
                raise RequestError(
                    f"--weights {variant.weights}: cannot be used: {first_line(error)}"
                ) from error


def _is_lora(path: Path) -> bool:
    """Whether a safetensors file holds a LoRA, and not parameters of the model."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return any(".lora_" in key for key in file.keys())  # noqa: SIM118


@contextmanager
def attention_of(pipe: CLEARPipeline, variant: Variant) -> Iterator[str]:
    """Run a pipeline with a variant's attention and weights, and then as it was, bit for bit.

    Yields:
        The implementation that runs: "full" or one of local attention.

    Raises:
        ValueError: a model without its original weights.
    """
    originals_of(transformer_of(pipe, "evaluate")).refuse_lost("evaluate")
    if variant.radius is None:
        yield "full"
        return
    weights = variant.weights
    lora = weights if weights is not None and _is_lora(weights) else None
    apply_clear(
        pipe,
        variant.radius,
        variant.down_factor,
        weights if lora is None else None,
        far=variant.far,
    )
    try:
        if lora is not None:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        kernels = kernels_of(variant.far, variant.down_factor > 1, needs_grad=False)
        yield find_impl("auto", pipe.dtype, pipe.device, head_dim_of(pipe.transformer), kernels)
    finally:
        if lora is not None:
            pipe.unload_lora_weights()
        remove_clear(pipe)


class TextCache(Texts):
    """Prompts encoded once, when first needed, and kept on the CPU, up to TEXT_CACHE_MB.

    Args:
        device: of the embeddings that are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._bytes = device, 0

    def of(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`encode` of these arguments, or what it gave before."""
        before = len(self._known)
        found = super().of(encode, *args, **kwargs)
        if len(self._known) > before:
            tensors = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
            self._bytes += sum(tensor.nbytes for tensor in tensors)
            if self._bytes > TEXT_CACHE_MB * 2**20:
                self._known.popitem()
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), found)

    def encoded(self, encode: Callable[[], Any]) -> Any:
        """What is not known yet."""
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, encode())


def generate_missing(
    pipe: CLEARPipeline,
    request: EvaluateRequest,
    variant: Variant,
    images: ImageSet,
    texts: TextCache,
    impl: str,
    progress: bool = True,
) -> int:
    """Generate what is missing of a variant, in batches; the pipeline runs its attention already.

    Args:
        pipe: inside `attention_of(pipe, variant)`.
        request: prompts and settings.
        variant: for the progress bar.
        images: where they go.
        texts: what is encoded of the prompts.
        impl: the attention that runs, noted in the images.
        progress: show a bar on standard error.

    Returns:
        How many were generated.

    Raises:
        OSError: an image cannot be written; those before it stay.
    """
    missing = images.missing()
    generation = request.generation
    # The folder tells far keys already.
    record = {"far": variant.far, "version": __version__, "impl": impl, "device": str(pipe.device)}
    bar = tqdm(
        total=len(images.wanted),
        initial=len(images.wanted) - len(missing),
        desc=variant.label,
        unit="image",
        **bar_options(progress),
    )
    with bar:
        for first in range(0, len(missing), request.batch):
            chosen = missing[first : first + request.batch]
            prompts = [request.prompts[index] for index in chosen]
            seeds = [generation.seed + index for index in chosen]
            latents = denoise(
                pipe,
                prompts,
                seeds,
                height=generation.height,
                width=generation.width,
                steps=generation.steps,
                guidance=generation.guidance,
                texts=texts,
            )
            # One at a time: decoding takes more memory than denoising.
            for index, one in zip(chosen, latents, strict=True):
                image = decode(pipe, one[None], generation.height, generation.width)
                images.save(index, image, one, record)
                bar.update()
    return len(missing)
