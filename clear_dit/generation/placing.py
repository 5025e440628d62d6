"""Where a pipeline's parts wait, and how they come to the device that runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import RequestError
from ..hooks import is_offloaded
from .models import OF_TEXTS

# What is on the device: all parts; the one that runs; and of the transformer two blocks, of the
# text encoders a layer or two.
OFFLOADS = ("none", "model", "group")


def check_offload(offload: str) -> None:
    """Refuse a way to offload that is none of OFFLOADS.

    Raises:
        RequestError: it is not.
    """
    if offload not in OFFLOADS:
        raise RequestError(f"--offload must be one of {', '.join(OFFLOADS)}; got {offload!r}.")


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Have a pipeline on the CPU run on a device; a second call places parts that are new.

    Args:
        offload: one of OFFLOADS.

    Raises:
        RequestError: a modular pipeline, of which diffusers cannot offload parts so.
    """
    if offload == "none":
        pipe.to(device)
        return
    if not hasattr(pipe, "enable_model_cpu_offload"):
        raise RequestError(f"--offload {offload}: not for the pipeline of {pipe.family.title}.")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
        return
    from diffusers.hooks import apply_group_offloading

    # On a GPU the next weights come while those before them run.
    stream = device.type == "cuda"
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or is_offloaded(part):
            continue
        if name == "transformer":
            apply_group_offloading(
                part, device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream
            )
        elif name.startswith(OF_TEXTS):
            apply_group_offloading(part, device, offload_type="leaf_level", use_stream=stream)
        else:
            part.to(device)
