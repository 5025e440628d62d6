"""What a model's configuration says of CLEAR weights: `save_pretrained` writes it, and so it comes
back with `from_pretrained`, where nothing else tells these weights from the original ones.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..families.table import is_transformer

ENTRY = "clear_weights"


def mark(model: Any, **facts: Any) -> None:
    """Write an entry that the model has CLEAR weights.

    Args:
        facts: radius, down_factor, far: what they were made for; file: its name; learned: whether
            it held weights of pooling too; fingerprints: digests of the tensors, by dtype.
    """
    model.register_to_config(**{ENTRY: facts})


def unmark(model: Any) -> None:
    """Take the entry out: the weights are the original ones again."""
    others = {name: value for name, value in model.config.items() if name != ENTRY}
    model._internal_dict = FrozenDict(others)


def marked(model: nn.Module) -> dict[str, Any] | None:
    """The entry, None without; a ControlNet made from a transformer's configuration has none."""
    config: Any = model.config
    return config.get(ENTRY) if is_transformer(model) else None
