"""The one exception that means: the request was wrong, not the program."""

from __future__ import annotations


class RequestError(ValueError):
    """A bad request: one or two lines that say who, which rule, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on a CUDA device or on a CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )
