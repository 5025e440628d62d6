"""Compiling a C++ file for this machine, on first use, into a folder of the user's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# No -ffast-math: masked scores and NaN must stay what they are.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-w")
SECONDS = 120


class BuildError(Exception):
    """Why there is no library, in a few words that follow "it"."""


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++ there is.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(named)
    except ValueError as error:
        raise BuildError(f"needs a C++ compiler, and $CXX is {named!r} ({error})") from error
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if chosen:
        raise BuildError(f"needs a C++ compiler, and $CXX is {named!r}, which is not found")
    raise BuildError("needs a C++ compiler (c++, g++, clang++ or $CXX), and there is none")


def load(source: Path, definitions: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a source file, compiled unless the user's cache folder has it.

    The cache folder is `clear-dit` in $XDG_CACHE_HOME (~/.cache). A library's name there tells
    source, headers beside it, command and all that the compiler says of itself and of this CPU.
    Where the folder cannot be written, every process compiles for itself.

    Args:
        definitions: of macros, as NAME=VALUE.

    Raises:
        BuildError: another system, no source, no compiler, or one that fails.
    """
    if os.name != "posix":
        raise BuildError("needs Linux or macOS")
    if not source.exists():  # a copy of this package may be of Python alone
        raise BuildError("is not part of this package")
    command = [*compiler(), *FLAGS, *(f"-D{each}" for each in definitions)]
    try:
        return _load(command, source)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"could not be compiled: {error}") from error


def load_for(
    head_dim: int, source: Path, function: str, arguments: Sequence[type], result: type | None
) -> ctypes.CDLL | str:
    """The library of a source file for a head_dim, or why there is none.

    Args:
        function: of the library, with the types of its arguments and of its result.
    """
    try:
        library = load(source, [f"HEAD_DIM={head_dim}"])
    except BuildError as error:
        return str(error)
    call = getattr(library, function)
    call.argtypes, call.restype = arguments, result
    return library


def _load(command: list[str], source: Path) -> ctypes.CDLL:
    machine = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    headers = [path.read_bytes() for path in sorted(source.parent.glob("*.h"))]
    text = b"\0".join([source.read_bytes(), *headers, repr(command).encode(), machine])
    name = f"{source.stem}-{hashlib.sha256(text).hexdigest()[:32]}.so"
    folder = _cache_folder()
    if folder is not None and (folder / name).exists():
        with suppress(OSError):  # damaged: compiled anew
            return ctypes.CDLL(str(folder / name))
    # In the folder itself: then a rename puts it there whole, whoever else does the same.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        library = Path(work) / name
        _run([*command, str(source), "-o", str(library)])
        if folder is not None:
            with library.open("rb") as file:
                os.fsync(file.fileno())  # else a crash could leave its name with half of it
            library = library.replace(folder / name)
        return ctypes.CDLL(str(library))  # once loaded, it needs its file no more


def _cache_folder() -> Path | None:
    """The folder, made if need be; None where this user alone cannot write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # A path that is not absolute is to be ignored, says the XDG specification.
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "clear-dit"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows the home
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if own and os.access(folder, os.W_OK) else None


def _run(command: list[str]) -> bytes:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[-1] if lines else "nothing")
        raise BuildError(f"could not be compiled: {command[0]} says: {said}")
    return done.stdout
