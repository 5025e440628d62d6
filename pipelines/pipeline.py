"""Text-to-image with CLEAR, at any size, for every family: above the native size stage by stage."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModularPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import BaseGuidance
from torch.distributed.device_mesh import DeviceMesh

from clear_dit.attention.processor import CLEARProcessor
from clear_dit.families.family import Family
from clear_dit.families.recipe import Recipe
from clear_dit.families.table import attention_layers, family_of, find_family, transformer_of
from clear_dit.files import DEMO_SIZE, DEMOS
from clear_dit.kernels.numbers import number
from clear_dit.plugin import install
from clear_dit.weights.load import load_clear_weights
from clear_dit.weights.state import ClearState
from clear_dit.wrappers import unwrapped

from .cascade.enlarge import Enlarger
from .cascade.given_image import enlarged_size, pixels_from
from .cascade.presets import AUTO
from .cascade.resolution import Resolution
from .cascade.run import Request, images_from, run_stages
from .cascade.stage_attention import can_run_full, pools_keys, runs_clear
from .cascade.stage_files import StageFiles
from .cascade.stages import Stage, plan_stages
from .cascade.step_caches import check_caches
from .checks import (
    WHO,
    check_callback_inputs,
    check_generators,
    check_options,
    check_shared,
    check_side,
    check_stages,
    check_upscaler,
    find_images,
    plain_numbers,
)
from .identity import check_agreement, request_identity
from .memory_need import refuse_too_large
from .modular import face_of, load_modular
from .parallel.patch_parallel import PatchParallel
from .text import Texts, count_images, rewriter
from .text_encoders import encoders_alone

# What a stage sets itself, of the arguments of a stock pipeline's call.
OF_A_STAGE = (
    "height",
    "width",
    "num_inference_steps",
    "sigmas",
    "latents",
    "generator",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)
# Of those, what a stage's own scheduler does where the stock call does not take them.
BY_SCHEDULER: dict[str, Any] = {
    "sigmas": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
}
# Arguments of `from_pretrained` by which a file is found.
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# Classes of this project for stock ones; others are made when they are asked for.
FACES = {"FluxPipeline": ".flux:CLEARFluxPipeline"}

logger: logging.Logger = logging.getLogger(__name__)


class _Wraps(type):
    """CLEARPipeline itself wraps a pipeline; the classes made of it are made as stock ones are."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return (
            _wrapped(*args, **kwargs) if cls is CLEARPipeline else super().__call__(*args, **kwargs)
        )


