"""Which tests README's command leaves to `.ci/run` (see `slow` in pyproject.toml)."""

from collections.abc import Iterable
from typing import Any

import pytest

slow = pytest.mark.slow

# Each puts its tokens, its text and its positions in another way; Krea 2 groups its queries.
FEW = ("flux", "sd3", "qwen-image", "krea2")


def slow_but(parameters: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, all of which are slow but the quick ones; tuples are several each."""
    parameters = list(parameters)
    assert all(each in parameters for each in quick)
    return [
        each
        if each in quick
        else pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=slow)
        for each in parameters
    ]


def few(families: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test, all of which are slow but a few families, or the named ones."""
    families = list(families)
    return slow_but(families, *(quick or (name for name in families if name in FEW)))
