"""Writes a demo pipeline as a folder that its stock diffusers pipeline loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from clear_dit.demo import sd3
from clear_dit.demo.text import TextEncoders

SHIFT = 3.0  # static time shift of the sampler, right for 32x32 tokens


def build_pipeline(
    transformer: FluxTransformer2DModel, vae: AutoencoderTiny, encoders: TextEncoders
) -> FluxPipeline:
    """Put the trained parts together."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=encoders.clip,
        tokenizer=encoders.tokenizer,
        text_encoder_2=encoders.t5,
        tokenizer_2=encoders.tokenizer_2,
        transformer=transformer,
    )


def build_sd3_pipeline(
    transformer: SD3Transformer2DModel, vae: AutoencoderTiny, encoders: sd3.TextEncoders
) -> StableDiffusion3Pipeline:
    """Put the parts of the second demo together."""
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders.clip,
        tokenizer=encoders.tokenizer,
        text_encoder_2=encoders.clip_2,
        tokenizer_2=encoders.tokenizer,
        text_encoder_3=encoders.t5,
        tokenizer_3=encoders.tokenizer_3,
        transformer=transformer,
    )


def _name_fast_tokenizers(folder: Path) -> None:
    """Name the public tokenizer class, which every transformers release can load."""
    index = folder / "model_index.json"
    listed = json.loads(index.read_text())
    for part in (name for name in listed if name.startswith("tokenizer")):
        listed[part] = ["transformers", "PreTrainedTokenizerFast"]
        config = folder / part / "tokenizer_config.json"
        values = json.loads(config.read_text())
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(values, indent=2) + "\n")
    index.write_text(json.dumps(listed, indent=2) + "\n")


def export_pipeline(
    pipe: FluxPipeline | StableDiffusion3Pipeline, target: Path, extra: dict[str, bytes]
) -> None:
    """Save `pipe` to `target`, the transformer in bfloat16, and replace what was there at once.

    extra: further files (name to content), such as the training card.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    half = type(pipe.transformer).from_pretrained(
        partial / "transformer", torch_dtype=torch.bfloat16
    )
    half.save_pretrained(partial / "transformer")
    _name_fast_tokenizers(partial)
    # AutoencoderTiny adds this entry by itself and warns when it finds it in the file.
    config = partial / "vae" / "config.json"
    values = json.loads(config.read_text())
    values.pop("block_out_channels")
    config.write_text(json.dumps(values, indent=2) + "\n")
    for name, content in extra.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.chmod(0o755)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
