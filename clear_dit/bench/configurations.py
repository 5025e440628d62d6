"""Configurations of whole pipelines, not their weights: published ones by name, or a folder's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import RequestError
from ..generation.models import DEMOS, Model, find_model
from .published import CONFIGURATIONS, Configuration

TOKENIZER_CONFIG = "tokenizer_config.json"


def find_configuration(model: str) -> Configuration:
    """A configuration by name: one of CONFIGURATIONS, or a model as `find_model` takes it.

    Raises:
        RequestError: an unknown name, or no pipeline that is known, with all of its configuration
            files.
    """
    if model in CONFIGURATIONS:
        return CONFIGURATIONS[model]
    if model not in DEMOS and not Path(model).is_dir() and model.count("/") != 1:
        raise RequestError(
            f"--model must be one of {', '.join((*CONFIGURATIONS, *DEMOS))}, a folder in diffusers "
            f"format or a hub repository (owner/name); got {model!r}."
        )
    found = find_model(model)
    recipe = found.family.recipe
    transformer = found.index.config("transformer")
    return Configuration(
        transformer=transformer,
        autoencoder=found.index.config("vae"),
        text_encoders=tuple(
            found.index.config(part)
            for part in found.index.parts
            if part.startswith("text_encoder")
        ),
        text_length=_text_length(found, transformer),
        native_size=found.defaults.size,
        token_pixels=found.token_pixels,
        latent_pixels=found.token_pixels // recipe.patch,
    )


def _text_length(model: Model, transformer: dict[str, Any]) -> int:
    """As `generation.denoising.text_length`, for a pipeline that is not loaded."""
    recipe = model.family.recipe
    # What `Recipe.options` looks at.
    parts = {
        part: SimpleNamespace(**{"model_max_length": recipe.text_length} | settings)
        for part in model.index.parts
        if part.startswith("tokenizer")
        for settings in [model.index.config(part, TOKENIZER_CONFIG)]
    }
    config = SimpleNamespace(**{"guidance_embeds": False} | transformer)
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=config), **parts)
    length: int = recipe.options(pipe).get("max_sequence_length", recipe.text_length)
    return length
