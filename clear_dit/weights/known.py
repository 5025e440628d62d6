"""Fine-tuned weights that are known to fit a model: what `--weights auto` takes."""

from __future__ import annotations

from ..files import ASSETS
from .load import published_name

AUTO = "auto"

# A folder for each setting of the demo, "r4" or "r4-down4", with the weights and their card.
DEMO_ADAPTERS = ASSETS / "demo-adapters"

# https://huggingface.co/Huage001/CLEAR, by the method's authors. FLUX.1-schnell takes those of
# FLUX.1-dev (arXiv 2412.16112, "zero-shot").
PUBLISHED = "Huage001/CLEAR"
PUBLISHED_MODELS = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
PUBLISHED_SETTINGS = ((8, 1), (16, 1), (32, 1), (8, 4), (16, 4))


def adapter_folder(radius: int, down_factor: int) -> str:
    """The name of a setting's folder."""
    return f"r{radius}" + (f"-down{down_factor}" if down_factor > 1 else "")


def known_weights(model: str, radius: int, down_factor: int) -> str | None:
    """The weights made for a model and a setting, as `apply_clear` takes them.

    Args:
        model: "demo", a folder or a hub repository.
        radius, down_factor: of the window, in tokens.

    Returns:
        A file of this package for the demo, the authors' hub repository for FLUX.1-dev and
        FLUX.1-schnell; None where there are none.
    """
    if model == "demo":
        folder = DEMO_ADAPTERS / adapter_folder(radius, down_factor)
        file = folder / published_name(radius, down_factor)
        return str(file) if file.is_file() else None
    if model in PUBLISHED_MODELS and (radius, down_factor) in PUBLISHED_SETTINGS:
        return PUBLISHED
    return None
