"""Prompts of a call: how many images they make, and encoding them once for all stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .checks import WHO


def count_images(options: Mapping[str, Any]) -> int:
    """How many images a stock pipeline's call makes.

    Args:
        options: its arguments.

    Raises:
        ValueError: there is neither a prompt nor embeddings of one, or an empty list.
    """
    given = options.get("prompt")
    if given is None:
        embeds = (name for name in options if name.startswith("prompt_embeds"))
        given = next((options[name] for name in embeds if options[name] is not None), None)
    number = 1 if isinstance(given, str) else 0 if given is None else len(given)
    if not number:
        raise ValueError(f"{WHO}: prompt must be a text or a list of them, got {given!r}.")
    copies: int = options["num_images_per_prompt"]
    return number * copies


class Texts:
    """What was encoded: the stages of a cascade, and other calls, ask for the same again."""

    def __init__(self) -> None:
        # With what was asked, of which an id stands for tensors and images: they must stay alive.
        self._known: dict[Any, tuple[Any, Any]] = {}

    def of(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`encode` of these arguments, or what it gave before."""
        asked = (args, tuple(sorted(kwargs.items())))
        key = _key(asked)
        if key not in self._known:
            self._known[key] = asked, self.encoded(functools.partial(encode, *args, **kwargs))
        return self._known[key][1]

    def encoded(self, encode: Callable[[], Any]) -> Any:
        """What is not known yet."""
        return encode()


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    plain = value is None or isinstance(value, (str, int, float, torch.device, torch.dtype))
    return value if plain else (type(value).__name__, id(value))
