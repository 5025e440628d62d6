"""The command `clear-dit render`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..errors import RequestError


def render(
    jobs: Annotated[
        Path,
        typer.Argument(
            help="A .jsonl or .csv file of jobs, such as jobs.csv, or a .txt of prompts (and "
            "comments, which begin with #). A job has a prompt and, where it differs from the "
            "options, id, height, width, seed, seeds, steps, guidance, negative_prompt, radius, "
            "down_factor, far, weights, lora, lora_scale, schedule, attention, image, preset, "
            "strength, stage_steps, low_resolution_guidance, upscaler."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for images and manifest.jsonl, such as images.")
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Wait for new lines; Ctrl-C ends it.")
    ] = False,
    model: options.Model = "demo",
    height: options.Height = None,
    width: options.Width = None,
    radius: options.ModelRadius = None,
    down_factor: options.DownFactor = 1,
    far: options.Far = None,
    weights: options.Weights = "auto",
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    schedule: options.Schedule = None,
    attention: options.Attention = "clear",
    impl: options.Impl = "auto",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    preset: options.Preset = "auto",
    upscaler: options.Upscaler = None,
    seed: Annotated[int, typer.Option(help="Seed of a job's first image, such as 7.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="Images of a job, such as 4; each next seed adds 1.")
    ] = 1,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Generate many images from a file of jobs.

    The same command goes on where it was stopped. Started several times, or by torchrun or
    accelerate launch, the processes share the jobs.
    Ctrl-C ends after the current image, twice at once.
    """
    settings = {
        name: value
        for name, value in locals().items()
        if name not in ("jobs", "out", "watch", "as_json")
    }
    from .fields import MAX_SEEDS
    from .launch import Launch
    from .run import render as run

    if not 1 <= seeds <= MAX_SEEDS:
        raise RequestError(f"--seeds must be from 1 to {MAX_SEEDS}, got {seeds}.")
    # What is told of single images would bury the bar; sidecars have it.
    logging.getLogger("clear_dit").setLevel(logging.WARNING)
    try:
        result = run(jobs, out, settings, watch=watch)
    except KeyboardInterrupt:
        options.fail("interrupted; the same command goes on.", 130)
    if as_json:
        options.print_json(result)
    elif Launch.from_environment().rank == 0:
        others = "".join(f", {result[key]} {key}" for key in ("failed", "waiting") if result[key])
        print(
            f"{out}: {result['done']} of {result['jobs']} images done{others}; "
            f"{result['generated']} generated now, in {result['seconds']:.1f} s (manifest.jsonl)"
        )
    if result["waiting"]:
        raise typer.Exit(130)
    if result["failed"]:
        raise typer.Exit(1)
