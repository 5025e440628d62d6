"""What the page offers: models with their sizes and defaults, and the server's bounds."""

from __future__ import annotations

from typing import Any

from ..generation.models import Model, find_model
from ..versions import __version__
from .actions import Actions
from .caller import Caller
from .entry import default_side, loras
from .settings import (
    MAX_FULL_PIXELS,
    MAX_IMAGES,
    MAX_JOBS,
    MAX_PROMPT,
    MAX_STEPS,
    MAX_UPLOAD_BYTES,
    Settings,
)

SIDES = (512, 1024, 2048, 4096, 8192)
SHAPES = {
    "Square 1:1": (1, 1),
    "Landscape 3:2": (3, 2),
    "Landscape 16:9": (16, 9),
    "Panorama 2:1": (2, 1),
    "Portrait 2:3": (2, 3),
    "Portrait 9:16": (9, 16),
}
EXAMPLES = (
    "a violet tower in the desert at sunset, a golden moon on the right",
    "a blue house in the hills at night",
    "a pink balloon by the sea by day, a crimson sun on the left",
)


def offer(actions: Actions, caller: Caller) -> dict[str, Any]:
    """All that the page needs to know before the first image."""
    settings = actions.settings
    return {
        "account": caller.account,
        "version": __version__,
        "models": [_model(name, actions) for name in settings.models],
        "loras": list(loras(settings)),
        "examples": EXAMPLES,
        "shapes": SHAPES,
        "limits": {
            "pixels": settings.max_pixels,
            "full_pixels": MAX_FULL_PIXELS,
            "prompt": MAX_PROMPT,
            "steps": MAX_STEPS,
            "images": MAX_IMAGES,
            "jobs": MAX_JOBS,
            "upload_bytes": MAX_UPLOAD_BYTES,
        },
        "keep_days": settings.keep_days,
    }


def sizes(model: Model, settings: Settings) -> list[int]:
    """Longer sides to choose from, in pixels; the default is among them."""
    offered = {side for side in SIDES if side * side <= settings.max_pixels}
    return sorted(offered | {default_side(model, settings)})


def _model(name: str, actions: Actions) -> dict[str, Any]:
    model = find_model(name)
    defaults = model.defaults
    return {
        "name": name,
        "title": name.rstrip("/").rsplit("/", 1)[-1],
        "family": model.family.title,
        "size": default_side(model, actions.settings),
        "sizes": sizes(model, actions.settings),
        "step": model.side_pixels,
        "radius": defaults.radius,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "negative": model.takes_negative_prompt,
        "words": actions.reader(name).known_words(),
    }
