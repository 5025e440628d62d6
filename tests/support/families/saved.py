"""Tiny random pipelines of each family on disk, for what takes a model by its folder."""

from typing import Any

import transformers
from tokenizers.processors import TemplateProcessing

from clear_dit import CLEARPipeline

from .models import TEXT_CHANNELS, make_model
from .pipelines import LANGUAGE, PIPELINES, make_pipeline, make_qwen3_vl

# A token between texts, so that an empty one is not nothing, as in real tokenizers.
STARTED = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
# Qwen-Image 2.1's place for an image, which is in no text.
IMAGE = "<|image_pad|>"
# Layers of their text encoders whose states FLUX.2 and FLUX.3 take, and how many there are.
FLUX2_LAYERS, FLUX2_DEPTH = 3, 31
FLUX3_LAYERS, FLUX3_DEPTH = 8, 32


def save_pipeline(name: str, folder: Any, cls: type | None = None, **config: Any) -> int:
    """Save a pipeline of a family that runs as its stock calls are by default.

    Args:
        folder: to be made.
        cls: see `make_pipeline`.
        config: changes to the transformer's configuration.

    Returns:
        Side of a token, in pixels.
    """
    pipe = make_pipeline(name, cls)
    for part, tokenizer in pipe.components.items():
        if part.startswith(("tokenizer", "processor")):
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            tokenizer.backend_tokenizer.post_processor = STARTED
    if name == "flux2":
        config |= {"joint_attention_dim": FLUX2_LAYERS * TEXT_CHANNELS}
    elif name == "flux3":
        config |= {"joint_attention_dim": FLUX3_LAYERS * TEXT_CHANNELS}
    if config:
        pipe.transformer = make_model(name, **config)
    if name == "flux2":
        pipe.text_encoder = deep_mistral()
    elif name == "flux3":
        pipe.text_encoder = make_qwen3_vl(num_hidden_layers=FLUX3_DEPTH)
        pipe = CLEARPipeline(pipe)  # which says where it is saved
    pipe.save_pretrained(folder)
    return PIPELINES[name][2]


def deep_mistral() -> transformers.Mistral3ForConditionalGeneration:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**LANGUAGE | {"num_hidden_layers": FLUX2_DEPTH}),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()
