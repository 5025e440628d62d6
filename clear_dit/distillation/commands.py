"""The commands `clear-dit sample` and `clear-dit distill`; their work is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "demo, a folder in diffusers format, or a hub repository."


def sample(
    prompts: Annotated[
        str, typer.Option(help="A .txt, .jsonl or .csv file, or demo for the demo's own captions.")
    ],
    count: Annotated[int, typer.Option(help="How many samples.")],
    out: Annotated[Path, typer.Option(help="The folder to write, or to go on with.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    images: Annotated[bool, typer.Option(help="Write the pictures too.")] = False,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Sample n starts from the noise of seed + n.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Torch device; default cuda if there, else cpu.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 4,
    shard_size: Annotated[int, typer.Option(help="Samples in a file.")] = 32,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model: minutes first, then faster.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Make samples with the stock model, for `distill` to learn from. A killed run goes on."""
    from .sample import make_request
    from .sample import sample as run

    request = make_request(
        model,
        prompts,
        count,
        images=images,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        dtype=dtype,
        device=device,
        batch=batch,
        shard_size=shard_size,
        compile_model=compile_model,
    )
    result = run(request, out)
    if as_json:
        print(json.dumps(result))
        return
    each = result["seconds_per_sample"]
    pace = "" if each is None else f", {each:.2f} s each"
    left = f"; {result['missing']} are still missing" if result["missing"] else ""
    print(f"{out}: {result['made']} of {result['count']} samples made now{pace}{left}")
