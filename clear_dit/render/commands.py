"""The command `clear-dit render`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError


def render(
    jobs: Annotated[
        Path,
        typer.Argument(
            help="A .jsonl or .csv file of jobs, or a .txt of prompts. A job has a prompt and, "
            "where it differs from the options, id, height, width, seed, seeds, steps, guidance, "
            "radius, down_factor, weights, attention, image, strength, low_resolution_guidance."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for images and manifest.jsonl.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Wait for new lines; Ctrl-C ends it.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="demo, a folder in diffusers format, or a hub repository.")
    ] = "demo",
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    radius: Annotated[int | None, typer.Option(help="Radius of the window, in tokens.")] = None,
    down_factor: Annotated[int, typer.Option(help="Side of a pooling cell, in tokens.")] = 1,
    weights: Annotated[
        str,
        typer.Option(
            help="CLEAR weights: a file, a folder or a hub repository; auto: those known to fit "
            "model and radius; none: the model's own."
        ),
    ] = "auto",
    attention: Annotated[str, typer.Option(help="clear or full.")] = "clear",
    impl: Annotated[str, typer.Option(help="auto, triton, flex, tiled or reference.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of a job's first image.")] = 0,
    seeds: Annotated[int, typer.Option(help="Images of a job; each next seed adds 1.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Torch device; default cuda if there, else cpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Generate many images from a file of jobs; the same command goes on where it was stopped.

    Started several times, or by torchrun or accelerate launch, the processes share the jobs.
    Ctrl-C ends after the current image, twice at once.
    """
    from .fields import MAX_SEEDS
    from .launch import Launch
    from .run import render as run

    if not 1 <= seeds <= MAX_SEEDS:
        raise RequestError(f"--seeds must be from 1 to {MAX_SEEDS}, got {seeds}.")
    # What is told of single images would bury the bar; sidecars have it.
    logging.getLogger("clear_dit").setLevel(logging.WARNING)
    settings = {
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "down_factor": down_factor,
        "weights": weights,
        "attention": attention,
        "impl": impl,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "seeds": seeds,
        "dtype": dtype,
        "device": device,
    }
    try:
        result = run(jobs, out, settings, watch=watch)
    except KeyboardInterrupt:
        print("clear-dit: interrupted; the same command goes on.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result))
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
