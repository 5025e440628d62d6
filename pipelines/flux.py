"""FLUX.1's face of `CLEARPipeline`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, FluxPipelineOutput
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from .cascade.enlarge import Enlarger
from .cascade.presets import AUTO
from .cascade.resolution import Resolution
from .cascade.stages import Stage
from .checks import check_side
from .flux_text import EncodedPrompts, count_images, encode_prompts, for_call
from .pipeline import CLEARPipeline
from .text import Texts
from .text_encoders import encoders_alone


class CLEARFluxPipeline(CLEARPipeline, FluxPipeline):
    """`diffusers.FluxPipeline` that generates any size, with CLEAR's methods on it.

    It is `CLEARPipeline` for FLUX.1, and is made as `FluxPipeline` is, too. It gives the
    transformer position ids in float32: bfloat16 cannot tell neighbours above 256 apart, which is a
    side of 4096 pixels.

    Args:
        native_size: side of a square of as many pixels as the model was trained at, in pixels:
            1024 where None, as FLUX.1; 512 for the demo pipeline. Saved with the pipeline.
        scheduler, vae, ...: as in `FluxPipeline`.
    """

    stock: type[DiffusionPipeline] = FluxPipeline

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        native_size: int | None = None,
    ) -> None:
        FluxPipeline.__init__(
            self,
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            transformer,
            image_encoder,
            feature_extractor,
        )
        self._begin(native_size)

    # Documented there; written down for editors. A test compares it with `FluxPipeline`'s and ours.
    def __call__(  # type: ignore[override] # names what that takes as keywords
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        image: Any = None,
        enlarge: Any = None,
        preset: str = AUTO,
        strength: float | Sequence[float] | None = None,
        stage_steps: int | Sequence[int] | None = None,
        cascade: bool | None = None,
        low_resolution_guidance: float | None = None,
        upscaler: Enlarger | None = None,
        stages_dir: str | os.PathLike[str] | None = None,
        resolution: Callable[[int, int], Resolution] | None = None,
        texts: Texts | None = None,
    ) -> Any:
        options = {name: value for name, value in locals().items() if name != "self"}
        return CLEARPipeline.__call__(self, **options)

    def _begin(self, native_size: int | None) -> None:
        super()._begin(native_size)
        if native_size is not None:
            self.default_sample_size: int = native_size // self.vae_scale_factor

    @property
    def native_size(self) -> int:
        """Side of a square of as many pixels as the model was trained at, in pixels."""
        return self.default_sample_size * self.vae_scale_factor

    def encode_prompt(
        self,
        prompt: Any,
        prompt_2: Any = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in `FluxPipeline`; threads that share text encoders or tokenizers take turns.

        `EncodedPrompts` have their embeddings with them.
        """
        if isinstance(prompt, EncodedPrompts):
            prompt, prompt_embeds, pooled_prompt_embeds = None, prompt.embeds, prompt.pooled
        asked = (
            prompt,
            prompt_2,
            device,
            num_images_per_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            max_sequence_length,
        )
        encode = MethodType(FluxPipeline.encode_prompt, self)
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        with encoders_alone(self, lora_scale):
            if self._texts is None or prompt_embeds is not None:
                found = encode(*asked)
            else:
                found = self._texts.of(encode, *asked)
        return found

    def _text_length(self, options: dict[str, Any]) -> int:
        embeds = options["prompt_embeds"]
        if embeds is not None:
            return int(embeds.shape[1])
        # Without a number, as many as the tokenizer pads to.
        return options["max_sequence_length"] or int(self.tokenizer_2.model_max_length)

    def _count_images(self, options: dict[str, Any]) -> tuple[int, int]:
        return count_images(options)

    def _common(self, options: dict[str, Any], batch: int) -> dict[str, Any]:
        others = super()._common(options, batch)
        text = {"num_images_per_prompt", *(name for name in others if _is_text(name))}
        encoded = encode_prompts(self, options, batch)
        return encoded | {name: others[name] for name in others if name not in text}

    def _first_latents(
        self,
        options: dict[str, Any],
        common: dict[str, Any],
        noises: int,
        batch: int,
        stage: Stage,
    ) -> torch.Tensor | None:
        latents: torch.Tensor | None = options["latents"]
        if noises < batch and latents is None and stage.strength is None:
            latents, _ = self.prepare_latents(
                noises,
                self.transformer.config.in_channels // 4,
                stage.height,
                stage.width,
                common["prompt_embeds"].dtype,
                self._execution_device,
                options["generator"],
            )
        return None if latents is None else latents.expand(batch, -1, -1)

    def _for_stock(self, options: dict[str, Any]) -> dict[str, Any]:
        return for_call(options)

    def _output(self, images: Any) -> Any:
        return FluxPipelineOutput(images=images)

    def check_inputs(
        self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any
    ) -> None:
        """As in `FluxPipeline`, but sizes are refused and not rounded.

        Raises:
            ValueError: height or width is not a positive multiple of a token's side.
        """
        height = check_side("height", height, self.token_pixels)
        width = check_side("width", width, self.token_pixels)
        FluxPipeline.check_inputs(self, prompt, prompt_2, height, width, *args, **kwargs)

    @staticmethod
    def _prepare_latent_image_ids(
        batch_size: int, height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        # Not by FluxPipeline's, which makes them in the default dtype.
        ids = torch.zeros(height, width, 3, dtype=torch.float32, device=device)
        ids[..., 1] = torch.arange(height, device=device)[:, None]
        ids[..., 2] = torch.arange(width, device=device)
        return ids.flatten(0, 1)


def _is_text(name: str) -> bool:
    """Whether an argument of `FluxPipeline.__call__` is a prompt, or embeddings of some."""
    return name.removeprefix("negative_").removeprefix("pooled_").startswith("prompt")
