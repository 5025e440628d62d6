"""Teacher samples: images the stock model makes itself, kept as what distillation reads."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..errors import RequestError, first_line
from ..generation.checks import Bounds, check_size, find_device, find_dtype, take_numbers
from ..generation.conditioning import Conditioning, conditioning_of
from ..generation.denoising import decode, denoise, latents_shape
from ..generation.dtypes import AUTO as AUTO_DTYPE
from ..generation.dtypes import resolve_dtype
from ..generation.image_output import save_png
from ..generation.models import find_model, load_pipeline, model_defaults
from ..generation.prompts import read_prompts
from ..generation.request import MAX_STEPS
from ..pipelines.cascade.resolution import Resolution
from ..pipelines.text import Texts
from ..progress import bar_options
from ..versions import versions
from .conditionings import tensors_of
from .cpu_attention import per_head_attention
from .files import refuse_full_disk
from .fingerprint import fingerprint, same_model
from .precision import autocast, weights_dtype
from .samples import INDEX, MAX_COUNT, SampleFolder, SampleIndex, read_index

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

logger: logging.Logger = logging.getLogger(__name__)

DEMO_PROMPTS = "demo"
_BOUNDS: dict[str, Bounds] = {
    "count": (1, MAX_COUNT),
    "steps": (1, MAX_STEPS),
    "batch": (1, 1024),
    "shard_size": (1, 10_000),
    "seed": (0, 2**62),
    "guidance": (0, 100),
}


@dataclass(frozen=True)
class SampleRequest:
    """Which samples to make: complete and checked. `make_request` fills in what is not said.

    Attributes:
        model: "demo", "demo-sd3", a folder in diffusers format, or a hub repository (owner/name).
        prompts: a file (see `read_prompts`), used again from its start where count is larger; or
            "demo", captions of the demo's training combinations.
        count: how many samples.
        height, width: in pixels, multiples of a token's side.
        steps, guidance: see `GenerateRequest`.
        seed: sample n starts from the noise of seed + n.
        dtype: "float32", "bfloat16" or "float16", also that of the stored numbers; given "auto",
            what that is in training on `device` (see `resolve_dtype`).
        device: a torch device.
        batch: images at once.
        shard_size: samples in a file, which is what a kill can cost.
        images: write the images too.

    Raises:
        RequestError: the first thing that is wrong.
    """

    model: str
    prompts: str
    count: int
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    dtype: str
    device: str
    batch: int
    shard_size: int
    images: bool

    def __post_init__(self) -> None:
        token_pixels = find_model(self.model).token_pixels
        for name in ("height", "width"):
            object.__setattr__(self, name, check_size(name, getattr(self, name), token_pixels))
        take_numbers(self, _BOUNDS)
        device = find_device(self.device)
        dtype = resolve_dtype(self.dtype, device, training=True)
        object.__setattr__(self, "dtype", dtype)


def make_request(model: str, prompts: str, count: int, **settings: Any) -> SampleRequest:
    """A request in which whatever is None or not named takes the model's default.

    Raises:
        RequestError: see `SampleRequest`.
    """
    defaults = model_defaults(model)
    device = str(find_device(settings.get("device")))
    complete: dict[str, Any] = {
        "height": defaults.size,
        "width": defaults.size,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "seed": 0,
        "dtype": AUTO_DTYPE,
        "batch": 4,
        "shard_size": 32,
        "images": False,
    }
    complete |= {name: value for name, value in settings.items() if value is not None}
    return SampleRequest(model, prompts, count, **(complete | {"device": device}))


class Prompts:
    """The prompt of every sample number.

    Attributes:
        digest: tells other prompts from these.
    """

    def __init__(self, source: str, seed: int) -> None:
        self.seed = seed
        self.texts: list[str] | None = None if source == DEMO_PROMPTS else read_prompts(source)
        self.digest: str = DEMO_PROMPTS
        if self.texts is not None:
            digest = hashlib.sha256(json.dumps(self.texts).encode())
            self.digest = digest.hexdigest()[:16]

    def __getitem__(self, number: int) -> str:
        if self.texts is not None:
            return self.texts[number % len(self.texts)]
        from ..demo.captions import caption, sample_scene

        rng = np.random.default_rng((self.seed, number))
        return caption(sample_scene(rng), rng)


def sample(request: SampleRequest, out: Path, progress: bool = True) -> dict[str, Any]:
    """Make the samples of a request that are not in the folder yet.

    Under `accelerate launch` or `torchrun`, each process makes the shards whose number is its own
    modulo the number of processes. A killed run goes on where it was: run the same again, with
    any number of processes. A larger count adds samples.

    Args:
        request: which samples.
        out: the folder; made if its parent is there.
        progress: show a progress bar on standard error.

    Returns:
        out, count (asked for), made (now, by this process), missing (left to the other processes),
        seconds (of this process) and seconds_per_sample (None if it made none).

    Raises:
        RequestError: a bad request, or a folder with other samples.
        OSError: a file cannot be written; nothing is left of it.
    """
    prompts = Prompts(request.prompts, request.seed)
    _check_folder(out)
    processes = PartialState(cpu=request.device == "cpu")
    device = processes.device if request.device == "cuda" else torch.device(request.device)
    dtype = find_dtype(request.dtype)
    pipe = load_pipeline(request.model, weights_dtype(dtype, device), device)
    per_head = per_head_attention(pipe.transformer)
    if per_head is not None and weights_dtype(dtype, device) != dtype:
        pipe.transformer.set_attn_processor(per_head)
    pipe.set_progress_bar_config(disable=True)
    samples = SampleFolder(out, _index(request, pipe, prompts))
    _check_other(samples)
    processes.wait_for_everyone()  # nobody writes before everybody has looked
    with autocast(dtype, device):
        no_prompt = pipe.recipe.guidance.negative or ""
        empty = _conditioning(pipe, no_prompt, samples.index, Texts())
    refuse_full_disk(out, _bytes(samples, empty))
    if processes.is_main_process:
        out.mkdir(exist_ok=True)
        samples.write_index()
        samples.write_empty(empty)
    processes.wait_for_everyone()
    own = range(processes.process_index, samples.index.shards, processes.num_processes)
    missing = [shard for shard in samples.missing() if shard in own]
    start, made = time.perf_counter(), 0
    total = sum(len(samples.index.numbers(shard)) for shard in missing)
    shown = bar_options(progress and processes.is_local_main_process)
    with tqdm(total=total, desc="sampling", unit="image", **shown) as bar:
        for shard in missing:
            texts = [prompts[number] for number in samples.index.numbers(shard)]
            with autocast(dtype, device):
                latents, conditionings = _make_shard(
                    pipe, request.batch, samples.index, shard, texts, bar
                )
            samples.write(shard, latents, texts, conditionings)
            samples.forget(shard)
            made += len(texts)
    seconds = time.perf_counter() - start
    if request.images:
        for shard in own:
            _write_images(pipe, samples, shard)
    return {
        "out": str(out),
        "count": request.count,
        "made": made,
        "missing": sum(len(samples.index.numbers(shard)) for shard in samples.missing()),
        "seconds": round(seconds, 3),
        "seconds_per_sample": round(seconds / made, 4) if made else None,
    }


def _bytes(samples: SampleFolder, empty: Conditioning) -> int:
    """What the shards that are missing will take, if no prompt occurs twice in one."""
    index = samples.index
    count = sum(len(index.numbers(shard)) for shard in samples.missing())
    numbers = math.prod(index.shape)
    numbers += sum(tensor.numel() for _, tensor in tensors_of(empty, ""))
    return count * numbers * find_dtype(index.dtype).itemsize


def _make_shard(
    pipe: CLEARPipeline, batch: int, index: SampleIndex, shard: int, prompts: list[str], bar: Any
) -> tuple[torch.Tensor, list[Conditioning]]:
    """Latents of a shard's samples and the conditionings of its different prompts."""
    seeds = [index.seed + number for number in index.numbers(shard)]
    latents, texts = [], Texts()
    for first in range(0, len(prompts), batch):
        chosen = slice(first, first + batch)
        latents.append(denoise_as_trained(pipe, prompts[chosen], seeds[chosen], index, texts))
        bar.update(len(latents[-1]))
    different = dict.fromkeys(prompts)
    return torch.cat(latents), [_conditioning(pipe, one, index, texts) for one in different]


