"""Caches of diffusers whose choice to skip blocks depends on the image: ranks choose together.

A rank that skips while another computes is a deadlock. Caches that go by the number of the step
agree by themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clear_dit.compat import names_from
from clear_dit.families.table import family_of

FBCHeadBlockHook: Any
FBC_HEAD: Any
FBCHeadBlockHook, FBC_HEAD = names_from(
    "diffusers.hooks.first_block_cache", "FBCHeadBlockHook", "_FBC_LEADER_BLOCK_HOOK"
)
# It looks at spatial frequencies, for which a rank would need the whole image.
SEA_CACHE = "sea_cache_root"
DECISION = "_should_compute_remaining_blocks"


class SharedDecisions:
    """FirstBlockCache's decision over all ranks of a group: that of one process.

    It compares means over the image, which are sums over the ranks' bands.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def follow(self, model: nn.Module, image_tokens: int | None) -> None:
        """Before a forward: take over the decision of a cache that is enabled.

        Args:
            image_tokens: of this rank's band; None where it has the whole image.

        Raises:
            ValueError: a cache that cannot be shared.
        """
        if _hook(model, SEA_CACHE) is not None:
            raise ValueError(
                "patch parallel: SeaCache needs the whole image on every rank; use "
                "FirstBlockCacheConfig, or disable_cache()."
            )
        if hasattr(model, "_is_cached"):  # cache-dit's, whose means are not those of one process
            raise ValueError(
                "patch parallel: with cache-dit ranks would not decide as one process does; use "
                "FirstBlockCacheConfig, or cache_dit.disable_cache(transformer)."
            )
        head = _hook(_first_block(model), FBC_HEAD)
        if head is not None:
            setattr(head, DECISION, partial(self._must_compute, head, image_tokens))

    def remove(self, model: nn.Module) -> None:
        """Leave the decision to the cache again."""
        head = _hook(_first_block(model), FBC_HEAD)
        if head is not None:
            vars(head).pop(DECISION, None)

    @torch.compiler.disable
    def _must_compute(self, head: Any, image_tokens: int | None, residual: torch.Tensor) -> bool:
        """As `FBCHeadBlockHook` decides; residual: (batch, image + references, channels)."""
        previous = head.state_manager.get_state().head_block_residual
        if previous is None:
            return True
        # Tokens of reference images are on all ranks: they count once.
        tokens = slice(None if self._group.rank() == 0 else image_tokens)
        sums = torch.stack(
            [x[:, tokens].abs().sum(dtype=torch.float32) for x in (residual - previous, previous)]
        )
        dist.all_reduce(sums, group=self._group)
        difference, size = sums.tolist()
        return difference / size > head.threshold


def _first_block(model: nn.Module) -> nn.Module:
    return next(iter(family_of(model).blocks(model).values()))


def _hook(module: nn.Module, name: str) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)
