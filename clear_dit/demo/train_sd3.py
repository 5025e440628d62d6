"""Train the second demo pipeline: `python -m clear_dit.demo.train --architecture sd3`.

It needs the first one, from which it takes the autoencoder, the text encoders, the probe and a
teacher. Stages: data (render at 512 px), latents (of whole and of halved images), phase-1 (256 px),
teach (what the first pipeline's transformer predicts), phase-2 (512 px, a sample of the tokens),
phase-3 (512 px, all tokens), export. A second start resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel, SD3Transformer2DModel

from clear_dit.demo.card import stage_seconds, training_card
from clear_dit.demo.checkpoint import load_checkpoint
from clear_dit.demo.data import ImageSet
from clear_dit.demo.export import build_sd3_pipeline, export_pipeline
from clear_dit.demo.sd3 import (
    SD3Architecture,
    TaughtBatches,
    TextEncoders,
    build_transformer,
    write_taught,
)
from clear_dit.demo.stages import draw_curve, encode_set, load_tokens, timed
from clear_dit.demo.transformer import FlowBatches, Phase, train_transformer

STAGES = ("data", "latents", "phase-1", "teach", "phase-2", "phase-3", "export")
_TEACH = 64  # draws in one file of the teacher's predictions


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    size: int = 512
    count: int = 800
    taught: int = 896
    kept: int = 256
    phases: tuple[Phase, Phase, Phase] = field(
        default=(
            Phase("phase-1", 16, 140, 16, 0.01, 2e-3, 0.3, 0.9, average_decay=0.995),
            Phase("phase-2", 32, 1200, 8, 0.01, 2e-3, 1.0, 0.5, 1.2, average_decay=0.995),
            Phase("phase-3", 32, 1200, 4, 0.008, 1e-3, 1.0, 0.0, 1.2, average_decay=0.99),
        )
    )
    save_every: int = 20

    def rows(self, steps: list[int]) -> dict[str, str]:
        """What each stage did, for the card; `steps`: done in each phase."""
        rows = {
            "data": f"{self.count} images of {self.size} px",
            "latents": f"of {self.size // 2} px and {self.size} px",
        }
        looks = (
            "16x16 tokens (256 px), noise minus image as the target",
            f"{self.kept} of 32x32 tokens (512 px)",
            "32x32 tokens (512 px)",
        )
        for phase, done, look in zip(self.phases, steps, looks, strict=False):
            rows[phase.name] = f"{done} steps of {phase.batch} images, {look}"
            if phase is self.phases[0]:
                rows["teach"] = f"{self.taught} predictions of the transformer of assets/demo"
        return rows


def newest_weights(work: Path, plan: Plan) -> tuple[SD3Transformer2DModel, list[list[float]]]:
    """The newest averaged transformer in `work` and the losses of the phases so far."""
    model, curves = build_transformer().requires_grad_(False), []
    for phase in plan.phases:
        path = work / f"{phase.name}.safetensors"
        if path.exists():
            curves.append(load_checkpoint(path, average=model)[1])
    if not curves:
        raise FileNotFoundError(f"no transformer checkpoint in {work}; run the phases first")
    return model, curves


def run(
    work: Path,
    output: Path,
    stages: tuple[str, ...],
    threads: int,
    first: Path = Path("assets/demo"),
    plan: Plan | None = None,
) -> None:
    """Run `stages` in order; `first` is the first demo pipeline's folder."""
    plan = plan or Plan()
    work.mkdir(parents=True, exist_ok=True)
    images = ImageSet(work, plan.size, plan.count, seed=2)
    encoders = TextEncoders(first)
    teacher = FluxTransformer2DModel.from_pretrained(first / "transformer").requires_grad_(False)
    folders = [work / f"latents-{size}" for size in (plan.size // 2, plan.size)]
    taught = work / "taught"

    def latents() -> None:
        vae = AutoencoderTiny.from_pretrained(first / "vae").to(memory_format=torch.channels_last)
        for folder in folders:
            encode_set(vae, images, folder, halved=folder == folders[0])

    def phase(index: int) -> None:
        it = plan.phases[index]
        initial = newest_weights(work, plan)[0].state_dict() if index else None
        batches = (
            TaughtBatches(taught, it.batch)
            if index
            else FlowBatches(it, load_tokens(folders[0]), images.scenes())
        )
        train_transformer(
            it,
            batches,
            SD3Architecture(encoders, teacher, plan.kept if index == 1 else None),
            work / f"{it.name}.safetensors",
            initial,
            compile_model=False,
            save_every=plan.save_every,
        )

    def export() -> None:
        model, curves = newest_weights(work, plan)
        vae = AutoencoderTiny.from_pretrained(first / "vae")
        measured = work / "measured.txt"
        card = training_card(
            sum(p.numel() for p in model.parameters()),
            plan.rows([len(curve) for curve in curves]),
            stage_seconds(work / "times.tsv"),
            measured.read_text() if measured.exists() else "",
            "sd3",
        )
        extra = {"README.md": card.encode(), "loss.png": draw_curve(curves)}
        extra["probe/probe.safetensors"] = (first / "probe" / "probe.safetensors").read_bytes()
        export_pipeline(build_sd3_pipeline(model, vae, encoders), output, extra)

    actions: dict[str, Callable[[], object]] = {
        "data": lambda: images.build(threads),
        "latents": latents,
        "phase-1": lambda: phase(0),
        "teach": lambda: write_taught(
            taught,
            plan.taught,
            FlowBatches(
                replace(plan.phases[1], batch=min(_TEACH, plan.taught)),
                load_tokens(folders[1]),
                images.scenes(),
            ),
            encoders,
            teacher,
        ),
        "phase-2": lambda: phase(1),
        "phase-3": lambda: phase(2),
        "export": export,
    }
    for name in stages:
        timed(work, name, actions[name])
