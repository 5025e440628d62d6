"""Arguments of a forward on disk: tensors by name, and JSON that says what they are parts of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def described(value: Any) -> Any:
    """A value as JSON: of tensors the shapes, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape)}
    if isinstance(value, dict):
        return {"dict": {name: described(each) for name, each in value.items()}}
    if isinstance(value, (list, tuple)):
        parts = [described(each) for each in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a value, each with the name it has where the value's is `name`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors_of(each, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            yield from tensors_of(each, f"{name}.{place}")


def restored(description: Any, name: str, read: Callable[[str], torch.Tensor]) -> Any:
    """The value that was described.

    Args:
        description: see `described`.
        name: of the value, see `tensors_of`.
        read: a tensor by its name.

    Raises:
        ValueError: it is no such description.
    """
    if isinstance(description, list):
        return [restored(each, f"{name}.{place}", read) for place, each in enumerate(description)]
    if not isinstance(description, dict):
        return description
    match description:
        case {"tensor": list()}:
            return read(name)
        case {"tuple": list(parts)}:
            return tuple(restored(parts, name, read))
        case {"dict": dict(parts)}:
            return {key: restored(each, f"{name}.{key}", read) for key, each in parts.items()}
    raise ValueError(f"{name} is not described")
