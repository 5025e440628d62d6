"""Configurations of whole pipelines, not their weights: published ones by name, or a folder's."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError
from ..generation.denoising import text_length
from ..generation.models import DEMOS, find_model
from ..generation.stage_plan import described
from .published import CONFIGURATIONS, Configuration


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
        text_length=text_length(described(found)),
        native_size=found.defaults.size,
        token_pixels=found.token_pixels,
        latent_pixels=found.token_pixels // recipe.patch,
    )
