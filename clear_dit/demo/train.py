"""Train the demo pipeline from nothing: `python -m clear_dit.demo.train`.

Stages: data (render), probe (the classifier of `evaluate`), text, autoencoder, latents, phase-1
(256 px), phase-2 (512 px), decoder (more training, the latents unchanged), export. Each leaves its
result in the work folder; started again after a kill, the program goes on where it stopped.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny

from clear_dit.demo import train_sd3
from clear_dit.demo.autoencoder import CropSampler, to_tensor, train_autoencoder, train_decoder
from clear_dit.demo.card import stage_seconds, training_card
from clear_dit.demo.checkpoint import load_checkpoint
from clear_dit.demo.data import ImageSet
from clear_dit.demo.export import build_pipeline, export_pipeline
from clear_dit.demo.probe import save_probe, train_probe
from clear_dit.demo.stages import draw_curve, encode_set, halve, load_tokens, timed
from clear_dit.demo.text import TextEncoders, train_text
from clear_dit.demo.transformer import (
    FlowBatches,
    FluxArchitecture,
    FluxTransformer2DModel,
    Phase,
    build_transformer,
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


def crop_sampler(work: Path, plan: Plan) -> CropSampler:
    """Crops of the small images and of the large ones at full and half size."""
    small, _, large = plan.image_sets(work)
    stack = [np.load(small.path(i), mmap_mode="r") for i in range(min(20, small.chunks))]
    full = [np.load(large.path(i)) for i in range(large.chunks)]
    return CropSampler([stack, [halve(chunk) for chunk in full], full], [2, 2, 1])


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
            FlowBatches(
                plan.phases[index], load_tokens(work / f"latents-{images.size}"), images.scenes()
            ),
            FluxArchitecture(text()),
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
        timed(work, name, actions[name])


def main(
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for data and checkpoints; runs/demo or runs/demo-sd3."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the pipeline goes; assets/demo or assets/demo-sd3."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this stage, repeatable: {', '.join(STAGES)}; "
            f"for sd3 {', '.join(train_sd3.STAGES)}."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of computation.")] = 2,
    architecture: Annotated[
        Literal["flux", "sd3"], typer.Option(help="sd3 starts from the FLUX demo in assets/demo.")
    ] = "flux",
) -> None:
    """Train a demo pipeline; a second start resumes."""
    stages = STAGES if architecture == "flux" else train_sd3.STAGES
    unknown = [name for name in stage or () if name not in stages]
    if unknown:
        raise typer.BadParameter(f"unknown stage {unknown[0]!r}; choose from {', '.join(stages)}")
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stopped stage records its time
    name = "demo" if architecture == "flux" else "demo-sd3"
    work, output = work or Path("runs") / name, output or Path("assets") / name
    if architecture == "flux":
        run(work, output, Plan(), tuple(stage or stages), threads)
    else:
        train_sd3.run(work, output, tuple(stage or stages), threads)


if __name__ == "__main__":
    typer.run(main)
