"""What `CLEARPipeline` is asked, checked before any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from clear_dit.kernels.numbers import as_integer, integer, number, shown

from .cascade.schedule import check_dynamic_shift
from .cascade.stages import Stage
from .decoding.segments import check_autoencoder
from .parallel.patch_parallel import PatchParallel

WHO = "CLEARPipeline"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


COUNTS = ("num_inference_steps", "num_images_per_prompt", "max_sequence_length")
SCALES = ("true_cfg_scale", "guidance_scale", "distilled_guidance_scale")
# Which leave no room for a stage's own noise levels.
UNSERVED = ("timesteps",)


def find_images(image: Any, enlarge: Any) -> Any:
    """The images to enlarge, by either of their names.

    Raises:
        ValueError: both are given.
    """
    if image is not None and enlarge is not None:
        raise ValueError(f"{WHO}: image and enlarge are the same here; give one of them.")
    return enlarge if image is None else image


def check_upscaler(upscaler: Any) -> None:
    """Refuse what cannot be called; a file's name is told how it becomes one.

    Raises:
        ValueError: it is neither None nor callable.
    """
    if upscaler is not None and not callable(upscaler):
        raise ValueError(
            f"{WHO}: upscaler must be a callable, image to image, got {type(upscaler).__name__}; "
            "load_upscaler makes one of a file."
        )


def plain_numbers(
    options: Mapping[str, Any], defaults: Mapping[str, Any], token_pixels: int
) -> dict[str, Any]:
    """The same options with Python's own numbers, whatever has come.

    Args:
        options: the arguments of a stock pipeline's call. What it takes None for may be None, and
            0 for height or width, which it takes for the native size.
        defaults: its own arguments; what is None there may be None.
        token_pixels: side of a token.

    Raises:
        ValueError: a number is none, not whole where it must be, or out of its range.
    """
    plain = dict(options)
    optional = {"guidance_scale", "max_sequence_length"}
    optional |= {name for name, value in defaults.items() if value is None}
    if plain["sigmas"] is not None:
        optional.add("num_inference_steps")
        plain["sigmas"] = [number(f"{WHO}: sigmas", sigma) for sigma in plain["sigmas"]]
    for name in (*COUNTS, *SCALES):
        if name not in plain or (plain[name] is None and name in optional):
            continue
        who = f"{WHO}: {name}"
        plain[name] = number(who, plain[name]) if name in SCALES else integer(who, plain[name], 1)
    for name in ("height", "width"):
        if plain[name] is not None and as_integer(plain[name]) != 0:
            plain[name] = check_side(name, plain[name], token_pixels)
    return plain


def check_side(name: str, pixels: Any, token_pixels: int) -> int:
    """A side of an image, in pixels; `name` is for the message.

    Raises:
        ValueError: it is no positive multiple of a token's side.
    """
    side = as_integer(pixels)
    if side is None:
        raise ValueError(
            f"{WHO}: {name} must be a whole number of pixels, a multiple of {token_pixels}; got "
            f"{shown(pixels)}."
        )
    if side <= 0 or side % token_pixels:
        lower = max(side // token_pixels, 1) * token_pixels
        raise ValueError(
            f"{WHO}: {name} must be a multiple of {token_pixels} pixels, got {shown(pixels)}; the "
            f"nearest are {lower} and {lower + token_pixels}."
        )
    return side


def check_options(pipe: Any, options: dict[str, Any], height: int, width: int) -> None:
    """Refuse what can be told before the stages are planned.

    Args:
        options: the arguments of the stock pipeline's call.
        height, width: of the image, in pixels.

    Raises:
        ValueError: prompts, sizes or output_type are not what they must be.
    """
    if not hasattr(pipe.transformer, "config"):  # DataParallel and DDP hide it
        raise ValueError(
            f"{WHO}: pipe.transformer is {type(pipe.transformer).__name__}, which pipelines cannot "
            "run; set pipe.transformer to the model inside."
        )
    for name in UNSERVED:
        if options.get(name) is not None:
            raise ValueError(f"{WHO}: {name} cannot be given to a stage; use sigmas.")
    told = set(options["callback_on_step_end_tensor_inputs"])
    served = inspect.signature(pipe.stock.__call__).parameters
    if "callback_on_step_end" not in served and not told <= {"latents"}:
        raise ValueError(
            f"{WHO}: with {pipe.stock.__name__} callbacks get latents alone; got "
            f"callback_on_step_end_tensor_inputs={sorted(told)}."
        )
    sized = options | {"height": height, "width": width}
    check = getattr(pipe.stock, "check_inputs", None)
    names = set() if check is None else set(inspect.signature(check).parameters) - {"self"}
    if names and names <= sized.keys():  # else it is left to the stock call, which knows the rest
        pipe.check_inputs(**{name: sized[name] for name in names})
    if options["output_type"] not in OUTPUT_TYPES:
        raise ValueError(
            f"{WHO}: output_type must be one of {', '.join(OUTPUT_TYPES)}; got "
            f"{options['output_type']!r}."
        )


def check_callback_inputs(stock: type, inputs: Sequence[str]) -> None:
    """Refuse tensors for a callback that a stage's scheduler calls, which knows only latents.

    Args:
        stock: class of the stock pipeline.
        inputs: names of the tensors.

    Raises:
        ValueError: the names.
    """
    others = ", ".join(name for name in inputs if name != "latents")
    if others and "callback_on_step_end" not in inspect.signature(stock.__call__).parameters:
        raise ValueError(
            f"{WHO}: callback_on_step_end gets latents and nothing else from {stock.__name__}; got "
            f"{others} in callback_on_step_end_tensor_inputs."
        )


def check_stages(
    pipe: Any,
    options: dict[str, Any],
    stages: tuple[Stage, ...],
    pixels: list[torch.Tensor],
    kept: bool,
) -> None:
    """Refuse what does not go with a plan.

    Args:
        options: the arguments of the stock pipeline's call.
        pixels: the images to start from, if any.
        kept: whether finished stages are kept.

    Raises:
        ValueError: another scheduler or autoencoder, a shift extrapolated too far, latents that do
            not fit, or no generator.
    """
    latents = options["latents"]
    if len(stages) > 1 or pixels or options["output_type"] != "latent":
        check_autoencoder(pipe.vae)
    beyond = len(stages) > 1 or stages[-1].resolution.shift is not None or bool(pixels)
    if beyond and not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{WHO}: above the native size the scheduler must be a "
            f"FlowMatchEulerDiscreteScheduler, this pipeline has a "
            f"{type(pipe.scheduler).__name__}."
        )
    for stage in stages:
        if stage.resolution.shift is None:
            mu = partial(pipe.recipe.mu, pipe, steps=options["num_inference_steps"] or 1)
            check_dynamic_shift(pipe.scheduler, stage.height, stage.width, pipe.token_pixels, mu)
    if latents is not None:
        if pixels:
            raise ValueError(f"{WHO}: latents are the noise of an image that has no image=.")
        _check_latents(pipe, latents, stages[0])
    if kept and options["generator"] is None:
        raise ValueError(f"{WHO}: stages_dir needs a generator: other noise is another image.")


def _check_latents(pipe: Any, latents: torch.Tensor, stage: Stage) -> None:
    sides = (side // pipe.latent_pixels for side in (stage.height, stage.width))
    shape = pipe.recipe.latents.given_shape(*sides)
    fits = latents.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == side
        for wanted, side in zip(shape, latents.shape, strict=True)
    )
    if not fits or not latents.isfinite().all():
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{WHO}: latents must be finite and for the first stage, {stage.name}: ({wanted}); got "
            f"{tuple(latents.shape)}."
        )


def check_generators(options: dict[str, Any], noises: int, images: int, stages: int) -> None:
    """Refuse what is no generator, and a list of another length than noises are drawn.

    Args:
        options: the arguments of the stock pipeline's call.
        noises, images: see `count_images`.
        stages: their number; latents are the noise of the first.

    Raises:
        ValueError: what came, or the numbers of generators and of images.
    """
    generators = options["generator"]
    several = isinstance(generators, list)
    for one in generators if several else [generators]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(
                f"{WHO}: generator must be a torch.Generator or a list of them, got "
                f"{'a list with ' if several else ''}{_no_generator(one)}."
            )
    fitting = {noises} if options["latents"] is None else {1, images}
    drawn = options["latents"] is None or stages > 1
    if drawn and several and len(generators) not in fitting:
        raise ValueError(
            f"{WHO}: {len(generators)} generators for {max(fitting)} images; give one, or one for "
            "each."
        )


def _no_generator(given: Any) -> str:
    """What came in place of a generator; a seed is told how it becomes one."""
    seed = as_integer(given)
    if seed is None:
        return type(given).__name__
    return f"{seed}; of a seed it is torch.Generator().manual_seed({seed})"


def check_shared(
    patches: PatchParallel,
    options: dict[str, Any],
    stages: tuple[Stage, ...],
    token_pixels: int,
    stages_dir: Any,
) -> None:
    """Refuse what ranks cannot share.

    Args:
        options: the arguments of the stock pipeline's call.
        token_pixels: side of a token.

    Raises:
        ValueError: full attention, more ranks than rows of tokens, no generator, or stages_dir.
    """
    if stages[-1].attention == "full":
        raise ValueError(
            f"{WHO}: ranks share an image by way of local attention, and this pipeline has full "
            "attention; call apply_clear first."
        )
    for stage in stages:
        if stage.attention == "clear":
            patches.check(stage.height // token_pixels)
    if options["generator"] is None and options["latents"] is None:
        raise ValueError(
            f"{WHO}: ranks that share an image must draw the same noise; pass generator="
            "torch.Generator().manual_seed(...), the same on every rank."
        )
    if stages_dir is not None:
        raise ValueError(
            f"{WHO}: stages_dir does not work with patch parallelism, where every rank would write "
            "to the folder; leave it out."
        )
