"""Configurations of whole pipelines, without their weights: published ones by name, or a folder's.

A component is described as in its config.json, with the name of its class: "_class_name" for
diffusers, "architectures" for transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..models import DEMO_DEFAULTS, FLUX_DEFAULTS, model_path


@dataclass(frozen=True)
class Configuration:
    """What a pipeline is made of.

    Attributes:
        transformer, autoencoder: of diffusers.
        text_encoders: of transformers.
        text_length: text tokens the transformer is given, padding included.
        native_size: side of a square of as many pixels as it was trained at, in pixels.
    """

    transformer: dict[str, Any]
    autoencoder: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    text_length: int
    native_size: int = FLUX_DEFAULTS.size


FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

# The config.json files of black-forest-labs/FLUX.1-dev and FLUX.1-schnell.
CONFIGURATIONS = {
    "flux-dev": Configuration(
        FLUX_TRANSFORMER | {"guidance_embeds": True}, FLUX_AUTOENCODER, (CLIP_L, T5_XXL), 512
    ),
    "flux-schnell": Configuration(
        FLUX_TRANSFORMER | {"guidance_embeds": False}, FLUX_AUTOENCODER, (CLIP_L, T5_XXL), 256
    ),
}


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
    return replace(found, native_size=DEMO_DEFAULTS.size) if model == "demo" else found


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
