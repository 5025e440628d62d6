"""One loaded pipeline that generates one request after the other."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RequestError, first_line, is_out_of_memory
from ..families.table import head_dim_of
from ..files import check_writable
from ..kernels.triton.device import kernels_of
from ..memory import peak_mb, reset_peak
from ..pipelines.cascade.upscaler import Upscaler, file_digest, load_upscaler
from ..pipelines.decoding.image_files import IMAGE_SUFFIXES, save_rows
from ..pipelines.decoding.segments import check_autoencoder
from ..plugin import apply_clear, remove_clear
from ..progress import bar_options
from ..versions import __version__
from ..weights.known import AUTO
from ..weights.quantise import quantised, quantize
from .checks import find_device, find_dtype, find_impl
from .denoising import denoise, unpack
from .dtypes import resolve_dtype
from .image_input import read_image
from .lora import load_lora, unload_lora
from .models import load_pipeline
from .placing import place
from .sharing import RequestTexts, check_shared
from .stage_plan import StagePlanner
from .timing import Timer
from .weights import Settled, settled

if TYPE_CHECKING:
    from ..pipelines.parallel.start import Ranks
    from ..pipelines.pipeline import CLEARPipeline
    from .request import GenerateRequest

logger: logging.Logger = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """`should_stop` said so: the image was not finished, and no file was written."""


@dataclass(frozen=True)
class Step:
    """A denoising step that was just finished.

    Attributes:
        step: its number in its stage, from 1.
        steps: of this stage.
        stage: the number of the stage, from 1; images near the native size have one only.
        stages: of this image.
        height, width: of the stage's image, in pixels.
        sigma: the noise level of `latents`, from 1 (noise) to 0 (the image).
        latents: of one image, as the stock pipeline holds them, on its device; not to be changed.
            With those of the step before, x and s, they tell the image that is coming:
            `latents - sigma * (latents - x) / (sigma - s)`.
    """

    step: int
    steps: int
    stage: int
    stages: int
    height: int
    width: int
    sigma: float
    latents: torch.Tensor


class PipelineRunner:
    """A pipeline, loaded once, that is switched to what each request asks for.

    An image depends on its request alone, not on those generated before. Threads that ask at once
    wait for each other.

    Args:
        model, dtype, device, quantize, offload: see `GenerateRequest`; the same for all requests.
            Quantised layers take no other CLEAR weights: where a request has other ones than the
            request before, the transformer is loaded anew.
        ranks: that share every image, each with a runner and the same requests; the first has
            the text encoders and writes.

    Attributes:
        pipe: the pipeline.

    Raises:
        RequestError: the model cannot be found or read, or its autoencoder is not known.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        device: str,
        ranks: Ranks | None = None,
        *,
        quantize: str | None = None,
        offload: str = "none",
    ) -> None:
        self.device: torch.device = find_device(device)
        dtype = resolve_dtype(dtype, self.device)
        self._made_for: dict[str, str | None] = {"model": model, "dtype": dtype, "device": device}
        self._made_for |= {"quantize": quantize, "offload": offload}
        self._dtype, self._quantize, self._offload = find_dtype(dtype), quantize, offload
        self._ranks = ranks
        self._writes = ranks is None or ranks.is_first
        self._one_at_a_time = threading.Lock()
        # Where it does not all go to the device as it is, it waits on the CPU.
        plain = quantize is None and offload == "none"
        home = self.device if plain else torch.device("cpu")
        self.pipe: CLEARPipeline = load_pipeline(
            model, self._dtype, home, text_encoders=self._writes
        )
        try:
            check_autoencoder(self.pipe.vae)
        except ValueError as error:
            raise RequestError(f"--model {model}: {error}") from error
        # What `_set_attention` was last asked for, and what it said; None for the stock model.
        self._attention: tuple[Any, ...] | None = None
        self._told: set[str] = set()
        # What `_set_lora` was last asked for: the file's digest and the scale; None for no LoRA.
        self._lora: tuple[Any, ...] | None = None
        self._upscaler: Upscaler | None = None
        self._placed, self._quantising = plain, False
        # The CLEAR weights that the transformer was quantised with.
        self._final_weights: str | None = None

    @classmethod
    def of(cls, request: GenerateRequest, ranks: Ranks | None = None) -> PipelineRunner:
        """That of a request, and of all others of its model and settings."""
        return cls(
            request.model,
            request.dtype,
            request.device,
            ranks,
            quantize=request.quantize,
            offload=request.offload,
        )

    def generate(
        self,
        request: GenerateRequest,
        out: Path,
        *,
        on_step: Callable[[Step], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        notes: Mapping[str, object] | None = None,
        progress: bool = False,
        overwrite: bool = True,
    ) -> dict[str, Any]:
        """Generate a request and write the image, whole or not at all.

        Args:
            request: what to generate.
            out: the PNG or TIFF to write; its settings stand in it.
            on_step: called after every denoising step.
            should_stop: asked after every step and every decoded strip of the image; True ends
                the work there.
            notes: stand in the image besides its settings.
            progress: show a bar on standard error, or lines where that is no terminal.
            overwrite: replace a file of that name; False for the next free one of name-2, ...

        Returns:
            out (the name it got), height, width (pixels), tokens (of the image), impl (the
            attention that ran: an implementation of local attention, or "full"), far (whether with
            far keys), weights (the name of the CLEAR weights, None for the model's own), ranks
            (their number), seconds {total, text, denoise, decode}, peak_memory_mb (of this image,
            in this process).

        Raises:
            Stopped: `should_stop` returned True.
            RequestError: a bad request; nothing was generated.
            FloatingPointError: the model's output is NaN or infinite.
            MemoryError: there is not enough; what the attempt had taken is free again.
            OSError: the image cannot be written.
        """
        for name, value in self._made_for.items():
            if getattr(request, name) != value:
                raise ValueError(
                    f"PipelineRunner: {name} is {value!r} here, and the request says "
                    f"{getattr(request, name)!r}; make another PipelineRunner for it."
                )
        if self._writes:
            check_writable(out, IMAGE_SUFFIXES)
        with self._one_at_a_time:
            watch = _Watch(on_step, should_stop)
            return self._generate(request, out, watch, notes or {}, progress, overwrite)

    def _generate(
        self,
        request: GenerateRequest,
        out: Path,
        watch: _Watch,
        notes: Mapping[str, object],
        progress: bool,
        overwrite: bool,
    ) -> dict[str, Any]:
        reset_peak(self.device)
        ranks = 1 if self._ranks is None else len(self._ranks.members)
        timer = Timer({})
        failure = None
        try:
            with timer.measure("total", self.device):
                (weights, far), impl = self._set_attention(request)
                self._place(weights)
                lora = self._set_lora(request)
                if self._ranks is not None:
                    self.pipe.enable_patch_parallel(self._ranks.mesh)
                    self._ranks.follow(self.pipe)
                shown = progress and self._writes
                self.pipe.set_progress_bar_config(desc="denoising", **bar_options(shown))
                upscaler = self._find_upscaler(request)
                latents = self._denoise(request, upscaler, watch, timer)
                settings = request.settings | {"far": far}
                settings |= {"version": __version__, "impl": impl, "ranks": ranks}
                settings |= _named(upscaler)
                settings |= {} if lora is None else {"lora": lora[0], "lora_sha256": lora[1]}
                done = quantised(self.pipe.transformer)
                statement = done and done.statement()
                settings |= {} if statement is None else {"quantised": statement}
                settings |= notes
                with timer.measure("decode", self.device):
                    out = self._write(latents, request, out, settings, watch, overwrite)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        if failure is not None:
            # Only here, outside of the handler: its traceback held the tensors.
            _free(self.device)
            raise MemoryError(
                f"{request.width} x {request.height} px do not fit into the memory of "
                f"{self.device} ({failure}); ask for fewer pixels."
            )
        return {
            "out": str(out),
            "height": request.height,
            "width": request.width,
            "tokens": request.height * request.width // self.pipe.token_pixels**2,
            "impl": impl,
            "far": far,
            "weights": weights and Path(weights).name,
            "ranks": ranks,
            "quantised": statement,
            "seconds": timer.seconds,
            "peak_memory_mb": round(peak_mb(self.device), 1),
        }

    def _set_attention(self, request: GenerateRequest) -> tuple[Settled, str]:
        """Switch the pipeline where it is not what a request needs; weights and implementation."""
        found = Settled(None, False)
        if request.attention == "full":
            impl, wanted = "full", None
        else:
            found = self._find_weights(request)
            impl = find_impl(
                request.impl,
                self.pipe.dtype,
                self.device,
                head_dim_of(self.pipe.transformer),
                kernels_of(found.far, request.down_factor > 1, needs_grad=False),
            )
            window = request.radius, request.down_factor, request.schedule
            wanted = (*window, *found, request.impl)
        if wanted != self._attention:
            before = self._attention
            # Where it is interrupted, the next request removes what was done.
            self._attention = ("unfinished",)
            if self._is_final(found.weights):
                self._renew_transformer()
                before = None
            if before is not None:
                self._remove_clear()
            if wanted is not None:
                self._apply_clear(request, found)
            self._attention = wanted
        return found, impl

    def _is_final(self, weights: str | None) -> bool:
        """Whether the transformer is quantised and cannot be had with these CLEAR weights."""
        have_weights = weights is not None or self._final_weights is not None
        done = quantised(self.pipe.transformer) is not None
        return self._quantising or (done and have_weights)

    def _renew_transformer(self) -> None:
        """Load the transformer again, as it was before CLEAR weights and quantisation."""
        self._drop_lora()
        self.pipe.register_modules(transformer=None)
        _free(self.device)
        model, home = self._made_for["model"], torch.device("cpu")
        assert model is not None
        fresh = load_pipeline(model, self._dtype, home, only_transformer=True)
        self.pipe.register_modules(transformer=fresh.transformer)
        self._placed = self._quantising = False

    def _place(self, weights: str | None) -> None:
        """Bring the pipeline to its device, once, and quantise it: its CLEAR weights are loaded."""
        if self._placed:
            return
        if self._quantize is not None:
            self._quantising = True  # where it is interrupted, the next request begins anew
            self._final_weights = weights
            quantize(self.pipe, self._quantize, self.device)
            self._quantising = False
        place(self.pipe, self.device, self._offload)
        self._placed = True

    def _set_lora(self, request: GenerateRequest) -> tuple[str, str] | None:
        """Switch the pipeline to a request's LoRA, or to none; its file's name and digest.

        After quantising, whose layers a LoRA is added to.
        """
        if request.lora is None:
            self._drop_lora()
            return None
        path = Path(request.lora)
        try:
            digest = file_digest(path)
        except OSError as error:
            raise RequestError(f"--lora: {path} cannot be read ({error.strerror}).") from error
        if self._lora != (digest, request.lora_scale):
            self._drop_lora()
            self._lora = ("unfinished",)  # where it is interrupted, the next request drops it
            load_lora(self.pipe, path, request.lora_scale)
            self._lora = digest, request.lora_scale
        return path.name, digest

    def _drop_lora(self) -> None:
        if self._lora is not None:
            self._lora = ("unfinished",)
            unload_lora(self.pipe)
            self._lora = None

    def _remove_clear(self) -> None:
        try:
            remove_clear(self.pipe)
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _apply_clear(self, request: GenerateRequest, found: Settled) -> None:
        try:
            apply_clear(
                self.pipe,
                radius=request.radius if request.schedule is None else None,
                down_factor=request.down_factor,
                schedule=request.schedule,
                far=found.far,
                weights=found.weights,
                impl=request.impl,
            )
        except (ValueError, OSError) as error:
            raise RequestError(str(error)) from error

    def _find_weights(self, request: GenerateRequest) -> Settled:
        """A request's weights; says which, once, where it leaves the choice to us."""
        found = settled(request)
        covers_all = request.schedule is None and self._covers_all(request)
        if request.weights != AUTO or request.schedule is not None:
            return found
        pooled = f", down_factor {request.down_factor}" if request.down_factor > 1 else ""
        sees = ", far keys" if found.far else pooled
        setting = f"{request.model}, radius {request.radius}{sees}"
        if setting in self._told or (found.weights is None and covers_all):
            return found
        self._told.add(setting)
        if found.weights is not None:
            logger.info("weights for %s: %s", setting, Path(found.weights).name)
        elif found.far:
            logger.info(
                "no weights are known for %s: the model's own are taken, every token sees the "
                "whole image",
                setting,
            )
        else:
            logger.warning(
                "no weights are known for %s: the model is not tuned for its window, which changes "
                "images; %s, or name weights with --weights (none: go without, quietly)",
                setting,
                _way_to_far_keys(request),
            )
        return found

    def _covers_all(self, request: GenerateRequest) -> bool:
        """Whether a request's window is the whole image; says so once."""
        side = self.pipe.token_pixels
        rows, columns = request.height // side, request.width // side
        if request.radius**2 <= (rows - 1) ** 2 + (columns - 1) ** 2:
            return False
        said = f"--radius {request.radius} covers all of an image of {rows} x {columns} tokens"
        if said not in self._told:
            self._told.add(said)
            logger.info("%s: it is full attention; take a smaller one for local attention", said)
        return True

    def _find_upscaler(self, request: GenerateRequest) -> Upscaler | None:
        """A request's, loaded once as long as requests name the same."""
        if request.upscaler is None:
            self._upscaler = None
            return None
        path = Path(request.upscaler)
        if self._upscaler is None or self._upscaler.digest != file_digest(path):
            self._upscaler = None
            try:
                self._upscaler = load_upscaler(path, self.device)
            except ValueError as error:
                raise RequestError(f"--{error}") from error
        return self._upscaler

    def _denoise(
        self,
        request: GenerateRequest,
        upscaler: Upscaler | None,
        watch: _Watch,
        timer: Timer,
    ) -> torch.Tensor:
        """Text and denoising, each timed; latents as the stock pipeline holds them."""
        pipe = self.pipe
        texts = RequestTexts(self._ranks, timer, self.device)
        stages: dict[str, Any] = {
            "low_resolution_guidance": request.low_resolution_guidance,
            "upscaler": upscaler,
            "stages_dir": request.stages_dir,
            "texts": texts,
            **request.stage_options,
        }
        if request.image is not None:
            stages["enlarge"] = image = read_image(Path(request.image))
            if request.negative_prompt is not None:
                StagePlanner(request.model).check_negative(request, (image.height, image.width))
        with timer.measure("denoise", self.device):
            try:
                latents = denoise(
                    pipe,
                    [request.prompt],
                    [request.seed],
                    height=request.height,
                    width=request.width,
                    steps=request.steps,
                    guidance=request.guidance,
                    negative_prompt=request.negative_prompt,
                    callback_on_step_end=watch.after_step,
                    **stages,
                )
            except ValueError as error:
                raise RequestError(str(error)) from error
        timer.without("denoise", "text")
        if watch.stopped:
            raise Stopped
        return latents

    def _write(
        self,
        latents: torch.Tensor,
        request: GenerateRequest,
        out: Path,
        settings: dict[str, Any],
        watch: _Watch,
        overwrite: bool,
    ) -> Path:
        """Decode and write an image strip by strip; the file."""
        from ..pipelines.decoding.autoencoder import decode_rows
        from ..pipelines.parallel.progress import Progress
        from ..pipelines.parallel.watch import until_failure

        height, width = request.height, request.width
        group = None if self._ranks is None else self._ranks.process_group.group
        strips = decode_rows(self.pipe.vae, unpack(self.pipe, latents, height, width), group=group)
        if self._ranks is not None:
            self._ranks.watch.progress = Progress("decoding")
            if not self._writes:
                list(strips)  # there are none: it computes what it sends to the first
                return out
            strips = until_failure(strips, self._ranks.watch)
        try:
            return save_rows(
                watch.each(strips),
                out,
                height=height,
                width=width,
                settings=settings,
                overwrite=overwrite,
            )
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise OSError(f"{out} could not be written ({reason}).") from error


def generate(
    request: GenerateRequest,
    out: Path,
    progress: bool = True,
    ranks: Ranks | None = None,
    overwrite: bool = True,
) -> dict[str, Any]:
    """Load the model of a request, generate it and write the image.

    Args:
        request: what to generate.
        out: the PNG or TIFF to write; its settings stand in it.
        progress, overwrite: see `PipelineRunner.generate`.
        ranks: that share the work, all with this request but for its device; the first writes and
            shows the bar.

    Returns:
        What `PipelineRunner.generate` returns, with the loading in seconds' total and in
        peak_memory_mb.

    Raises:
        RequestError: a bad request, before any work.
        MemoryError: there is not enough for this image.
        OSError: the image cannot be written; nothing is left under its name.
    """
    if ranks is not None:
        check_shared(request, ranks)
    if ranks is None or ranks.is_first:
        check_writable(out, IMAGE_SUFFIXES)
    device = find_device(request.device)
    reset_peak(device)
    start = time.perf_counter()
    runner = PipelineRunner.of(request, ranks)
    load_peak = round(peak_mb(device), 1)
    result = runner.generate(request, out, progress=progress, overwrite=overwrite)
    result["seconds"]["total"] = round(time.perf_counter() - start, 3)
    result["peak_memory_mb"] = max(load_peak, result["peak_memory_mb"])
    return result


def _way_to_far_keys(request: GenerateRequest) -> str:
    """What a request without them and without weights may change."""
    if request.down_factor > 1:
        return "leave out --down-factor to take far keys"
    if request.radius == 1:
        return "take far keys with --radius 2 or more"
    return "take far keys with --far"


class _Watch:
    """Who is told of every step, and who may end the work."""

    def __init__(
        self, on_step: Callable[[Step], None] | None, should_stop: Callable[[], bool] | None
    ) -> None:
        self._on_step, self._should_stop = on_step, should_stop
        self.stopped = False

    def after_step(
        self, pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """As `callback_on_step_end` in diffusers."""
        if self._on_step is not None:
            self._on_step(
                Step(
                    step=step + 1,
                    steps=len(pipe.scheduler.timesteps),
                    stage=pipe.stages.index(pipe.stage) + 1,
                    stages=len(pipe.stages),
                    height=pipe.stage.height,
                    width=pipe.stage.width,
                    sigma=float(pipe.scheduler.sigmas[step + 1]),
                    latents=tensors["latents"],
                )
            )
        if self._should_stop is not None and self._should_stop():
            pipe._interrupt = self.stopped = True
        return {}

    def each(self, strips: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The same strips, as long as nobody ends the work."""
        for strip in strips:
            if self._should_stop is not None and self._should_stop():
                raise Stopped
            yield strip


def _named(upscaler: Upscaler | None) -> dict[str, str]:
    """What stands in an image of its upscaler."""
    if upscaler is None:
        return {}
    return {"upscaler": upscaler.name, "upscaler_sha256": upscaler.digest}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
