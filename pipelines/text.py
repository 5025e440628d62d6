"""Prompts of a call: how many images they make; rewritten and encoded once for all stages."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch

from .checks import WHO
from .text_encoders import encoders_alone


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
        """`encode`, a method, of these arguments, or what one of its name gave before."""
        asked = (encode.__name__, args, tuple(sorted(kwargs.items())))
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


def rewriter(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """A stock pipeline's method that rewrites prompts, for a `CLEARPipeline`.

    All stages of a call get what the first makes of a prompt, at its size where it asks for one.
    What is drawn on the way follows from the prompt: so do the texts of other ranks, and of a call
    that is resumed.

    Args:
        rewrite: (pipeline, prompt, ...) to other text.
    """
    signature = inspect.signature(rewrite)

    @functools.wraps(rewrite)
    def alike(self: Any, *args: Any, **kwargs: Any) -> Any:
        with encoders_alone(self):
            if self._texts is None:
                return rewrite(self, *args, **kwargs)
            given = signature.bind(self, *args, **kwargs).arguments
            del given["self"]
            sizes = {name: getattr(self.stages[0], name) for name in ("height", "width")}
            given |= {name: size for name, size in sizes.items() if name in given}
            return self._texts.of(_drawn_by_prompt(MethodType(rewrite, self)), **given)

    return alike


def _drawn_by_prompt(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rewrite)
    def drawn(prompt: str | list[str], **options: Any) -> Any:
        seed = int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:8]) >> 1
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            return rewrite(prompt, **options)

    return drawn
