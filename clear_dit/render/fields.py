"""What a line of a job file may say, with the type each has."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..generation.prompts import check_prompt
from ..kernels.numbers import as_integer, as_number
from ..options import fractions, numbers
from .names import check_id

MAX_SEEDS = 10_000
_MAX_TEXT = 4096
# Pandas writes whole numbers as 42.0 where a column has empty cells.
_INTEGER = re.compile(r"([+-]?[0-9]{1,20})(\.0*)?")
# Above it pandas has rounded what it writes so.
_MAX_FLOAT_INTEGER = 2**53
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_BOOLEANS = {"true": True, "false": False}

# By field: what it is. "id" is of the image; "seeds" counts images, from "seed" on.
FIELDS = {
    "id": "id",
    "prompt": "prompt",
    "height": "integer",
    "width": "integer",
    "seed": "integer",
    "seeds": "integer",
    "steps": "integer",
    "guidance": "number",
    "negative_prompt": "text or nothing",
    "radius": "integer",
    "down_factor": "integer",
    "far": "boolean",
    "weights": "text",
    "lora": "text",
    "lora_scale": "number",
    "schedule": "text",
    "attention": "text",
    "image": "text",
    "preset": "text",
    "strength": "numbers",
    "stage_steps": "integers",
    "low_resolution_guidance": "number",
    "upscaler": "text",
}


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse fields that are not known, or twice there.

    Args:
        names: in their order.
        what: "key" or "column".

    Raises:
        RequestError: by name.
    """
    for name in names:
        if name not in FIELDS:
            raise RequestError(
                f"there is no {what} {name[:100]!r}; those are: {', '.join(FIELDS)}."
            )
    twice = next((name for name in FIELDS if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"the {what} {twice!r} is there twice.")
    if "prompt" not in names:
        raise RequestError(f"the {what} 'prompt' is missing.")


def check_values(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line, typed; those that are None are left out.

    Raises:
        RequestError: another type than the field has.
    """
    return {
        name: _CHECKS[FIELDS[name]](name, value)
        for name, value in entry.items()
        if value is not None or name == "prompt"
    }


def from_text(name: str, text: str) -> Any:
    """The value of a cell in a table as JSON would have it; None for an empty one but the prompt.

    Raises:
        RequestError: it is not of the field's type.
    """
    kind = FIELDS[name]
    if not text:
        return text if kind == "prompt" else None
    if kind == "boolean":
        return _BOOLEANS.get(text.lower(), text)
    if kind == "integer":
        return _integer_from(name, text)
    if kind == "number":
        return _number_from(name, text)
    if kind == "numbers":
        return list(fractions(name, text))
    if kind == "integers":
        return list(numbers(name, text))
    return text


def _integer_from(name: str, text: str) -> int:
    found = _INTEGER.fullmatch(text)
    if not found:
        raise RequestError(f"{name} must be an integer, got {text[:100]!r}.")
    value = int(found.group(1))
    if found.group(2) and abs(value) > _MAX_FLOAT_INTEGER:
        raise RequestError(f"{name} has been rounded to {text}; write it as a whole number.")
    return value


def _number_from(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        comma = _DECIMAL_COMMA.fullmatch(text)
        hint = f"; write {text.replace(',', '.')}" if comma else ""
        raise RequestError(f"{name} must be a number, got {text[:100]!r}{hint}.") from None


def _id(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)[:200]
    return check_id(_text(name, value))


def _prompt(name: str, value: object) -> str:
    return check_prompt(value, name)


def _negative(name: str, value: object) -> str:
    return "" if value == "" else check_prompt(value, name)


def _integer(name: str, value: object) -> int:
    number = as_integer(value)
    if number is None:
        raise RequestError(f"{name} must be an integer, got {str(value)[:100]!r}.")
    if abs(number) >= 2**63:
        raise RequestError(f"{name} must be below 2^63.")
    if name == "seeds" and not 1 <= number <= MAX_SEEDS:
        raise RequestError(f"seeds must be from 1 to {MAX_SEEDS}, got {number}.")
    return number


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {str(value)[:100]!r}.")
    return value


def _number(name: str, value: object) -> float:
    number = as_number(value)
    if number is None:
        raise RequestError(f"{name} must be a number, got {str(value)[:100]!r}.")
    try:
        return float(number)
    except OverflowError:
        raise RequestError(f"{name} is too large.") from None


def _numbers(name: str, value: object) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    if not 1 <= len(values) <= 100:
        raise RequestError(f"{name} must be a number or a list of some.")
    return tuple(_number(name, one) for one in values)


def _integers(name: str, value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not 1 <= len(values) <= 100:
        raise RequestError(f"{name} must be an integer or a list of some.")
    return tuple(_integer(name, one) for one in values)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} must be text, got {str(value)[:100]!r}.")
    if len(value) > _MAX_TEXT:
        raise RequestError(f"{name} may have {_MAX_TEXT} characters, got {len(value)}.")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise RequestError(f"{name} has control characters: {value[:100]!r}.")
    return value


_CHECKS = {
    "id": _id,
    "prompt": _prompt,
    "text or nothing": _negative,
    "integer": _integer,
    "boolean": _boolean,
    "number": _number,
    "numbers": _numbers,
    "integers": _integers,
    "text": _text,
}
