"""Fine-tuned weights that are known to fit a model: what `--weights auto` takes."""

from __future__ import annotations

from ..files import ASSETS
from .load import published_name

AUTO = "auto"

# A folder for each setting of the demo, "r4", "r4-down4" or "r4-far": the weights and their card.
DEMO_ADAPTERS = ASSETS / "demo-adapters"

# https://huggingface.co/Huage001/CLEAR, by the method's authors. FLUX.1-schnell takes those of
# FLUX.1-dev (arXiv 2412.16112, "zero-shot").
PUBLISHED = "Huage001/CLEAR"
PUBLISHED_MODELS = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
PUBLISHED_SETTINGS = ((8, 1), (16, 1), (32, 1), (8, 4), (16, 4))


def adapter_folder(radius: int, down_factor: int, far: bool = False) -> str:
    """The name of a setting's folder."""
    pooled = f"-down{down_factor}" if down_factor > 1 else ""
    return f"r{radius}{pooled}{'-far' if far else ''}"


def known_weights(model: str, radius: int, down_factor: int, far: bool | None = None) -> str | None:
    """The weights made for a model and a setting, as `apply_clear` takes them.

    Args:
        model: "demo", a folder or a hub repository.
        radius, down_factor: of the window, in tokens.
        far: only those made for far keys, or only those made without; None takes what there is,
            those for far keys first.

    Returns:
        A file of this package for the demo, the authors' hub repository for FLUX.1-dev and
        FLUX.1-schnell; None where there are none.
    """
    if model == "demo":
        for made_for_far in (True, False) if far is None else (far,):
            setting = (radius, down_factor, made_for_far)
            file = DEMO_ADAPTERS / adapter_folder(*setting) / published_name(*setting)
            if file.is_file():
                return str(file)
    elif model in PUBLISHED_MODELS and (radius, down_factor) in PUBLISHED_SETTINGS and not far:
        return PUBLISHED
    return None