def _conditioning(
    pipe: CLEARPipeline, prompt: str, index: SampleIndex, texts: Texts
) -> Conditioning:
    """What the transformer is given for a prompt at an index's size.

    Raises:
        RequestError: the pipeline cannot do this size.
    """
    size = {"height": index.height, "width": index.width}
    try:
        return conditioning_of(pipe, prompt, guidance=index.guidance, texts=texts, **size)
    except ValueError as error:
        raise RequestError(first_line(error)) from error


def denoise_as_trained(
    pipe: CLEARPipeline, prompts: list[str], seeds: list[int], index: SampleIndex, texts: Texts
) -> torch.Tensor:
    """Latents, (batch, *index.shape), of images of an index's size and settings.

    In one stage and with the positions the model was trained with, at any size: those that the
    student learns with.

    Raises:
        RequestError: the pipeline cannot do this size, or the latents are not finite.
    """
    try:
        return denoise(
            pipe,
            prompts,
            seeds,
            height=index.height,
            width=index.width,
            steps=index.steps,
            guidance=index.guidance,
            cascade=False,
            resolution=lambda height, width: Resolution(),
            texts=texts,
        )
    except FloatingPointError as error:
        raise RequestError(
            f"{index.model} in {index.dtype} gives latents that are not finite "
            f"({first_line(error)}); use another --dtype."
        ) from error
    except ValueError as error:
        raise RequestError(first_line(error)) from error


