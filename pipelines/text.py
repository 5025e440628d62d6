"""Prompts to embeddings, once for all stages."""

from __future__ import annotations

from typing import Any

import torch

WHO = "CLEARFluxPipeline"


def count_prompts(options: dict[str, Any]) -> int:
    """Number of prompts, as `FluxPipeline.__call__` counts them.

    Args:
        options: its arguments.
    """
    prompt = options["prompt"]
    if isinstance(prompt, str):
        return 1
    return len(options["prompt_embeds"] if prompt is None else prompt)


def encode_prompts(pipe: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Embeddings of the prompts, and of the negative ones where they are used.

    One text or embedding, alone or in a list, stands for all prompts, as in `FluxPipeline`.

    Args:
        options: the arguments of `FluxPipeline.__call__`.

    Returns:
        By the names that `FluxPipeline.__call__` has for them, one for each image.

    Raises:
        ValueError: another number of texts or embeddings than of prompts.
    """
    count, copies = count_prompts(options), options["num_images_per_prompt"]
    joint = options["joint_attention_kwargs"] or {}
    found: dict[str, torch.Tensor] = {}
    for sign in ("", "negative_"):
        names = [f"{sign}{name}" for name in ("prompt", "prompt_2")]
        prompt, prompt_2 = (_one_each(name, options[name], count) for name in names)
        embeds = options[f"{sign}prompt_embeds"]
        pooled = options[f"{sign}pooled_prompt_embeds"]
        if sign and (options["true_cfg_scale"] <= 1 or (prompt is None and embeds is None)):
            break
        if embeds is None:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=prompt,
                prompt_2=prompt_2,
                device=pipe._execution_device,
                max_sequence_length=options["max_sequence_length"],
                lora_scale=joint.get("scale"),
            )
        for name, given in (("prompt_embeds", embeds), ("pooled_prompt_embeds", pooled)):
            each = _one_each(f"{sign}{name}", given, count)
            found[f"{sign}{name}"] = each.repeat_interleave(copies, dim=0)
    return found


def _one_each(name: str, given: Any, count: int) -> Any:
    """Texts or embeddings, one for each prompt; None where there are none.

    Raises:
        ValueError: neither one nor `count` of them.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = [given]
    if len(given) not in (1, count):
        raise ValueError(
            f"{WHO}: {name}: {len(given)} for {count} prompts; give one, or one for each."
        )
    if isinstance(given, torch.Tensor):
        return given.expand(count, *given.shape[1:])
    return list(given) * (count // len(given))
