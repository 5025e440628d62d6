"""One prompt, one picture: the request, its checks, and the work."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .adapters import AUTO, known_weights
from .checks import find_device, find_dtype, find_impl, find_window
from .errors import RequestError, first_line
from .memory import peak_mb, reset_peak
from .models import TOKEN_PIXELS, load_pipeline, model_defaults, model_path, text_length
from .output import PICTURE_SUFFIXES, check_writable
from .picture_input import read_picture
from .plugin import apply_clear

if TYPE_CHECKING:
    from diffusers import FluxPipeline

    from .pipelines.flux import CLEARFluxPipeline
    from .pipelines.ranks import Ranks

# How ranks share a picture: its rows; and the passes of guidance, too, each on half of the ranks.
PARALLEL = ("patch", "guidance")
MAX_STEPS = 1000
NO_WEIGHTS = "none"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateRequest:
    """What to paint, and how: complete and checked. `make_request` fills in what is not said.

    Attributes:
        prompt: the text.
        model: "demo", a folder in diffusers format, or a hub repository (owner/name).
        height, width: of the picture, in pixels, multiples of 16.
        radius: of the window, in tokens (16 pixels).
        down_factor: side of a pooling cell, in tokens; 1 for none.
        weights: CLEAR weights: a file, a folder or a hub repository; "auto" for those known to fit
            model, radius and down_factor (see `known_weights`); None for the model's own.
        attention: "clear" or "full".
        impl: see `local_attention`.
        steps: denoising steps.
        guidance: strength of guidance: FLUX.1-dev's embedded scale; for a model without one, the
            scale of classifier-free guidance against an empty prompt (two passes), 1 for none.
        seed: of the initial noise.
        image: a picture to enlarge to height x width, of that aspect ratio; None to start from
            noise.
        strength: of the stages above the native size, from 0 to 1: one for all, or one for each;
            None for the default. See `CLEARFluxPipeline`.
        low_resolution_guidance: from 0 to 1, see `CLEARFluxPipeline`; None for the default.
        stages_dir: a folder for finished stages, from which the same request goes on.
        dtype: "float32", "bfloat16" or "float16".
        device: a torch device.

    Raises:
        RequestError: the first thing that is wrong.
    """

    prompt: str
    model: str
    height: int
    width: int
    radius: int
    down_factor: int
    weights: str | None
    attention: str
    impl: str
    steps: int
    guidance: float
    seed: int
    image: str | None
    strength: tuple[float, ...] | None
    low_resolution_guidance: float | None
    stages_dir: str | None
    dtype: str
    device: str

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; describe a picture.")
        model_path(self.model)
        find_window(self.height, self.width, self.radius, self.down_factor)
        if self.attention not in ("clear", "full"):
            raise RequestError(f"--attention must be clear or full, got {self.attention!r}.")
        if self.attention == "full" and self.weights not in (None, AUTO):
            raise RequestError("--weights are for --attention clear; leave them out with full.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise RequestError(f"--steps must be from 1 to {MAX_STEPS}, got {self.steps}.")
        if not 0 <= self.guidance <= 100:
            raise RequestError(f"--guidance must be from 0 to 100, got {self.guidance}.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}.")
        shares = {"strength": self.strength or ()}
        if self.low_resolution_guidance is not None:
            shares["low-resolution-guidance"] = (self.low_resolution_guidance,)
        for name, values in shares.items():
            for value in values:
                if not 0 <= value <= 1:
                    raise RequestError(f"--{name} must be from 0 to 1, got {value}.")
        dtype, device = find_dtype(self.dtype), find_device(self.device)
        if self.attention == "clear":
            find_impl(self.impl, dtype, device)


def make_request(prompt: str, model: str = "demo", **settings: Any) -> GenerateRequest:
    """A request in which whatever is None or not named takes the model's default.

    Weights are "auto" by default, and "none" stands for the model's own.

    Raises:
        RequestError: see `GenerateRequest`.
    """
    defaults = model_defaults(model)
    device = str(find_device(settings.get("device")))
    height, width = defaults.size, defaults.size
    if settings.get("image") is not None:
        height, width = _enlarged_size(settings)
    complete: dict[str, Any] = {
        "height": height,
        "width": width,
        "radius": defaults.radius,
        "down_factor": 1,
        "weights": AUTO,
        "attention": "clear",
        "impl": "auto",
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "seed": 0,
        "image": None,
        "strength": None,
        "low_resolution_guidance": None,
        "stages_dir": None,
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    complete |= {name: value for name, value in settings.items() if value is not None}
    if complete["weights"] == NO_WEIGHTS:
        complete["weights"] = None
    return GenerateRequest(prompt, model, **(complete | {"device": device}))


def _enlarged_size(settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the picture that an image is enlarged to."""
    from .pipelines.given_image import check_picture, enlarged_size

    image = read_picture(Path(settings["image"]))
    try:
        check_picture(image, TOKEN_PIXELS)
        return enlarged_size(
            settings.get("height"),
            settings.get("width"),
            (image.height, image.width),
            TOKEN_PIXELS,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error


@dataclass
class Timer:
    """Seconds by stage of the work."""

    seconds: dict[str, float]

    @contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def joined_ranks(parallel: str | None, device: str | None) -> Iterator[Ranks | None]:
    """The ranks that paint a picture together; None for this process alone.

    Args:
        parallel: one of PARALLEL, or None.
        device: "cuda" or "cpu", see `start_ranks`.

    Raises:
        RequestError: an unknown choice, none under torchrun, or see `start_ranks`.
    """
    if parallel is None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RequestError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: every rank would paint the same; add "
                "--parallel patch, or start without torchrun."
            )
        yield None
        return
    if parallel not in PARALLEL:
        raise RequestError(f"--parallel must be {' or '.join(PARALLEL)}, got {parallel!r}.")
    from .pipelines.ranks import start_ranks

    with ExitStack() as stack:
        try:
            started = start_ranks(device, guidance=2 if parallel == "guidance" else 1)
            ranks = stack.enter_context(started)
        except ValueError as error:
            raise RequestError(f"--parallel {parallel}: {error}") from error
        yield ranks