class CLEARPipeline(DiffusionPipeline, metaclass=_Wraps):
    """A stock pipeline of diffusers that generates any size, with CLEAR's methods on it.

    `CLEARPipeline(pipe)` has the models, adapters and hooks of a stock pipeline, and is one of its
    class; the stock pipeline stays as it is. What is set on one of the two later, the other does
    not see, models apart. `CLEARPipeline.from_pretrained(model)` loads one. For `FluxPipeline` both
    give a `CLEARFluxPipeline`.

    An image well above the native size is generated in stages: one at the native size, then each
    from the enlarged image before it (see `__call__`), every one by the stock pipeline's own
    `__call__`. Unlike that it refuses sizes that are not whole tokens instead of rounding them.

    Args:
        pipe: a pipeline of one of the families (`docs/families.md`); a modular one of FLUX.3.
        native_size: side of a square of as many pixels as the model was trained at, in pixels; that
            of the family's published models where None. Saved with the pipeline.

    Raises:
        ValueError: a pipeline that is not known, or a native size of no whole tokens.
    """

    # The stock class that a class of this kind is made of.
    stock: type[DiffusionPipeline]

    def _begin(self, native_size: int | None) -> None:
        """What is CLEAR's on a pipeline that holds its parts."""
        model = unwrapped(getattr(self, "transformer", None))
        family = find_family(model)
        if family is not None and self.stock.__name__ not in family.recipe.pipelines:
            raise ValueError(
                f"{WHO}: {type(self).__name__} is not for {family.title}, got a "
                f"{type(model).__name__}; CLEARPipeline.from_pretrained finds a model's class."
            )
        if native_size is not None:
            # Without an autoencoder nothing says how many pixels a token has.
            side = 1 if getattr(self, "vae", None) is None else self.side_pixels
            native_size = check_side("native_size", native_size, side)
            self.register_to_config(native_size=native_size)
        self._patch_parallel: PatchParallel | None = None
        self._interrupt = False
        # Of a call's own copy: what it is of, where it is, and the texts it has encoded.
        self._original: CLEARPipeline | None = None
        self._stage: Stage | None = None
        self._stages: tuple[Stage, ...] = ()
        self._texts: Texts | None = None
        # The copies whose calls are under way.
        self._calls: list[CLEARPipeline] = []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As `DiffusionPipeline.from_pretrained`; of a modular pipeline with its parts, too.

        Args:
            pretrained_model_name_or_path: a folder in diffusers format, a hub repository, or "demo"
                or "demo-sd3" for the pipelines of this package (a folder of such a name: "./demo").
            options: of `DiffusionPipeline.from_pretrained` (a part's name: the part, or None for
                none), and `native_size`.
        """
        model = pretrained_model_name_or_path
        if isinstance(model, str) and model in DEMOS:
            pretrained_model_name_or_path = DEMOS[model]
            options = {"native_size": DEMO_SIZE, **options}
        if cls is not CLEARPipeline:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        of_hub = {name: options[name] for name in OF_THE_HUB if name in options}
        native_size = options.pop("native_size", None)
        try:
            saved = cls.load_config(pretrained_model_name_or_path, **of_hub)
        except OSError:
            modular = load_modular(pretrained_model_name_or_path, options, of_hub)
            if modular is None:
                raise
            return CLEARPipeline(modular, native_size=native_size)
        # Diffusers does not find by its name what was saved as a face.
        faces = {face.partition(":")[2]: stock for stock, face in FACES.items()}
        stock = faces.get(saved["_class_name"])
        loader = DiffusionPipeline if stock is None else _face(stock)
        pipe = loader.from_pretrained(pretrained_model_name_or_path, **options)
        return CLEARPipeline(pipe, native_size=native_size or saved.get("native_size"))

    @property
    def family(self) -> Family:
        """That of the transformer."""
        return family_of(transformer_of(self, WHO))

    @property
    def recipe(self) -> Recipe:
        """How the family's pipelines make whole images."""
        return self.family.recipe

    @property
    def token_pixels(self) -> int:
        """Side of a token, in pixels."""
        return self.recipe.patch * self.latent_pixels

    @property
    def latent_pixels(self) -> int:
        """Side of a latent pixel, in pixels."""
        factor: int = self.vae_scale_factor
        return factor // self.recipe.latents.pack if self.recipe.factor_counts_packing else factor

    @property
    def side_pixels(self) -> int:
        """What sides of images are multiples of, in pixels."""
        return self.recipe.step * self.token_pixels

    @property
    def native_size(self) -> int:
        """Side of a square of as many pixels as the model was trained at, in pixels."""
        given: int | None = self.config.get("native_size")
        return given or self.recipe.native_size

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
    def latest_call(self) -> CLEARPipeline:
        """The copy whose call is under way, the latest of several; the pipeline itself if none."""
        return next(reversed(tuple(self._calls)), self)

    @property
    def interrupt(self) -> bool:
        """Whether the call shall end after the step that is under way."""
        return self._interrupt or (self._original is not None and self._original._interrupt)

    @contextmanager
    def _call(self, texts: Texts) -> Iterator[CLEARPipeline]:
        """A copy of the pipeline for one call, with the same models and a scheduler of its own.

        A stock pipeline's `__call__` keeps its guidance, its step and more on the pipeline, and the
        noise levels on the scheduler; a guider keeps its step.
        """
        call = copy.copy(self)
        call._original, call._calls, call._texts = self, [], texts
        for name, part in self.components.items():
            if name == "scheduler" or isinstance(part, BaseGuidance):
                setattr(call, name, copy.deepcopy(part))
        self._calls.append(call)
        try:
            yield call
        finally:
            self._calls.remove(call)

    @property
    def patch_parallel(self) -> PatchParallel | None:
        """The ranks that share this pipeline's images, see `enable_patch_parallel`."""
        return self._patch_parallel

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
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
        **kwargs: Any,
    ) -> Any:
        """Generate an image of any size, or enlarge one.

        Takes what the stock pipeline's `__call__` takes, and:

        Args:
            image: an image to enlarge in place of the first stage: a PIL image, a list of them
                (one for each prompt) or a float tensor (batch, 3, height, width) in [0, 1].
                `height` and `width` (pixels) are then twice its own where None, and must have its
                aspect ratio. Of a stock pipeline that takes an `image` itself (reference images)
                it is that one.
            enlarge: the same, also where `image` is the stock pipeline's.
            preset: where the stages that enlarge start and how many steps they take: "repaint",
                "refine", or "auto", which repaints images of up to twice the native size and
                refines larger ones; see `pipelines/cascade/presets.py`.
            strength: from 0 (only enlarge) to 1 (ignore the enlarged image), the noise level at
                which a stage starts to repaint it; one number, or one for each stage that
                enlarges; the preset's where None. It does not depend on the scheduler's shift:
                `FluxImg2ImgPipeline`'s strength s starts at 3 s / (1 + 2 s) with a shift of 3.
            stage_steps: steps of these stages, one number, or one for each. None: the preset's; of
                a strength that is given its share of `num_inference_steps`.
            cascade: whether to start at the native size; None does where the image has over 1.25
                times the native number of pixels.
            low_resolution_guidance: from 0 (none) to 1, how much the low frequencies of the
                previous image steer each stage that enlarges. None: 1 above 4096 pixels a side,
                else 0.
            upscaler: enlarges the image before every stage that repaints one: any callable that
                takes (1, 3, height, width), float32 in [0, 1], on the pipeline's device, and
                returns it larger, by any factor; see `load_upscaler`, `enlarge`.
            stages_dir: a folder in which finished stages are kept. The same call goes on after
                the last one there, bit for bit as if it had not been interrupted. Needs a
                `generator`; a callback that changes latents is not told apart, and an upscaler must
                be a module or of `load_upscaler`.
            resolution: positions, shift and proportional attention for a stage's height and width
                in pixels; `settings_for` where None. `lambda height, width: Resolution()` generates
                every stage as the model was trained.
            texts: what earlier calls have encoded, `pipelines.text.Texts`; this call's stages alone
                share theirs where None.

        `num_inference_steps` is that of a whole schedule; `sigmas` and `latents` are those of a
        first stage without an image. Noise is drawn on the generator's device. The pipeline that
        `callback_on_step_end` is given is the call's own copy, with the same models: `pipe.stage`
        is the stage; `pipe._interrupt = True` ends the work after the step, and the image that is
        returned has the size of that stage. Set on the pipeline itself it ends every call that is
        under way.

        Threads may call one pipeline at the same time, or several with the same models and
        scheduler. A stage of full attention has the transformer for itself where CLEAR weights are
        loaded, a forward with extended positions for its duration: others wait.

        Returns:
            The stock pipeline's output, or a tuple; images as `output_type` says: "pil", "np",
            "pt", or "latent": as the stock pipeline gives them.

        Raises:
            ValueError: a bad request, before any work; ranks that do not agree on one; or an
                upscaler that does not return an image, enlarged.
            FloatingPointError: latents are NaN or infinite; stage and step are named.
        """
        signature = _signature_of(self.stock)
        if "image" not in signature.parameters:
            enlarge = find_images(image, enlarge)
        elif image is not None:
            kwargs["image"] = image
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        token_pixels = self.token_pixels
        del given.arguments["self"]
        defaults = {name: each.default for name, each in signature.parameters.items()}
        options = plain_numbers(given.arguments, defaults, self.side_pixels)
        if low_resolution_guidance is not None:
            who = f"{WHO}: low_resolution_guidance"
            low_resolution_guidance = number(who, low_resolution_guidance, 0, 1)
        check_upscaler(upscaler)
        pixels = [] if enlarge is None else pixels_from(enlarge, token_pixels)
        image_size = (pixels[0].shape[-2], pixels[0].shape[-1]) if pixels else None
        height, width = self._size(options["height"], options["width"], image_size)
        check_options(self, options, height, width)
        sigmas = options["sigmas"]
        model = transformer_of(self, WHO)
        stages = plan_stages(
            height,
            width,
            native_size=self.native_size,
            token_pixels=token_pixels,
            text_length=self._text_length(options),
            preset=preset,
            strength=strength,
            stage_steps=stage_steps,
            attention="clear" if runs_clear(model) else "full",
            native_attention="full" if can_run_full(model) else "clear",
            pooled=pools_keys(model),
            cascade=cascade,
            image_size=image_size,
            resolution=resolution,
            family=self.family,
            step=self.recipe.step,
        )
        check_stages(self, options, stages, pixels, stages_dir is not None)
        ranks = 1
        if self._patch_parallel is not None:
            check_shared(self._patch_parallel, options, stages, token_pixels, stages_dir)
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
        check_caches(self, options, stages, self._patch_parallel)
        noises, batch = self._count_images(options)
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
        callback = options["callback_on_step_end"]
        inputs = options["callback_on_step_end_tensor_inputs"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs = callback.tensor_inputs
        check_callback_inputs(self.stock, inputs)
        self._interrupt = False
        with ExitStack() as stack:
            call = stack.enter_context(self._call(texts or Texts()))
            call._stages = stages
            common = call._common(options, batch)
            request = Request(
                stages=stages,
                options=common,
                batch=batch,
                steps=self._steps(options),
                sigmas=sigmas,
                generator=options["generator"],
                latents=call._first_latents(options, common, noises, batch, stages[0]),
                pixels=pixels,
                guidance_weight=low_resolution_guidance,
                callback=callback,
                callback_inputs=inputs,
                upscaler=upscaler,
            )
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
            request = replace(request, options=self._for_stock(request.options))
            latents, last = run_stages(call, request, files)
        images = self._finish(latents, last, options["output_type"])
        self.maybe_free_model_hooks()
        return self._output(images) if options["return_dict"] else (images,)

    def _size(
        self, height: int | None, width: int | None, image_size: tuple[int, int] | None
    ) -> tuple[int, int]:
        if image_size is not None:
            return enlarged_size(height, width, image_size, self.side_pixels)
        return height or self.native_size, width or self.native_size

    def _text_length(self, options: dict[str, Any]) -> int:
        """Tokens of text that a call gives the transformer, at most."""
        length: int = options.get("max_sequence_length") or self.recipe.text_length
        return length

    def _steps(self, options: dict[str, Any]) -> int:
        """Of a whole schedule, as the stock pipeline has it."""
        sigmas = options["sigmas"]
        if sigmas is None:  # a model of few steps may bring its own
            sigmas = self.config.get("sample_sigmas")
        return options["num_inference_steps"] if sigmas is None else len(sigmas)

    def _count_images(self, options: dict[str, Any]) -> tuple[int, int]:
        """How many noises a call draws, and how many images it makes of them."""
        images = count_images(options)
        return images, images

    def _common(self, options: dict[str, Any], batch: int) -> dict[str, Any]:
        """What every stage of a call gives to the stock pipeline."""
        return {name: value for name, value in options.items() if name not in OF_A_STAGE}

    def _first_latents(
        self,
        options: dict[str, Any],
        common: dict[str, Any],
        noises: int,
        batch: int,
        stage: Stage,
    ) -> torch.Tensor | None:
        """The first stage's noise; None where the stock pipeline draws it."""
        latents: torch.Tensor | None = options["latents"]
        return latents

    def _for_stock(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of all stages as the stock pipeline takes them."""
        return options

    def _output(self, images: Any) -> Any:
        return ImagePipelineOutput(images=images)

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
        model = transformer_of(self, "set_attn_processor")
        state = ClearState.on(model)
        with nullcontext() if state is None else state.access.exclusive():
            if hasattr(self.transformer, "set_attn_processor"):
                if isinstance(processor, dict):
                    processor = dict(processor)  # diffusers empties it
                self.transformer.set_attn_processor(processor)
            else:
                for attn in attention_layers(model).values():
                    attn.set_processor(processor)
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
        patches.attach(transformer_of(self, WHO))
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

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in the stock pipeline; threads that share text encoders or tokenizers take turns.

        Within a call the same prompts are encoded once, for all stages.
        """
        encode = MethodType(self.stock.encode_prompt, self)
        with encoders_alone(self):
            if self._texts is None:
                return encode(*args, **kwargs)
            return self._texts.of(encode, *args, **kwargs)

    def maybe_free_model_hooks(self) -> None:
        """As in the stock pipeline, but not in the middle of another thread's forward or stage.

        It resets what caches keep, and takes offloaded models away.
        """
        model = unwrapped(self.transformer)
        state = None if model is None else ClearState.on(model)
        with nullcontext() if state is None else state.access.exclusive():
            super().maybe_free_model_hooks()


def _signature_of(stock: type) -> inspect.Signature:
    """That of a stock pipeline's call, with `BY_SCHEDULER`, and no sizes of its own."""
    known, keyword = inspect.signature(stock.__call__), inspect.Parameter.KEYWORD_ONLY
    sides = {
        name: each.replace(default=None) if name in ("height", "width") else each
        for name, each in known.parameters.items()
    }
    known = known.replace(parameters=[*sides.values()])
    added = [
        inspect.Parameter(name, keyword, default=default) for name, default in BY_SCHEDULER.items()
    ]
    return _with(known, added)


def _with(known: inspect.Signature, added: Iterable[inspect.Parameter]) -> inspect.Signature:
    """A signature with the parameters that it does not have yet."""
    new = [one for one in added if one.name not in known.parameters]
    parameters = sorted([*known.parameters.values(), *new], key=lambda one: one.kind)
    return known.replace(parameters=parameters)


def _call_of(stock: type) -> Callable[..., Any]:
    """`CLEARPipeline.__call__`, that shows what it takes for a stock pipeline."""

    @functools.wraps(CLEARPipeline.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return CLEARPipeline.__call__(self, *args, **kwargs)

    ours = inspect.signature(CLEARPipeline.__call__).parameters.values()
    named = (one for one in ours if one.kind is inspect.Parameter.KEYWORD_ONLY)
    call.__signature__ = _with(_signature_of(stock), named)  # type: ignore[attr-defined]
    return call


def _wrapped(pipe: Any, native_size: int | None = None) -> CLEARPipeline:
    made = object.__new__(_class_for(pipe))
    made.__dict__.update(pipe.__dict__)
    made._begin(native_size)
    return made


def _class_for(pipe: Any) -> type[CLEARPipeline]:
    """The class of what `CLEARPipeline(pipe)` makes.

    Raises:
        ValueError: no pipeline that is known.
    """
    if isinstance(pipe, CLEARPipeline):
        return type(pipe)
    modular = isinstance(pipe, ModularPipeline)
    if not modular and not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"{WHO}: takes a pipeline of diffusers, got {type(pipe).__name__}.")
    family = family_of(transformer_of(pipe, WHO))
    recipe = family.recipe
    if type(pipe).__name__ not in recipe.pipelines:
        known = " or ".join(recipe.pipelines)
        raise ValueError(f"{WHO}: takes {known} of {family.title}, got {type(pipe).__name__}.")
    stock: Any = face_of(pipe) if modular else type(pipe)
    return _made(stock, recipe.rewriters)


def _face(stock: str) -> type[CLEARPipeline]:
    """This project's class for a stock one."""
    module, _, name = FACES[stock].partition(":")
    face: type[CLEARPipeline] = getattr(import_module(module, __package__), name)
    return face


@functools.cache
def _made(stock: type[DiffusionPipeline], rewriters: tuple[str, ...]) -> type[CLEARPipeline]:
    """A class made of CLEARPipeline and a stock one, of whose name it is: diffusers finds by it."""
    if stock.__name__ in FACES:
        return _face(stock.__name__)

    @functools.wraps(stock.__init__)
    def initialise(self: Any, *args: Any, native_size: int | None = None, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self._begin(native_size)

    # By which diffusers tells what a pipeline is made of.
    known = inspect.signature(stock.__init__)
    added = inspect.Parameter("native_size", inspect.Parameter.KEYWORD_ONLY, default=None)
    initialise.__signature__ = _with(known, [added])  # type: ignore[attr-defined]
    members = {"stock": stock, "__init__": initialise, "__call__": _call_of(stock)}
    members |= {"__module__": __name__}
    members |= {name: rewriter(getattr(stock, name)) for name in rewriters if hasattr(stock, name)}
    return type(stock.__name__, (CLEARPipeline, stock), members)
