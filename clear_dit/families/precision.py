"""Which linear layers of a transformer are quantised, and which stay wide, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .table import family_of

# Products in 8 and 4 bits are made of whole pieces of so many channels.
PIECE = 16
UNEVEN = f"its sides are no multiples of {PIECE}"
# Between the name of a layer and that of the plain layer inside of one with a LoRA.
_INSIDE, _LORA = ".base_layer", ".lora_"


class Linears(NamedTuple):
    """The linear layers of a transformer, by name; a LoRA's own are in none of the three.

    Attributes:
        narrow: whose weights are quantised, and what is multiplied by them.
        stored: whose weights alone are: one row of numbers goes through, which costs no time.
        wide: the others, to why.
    """

    narrow: tuple[str, ...]
    stored: tuple[str, ...]
    wide: Mapping[str, str]


def linears_of(model: nn.Module) -> Linears:
    """The linear layers of a family's transformer, by what quantisation does to them."""
    family = family_of(model)
    narrow, stored, wide = list[str](), list[str](), dict[str, str]()
    for name, linear in linear_layers(model):
        plain = name.replace(_INSIDE, "")
        reason = next((why for at, why in family.wide.items() if fnmatchcase(plain, at)), None)
        if reason is None and (linear.in_features % PIECE or linear.out_features % PIECE):
            reason = UNEVEN
        if reason is not None:
            wide[name] = reason
        elif any(fnmatchcase(plain, at) for at in family.modulation):
            stored.append(name)
        else:
            narrow.append(name)
    return Linears(tuple(narrow), tuple(stored), wide)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The model's own linear layers, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _LORA not in name:
            yield name, module
