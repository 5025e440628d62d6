"""Train the demo pipeline from nothing: `python -m clear_dit.demo.train`.

Stages: data (render), probe (the classifier of `evaluate`), text, autoencoder, latents, phase-1
(256 px), phase-2 (512 px), decoder (more training, the latents unchanged), export. Each leaves its
result in the work folder; started again after a kill, the program goes on where it stopped.
"""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from tqdm import tqdm

from clear_dit.demo.autoencoder import CropSampler, to_tensor, train_autoencoder, train_decoder
from clear_dit.demo.card import stage_seconds, training_card
from clear_dit.demo.checkpoint import load_checkpoint
from clear_dit.demo.data import ImageSet, save_array
from clear_dit.demo.export import build_pipeline, export_pipeline
from clear_dit.demo.probe import save_probe, train_probe
from clear_dit.demo.text import TextEncoders, train_text
from clear_dit.demo.transformer import (
    FluxTransformer2DModel,
    Phase,
    build_transformer,
    pack,
    train_transformer,
)

STAGES = (
    "data", "probe", "text", "autoencoder", "latents", "phase-1", "phase-2", "decoder", "export",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much of everything; the defaults trained the weights in assets/demo."""

    sizes: tuple[int, int, int] = (256, 512, 1024)
    counts: tuple[int, int, int] = (14000, 5200, 60)
    text_steps: int = 600
    autoencoder_steps: int = 2600
    decoder_steps: int = 700
    autoencoder_crop: int = 128
    probe_epochs: int = 6
    phases: tuple[Phase, Phase] = field(
        default=(
            Phase("phase-1", 16, 1200, 32, 0.01, 2e-3, 0.3, 0.3),
            Phase("phase-2", 32, 3200, 8, 0.006, 1.2e-3, 1.0, 0.15, 1.2),
        )
    )
    compile_model: bool = True
    save_every: int = 100

    def image_sets(self, work: Path) -> list[ImageSet]:
        return [
            ImageSet(work, size, count, seed)
            for seed, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True), 1)
        ]


def _halve(images: np.ndarray) -> np.ndarray:
    """Average 2x2 pixels: uint8 [n, 2h, 2w, 3] -> [n, h, w, 3]."""
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2, c)
    return blocks.mean((2, 4), dtype=np.float32).round().astype(np.uint8)


def crop_sampler(work: Path, plan: Plan) -> CropSampler:
    """Crops of the small images and of the large ones at full and half size."""
    small, _, large = plan.image_sets(work)
    stack = [np.load(small.path(i), mmap_mode="r") for i in range(min(20, small.chunks))]
    full = [np.load(large.path(i)) for i in range(large.chunks)]
    return CropSampler([stack, [_halve(chunk) for chunk in full], full], [2, 2, 1])


def fit_autoencoder(work: Path, plan: Plan) -> AutoencoderTiny:
    """Train, or load, the autoencoder; its scale and shift make latents of variance 1."""
    sampler = crop_sampler(work, plan)
    vae = train_autoencoder(
        sampler, work / "autoencoder.safetensors", plan.autoencoder_steps, plan.autoencoder_crop
    ).eval()
    with torch.no_grad():
        latents = vae.encoder(to_tensor(sampler.stacks[0][0][:64]))
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    return vae.requires_grad_(False)


def load_autoencoder(work: Path) -> AutoencoderTiny:
    """The autoencoder that made the latents, with its decoder as far as it has been trained."""
    vae = AutoencoderTiny.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    load_checkpoint(work / "decoder.safetensors", average=vae.decoder)
    return vae.requires_grad_(False)


@torch.no_grad()
def encode_set(vae: AutoencoderTiny, image_set: ImageSet, folder: Path) -> None:
    """Encode `image_set` to packed latents: one float16 file [<= CHUNK, tokens, 64] per chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = max(1, 16 * 256**2 // image_set.size**2)
    for index, chunk in enumerate(tqdm(image_set.open_chunks(), f"encode {image_set.size} px")):
        path = folder / f"{index:05d}.npy"
        if path.exists():
            continue
        parts = []
        for first in range(0, len(chunk), batch):
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encoder(to_tensor(chunk[first : first + batch]))
            latents = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
            parts.append(pack(latents).half().numpy())
        save_array(path, np.concatenate(parts))


def load_tokens(folder: Path) -> np.ndarray:
    """All packed latents of a set: float16 [n, tokens, 64]."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def averaged_weights(work: Path, plan: Plan) -> tuple[FluxTransformer2DModel, list[list[float]]]:
    """The newest averaged transformer in `work` and the losses of the phases so far."""
    model, curves = build_transformer().requires_grad_(False), []
    for phase in plan.phases:
        path = work / f"{phase.name}.safetensors"
        if path.exists():
            curves.append(load_checkpoint(path, average=model)[1])
    if not curves:
        raise FileNotFoundError(f"no transformer checkpoint in {work}; run the phases first")
    return model, curves


def draw_curve(curves: list[list[float]], width: int = 960, height: int = 360) -> bytes:
    """A PNG of the smoothed losses, one colour per phase, on a common axis of steps."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, width - 20, height - 40
    total = sum(map(len, curves))
    smooth = []
    for curve in curves:
        window = max(1, len(curve) // 100)
        sums = np.cumsum(np.concatenate([np.zeros(1), curve]))
        smooth.append((sums[window:] - sums[:-window]) / window)
    low = 0.9 * min(map(np.min, smooth))
    high = max(float(np.quantile(c, 0.97)) for c in smooth) * 1.1
    for level in np.linspace(low, high, 6):
        y = bottom - (level - low) / (high - low) * (bottom - top)
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f"{level:.3f}", fill="black")
    start = 0
    for index, curve in enumerate(smooth):
        xs = left + (start + np.arange(len(curve))) / total * (right - left)
        ys = bottom - (np.clip(curve, low, high) - low) / (high - low) * (bottom - top)
        colour = ((30, 90, 200), (200, 70, 30))[index % 2]
        draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=colour, width=2)
        draw.text((xs[0] + 4, top), f"phase {index + 1}", fill=colour)
        start += len(curves[index])
    draw.text(((left + right) // 2 - 60, bottom + 14), f"steps (0 to {total})", fill="black")
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def export(work: Path, output: Path, plan: Plan, encoders: TextEncoders) -> None:
    """Write the newest weights, the card and the loss curve to `output`."""
    model, curves = averaged_weights(work, plan)
    pipe = build_pipeline(model, load_autoencoder(work), encoders)
    done = [len(curve) for curve in curves]
    decoder_steps = load_checkpoint(work / "decoder.safetensors")[0]
    rows = {
        "data": ", ".join(
            f"{n} images of {s} px" for s, n in zip(plan.sizes, plan.counts, strict=True)
        ),
        "text": f"both encoders, {plan.text_steps} steps",
        "autoencoder": f"{plan.autoencoder_steps} steps on crops of {plan.autoencoder_crop} px",
        "latents": "images to latents",
        "probe": f"{plan.probe_epochs} epochs",
        "decoder": f"{decoder_steps} more steps, the encoder fixed",
    }
    for phase, steps in zip(plan.phases, done, strict=False):
        rows[phase.name] = (
            f"{steps} steps of {phase.batch} images, {phase.grid}x{phase.grid} tokens"
        )
    measured = work / "measured.txt"
    card = training_card(
        sum(p.numel() for p in model.parameters()),
        rows,
        stage_seconds(work / "times.tsv"),
        measured.read_text() if measured.exists() else "",
    )
    extra = {"README.md": card.encode(), "loss.png": draw_curve(curves)}
    extra["probe/probe.safetensors"] = (work / "probe.safetensors").read_bytes()
    export_pipeline(pipe, output, extra)


def _timed(work: Path, name: str, stage: Callable[[], object]) -> None:
    """Run `stage` and add its seconds to WORK/times.tsv, which the card sums up."""
    begin = time.time()
    try:
        stage()
    finally:
        with (work / "times.tsv").open("a") as stream:
            stream.write(f"{name}\t{time.time() - begin:.0f}\n")


def run(work: Path, output: Path, plan: Plan, stages: tuple[str, ...], threads: int) -> None:
    """Run `stages` in order."""
    work.mkdir(parents=True, exist_ok=True)
    small, medium, _ = plan.image_sets(work)

    def data() -> None:
        for images in plan.image_sets(work):
            images.build(threads)

    def probe() -> None:
        if not (work / "probe.safetensors").exists():
            save_probe(train_probe(small, plan.probe_epochs), work / "probe.safetensors")

    def text() -> TextEncoders:
        return train_text(work / "text.safetensors", plan.text_steps)

    def latents() -> None:
        if not (work / "vae").exists():
            fit_autoencoder(work, plan).save_pretrained(work / "vae")
        vae = load_autoencoder(work)
        for images in (small, medium):
            encode_set(vae, images, work / f"latents-{images.size}")

    def phase(index: int) -> None:
        images = (small, medium)[index]
        initial = None
        if index == 1:
            initial = averaged_weights(work, plan)[0].state_dict()
        train_transformer(
            plan.phases[index],
            load_tokens(work / f"latents-{images.size}"),
            images.scenes(),
            text(),
            work / f"{plan.phases[index].name}.safetensors",
            initial,
            plan.compile_model,
            plan.save_every,
        )

    def decoder() -> None:
        vae = AutoencoderTiny.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
        train_decoder(
            vae.requires_grad_(False),
            crop_sampler(work, plan),
            work / "decoder.safetensors",
            plan.decoder_steps,
            plan.autoencoder_crop,
        )

    actions: dict[str, Callable[[], object]] = {
        "data": data,
        "probe": probe,
        "text": text,
        "autoencoder": lambda: fit_autoencoder(work, plan),
        "latents": latents,
        "phase-1": lambda: phase(0),
        "phase-2": lambda: phase(1),
        "decoder": decoder,
        "export": lambda: export(work, output, plan, text()),
    }
    for name in stages:
        _timed(work, name, actions[name])


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path(
        "runs/demo"
    ),
    output: Annotated[Path, typer.Option(help="Where the pipeline goes.")] = Path("assets/demo"),
    stage: Annotated[
        list[str] | None, typer.Option(help=f"Only this stage, repeatable: {', '.join(STAGES)}.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of computation.")] = 2,
) -> None:
    """Train the demo pipeline; a second start resumes."""
    unknown = [name for name in stage or () if name not in STAGES]
    if unknown:
        raise typer.BadParameter(f"unknown stage {unknown[0]!r}; choose from {', '.join(STAGES)}")
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stopped stage records its time
    run(work, output, Plan(), tuple(stage or STAGES), threads)


if __name__ == "__main__":
    typer.run(main)
