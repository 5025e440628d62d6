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
    """Refuse missing or too old libraries.

    Raises:
        ImportError: which library, the version found, the version needed, and what to do.
    """
    for library, needed in MINIMUM.items():
        try:
            found = metadata.version(library)
        except metadata.PackageNotFoundError:
            found = "none"
        if release(found) < release(needed):
            raise ImportError(
                f"clear_dit needs {library} {needed} or newer, found {found}; "
                f'run: pip install "{library}>={needed}"'
            )


def names_from(module: str, *names: str) -> list[Any]:
    """Import names that a library does not promise to keep.

    Raises:
        ImportError: a name is gone, in one line that says which and what to do.
    """
    library = module.partition(".")[0]
    try:
        source = import_module(module)
        return [getattr(source, name) for name in names]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"clear_dit does not know {library} {metadata.version(library)}: {error}; "
            f"install the {library} of constraints.txt, or a newer clear_dit."
        ) from error