def _write_images(pipe: CLEARPipeline, samples: SampleFolder, shard: int) -> None:
    """Decode the images of a shard that are not there yet."""
    index, folder = samples.index, samples.folder / "images"
    folder.mkdir(exist_ok=True)
    header = samples.header(shard)
    for row, latents in enumerate(samples.latents(shard)):
        number = header["numbers"][row]
        path = folder / f"{number:06d}.png"
        if path.exists():
            continue
        latents = latents[None].to(pipe.vae.device, pipe.vae.dtype)
        settings = {name: header[f"{name}s"][row] for name in ("prompt", "seed")}
        save_png(decode(pipe, latents, index.height, index.width), path, settings)


def _index(request: SampleRequest, pipe: CLEARPipeline, prompts: Prompts) -> SampleIndex:
    return SampleIndex(
        model=request.model,
        fingerprint=fingerprint(pipe.transformer),
        height=request.height,
        width=request.width,
        shape=latents_shape(pipe, request.height, request.width),
        steps=request.steps,
        guidance=request.guidance,
        dtype=request.dtype,
        prompts=prompts.digest,
        seed=request.seed,
        count=request.count,
        shard_size=request.shard_size,
        versions=versions(),
    )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out must be a folder, and {out} is a file.")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"--out: there is no folder {out.absolute().parent}. Create it first.")
    # A killed first run may have left the temporary file of the index.
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if others and not (out / INDEX).exists():
        raise RequestError(f"--out: {out} has files in it but no {INDEX}; choose another folder.")


def _check_other(samples: SampleFolder) -> None:
    """Refuse a folder of other samples than those asked for."""
    if not (samples.folder / INDEX).exists():
        return
    found, asked = read_index(samples.folder), samples.index
    if not same_model(found.fingerprint, asked.fingerprint):
        raise RequestError(
            f"--out: {samples.folder} has samples of another model: of {found.model!r}, not of "
            f"{asked.model!r}."
        )
    for name in ("height", "width", "steps", "guidance", "dtype", "prompts", "seed", "shard_size"):
        before, now = getattr(found, name), getattr(asked, name)
        if before != now:
            raise RequestError(
                f"--out: {samples.folder} was begun with {name} {before}, now it is {now}; choose "
                "another folder, or the same settings."
            )
    if found.count > asked.count:
        raise RequestError(
            f"--out: {samples.folder} was begun with count {found.count}, which is more than "
            f"{asked.count}; a folder can only grow."
        )
