"""Files that appear whole under their name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import RequestError, first_line

# safetensors has an exception of its own for a full disk.
FAILURES = (OSError, SafetensorError)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it.

    The temporary name is the same every time: what a killed process left is replaced by the next
    one. Two processes must not write the same path.

    Raises:
        OSError: it cannot be written, with the path and the reason; nothing is left.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, FAILURES):
            raise could_not_write(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; see `write_whole`."""
    write_whole(path, lambda temporary: save_file(dict(tensors), temporary, dict(header or {})))


def could_not_write(path: Path, error: Exception) -> OSError:
    """The error to raise for a file or folder that cannot be written."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return OSError(f"{path} could not be written ({reason}).")


def refuse_full_disk(out: Path, needed: int) -> None:
    """Refuse to begin what `needed` bytes in the folder `out` will not suffice for.

    Raises:
        RequestError: how much is needed, and how much there is.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise RequestError(
            f"--out: about {needed / 1e9:,.1f} GB are needed for {out}, and {free / 1e9:,.1f} GB "
            "are free there."
        )
