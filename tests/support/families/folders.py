"""The tiny pipelines of `pipelines.py` as folders, as `--model` takes them."""

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from clear_dit import CLEARPipeline
from clear_dit.generation.models import quiet_libraries

from .models import TEXT_CHANNELS, make_model
from .pipelines import PIPELINES, make_mistral, make_pipeline, make_qwen3_vl

# The side of a square of as many pixels as the models were trained at, in tokens.
NATIVE = 8
# What text is made of in FLUX.2 and FLUX.3: 3 and 8 of their text encoders' layers.
FLUX2_LAYERS, FLUX3_LAYERS = 30, 32


def save_folder(name: str, folder: Path) -> Path:
    """Save a pipeline of a family, at its default prompt settings."""
    pipe = make_pipeline(name)
    if name == "flux2":
        pipe.register_modules(
            text_encoder=make_mistral(num_hidden_layers=FLUX2_LAYERS),
            transformer=make_model(name, joint_attention_dim=3 * TEXT_CHANNELS),
        )
    elif name == "flux3":
        pipe.update_components(
            text_encoder=make_qwen3_vl(num_hidden_layers=FLUX3_LAYERS),
            transformer=make_model(name, joint_attention_dim=8 * TEXT_CHANNELS),
        )
    elif name == "qwen-image-2.1":
        # Else any word that is not known would stand for it.
        pipe.processor.add_tokens(["<|image_pad|>"], special_tokens=True)
        sides = {"dim_mult": [1] * 5, "temperal_downsample": [False] * 4}  # 16 pixels a latent
        pipe.register_modules(vae=type(pipe.vae).from_config({**pipe.vae.config, **sides}).eval())
    if name in ("cogview4", "flux3"):  # whose text is never empty
        tokenizer = pipe.tokenizer
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
        )
    with quiet_libraries():
        CLEARPipeline(pipe, native_size=NATIVE * token_pixels(name)).save_pretrained(folder)
    return folder


def token_pixels(name: str) -> int:
    """Side of a token of a family's tiny pipeline."""
    side: int = PIPELINES[name][2]
    return side


def size_options(name: str, rows: int, columns: int) -> tuple[Any, ...]:
    """Of the command line, for an image of so many tokens."""
    side = token_pixels(name)
    return ("--height", rows * side, "--width", columns * side)
