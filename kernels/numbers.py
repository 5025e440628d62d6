"""Numbers as people give them, Python's, numpy's or torch's, to Python's own.

What is kept, compared and written to files is then of one type, wherever it came from.
"""

from __future__ import annotations

import math
import operator
import sys
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch

# Floats beyond it are all whole, and next to none of them is what was meant.
LARGEST_WHOLE_FLOAT = 2**53
LARGEST = sys.float_info.max


def as_number(value: Any) -> int | float | None:
    """The int or float that a value is; None where it is no finite number.

    Taken are real numbers of Python, numpy and torch, 0-dimensional arrays and tensors among them;
    truth values, text, and what is masked or has no values (on "meta") are none.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim > 0 or value is np.ma.masked or getattr(value, "is_meta", False):
            return None
        value = value.item()
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        found = float(value) if isinstance(value, (Real, Decimal)) else math.nan
    except (TypeError, ValueError, OverflowError):  # durations, signalling NaN, beyond floats
        return None
    return found if math.isfinite(found) else None


def as_integer(value: Any) -> int | None:
    """The int that a value is, floats without a fraction among them; None where it is none.

    See `as_number`.
    """
    # This first: what torch.compile keeps symbolic stays so.
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = as_number(value)
    if isinstance(found, float):
        whole = found.is_integer() and abs(found) <= LARGEST_WHOLE_FLOAT
        return int(found) if whole else None
    return found


def integer(
    who: str,
    value: Any,
    least: int,
    most: int | None = None,
    error: type[ValueError] = ValueError,
) -> int:
    """A checked integer.

    Args:
        who: it is, for the message.
        value: what came; see `as_integer`.
        least, most: bounds that belong to the range; None for no upper one.
        error: what is raised.

    Raises:
        ValueError: it is no integer, or out of its range.
    """
    found = as_integer(value)
    if found is None or found < least or (most is not None and found > most):
        if most is None:
            rule = f"an integer of at least {least}"
        else:
            rule = ("an integer " if found is None else "") + f"from {least} to {most}"
        raise error(f"{who} must be {rule}, got {shown(value)}.")
    return found


def number(
    who: str,
    value: Any,
    least: float = -LARGEST,
    most: float = LARGEST,
    error: type[ValueError] = ValueError,
) -> float:
    """A checked number, finite, as a float; see `integer`."""
    found = as_number(value)
    if found is None or not least <= found <= most:
        rule = "a finite number" if most == LARGEST else f"from {least} to {most}"
        raise error(f"{who} must be {rule}, got {shown(value)}.")
    return float(found)


def shown(value: Any) -> str:
    """What came, for a message: short, numbers without their types, text in quotes."""
    plain = getattr(value, "ndim", None) == 0 and not getattr(value, "is_meta", False)
    text = str(value.item()) if plain else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
