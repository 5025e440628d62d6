"""The version of this package, and of those that a result depends on."""

from __future__ import annotations

from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    import torch

    return {
        "clear_dit": __version__,
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
    }
