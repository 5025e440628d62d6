"""FLUX.1's prompts to embeddings, once for all stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .checks import WHO


def count_images(options: dict[str, Any]) -> tuple[int, int]:
    """How many noises are drawn and how many images made of them, as `FluxPipeline` has it.

    There the numbers of prompts, negative prompts, embeddings and latents are broadcast, whatever
    their types: one stands for all. So one noise may serve several images, such as those of one
    prompt and several negative ones. What it fails at is taken too where it is clear what is meant:
    `num_images_per_prompt` with one text for several prompts, or with several embeddings.

    Args:
        options: the arguments of `FluxPipeline.__call__`.

    Raises:
        ValueError: numbers that do not go together; the first that does not fit is named.
    """
    prompt, latents = options["prompt"], options["latents"]
    count, copies = (
        _number(options["prompt_embeds"] if prompt is None else prompt),
        options["num_images_per_prompt"],
    )
    noises = count * copies
    start = noises if latents is None else len(latents)

    def of_stock(given: Any) -> int:
        return len(given) if isinstance(given, torch.Tensor) else _number(given) * copies

    def of_each(given: Any) -> int:
        number = _number(given)
        if number == 1 or (isinstance(given, torch.Tensor) and number != count):
            return number
        return number * copies

    images, misfit = _broadcast(options, start, of_stock)
    if misfit is not None and (1 in (start, noises) or start == noises):
        images, misfit = _broadcast(options, max(start, noises), of_each)
    if misfit is not None or not noises:
        name = misfit or "prompt"
        raise ValueError(
            f"{WHO}: {name}: {_number(options[name])} for {count} prompts; give one, or one for "
            "each."
        )
    return noises, images


def _broadcast(
    options: dict[str, Any], start: int, rows: Callable[[Any], int]
) -> tuple[int, str | None]:
    """The number of images, and the first argument of another number.

    Args:
        start: number of latents.
        rows: of a text or list of them, or of embeddings, how many images have one of their own.
    """
    images = start
    for sign in _signs(options):
        words, pooled = _sources(options, sign)
        # The pooled embeddings reach the image first, which the words have to be as many as.
        seen = rows(options[pooled])
        if seen not in (1, images) and images != 1:
            return images, pooled
        images, seen = max(images, seen), max(start, seen)
        if rows(options[words]) not in (1, seen):
            return images, words
    return images, None


def encode_prompts(pipe: Any, options: dict[str, Any], images: int) -> dict[str, torch.Tensor]:
    """Embeddings of the prompts, and of the negative ones where they are used.

    Args:
        options: the arguments of `FluxPipeline.__call__`, which `count_images` took.
        images: their number.

    Returns:
        By the names that `FluxPipeline.__call__` has for them, one for each image.
    """
    joint = options["joint_attention_kwargs"] or {}
    found: dict[str, torch.Tensor] = {}
    for sign in _signs(options):
        embeds = options[f"{sign}prompt_embeds"]
        pooled = options[f"{sign}pooled_prompt_embeds"]
        if embeds is None:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=options[f"{sign}prompt"],
                prompt_2=options[f"{sign}prompt_2"],
                device=pipe._execution_device,
                max_sequence_length=options["max_sequence_length"],
                lora_scale=joint.get("scale"),
            )
        for name, given in (("prompt_embeds", embeds), ("pooled_prompt_embeds", pooled)):
            found[f"{sign}{name}"] = given.repeat_interleave(images // len(given), dim=0)
    return found


class EncodedPrompts(list[str]):
    """Prompts that `CLEARFluxPipeline.encode_prompt` has nothing to do for.

    Args:
        embeds: of words, (batch, text tokens, channels).
        pooled: (batch, channels).
    """

    def __init__(self, embeds: torch.Tensor, pooled: torch.Tensor) -> None:
        super().__init__([""] * len(embeds))
        self.embeds = embeds
        self.pooled = pooled


def for_call(options: dict[str, Any]) -> dict[str, Any]:
    """Options by which `FluxPipeline.__call__` takes embeddings of two lengths.

    It refuses them where both are given as such, but not where they come of texts.

    Args:
        options: its arguments, with embeddings.
    """
    options = dict(options)
    embeds = options.pop("negative_prompt_embeds", None)
    pooled = options.pop("negative_pooled_prompt_embeds", None)
    if embeds is not None:
        options["negative_prompt"] = EncodedPrompts(embeds, pooled)
    return options


def _signs(options: dict[str, Any]) -> tuple[str, ...]:
    """The beginnings of names: of prompts, and of negative prompts where there is guidance."""
    negative = options["negative_prompt"], options["negative_prompt_embeds"]
    guided = options["true_cfg_scale"] > 1 and any(one is not None for one in negative)
    return ("", "negative_") if guided else ("",)


def _sources(options: dict[str, Any], sign: str) -> tuple[str, str]:
    """The arguments that the embeddings of words and the pooled ones come from."""
    if options[f"{sign}prompt_embeds"] is not None:
        return f"{sign}prompt_embeds", f"{sign}pooled_prompt_embeds"
    return f"{sign}prompt_2" if options[f"{sign}prompt_2"] else f"{sign}prompt", f"{sign}prompt"


def _number(given: Any) -> int:
    return 1 if isinstance(given, str) else len(given)
