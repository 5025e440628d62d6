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
# Text encoders of FLUX.2 and FLUX.3: how many layers there are, and of how many text is made.
FLUX2_LAYERS, FLUX3_LAYERS = (30, 3), (32, 8)
# A token between texts, so that an empty one is not nothing, as in real tokenizers.
STARTED = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
# Qwen-Image 2.1's place for an image; else any word that is not known would stand for it.
IMAGE = "<|image_pad|>"


def save_folder(name: str, folder: Path, cls: type | None = None, **config: Any) -> Path:
    """Save a pipeline of a family that runs as its stock calls are by default.

    Args:
        folder: to be made.
        cls: see `make_pipeline`.
        config: changes to the transformer's configuration.
    """
    pipe = make_pipeline(name, cls)
    for part, tokenizer in pipe.components.items():
        if part.startswith(("tokenizer", "processor")):
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            tokenizer.backend_tokenizer.post_processor = STARTED
    if name == "longcat-image":  # any word ends a rewritten prompt, else it has 512
        encoder = pipe.text_encoder
        encoder.generation_config.eos_token_id = list(
            range(encoder.get_input_embeddings().num_embeddings)
        )
    changed: dict[str, Any] = {}
    if name == "flux2":
        layers, taken = FLUX2_LAYERS
        changed["text_encoder"] = make_mistral(num_hidden_layers=layers)
        config |= {"joint_attention_dim": taken * TEXT_CHANNELS}
    elif name == "flux3":
        layers, taken = FLUX3_LAYERS
        changed["text_encoder"] = make_qwen3_vl(num_hidden_layers=layers)
        config |= {"joint_attention_dim": taken * TEXT_CHANNELS}
    elif name == "qwen-image-2.1":
        sides = {"dim_mult": [1] * 5, "temperal_downsample": [False] * 4}  # 16 pixels a latent
        changed["vae"] = type(pipe.vae).from_config({**pipe.vae.config, **sides}).eval()
    if config:
        changed["transformer"] = make_model(name, **config)
    for part, module in changed.items():
        setattr(pipe, part, module)
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
