"""Configurations of published pipelines, by name.

A component is described as in its config.json, with the name of its class: "_class_name" for
diffusers, "architectures" for transformers. What is left out is the class's default. Where a
repository is gated, the numbers are those of diffusers' conversion scripts
(https://github.com/huggingface/diffusers/tree/main/scripts), as said at each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..generation.models import TOKEN_PIXELS

# Side of a latent in pixels, in most autoencoders.
LATENT_PIXELS = 8


@dataclass(frozen=True)
class Configuration:
    """What a pipeline is made of.

    Attributes:
        transformer, autoencoder: of diffusers.
        text_encoders: of transformers.
        text_length: text tokens the transformer is given, padding included.
        native_size: side of a square of as many pixels as it was trained at, in pixels; that of
            the family's published models where None.
        token_pixels: side of a token, in pixels.
        latent_pixels: side of the autoencoder's latents, in pixels.
    """

    transformer: dict[str, Any]
    autoencoder: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    text_length: int
    native_size: int | None = None
    token_pixels: int = TOKEN_PIXELS
    latent_pixels: int = LATENT_PIXELS

    @property
    def latents_of_token(self) -> int:
        """Side of a token, in latent pixels."""
        return self.token_pixels // self.latent_pixels


# https://huggingface.co/black-forest-labs/FLUX.1-dev and FLUX.1-schnell.
FLUX_TRANSFORMER: dict[str, Any] = {
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
# SD3.5's and Z-Image's too, but for the scale of the latents.
FLUX_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
T5_XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

# https://huggingface.co/lodestones/Chroma1-HD; the class's defaults are the same numbers.
CHROMA_TRANSFORMER: dict[str, Any] = {
    "_class_name": "ChromaTransformer2DModel",
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "in_channels": 64,
    "axes_dims_rope": [16, 56, 56],
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}

# https://huggingface.co/black-forest-labs/FLUX.2-dev and FLUX.2-klein-4B, by diffusers'
# scripts/convert_flux2_to_diffusers.py; the autoencoder is the class's default there.
FLUX2_TRANSFORMER: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "in_channels": 128,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
FLUX2_DEV: dict[str, Any] = FLUX2_TRANSFORMER | {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
FLUX2_KLEIN_4B: dict[str, Any] = FLUX2_TRANSFORMER | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
FLUX2_AUTOENCODER = {"_class_name": "AutoencoderKLFlux2"}
# Mistral-Small-3.2-24B-Instruct-2506, with its image encoder; transformers' defaults for the class
# are taken to be its numbers (24.0 billion parameters), which could not be looked up.
MISTRAL_SMALL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "tie_word_embeddings": False,
}
# https://huggingface.co/Qwen/Qwen3-4B
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3Model"],
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

# https://huggingface.co/stabilityai/stable-diffusion-3.5-large, which has no second attention in
# its blocks; gated: the numbers are those of others' copies of its config.json.
SD35_LARGE: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium; as above.
SD35_MEDIUM: dict[str, Any] = SD35_LARGE | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
CLIP_L_PROJECTED: dict[str, Any] = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "projection_dim": 768,
}
CLIP_G_PROJECTED: dict[str, Any] = CLIP_L_PROJECTED | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

# https://huggingface.co/Qwen/Qwen-Image; the autoencoder is the class's default.
QWEN_IMAGE: dict[str, Any] = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}
QWEN_IMAGE_AUTOENCODER = {"_class_name": "AutoencoderKLQwenImage"}
# https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct
QWEN25_VL_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}

# https://huggingface.co/Tongyi-MAI/Z-Image-Turbo
Z_IMAGE: dict[str, Any] = {
    "_class_name": "ZImageTransformer2DModel",
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}

# https://huggingface.co/hunyuanvideo-community/HunyuanImage-2.1-Diffusers, by diffusers'
# scripts/convert_hunyuan_image_to_diffusers.py.
HUNYUAN_IMAGE: dict[str, Any] = {
    "_class_name": "HunyuanImageTransformer2DModel",
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "num_attention_heads": 28,
    "attention_head_dim": 128,
    "patch_size": [1, 1],
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "rope_axes_dim": [64, 64],
    "guidance_embeds": False,
}
HUNYUAN_IMAGE_AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKLHunyuanImage",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "layers_per_block": 2,
    "spatial_compression_ratio": 32,
    "sample_size": 384,
}
# ByT5-small with tokens for fonts and colours.
BYT5_GLYPH: dict[str, Any] = T5_XXL | {
    "vocab_size": 1510,
    "d_model": 1472,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
}

# https://huggingface.co/zai-org/CogView4-6B, by diffusers'
# scripts/convert_cogview4_to_diffusers_megatron.py.
COGVIEW4: dict[str, Any] = {
    "_class_name": "CogView4Transformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 28,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "condition_dim": 256,
}
COGVIEW4_AUTOENCODER: dict[str, Any] = FLUX_AUTOENCODER | {
    "block_out_channels": [128, 512, 1024, 1024],
    "layers_per_block": 3,
    "mid_block_add_attention": False,
}
# https://huggingface.co/zai-org/glm-4-9b-hf: transformers' defaults for the class.
GLM4_9B = {"architectures": ["GlmModel"]}

# https://huggingface.co/krea/Krea-2-Raw, by the class's defaults and documentation (12.8 billion
# parameters). The autoencoder is Qwen-Image's.
KREA_2: dict[str, Any] = {
    "_class_name": "Krea2Transformer2DModel",
    "in_channels": 64,
    "num_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "num_key_value_heads": 12,
    "intermediate_size": 16384,
    "text_hidden_dim": 2560,
    "num_text_layers": 12,
    "axes_dims_rope": [32, 48, 48],
}
# https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct and Qwen3-VL-8B-Instruct.
QWEN3_VL_4B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}
QWEN3_VL_8B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "text_config": QWEN3_VL_4B["text_config"] | {"hidden_size": 4096, "intermediate_size": 12288},
    "vision_config": {"out_hidden_size": 4096},  # and the class's defaults
    "tie_word_embeddings": False,
}

# FLUX.3 by the class's defaults; the width of its text, 20480, is that of eight layers of
# Qwen3-VL-4B, which its modular pipeline stacks. The autoencoder is FLUX.2's class.
FLUX3: dict[str, Any] = {
    "_class_name": "Flux3Transformer2DModel",
    "in_channels": 128,
    "cond_in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 20480,
    "axes_dims_rope": [32, 32, 32, 32],
}

# https://huggingface.co/Qwen/Qwen-Image-2.1, by the class's defaults and documentation; the
# autoencoder is the class's default.
QWEN_IMAGE_21: dict[str, Any] = {
    "_class_name": "QwenImage21Transformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 32,
    "context_in_dim": 4096,
    "mlp_ratio": 3,
    "axes_dims_rope": [16, 56, 56],
}
QWEN_IMAGE_21_AUTOENCODER = {"_class_name": "AutoencoderKLQwenImage21"}

# https://huggingface.co/meituan-longcat/LongCat-Image, by the class's defaults; its encoder is
# Qwen2.5-VL-7B, its autoencoder has FLUX.1's class and channels.
LONGCAT_IMAGE: dict[str, Any] = {
    "_class_name": "LongCatImageTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}

# https://huggingface.co/baidu/ERNIE-Image: transformer/config.json and text_encoder/config.json.
ERNIE_IMAGE: dict[str, Any] = {
    "_class_name": "ErnieImageTransformer2DModel",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "text_in_dim": 3072,
    "rope_theta": 256,
    "rope_axes_dim": [32, 48, 48],
}
MINISTRAL_3B: dict[str, Any] = {
    "architectures": ["Mistral3Model"],
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tie_word_embeddings": True,
}

SD35_ENCODERS: tuple[dict[str, Any], ...] = (CLIP_L_PROJECTED, CLIP_G_PROJECTED, T5_XXL)
HUNYUAN_IMAGE_ENCODERS: tuple[dict[str, Any], ...] = (QWEN25_VL_7B, BYT5_GLYPH)

# Text lengths are the longest the stock pipelines give by default, or long ones where there is no
# such limit.
CONFIGURATIONS: dict[str, Configuration] = {
    "flux-dev": Configuration(
        FLUX_TRANSFORMER | {"guidance_embeds": True}, FLUX_AUTOENCODER, (CLIP_L, T5_XXL), 512
    ),
    "flux-schnell": Configuration(
        FLUX_TRANSFORMER | {"guidance_embeds": False}, FLUX_AUTOENCODER, (CLIP_L, T5_XXL), 256
    ),
    "chroma": Configuration(CHROMA_TRANSFORMER, FLUX_AUTOENCODER, (T5_XXL,), 512),
    "flux2-dev": Configuration(FLUX2_DEV, FLUX2_AUTOENCODER, (MISTRAL_SMALL,), 512),
    "flux2-klein-4b": Configuration(FLUX2_KLEIN_4B, FLUX2_AUTOENCODER, (QWEN3_4B,), 512),
    # CLIP's 77 tokens and T5's 256.
    "sd35-large": Configuration(SD35_LARGE, FLUX_AUTOENCODER, SD35_ENCODERS, 333),
    "sd35-medium": Configuration(SD35_MEDIUM, FLUX_AUTOENCODER, SD35_ENCODERS, 333),
    "qwen-image": Configuration(QWEN_IMAGE, QWEN_IMAGE_AUTOENCODER, (QWEN25_VL_7B,), 1024),
    "z-image": Configuration(Z_IMAGE, FLUX_AUTOENCODER, (QWEN3_4B,), 512),
    # Of two encoders, 1000 and 128 tokens.
    "hunyuanimage-2.1": Configuration(
        HUNYUAN_IMAGE,
        HUNYUAN_IMAGE_AUTOENCODER,
        HUNYUAN_IMAGE_ENCODERS,
        1128,
        token_pixels=32,
        latent_pixels=32,
    ),
    "cogview4": Configuration(COGVIEW4, COGVIEW4_AUTOENCODER, (GLM4_9B,), 1024),
    "krea-2": Configuration(KREA_2, QWEN_IMAGE_AUTOENCODER, (QWEN3_VL_4B,), 512),
    # Multiples of 80 tokens, however long the prompt.
    "flux3": Configuration(FLUX3, FLUX2_AUTOENCODER, (QWEN3_VL_4B,), 480),
    "qwen-image-2.1": Configuration(
        QWEN_IMAGE_21, QWEN_IMAGE_21_AUTOENCODER, (QWEN3_VL_8B,), 512, latent_pixels=16
    ),
    "longcat-image": Configuration(LONGCAT_IMAGE, FLUX_AUTOENCODER, (QWEN25_VL_7B,), 512),
    "ernie-image": Configuration(ERNIE_IMAGE, FLUX2_AUTOENCODER, (MINISTRAL_3B,), 512),
}