def generate(
    request: GenerateRequest, out: Path, progress: bool = True, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Paint the picture of a request and write it.

    Args:
        request: what to paint.
        out: the PNG or TIFF to write; its settings stand in it.
        progress: show a progress bar on standard error.
        ranks: that share the work, all with this request but for its device; the first writes and
            shows the bar.

    Returns:
        out, height, width (pixels), tokens (of the picture), impl (the attention that ran: an
        implementation of local attention, or "full"), weights (the name of the CLEAR weights, None
        for the model's own), ranks (their number), seconds {total, text, denoise, decode},
        peak_memory_mb (of this process).

    Raises:
        RequestError: a bad request, before any work.
        OSError: the picture cannot be written; nothing is left under its name.
    """
    writes = ranks is None or ranks.is_first
    if ranks is not None:
        _check_shared(request, ranks)
    if writes:
        check_writable(out, PICTURE_SUFFIXES)
    device, dtype = find_device(request.device), find_dtype(request.dtype)
    reset_peak(device)
    start = time.perf_counter()
    pipe = load_pipeline(request.model, dtype, device, text_encoders=writes)
    weights = _find_weights(request)
    impl = _set_attention(pipe, request, weights)
    if ranks is not None:
        pipe.enable_patch_parallel(ranks.mesh)
        ranks.follow(pipe)
    pipe.set_progress_bar_config(disable=not (progress and writes), desc="denoising")
    timer = Timer({})
    latents = _paint(pipe, request, device, timer, ranks)
    count = 1 if ranks is None else len(ranks.members)
    settings = asdict(request) | {"version": __version__, "impl": impl, "ranks": count}
    with timer.measure("decode", device):
        _write(pipe, latents, request, out, settings, ranks)
    return {
        "out": str(out),
        "height": request.height,
        "width": request.width,
        "tokens": request.height * request.width // TOKEN_PIXELS**2,
        "impl": impl,
        "weights": weights and Path(weights).name,
        "ranks": count,
        "seconds": {"total": round(time.perf_counter() - start, 3), **timer.seconds},
        "peak_memory_mb": round(peak_mb(device), 1),
    }


def _check_shared(request: GenerateRequest, ranks: Ranks) -> None:
    """Refuse a request that ranks cannot share, or that is not the same on all."""
    from .pipelines.patch_bands import Bands
    from .pipelines.rank_agreement import agree

    facts = {name: repr(value) for name, value in asdict(request).items() if name != "device"}
    try:
        agree(ranks.team, facts)
        Bands(request.height // TOKEN_PIXELS, ranks.mesh.size(-1), 0, 0)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if request.attention == "full":
        raise RequestError("--parallel shares rows by local attention; leave --attention full out.")


def _set_attention(pipe: CLEARFluxPipeline, request: GenerateRequest, weights: str | None) -> str:
    if request.attention == "full":
        return "full"
    try:
        apply_clear(
            pipe,
            radius=request.radius,
            down_factor=request.down_factor,
            weights=weights,
            impl=request.impl,
        )
    except (ValueError, OSError) as error:
        raise RequestError(str(error)) from error
    return find_impl(request.impl, pipe.dtype, pipe.device)


def _find_weights(request: GenerateRequest) -> str | None:
    """A request's weights, those known to fit where it says "auto"."""
    if request.attention == "full":
        return None
    if request.weights != AUTO:
        return request.weights
    found = known_weights(request.model, request.radius, request.down_factor)
    pooled = f", down_factor {request.down_factor}" if request.down_factor > 1 else ""
    setting = f"{request.model}, radius {request.radius}{pooled}"
    rows, columns = request.height // TOKEN_PIXELS, request.width // TOKEN_PIXELS
    covers_all = request.radius**2 > (rows - 1) ** 2 + (columns - 1) ** 2
    if found is None and not covers_all:
        logger.warning(
            "no weights are known for %s: the model is not tuned for its window, which changes "
            "pictures; name weights with --weights (none: go without, quietly)",
            setting,
        )
    elif found is not None:
        logger.info("weights for %s: %s", setting, Path(found).name)
    return found


def _paint(
    pipe: CLEARFluxPipeline,
    request: GenerateRequest,
    device: torch.device,
    timer: Timer,
    ranks: Ranks | None,
) -> torch.Tensor:
    """Text and denoising one after the other, each timed; packed latents."""
    with timer.measure("text", device):
        text = _encode_once(pipe, request.prompt, ranks)
        guided = two_passes(pipe, request.guidance)
        empty = _encode_once(pipe, "", ranks) if guided else None
    stages: dict[str, Any] = {
        "low_resolution_guidance": request.low_resolution_guidance,
        "stages_dir": request.stages_dir,
    }
    if request.strength is not None:
        one = len(request.strength) == 1
        stages["strength"] = request.strength[0] if one else request.strength
    if request.image is not None:
        stages["image"] = read_picture(Path(request.image))
    with timer.measure("denoise", device):
        try:
            return denoise(
                pipe,
                text,
                empty,
                [request.seed],
                height=request.height,
                width=request.width,
                steps=request.steps,
                guidance=request.guidance,
                **stages,
            )
        except ValueError as error:
            raise RequestError(str(error)) from error


def _encode_once(pipe: CLEARFluxPipeline, prompt: str, ranks: Ranks | None) -> Text:
    """A prompt's embeddings; of several ranks the first has the encoders, and sends."""
    if ranks is None or ranks.is_first:
        text = encode(pipe, [prompt])
    else:
        config = pipe.transformer.config
        text = (
            torch.empty(1, text_length(pipe), config.joint_attention_dim),
            torch.empty(1, config.pooled_projection_dim),
        )
    embeds, pooled = (part.to(pipe.device, pipe.dtype).contiguous() for part in text)
    if ranks is not None:
        ranks.team.broadcast(embeds, 0)
        ranks.team.broadcast(pooled, 0)
    return embeds, pooled


def _write(
    pipe: CLEARFluxPipeline,
    latents: torch.Tensor,
    request: GenerateRequest,
    out: Path,
    settings: dict[str, Any],
    ranks: Ranks | None,
) -> None:
    """Decode and write a picture strip by strip."""
    from .pipelines.autoencoder import decode_rows
    from .pipelines.picture_files import save_rows
    from .pipelines.rank_progress import Progress
    from .pipelines.rank_watch import until_failure

    height, width = request.height, request.width
    group = None if ranks is None else ranks.team.group
    strips = decode_rows(pipe.vae, unpack(pipe, latents, height, width), group=group)
    if ranks is not None:
        ranks.watch.progress = Progress("decoding")
        if not ranks.is_first:
            list(strips)  # there are none: it computes what it sends to the first
            return
        strips = until_failure(strips, ranks.watch)
    try:
        save_rows(strips, out, height=height, width=width, settings=settings)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(f"{out} could not be written ({reason}).") from error


# Of some prompts: (batch, text tokens, channels), and pooled (batch, channels).
Text = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def encode(pipe: FluxPipeline, prompts: list[str]) -> Text:
    """Prompts as the transformer takes them, padded to `text_length(pipe)`."""
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=prompts, prompt_2=None, device=pipe.device, max_sequence_length=text_length(pipe)
    )
    return embeds, pooled


def two_passes(pipe: FluxPipeline, guidance: float) -> bool:
    """Whether guidance of this strength takes a second pass, with an empty prompt."""
    return not pipe.transformer.config.guidance_embeds and guidance > 1


def denoise(
    pipe: FluxPipeline,
    text: Text,
    empty: Text | None,
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    **stages: Any,
) -> torch.Tensor:
    """Final latents, from noise of these seeds, one for each prompt.

    Args:
        pipe: whose attention is what it is.
        text: of the prompts, on the pipeline's device.
        empty: of one empty prompt, where guidance takes two passes (see `two_passes`).
        seeds: a picture depends on its own seed only, not on the others in the batch.
        height, width: in pixels.
        steps, guidance: see `GenerateRequest`.
        stages: image, strength, low_resolution_guidance and stages_dir, see `CLEARFluxPipeline`.

    Returns:
        Packed, (batch, tokens, channels), in the pipeline's dtype.
    """
    arguments: dict[str, Any] = {"prompt_embeds": text[0], "pooled_prompt_embeds": text[1]}
    if empty is not None:
        arguments["negative_prompt_embeds"] = empty[0].expand_as(text[0])
        arguments["negative_pooled_prompt_embeds"] = empty[1].expand_as(text[1])
    embedded = bool(pipe.transformer.config.guidance_embeds)
    return pipe(
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance if embedded else 1.0,
        true_cfg_scale=1.0 if empty is None else guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        max_sequence_length=text_length(pipe),
        output_type="latent",
        **arguments,
        **stages,
    ).images


def unpack(pipe: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Packed latents of a picture of height x width pixels: (batch, channels, rows, columns)."""
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def decode(pipe: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> Any:
    """Packed latents (1, tokens, channels) to a PIL image of height x width pixels."""
    from .pipelines.autoencoder import decode as decode_picture

    pixels = decode_picture(pipe.vae, unpack(pipe, latents, height, width))
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]
