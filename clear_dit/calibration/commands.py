"""The command `clear-dit calibrate`; its work is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options


def calibrate(
    model: options.Model = "demo",
    radius: options.ModelRadius = None,
    far: Annotated[
        bool | None,
        typer.Option("--far/--no-far", help="Far keys, or the paper's CLEAR; default far keys."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="FLOPs of attention, such as 0.8 of those of --radius everywhere, which are 1."
        ),
    ] = 1.0,
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .csv file, such as prompts.txt; demo: captions of its training."
        ),
    ] = "demo",
    count: Annotated[
        int,
        typer.Option(
            help="Prompts that are measured, such as 8; half as many more check the result."
        ),
    ] = 8,
    intervals: Annotated[
        int, typer.Option(help="Intervals of noise levels, each with its own radii, such as 4.")
    ] = 4,
    points: Annotated[int, typer.Option(help="Steps measured in an interval, such as 2.")] = 1,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image, such as 7; the next add 1.")
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    out: Annotated[
        Path, typer.Option(help="The JSON file to write, such as schedule.json.")
    ] = Path("schedule.json"),
    as_json: options.Json = False,
) -> None:
    """Find radii by layer and noise level.

    They err less than one radius, at its FLOPs.
    """
    from .request import make_calibrate_request
    from .run import calibrate as run
    from .run import report

    request = make_calibrate_request(
        model,
        prompts,
        count,
        radius=radius,
        far=far,
        budget=budget,
        intervals=intervals,
        points=points,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    result = run(request, out)
    print(report(result))
    if as_json:
        options.print_json(result)
    if result["out"] is None:
        raise typer.Exit(1)
    if not as_json:
        print(f"{out}: use it with --schedule {out}; {result['seconds']:.0f} s")
