"""Configurations of whole pipelines, not their weights: published ones by name, or a folder's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..generation.models import DEMO_DEFAULTS, model_path
from .published import CONFIGURATIONS, Configuration


def find_configuration(model: str) -> Configuration:
    """A configuration by name: one of CONFIGURATIONS, "demo", or a folder in diffusers format.

    Raises:
        RequestError: an unknown name, or a folder that is not a FLUX pipeline.
    """
    if model in CONFIGURATIONS:
        return CONFIGURATIONS[model]
    if model != "demo" and not Path(model).is_dir():
        raise RequestError(
            f"--model must be one of {', '.join(CONFIGURATIONS)}, demo, or a folder in diffusers "
            f"format; got {model!r}."
        )
    found = _read_folder(Path(model_path(model)))
    return replace(found, native_size=DEMO_DEFAULTS["size"]) if model == "demo" else found


def _read_folder(folder: Path) -> Configuration:
    transformer = _read(folder / "transformer" / "config.json")
    # As `models.text_length`, for a pipeline that is not loaded.
    longest = 512 if transformer.get("guidance_embeds") else 256
    tokenizer = _read(folder / "tokenizer_2" / "tokenizer_config.json")
    return Configuration(
        transformer=transformer,
        autoencoder=_read(folder / "vae" / "config.json"),
        text_encoders=tuple(
            _read(folder / name / "config.json") for name in ("text_encoder", "text_encoder_2")
        ),
        text_length=min(longest, tokenizer.get("model_max_length", longest)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"--model: {path} is missing or is not JSON.") from error
    if not isinstance(found, dict):
        raise RequestError(f"--model: {path} is not a JSON object.")
    return found
