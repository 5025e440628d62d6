"""The command `clear-dit generate`; its work is imported when it runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import options


def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to generate, such as 'a tower in the desert'.")
    ],
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
    seed: Annotated[int, typer.Option(help="Seed of the initial noise, such as 7.")] = 0,
    image: Annotated[
        str | None,
        typer.Option(help="An image to enlarge, such as photo.jpg; twice, unless a size is given."),
    ] = None,
    preset: options.Preset = "auto",
    strength: Annotated[
        str | None,
        typer.Option(
            help="Noise level from which stages above the native size repaint, 0 to 1: one, such "
            "as 0.5, or one for each, such as 0.5,0.3; default the preset's."
        ),
    ] = None,
    stage_steps: Annotated[
        str | None,
        typer.Option(
            help="Steps of these stages: one number, such as 10, or one for each, such as 10,4; "
            "default the preset's, or with --strength its share of --steps."
        ),
    ] = None,
    low_resolution_guidance: Annotated[
        float | None,
        typer.Option(help="How much the previous stage steers the next, 0 to 1, such as 0.3."),
    ] = None,
    upscaler: options.Upscaler = None,
    stages_dir: Annotated[
        str | None,
        typer.Option(
            help="A folder, such as stages: finished stages are kept there, and the same command "
            "goes on."
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    device: options.Device = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun, one of patch (the ranks share the image's rows), guidance (and "
            "each half computes one of guidance's two passes)."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="The PNG or TIFF to write, such as tower.png; if there is one, tower-2.png."
        ),
    ] = Path("clear-dit.png"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the image that has this name.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--open", help="Show the image in the system's viewer.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan of stages and what it takes only.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Generate one image."""
    from .prompt_notes import PromptReader
    from .request import make_request
    from .runner import generate as run
    from .sharing import joined_ranks
    from .stage_plan import planned

    with joined_ranks(parallel, device) as ranks:
        if ranks is not None and not ranks.is_first:
            logging.getLogger("clear_dit").setLevel(logging.ERROR)
        request = make_request(
            prompt,
            model,
            height=height,
            width=width,
            radius=radius,
            down_factor=down_factor,
            far=far,
            weights=weights,
            lora=lora,
            lora_scale=lora_scale,
            schedule=schedule,
            attention=attention,
            impl=impl,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            seed=seed,
            image=image,
            preset=preset,
            strength=options.optional(options.fractions, "--strength", strength),
            stage_steps=options.optional(options.numbers, "--stage-steps", stage_steps),
            low_resolution_guidance=low_resolution_guidance,
            upscaler=upscaler,
            stages_dir=stages_dir,
            dtype=dtype,
            quantize=quantize,
            offload=offload,
            device=device if ranks is None else str(ranks.device),
        )
        if ranks is None or ranks.is_first:
            plan = planned(request)
            for note in PromptReader(model).notes(prompt):
                logging.getLogger(__name__).warning(note)
            if dry_run:
                print(plan)
                if as_json:
                    options.print_json(plan.as_json())
            else:
                print(plan, file=sys.stderr)
        if dry_run:
            return
        try:
            result = run(request, out, ranks=ranks, overwrite=overwrite)
        except KeyboardInterrupt:
            kept = (
                "the same command goes on" if stages_dir else "--stages-dir would have kept stages"
            )
            options.fail(f"interrupted; {kept}.", 130)
    if ranks is not None and not ranks.is_first:
        return
    written = Path(result["out"])
    if written != out:
        print(f"{out} is there already; the image is {written}", file=sys.stderr)
    if show:
        _open(written)
    if as_json:
        options.print_json(result)
    else:
        seconds = result["seconds"]
        print(
            f"{result['out']}: {result['width']} x {result['height']} px, "
            f"{result['impl']} attention, {seconds['total']:.1f} s "
            f"(denoising {seconds['denoise']:.1f} s)"
        )


def _open(image: Path) -> None:
    """Show an image, or say on standard error that this machine shows none."""
    headless = sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if headless or typer.launch(str(image.absolute())):
        print(f"--open: there is no viewer here for {image}", file=sys.stderr)
