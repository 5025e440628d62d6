"""Sizes that no setting can generate on this machine are refused before work starts."""

from __future__ import annotations

import os
from typing import Any

import torch

from clear_dit.families.table import channels_of

from .cascade.stages import Stage

# A token's hidden state, residual, query, key, value and attention output, alive at once in any
# layer, however the rest is chunked.
COPIES = 6


def refuse_too_large(pipe: Any, stage: Stage, batch: int, ranks: int = 1) -> None:
    """Refuse an image whose activations alone exceed the device's memory.

    The need is a lower bound: batch * tokens * channels * bytes * `COPIES`, and the decoded
    image in float32.

    Args:
        ranks: that share the tokens, each on a device like this one.

    Raises:
        ValueError: it does not fit.
    """
    tokens = stage.height * stage.width // pipe.token_pixels**2
    channels = channels_of(pipe.transformer)
    need = batch * tokens * channels * pipe.transformer.dtype.itemsize * COPIES // ranks
    need += 3 * 4 * stage.height * stage.width
    have = total_memory(pipe._execution_device)
    if need > have:
        several = f"{batch} images of " if batch > 1 else ""
        raise ValueError(
            f"CLEARPipeline: {several}{stage.name} pixels ({tokens:,} tokens) need at least "
            f"{need / 1e9:,.0f} GB of memory, and {pipe._execution_device} has {have / 1e9:,.0f} "
            "GB; ask for fewer pixels."
        )


def total_memory(device: torch.device) -> int:
    """Memory of a device, in bytes, used or not; the machine's for those that share it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
