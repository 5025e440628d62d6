"""FLUX text-to-image with CLEAR, at any size: above the native one stage by stage."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, FluxPipelineOutput
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from clear_dit.attention.processor import CLEARProcessor
from clear_dit.families.table import transformer_of
from clear_dit.kernels.numbers import number
from clear_dit.plugin import install
from clear_dit.weights.load import load_clear_weights
from clear_dit.weights.state import ClearState
from clear_dit.wrappers import unwrapped

from .cascade.given_image import enlarged_size, pixels_from
from .cascade.resolution import Resolution
from .cascade.run import Request, images_from, run_stages
from .cascade.stage_attention import can_run_full, pools_keys, runs_clear
from .cascade.stage_files import StageFiles
from .cascade.stages import Stage, plan_stages
from .checks import (
    check_generators,
    check_options,
    check_shared,
    check_side,
    check_stages,
    plain_numbers,
)
from .identity import check_agreement, request_identity
from .memory_need import refuse_too_large
from .parallel.patch_parallel import PatchParallel
from .text import EncodedPrompts, count_images, encode_prompts, for_call
from .text_encoders import encoders_alone

WHO = "CLEARFluxPipeline"
# What `FluxPipeline.__call__` takes and the same in every stage.
SHARED = (
    "true_cfg_scale",
    "guidance_scale",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
    "joint_attention_kwargs",
    "max_sequence_length",
)

logger = logging.getLogger(__name__)

_PARENT = inspect.signature(FluxPipeline.__call__)


class CLEARFluxPipeline(FluxPipeline):
    """`diffusers.FluxPipeline` that generates any size, with CLEAR's two methods on it.

    An image well above the native size is generated in stages: one at the native size, then each
    from the enlarged image before it (see `__call__`). Unlike its parent it refuses sizes that
    are not whole tokens (16 pixels) instead of rounding them, and gives the transformer position
    ids in float32: bfloat16 cannot tell neighbours above 256 apart, which is a side of 4096 pixels.

    Args:
        native_size: side of a square of as many pixels as the model was trained at, in pixels:
            1024 where None, as FLUX.1; 512 for the demo pipeline. Saved with the pipeline.
        scheduler, vae, ...: as in `FluxPipeline`.
    """

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
        super().__init__(
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
        if native_size is not None:
            native_size = check_side("native_size", native_size, self._token_pixels)
            self.default_sample_size = native_size // self.vae_scale_factor
        self.register_to_config(native_size=native_size)
        self._patch_parallel: PatchParallel | None = None
        self._interrupt = False
        # Of a call's own copy: what it is of, and where it is.
        self._original: CLEARFluxPipeline | None = None
        self._stage: Stage | None = None
        self._stages: tuple[Stage, ...] = ()
        # The copies whose calls are under way.
        self._calls: list[CLEARFluxPipeline] = []

    @property
    def native_size(self) -> int:
        """Side of a square of as many pixels as the model was trained at, in pixels."""
        return self.default_sample_size * self.vae_scale_factor

    @property
    def stage(self) -> Stage | None:
        """The stage that is being generated; None outside of `__call__`.

        A callback's pipeline tells of the callback's call, another one of the latest call.
        """
        return self.latest_call._stage

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The plan that `stage` is of; empty outside of `__call__`."""
        return self.latest_call._stages

    @property
    def latest_call(self) -> CLEARFluxPipeline:
        """The copy whose call is under way, the latest of several; the pipeline itself if none."""
        return next(reversed(tuple(self._calls)), self)

    @property
    def interrupt(self) -> bool:
        """Whether the call shall end after the step that is under way."""
        return self._interrupt or (self._original is not None and self._original._interrupt)

    @contextmanager
    def _call(self) -> Iterator[CLEARFluxPipeline]:
        """A copy of the pipeline for one call, with the same models and a scheduler of its own.

        `FluxPipeline.__call__` keeps its guidance, its step and more on the pipeline, and the noise
        levels on the scheduler.
        """
        call = copy.copy(self)
        call._original, call._calls = self, []
        call.scheduler = copy.deepcopy(self.scheduler)
        self._calls.append(call)
        try:
            yield call
        finally:
            self._calls.remove(call)

    @property
    def patch_parallel(self) -> PatchParallel | None:
        """The ranks that share this pipeline's images, see `enable_patch_parallel`."""
        return self._patch_parallel

    @property
    def _token_pixels(self) -> int:
        return 2 * self.vae_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        image: Any = None,
        strength: float | Sequence[float] | None = None,
        cascade: bool | None = None,
        low_resolution_guidance: float | None = None,
        stages_dir: str | os.PathLike[str] | None = None,
        resolution: Callable[[int, int], Resolution] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate an image of any size, or enlarge one.

        Takes what `FluxPipeline.__call__` takes, and:

        Args:
            image: an image to enlarge in place of the first stage: a PIL image, a list of them
                (one for each prompt) or a float tensor (batch, 3, height, width) in [0, 1].
                `height` and `width` (pixels) are then twice its own where None, and must have its
                aspect ratio.
            strength: from 0 (only enlarge) to 1 (ignore the enlarged image), the noise level at
                which a stage starts to repaint it; one number, or one for each stage that
                enlarges; 0.55 where None. It does not depend on the scheduler's shift:
                `FluxImg2ImgPipeline`'s strength s starts at 3 s / (1 + 2 s) with a shift of 3.
            cascade: whether to start at the native size; None does where the image has over 1.25
                times the native number of pixels.
            low_resolution_guidance: from 0 (none) to 1, how much the low frequencies of the
                previous image steer each stage that enlarges. None: 1 above 4096 pixels a side,
                else 0.
            stages_dir: a folder in which finished stages are kept. The same call goes on after
                the last one there, bit for bit as if it had not been interrupted. Needs a
                `generator`; a callback that changes latents is not told apart.

            resolution: positions, shift and proportional attention for a stage's height and width
                in pixels; `settings_for` where None. `lambda height, width: Resolution()` generates
                every stage as the model was trained.

        `num_inference_steps` is that of a whole schedule, of which a stage that enlarges takes its
        share; `sigmas` and `latents` are those of a first stage without an image. Noise is drawn
        on the generator's device. The pipeline that `callback_on_step_end` is given is the call's
        own copy, with the same models: `pipe.stage` is the stage; `pipe._interrupt = True` ends the
        work after the step, and the image that is returned has the size of that stage. Set on the
        pipeline itself it ends every call that is under way.

        Threads may call one pipeline at the same time, or several with the same models and
        scheduler. A stage of full attention has the transformer for itself where CLEAR weights are
        loaded, a forward with extended positions for its duration: others wait.

        Returns:
            `FluxPipelineOutput`, or a tuple; images as `output_type` says: "pil", "np", "pt", or
            "latent": packed, (batch, tokens, channels).

        Raises:
            ValueError: a bad request, before any work; or ranks that do not agree on one.
            FloatingPointError: latents are NaN or infinite; stage and step are named.
        """
        given = _PARENT.bind(self, *args, **kwargs)
        given.apply_defaults()
        options = plain_numbers(given.arguments, self._token_pixels)
        if low_resolution_guidance is not None:
            who = f"{WHO}: low_resolution_guidance"
            low_resolution_guidance = number(who, low_resolution_guidance, 0, 1)
        pixels = [] if image is None else pixels_from(image, self._token_pixels)
        image_size = (pixels[0].shape[-2], pixels[0].shape[-1]) if pixels else None
        height, width = self._size(options["height"], options["width"], image_size)
        check_options(self, options, height, width)
        embeds, sigmas = options["prompt_embeds"], options["sigmas"]
        if embeds is None:  # without a number, as many as the tokenizer pads to
            text_length = options["max_sequence_length"] or self.tokenizer_2.model_max_length
        else:
            text_length = embeds.shape[1]
        model = transformer_of(self, WHO, "cascade")
        stages = plan_stages(
            height,
            width,
            native_size=self.native_size,
            token_pixels=self._token_pixels,
            text_length=text_length,
            strength=strength,
            attention="clear" if runs_clear(model) else "full",
            native_attention="full" if can_run_full(model) else "clear",
            pooled=pools_keys(model),
            cascade=cascade,
            image_size=image_size,
            resolution=resolution,
        )
        check_stages(self, options, stages, pixels, stages_dir is not None)
        ranks = 1
        if self._patch_parallel is not None:
            check_shared(self._patch_parallel, options, stages, self._token_pixels, stages_dir)
            ranks = self._patch_parallel.ranks
        if len(stages) > 1:
            plan = ", ".join(f"{stage.name} ({stage.attention} attention)" for stage in stages)
            logger.info("stages: %s", plan)
        if stages[-1].attention == "full" and height * width > 4 * self.native_size**2:
            logger.warning(
                "full attention at %s pixels is slow and takes much memory: call apply_clear or "
                "set_attn_processor(CLEARProcessor()) first",
                stages[-1].name,
            )
        noises, batch = count_images(options)
        copies = options["num_images_per_prompt"]
        if len(pixels) > 1 and len(pixels) * copies == batch:
            pixels = [one for one in pixels for _ in range(copies)]
        if len(pixels) not in (0, 1, batch):
            raise ValueError(
                f"{WHO}: image: {len(pixels)} images to make {batch} of; give one, or one for each "
                "prompt."
            )
        check_generators(options, noises, batch, len(stages))
        refuse_too_large(self, stages[-1], batch, ranks)
        text = encode_prompts(self, options, batch)
        latents = options["latents"]
        if noises < batch and latents is None and not pixels:
            latents, _ = self.prepare_latents(
                noises,
                self.transformer.config.in_channels // 4,
                stages[0].height,
                stages[0].width,
                text["prompt_embeds"].dtype,
                self._execution_device,
                options["generator"],
            )
        callback = options["callback_on_step_end"]
        inputs = options["callback_on_step_end_tensor_inputs"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs = callback.tensor_inputs
        common = text | {name: options[name] for name in SHARED}
        request = Request(
            stages=stages,
            options=common,
            batch=batch,
            steps=options["num_inference_steps"] if sigmas is None else len(sigmas),
            sigmas=sigmas,
            generator=options["generator"],
            latents=None if latents is None else latents.expand(batch, -1, -1),
            pixels=pixels,
            guidance_weight=low_resolution_guidance,
            callback=callback,
            callback_inputs=inputs,
        )
        self._interrupt = False
        with ExitStack() as stack:
            call = stack.enter_context(self._call())
            call._stages = stages
            files = None
            if stages_dir is not None:
                with ClearState.attach(model).access.shared():
                    identity = request_identity(self, request)
                kept = StageFiles(Path(stages_dir), stages, identity)
                files = stack.enter_context(kept.opened())
            if self._patch_parallel is not None:
                stack.enter_context(ClearState.attach(model).access.exclusive())
                check_agreement(self, request, self._patch_parallel.groups)
                own = stack.enter_context(self._patch_parallel.one_pass(common))
                request = replace(request, options=own)
            request = replace(request, options=for_call(request.options))
            latents, last = run_stages(call, request, files)
        images = self._finish(latents, last, options["output_type"])
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if options["return_dict"] else (images,)

    def _size(
        self, height: int | None, width: int | None, image_size: tuple[int, int] | None
    ) -> tuple[int, int]:
        if image_size is not None:
            return enlarged_size(height, width, image_size, self._token_pixels)
        return height or self.native_size, width or self.native_size

    def _finish(self, latents: torch.Tensor, stage: Stage, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        parts = [
            self.image_processor.postprocess(pixels, output_type=output_type)
            for pixels in images_from(self, latents, stage)
        ]
        if output_type == "pil":
            return [image for part in parts for image in part]
        return np.concatenate(parts) if output_type == "np" else torch.cat(parts)

    def set_attn_processor(self, processor: Any) -> None:
        """Set the transformer's attention processor.

        Args:
            processor: a `CLEARProcessor`, whose settings are applied to every layer as
                `apply_clear` does; or what diffusers takes: a processor for all layers, or a dict
                with one for each. The latter two leave loaded weights as they are; `remove_clear`
                restores those too.
        """
        if isinstance(processor, CLEARProcessor):
            install([transformer_of(self, "set_attn_processor")], processor)
            return
        if isinstance(processor, dict):
            processor = dict(processor)  # diffusers empties it
        model = transformer_of(self, "set_attn_processor")
        state = ClearState.on(model)
        with nullcontext() if state is None else state.access.exclusive():
            self.transformer.set_attn_processor(processor)
            if state is not None:
                state.give_up(model)

    def enable_patch_parallel(self, mesh: DeviceMesh, stale_halos_after: int | None = None) -> None:
        """Share every image among the ranks of a mesh; see `pipelines/parallel`.

        Every rank calls it, and then the pipeline, with the same arguments and a `generator`;
        every rank gets the image. A second call replaces the first.

        Args:
            mesh: of dimensions "patch" and, optionally, "guidance" (of size 2, where the halves
                compute one of guidance's two passes each).
            stale_halos_after: None is exact; see `parallelize`.

        Raises:
            ValueError: a mesh that does not fit, or a setting out of its range.
        """
        patches = PatchParallel(mesh, stale_halos_after)
        self.disable_patch_parallel()
        patches.attach(transformer_of(self, WHO, "patch-parallel"))
        self._patch_parallel = patches

    def disable_patch_parallel(self) -> None:
        """Generate alone again."""
        if self._patch_parallel is not None:
            self._patch_parallel.remove()
            self._patch_parallel = None

    def load_clear_weights(
        self, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> None:
        """`clear_dit.load_clear_weights` on this pipeline."""
        load_clear_weights(self, pretrained_model_name_or_path, **options)

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
        with encoders_alone(self, lora_scale):
            found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                prompt_embeds,
                pooled_prompt_embeds,
                max_sequence_length,
            )
        return found

    def maybe_free_model_hooks(self) -> None:
        """As in `FluxPipeline`, but not in the middle of another thread's forward or stage.

        It resets what caches keep, and takes offloaded models away.
        """
        model = unwrapped(self.transformer)
        state = None if model is None else ClearState.on(model)
        with nullcontext() if state is None else state.access.exclusive():
            super().maybe_free_model_hooks()

    def check_inputs(
        self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any
    ) -> None:
        """As in `FluxPipeline`, but sizes are refused and not rounded.

        Raises:
            ValueError: height or width is not a positive multiple of a token's side.
        """
        height = check_side("height", height, self._token_pixels)
        width = check_side("width", width, self._token_pixels)
        super().check_inputs(prompt, prompt_2, height, width, *args, **kwargs)

    @staticmethod
    def _prepare_latent_image_ids(
        batch_size: int, height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        # Not by FluxPipeline's, which makes them in the default dtype.
        ids = torch.zeros(height, width, 3, dtype=torch.float32, device=device)
        ids[..., 1] = torch.arange(height, device=device)[:, None]
        ids[..., 2] = torch.arange(width, device=device)
        return ids.flatten(0, 1)
