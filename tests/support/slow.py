"""Which tests README's command leaves to `.ci/run` (see `slow` in pyproject.toml)."""

from collections.abc import Iterable
from typing import Any

import pytest

slow = pytest.mark.slow


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
