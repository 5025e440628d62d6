"""Prompts to embeddings, once for all stages."""

from __future__ import annotations

from typing import Any

import torch


def encode_prompts(pipe: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Embeddings of the prompts, and of the negative ones where they are used.

    Args:
        options: the arguments of `FluxPipeline.__call__`; one negative prompt serves all prompts.

    Returns:
        By the names that `FluxPipeline.__call__` has for them, one for each image.
    """
    prompts, copies = options["prompt"], options["num_images_per_prompt"]
    joint = options["joint_attention_kwargs"] or {}
    common = {
        "device": pipe._execution_device,
        "num_images_per_prompt": copies,
        "max_sequence_length": options["max_sequence_length"],
        "lora_scale": joint.get("scale"),
    }
    found: dict[str, torch.Tensor] = {}
    for sign in ("", "negative_"):
        prompt, prompt_2 = options[f"{sign}prompt"], options[f"{sign}prompt_2"]
        embeds = options[f"{sign}prompt_embeds"]
        pooled = options[f"{sign}pooled_prompt_embeds"]
        if sign and (options["true_cfg_scale"] <= 1 or (prompt is None and embeds is None)):
            break
        if embeds is None:
            if isinstance(prompt, str) and isinstance(prompts, list):
                prompt = [prompt] * len(prompts)
            embeds, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=prompt_2, **common)
        elif copies > 1:
            embeds = embeds.repeat_interleave(copies, dim=0)
            pooled = pooled.repeat_interleave(copies, dim=0)
        found |= {f"{sign}prompt_embeds": embeds, f"{sign}pooled_prompt_embeds": pooled}
    return found
