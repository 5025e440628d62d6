"""A stock pipeline of each family, of tiny random parts. Prompts may be any words."""

from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clear_dit import CLEARPipeline

from ..autoencoders import make_autoencoder
from .models import TEXT_CHANNELS, make_model

WORDS = ("a", "small", "red", "house", "by", "the", "sea")
VOCABULARY = {word: index for index, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
# Messages one after the other; what they say is text, or a list of texts.
CHAT = """{% for message in messages %}{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %} {% endfor %}"""

# Of transformers' language models.
LANGUAGE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": TEXT_CHANNELS,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
VISION = {"hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "depth": 1}


def make_parts(name: str) -> dict[str, Any]:
    """What a pipeline of a family is made of, by its arguments' names."""
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"transformer": make_model(name), "scheduler": scheduler, **PIPELINES[name][1]()}


def make_pipeline(name: str, cls: type | None = None) -> Any:
    """A pipeline of a family of `FAMILIES`; a token of FLUX's is 4 x 4 pixels.

    Args:
        cls: another than the stock text-to-image pipeline, of the same parts.
    """
    cls = cls or PIPELINES[name][0]
    if issubclass(cls, diffusers.ModularPipeline):
        blocks = cls().blocks
        blocks.sub_blocks.pop("prompt_upsampler", None)  # of FLUX.3: another language model
        pipe = blocks.init_pipeline()
        parts = make_parts(name)
        pipe.update_components(**{x: parts[x] for x in pipe.component_names if x in parts})
    else:
        pipe = cls(**make_parts(name))
    if name in ("qwen-image", "hunyuan-image"):
        pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a small {}", 2
        pipe.tokenizer_max_length = pipe.tokenizer_2_max_length = 12
    elif name == "krea2":
        pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "a small ", 2
        pipe.prompt_template_encode_suffix = " by the sea"
        pipe.prompt_template_encode_num_suffix_tokens = 3
    elif name == "qwen-image-2.1":
        pipe.prompt_template_t2i, pipe._drop_idx, pipe._img_token_id = "a small {}", 2, -1
    elif name == "longcat-image":
        pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix = "a small", "sea"
        pipe.tokenizer_max_length = 12
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_options(name: str) -> dict[str, Any]:
    """What a call of `make_pipeline(name)` needs besides prompts and size, for guidance too."""
    options: dict[str, Any] = {"max_sequence_length": 12}
    if name == "flux2":
        options["text_encoder_out_layers"] = (1,)
    elif name == "qwen-image":
        options |= {"true_cfg_scale": 4.0, "negative_prompt": ["a house", "sea"]}
    elif name == "hunyuan-image":
        options = {"negative_prompt": ["a house", "sea"]}
    elif name == "cogview4":
        options["negative_prompt"] = ["a house", "sea"]
    elif name == "flux3":
        options |= {"text_encoder_out_layers": (1,), "negative_prompt": "a house"}
    elif name == "qwen-image-2.1":
        options = {"true_cfg_scale": 4.0, "negative_prompt": ["a house", "sea"]}
    elif name == "longcat-image":
        options = {"negative_prompt": ["a house", "sea"], "enable_prompt_rewrite": False}
    elif name == "ernie-image":
        options = {"negative_prompt": ["a house", "sea"]}
    return options


def draw(pipe: Any, name: str, rows: int = 4, columns: int = 6, **options: Any) -> torch.Tensor:
    """Two images of two steps and of two prompts, (2, height, width, 3), from a fixed seed.

    Args:
        rows, columns: even, in tokens.
    """
    side, prompts = PIPELINES[name][2], ["a red house", "the small house by the sea"]
    given = {
        "height": side * rows,
        "width": side * columns,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        **call_options(name),
        **options,
    }
    if not isinstance(pipe, diffusers.ModularPipeline):
        return torch.from_numpy(pipe(prompt=prompts, **given).images)
    if "negative_prompt" in given:
        given["negative_prompt"] = "a house"
    if isinstance(pipe, CLEARPipeline):
        images = [pipe(prompt=prompt, **given).images for prompt in prompts]
    else:
        known = pipe.blocks.input_names
        given = {name: value for name, value in given.items() if name in known}
        images = [pipe(prompt=prompt, output="images", **given) for prompt in prompts]
    return torch.from_numpy(np.concatenate(images))  # FLUX.3's takes one prompt at a time


def make_tokenizer(cls: type = PreTrainedTokenizerFast) -> Any:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return cls(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=8,
        chat_template=CHAT,
    )


class Processor(PreTrainedTokenizerFast):
    """Of text alone, in the place of one of text and images, which holds a tokenizer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self

    def apply_chat_template(self, *args: Any, tokenize: bool = True, **options: Any) -> Any:
        """Text, or a batch of tokens."""
        found = super().apply_chat_template(*args, tokenize=tokenize, **options)
        return [found] if tokenize else found


def make_clip(cls: type, hidden_size: int = 8) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        projection_dim=hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return cls(config).eval()


def make_t5() -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY),
        d_model=TEXT_CHANNELS,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
    )
    return transformers.T5EncoderModel(config).eval()


def make_qwen_vl() -> transformers.Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=LANGUAGE | {"rope_parameters": rope},
        vision_config=VISION | {"out_hidden_size": TEXT_CHANNELS},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def make_qwen3_vl(**changes: Any) -> transformers.Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config=LANGUAGE | {"rope_parameters": rope} | changes,
        vision_config=VISION | {"out_hidden_size": TEXT_CHANNELS, "deepstack_visual_indexes": [0]},
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def make_mistral(**changes: Any) -> transformers.Mistral3ForConditionalGeneration:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**LANGUAGE | changes),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def tiny_autoencoder(latent_channels: int = 1, blocks: int = 2, **config: Any) -> Any:
    """One that reduces by 2^(blocks - 1)."""
    config |= {"latent_channels": latent_channels, "norm_num_groups": 2, "sample_size": 16}
    return make_autoencoder((4,) * blocks, **config)


def flux_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(shift_factor=0.0),
        "text_encoder": make_clip(transformers.CLIPTextModel),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": make_t5(),
        "tokenizer_2": make_tokenizer(),
    }


def chroma_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(shift_factor=0.0),
        "text_encoder": make_t5(),
        "tokenizer": make_tokenizer(),
    }


def flux2_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(cls=diffusers.AutoencoderKLFlux2),
        "text_encoder": make_mistral(),
        "tokenizer": make_tokenizer(),
    }


def sd3_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(4, shift_factor=0.0),
        "text_encoder": make_clip(transformers.CLIPTextModelWithProjection, 4),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": make_clip(transformers.CLIPTextModelWithProjection, 4),
        "tokenizer_2": make_tokenizer(),
        "text_encoder_3": make_t5(),
        "tokenizer_3": make_tokenizer(),
    }


def qwen_image_autoencoder() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=1,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0],
        latents_std=[1.0],
    ).eval()


def qwen_image_parts() -> dict[str, Any]:
    return {
        "vae": qwen_image_autoencoder(),
        "text_encoder": make_qwen_vl(),
        "tokenizer": make_tokenizer(),
    }


def z_image_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(4, shift_factor=0.0),
        "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**LANGUAGE)).eval(),
        "tokenizer": make_tokenizer(),
    }


def hunyuan_image_parts() -> dict[str, Any]:
    return {
        "vae": diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
            scaling_factor=1.0,
        ).eval(),
        "text_encoder": make_qwen_vl(),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": make_t5(),
        "tokenizer_2": make_tokenizer(),
        "guider": diffusers.AdaptiveProjectedMixGuidance(),
    }


def cogview4_parts() -> dict[str, Any]:
    return {
        # The pipeline takes multiples of 16 pixels only.
        "vae": tiny_autoencoder(4, blocks=4),
        "text_encoder": transformers.GlmModel(transformers.GlmConfig(**LANGUAGE)).eval(),
        "tokenizer": make_tokenizer(),
    }


def krea2_parts() -> dict[str, Any]:
    return {
        "vae": qwen_image_autoencoder(),
        "text_encoder": make_qwen3_vl().model,
        "tokenizer": make_tokenizer(),
        "text_encoder_select_layers": (1, 2),
    }


def flux3_parts() -> dict[str, Any]:
    return {
        "vae": tiny_autoencoder(cls=diffusers.AutoencoderKLFlux2),
        "text_encoder": make_qwen3_vl(),
        "tokenizer": make_tokenizer(Processor),
    }


def qwen_image21_parts() -> dict[str, Any]:
    return {
        "vae": diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1] * 5,  # 16 pixels a latent, which the pipeline has whatever is here
            num_res_blocks=1,
            temperal_downsample=[False] * 4,
            latents_mean=[0.1, 0.0, -0.2, 0.0],
            latents_std=[1.0, 2.0, 1.0, 0.5],
        ).eval(),
        "text_encoder": make_qwen3_vl(),
        "processor": make_tokenizer(Processor),
    }


def longcat_image_parts() -> dict[str, Any]:
    return {
        "transformer": make_model("longcat-image", in_channels=64),  # the pipeline's own number
        "vae": tiny_autoencoder(16, shift_factor=0.0),
        "text_encoder": make_qwen_vl(),
        "tokenizer": make_tokenizer(),
        "text_processor": make_tokenizer(Processor),
    }


def ernie_image_parts() -> dict[str, Any]:
    return {
        # The variance's epsilon that the pipeline has, whatever the autoencoder's.
        "vae": tiny_autoencoder(cls=diffusers.AutoencoderKLFlux2, batch_norm_eps=1e-5),
        "text_encoder": make_mistral().model,
        "tokenizer": make_tokenizer(),
    }


# Class, its parts besides transformer and scheduler, and the side of a token in pixels.
PIPELINES = {
    "flux": (diffusers.FluxPipeline, flux_parts, 4),
    "chroma": (diffusers.ChromaPipeline, chroma_parts, 4),
    "flux2": (diffusers.Flux2Pipeline, flux2_parts, 4),
    "sd3": (diffusers.StableDiffusion3Pipeline, sd3_parts, 4),
    "qwen-image": (diffusers.QwenImagePipeline, qwen_image_parts, 4),
    "z-image": (diffusers.ZImagePipeline, z_image_parts, 4),
    "hunyuan-image": (diffusers.HunyuanImagePipeline, hunyuan_image_parts, 2),
    "cogview4": (diffusers.CogView4Pipeline, cogview4_parts, 16),
    "krea2": (diffusers.Krea2Pipeline, krea2_parts, 4),
    "flux3": (diffusers.Flux3ModularPipeline, flux3_parts, 4),
    "qwen-image-2.1": (diffusers.QwenImage21Pipeline, qwen_image21_parts, 16),
    "longcat-image": (diffusers.LongCatImagePipeline, longcat_image_parts, 4),
    "ernie-image": (diffusers.ErnieImagePipeline, ernie_image_parts, 4),
}
