"""The commands `clear-dit evaluate` and, of it, `seams`; their work is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..errors import RequestError

evaluation: typer.Typer = typer.Typer()


@evaluation.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .csv file, such as prompts.txt; demo: its held-out captions."
        ),
    ] = "demo",
    model: options.Model = "demo",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Distilled weights, such as run/clear_local_8.safetensors, repeatable; each "
            "brings its untuned row along."
        ),
    ] = None,
    radius: Annotated[
        list[int] | None,
        typer.Option(help="Radius of an untuned row, in tokens, such as 8; repeatable."),
    ] = None,
    down_factor: options.DownFactor = 1,
    far: Annotated[
        bool | None,
        typer.Option(
            "--far/--no-far",
            help="With --radius: rows with far keys, which see the whole image, or of the paper's "
            "CLEAR; default far keys unless --down-factor is above 1. Files of weights say it.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(help="Images of each row, such as 64: the first prompts.")
    ] = 64,
    metrics: Annotated[
        str,
        typer.Option(
            help="What is measured, with commas, such as psnr,lpips; auto: all that can be "
            "computed here."
        ),
    ] = "auto",
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image, such as 7; the next add 1.")
    ] = 0,
    batch: options.Batch = 4,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    out: Annotated[
        Path, typer.Option(help="A folder, such as evaluation; a stopped run in it goes on.")
    ] = Path("evaluation"),
    as_json: options.Json = False,
) -> None:
    """Compare CLEAR, untuned and distilled, with full attention.

    All images are from the same seeds and prompts.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from .report import markdown
    from .request import make_evaluate_request
    from .run import evaluate as run

    request = make_evaluate_request(
        model,
        prompts,
        count,
        weights=weights or (),
        radii=radius or (),
        down_factor=down_factor,
        far=far,
        metrics=metrics,
        batch=batch,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    result = run(request, out)
    print(markdown(result))
    print(
        f"{out / 'report.md'}, report.json, contact-sheet.png; {result['generated']} generated now"
    )
    if as_json:
        options.print_json(result)


def _refuse_options(context: typer.Context) -> None:
    """Those of a group, which its command would ignore."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            raise RequestError(
                f"{parameter.opts[0]} does not go with {context.invoked_subcommand}; give its own "
                f"options behind the name: {context.command_path} {context.invoked_subcommand} ..."
            )


@evaluation.command("seams")
def evaluate_seams(
    image: Annotated[Path, typer.Argument(help="An image file, such as large.png.")],
    tile: Annotated[
        int, typer.Option(help="Side of the tiles to look for, in pixels, such as 1024.")
    ] = 1024,
    as_json: options.Json = False,
) -> None:
    """Measure the seams that tiles leave in an image.

    How much steeper it is across their borders than beside them: 1 is no seam.
    """
    from .seams import report, seams_of_file

    result = seams_of_file(image, tile)
    print(report(result))
    if as_json:
        options.print_json(result)
