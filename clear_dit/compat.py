"""Refuses library versions this package does not work with, before anything breaks half-way.

Versions are read from package metadata, so that `import clear_dit` stays quick. Names inside
diffusers are looked for when the plugin is first used.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import Any

# The same as in pyproject.toml; a test compares them.
MINIMUM = {"torch": "2.9", "diffusers": "0.38"}


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: "2.13.0+cpu" -> (2, 13, 0), "0.39.0.dev0" -> (0, 39, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def check_versions() -> None:
    """Refuse too old libraries, and that PyTorch is missing.

    The kernels do without diffusers: that it is missing is said by what needs it.

    Raises:
        ImportError: see `check_version`.
    """
    check_version("torch")
    if _installed("diffusers") is not None:
        check_version("diffusers")


def check_version(library: str) -> None:
    """Refuse a library of MINIMUM that is missing or too old.

    Raises:
        ImportError: which library, the version found, the version needed, and what to do.
    """
    needed, found = MINIMUM[library], _installed(library)
    if found is None or release(found) < release(needed):
        raise ImportError(
            f"clear_dit needs {library} {needed} or newer, found {found or 'none'}; "
            f'run: pip install "{library}>={needed}"'
        )


def _installed(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def names_from(module: str, *names: str) -> list[Any]:
    """Import names that a library does not promise to keep.

    Raises:
        ImportError: the library is missing, or a name is gone, in one line that says which and
            what to do.
    """
    library = module.partition(".")[0]
    check_version(library)
    try:
        source = import_module(module)
        return [getattr(source, name) for name in names]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"clear_dit does not know {library} {metadata.version(library)}: {error}; "
            f"install the {library} of constraints.txt, or a newer clear_dit."
        ) from error
