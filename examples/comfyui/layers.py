"""The layers of a ComfyUI model by number: double blocks first, then single ones, from 0 on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Where models keep the blocks whose attention is text and image together.
STACKS = ("double_blocks", "single_blocks", "transformer_blocks", "layers")
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def layer_count(model: Any) -> int:
    """How many layers a diffusion model has."""
    return sum(len(getattr(model, stack, ())) for stack in STACKS)


def layer_number(model: Any, options: Mapping[str, Any]) -> int | None:
    """The layer that `transformer_options` speak of; None outside of these blocks."""
    index = options.get("block_index")
    if index is None or options.get("block_type") not in ("double", "single"):
        return None
    before = (
        len(model.double_blocks) if options["block_type"] == "single" and _has_both(model) else 0
    )
    return before + int(index)


def _has_both(model: Any) -> bool:
    return hasattr(model, "double_blocks") and hasattr(model, "single_blocks")


def parse_layers(text: str, count: int, title: str) -> frozenset[int]:
    """Numbers of layers in words: "0-2, 56".

    Args:
        text: numbers and ranges, with commas between them; may be empty.
        count: of the model's layers.
        title: of the model, for messages.

    Raises:
        ValueError: something else, or a layer that the model does not have.
    """
    numbers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(
                "CLEAR attention: dense_layers must be numbers and ranges such as '0-2, 56', got "
                f"{part!r}."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= count:
            raise ValueError(
                f"CLEAR attention: dense_layers names {part!r}, but this {title} has the layers "
                f"0 to {count - 1}."
            )
        numbers.update(range(first, last + 1))
    return frozenset(numbers)
