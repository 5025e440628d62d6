"""Progress on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from typing import Any

# Seconds between lines, and before the first: what is done sooner says nothing.
LINE_SECONDS = 30.0
_LINE = "{desc} {n_fmt}/{total_fmt}, {elapsed} passed, {remaining} left{postfix}"


def bar_options(shown: bool = True, line: str = _LINE) -> dict[str, Any]:
    """What tqdm takes, and diffusers' `set_progress_bar_config`, besides a title and a total.

    Args:
        shown: False for no progress at all.
        line: the `bar_format` where standard error is no terminal.
    """
    if not shown or sys.stderr.isatty():
        return {"disable": not shown}
    return {
        "disable": False,
        "file": _Lines(),
        "bar_format": line,
        "delay": LINE_SECONDS,
        "mininterval": LINE_SECONDS,
        "maxinterval": LINE_SECONDS,
        "miniters": 1,  # the clock alone decides
    }


class _Lines:
    """A file that prints what tqdm draws over and over as lines."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
