"""The command line: `clear-dit COMMAND`. Thin: every command calls one function of the library."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .app.commands import serve_app
from .distillation.commands import distill, sample
from .errors import RequestError, first_line, is_out_of_memory
from .render.commands import render

app = typer.Typer(
    help="CLEAR: high-resolution images from diffusion transformers, in time linear in the pixels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
evaluation = typer.Typer()
app.add_typer(evaluation, name="evaluate")

Json = Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")]
Height = Annotated[int, typer.Option(help="Height in pixels, a multiple of 16.")]
Width = Annotated[int, typer.Option(help="Width in pixels, a multiple of 16.")]
Radius = Annotated[int, typer.Option(help="Radius of the window, in tokens of 16 pixels.")]
DownFactor = Annotated[int, typer.Option(help="Side of a pooling cell, in tokens.")]
Heads = Annotated[int, typer.Option(min=1, max=128, help="Attention heads.")]
HeadDim = Annotated[int, typer.Option(min=1, max=512, help="Channels of a head.")]
TextLength = Annotated[int, typer.Option(min=0, max=4096, help="Text tokens.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Torch device; default cuda if there, else cpu.")]
Impl = Annotated[str, typer.Option(help="auto, triton, flex, tiled or reference.")]
Repeats = Annotated[int, typer.Option(min=1, max=1000, help="Timed runs; the median counts.")]


def main() -> None:
    """Run the command line; a bad request is one line on standard error and status 2."""
    # PyTorch reads this at its first allocation: large pages save page faults on Linux.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("clear_dit").setLevel(logging.INFO)
    try:
        app()
    except RequestError as error:
        _fail(error, 2)
    except (OSError, FloatingPointError) as error:
        _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"out of memory: {first_line(error)}", 1)


def _fail(error: object, status: int) -> NoReturn:
    print(f"clear-dit: {error}", file=sys.stderr)
    sys.exit(status)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to generate.")],
    model: Annotated[
        str, typer.Option(help="demo, a folder in diffusers format, or a hub repository.")
    ] = "demo",
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    radius: Annotated[int | None, typer.Option(help="Radius of the window, in tokens.")] = None,
    down_factor: DownFactor = 1,
    weights: Annotated[
        str,
        typer.Option(
            help="CLEAR weights: a file, a folder or a hub repository; auto: those known to fit "
            "model and radius; none: the model's own."
        ),
    ] = "auto",
    attention: Annotated[str, typer.Option(help="clear or full.")] = "clear",
    impl: Impl = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    image: Annotated[
        str | None, typer.Option(help="An image to enlarge, twice unless a size is given.")
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="Noise level from which stages above the native size repaint, 0 to 1; one, or "
            "one for each with commas."
        ),
    ] = None,
    low_resolution_guidance: Annotated[
        float | None,
        typer.Option(help="How much the previous stage steers the next, 0 to 1."),
    ] = None,
    stages_dir: Annotated[
        str | None, typer.Option(help="Keep finished stages here; the same command goes on.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Device = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun: patch, the ranks share the image's rows; guidance, and each "
            "half computes one of guidance's two passes."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG or TIFF to write.")] = Path("clear-dit.png"),
    as_json: Json = False,
) -> None:
    """Generate one image."""
    from .generation.request import make_request
    from .generation.runner import generate as run
    from .generation.sharing import joined_ranks

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
            weights=weights,
            attention=attention,
            impl=impl,
            steps=steps,
            guidance=guidance,
            seed=seed,
            image=image,
            strength=None if strength is None else _numbers("strength", strength),
            low_resolution_guidance=low_resolution_guidance,
            stages_dir=stages_dir,
            dtype=dtype,
            device=device if ranks is None else str(ranks.device),
        )
        try:
            result = run(request, out, ranks=ranks)
        except KeyboardInterrupt:
            kept = (
                "the same command goes on" if stages_dir else "--stages-dir would have kept stages"
            )
            _fail(f"interrupted; {kept}.", 130)
    if ranks is not None and not ranks.is_first:
        return
    if as_json:
        _print_json(result)
    else:
        seconds = result["seconds"]
        print(
            f"{result['out']}: {result['width']} x {result['height']} px, "
            f"{result['impl']} attention, {seconds['total']:.1f} s "
            f"(denoising {seconds['denoise']:.1f} s)"
        )


@evaluation.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    prompts: Annotated[
        str, typer.Option(help="A .txt, .jsonl or .csv file; demo: the demo's held-out captions.")
    ] = "demo",
    model: Annotated[
        str, typer.Option(help="demo, a folder in diffusers format, or a hub repository.")
    ] = "demo",
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Distilled weights, repeatable; each brings its untuned row along."),
    ] = None,
    radius: Annotated[
        list[int] | None, typer.Option(help="Radius of an untuned row, in tokens; repeatable.")
    ] = None,
    down_factor: DownFactor = 1,
    count: Annotated[int, typer.Option(help="Images of each row: the first prompts.")] = 64,
    metrics: Annotated[
        str, typer.Option(help="With commas; auto: all that can be computed here.")
    ] = "auto",
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next add 1.")] = 0,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="A folder; a stopped run in it goes on.")] = Path(
        "evaluation"
    ),
    as_json: Json = False,
) -> None:
    """Full attention against CLEAR, untuned and distilled, from the same seeds and prompts."""
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from .evaluation.report import markdown
    from .evaluation.request import make_evaluate_request
    from .evaluation.run import evaluate as run

    request = make_evaluate_request(
        model,
        prompts,
        count,
        weights=weights or (),
        radii=radius or (),
        down_factor=down_factor,
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
        _print_json(result)


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
    image: Annotated[Path, typer.Argument(help="An image file.")],
    tile: Annotated[int, typer.Option(help="Side of the tiles to look for, in pixels.")] = 1024,
    as_json: Json = False,
) -> None:
    """How much steeper an image is across the borders of tiles than beside them: 1 is no seam."""
    from .evaluation.seams import report, seams_of_file

    result = seams_of_file(image, tile)
    print(report(result))
    if as_json:
        _print_json(result)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what can run on this machine, and why the rest cannot."""
    from .doctor import examine, report

    found = examine()
    if as_json:
        _print_json(found)
    else:
        print(report(found))


app.command()(render)
app.command()(sample)
app.command()(distill)
app.command("app")(serve_app)


@bench.command("attention")
def bench_attention(
    height: Height = 2048,
    width: Width = 2048,
    radius: Radius = 8,
    down_factor: DownFactor = 1,
    heads: Heads = 4,
    head_dim: HeadDim = 128,
    text_length: TextLength = 512,
    dtype: Dtype = "float32",
    device: Device = None,
    impls: Annotated[
        str,
        typer.Option(
            help="With commas: auto, triton, flex, tiled, reference; full attention by sdpa, "
            "sdpa-cudnn, sdpa-flash, xformers; natten (a square); flex-tiled (tokens permuted)."
        ),
    ] = "tiled,flex,sdpa",
    backward: Annotated[bool, typer.Option(help="Time the backward pass too.")] = False,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """One attention layer: correct first, then timed against its peers."""
    from .bench.attention import bench_attention as run
    from .bench.attention import report

    problem = _problem(
        height, width, radius, down_factor, heads, head_dim, text_length, dtype, device
    )
    result = run(problem, [name.strip() for name in impls.split(",")], repeats, backward)
    print(report(result))
    if as_json:
        _print_json(result)
    if not result["correct"]:
        raise typer.Exit(1)


@bench.command("growth")
def bench_growth(
    sizes: Annotated[str, typer.Option(help="Sides in pixels, with commas.")] = "1024,2048,4096",
    radius: Radius = 8,
    heads: Heads = 4,
    head_dim: HeadDim = 128,
    text_length: TextLength = 512,
    dtype: Dtype = "float32",
    device: Device = None,
    impl: Impl = "auto",
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """How time and memory of one attention layer grow with the image."""
    from .bench.growth import bench_growth as run
    from .bench.growth import report

    try:
        sides = [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise RequestError(f"--sizes must be pixels with commas between, got {sizes!r}.") from error
    problems = [
        _problem(side, side, radius, 1, heads, head_dim, text_length, dtype, device)
        for side in sides
    ]
    result = run(problems, impl, repeats)
    print(report(result))
    if as_json:
        _print_json(result)
    if not result["correct"]:
        raise typer.Exit(1)


@bench.command("denoise")
def bench_denoise(
    model: Annotated[str, typer.Option(help="demo, a folder or a hub repository.")] = "demo",
    height: Height = 2048,
    width: Width = 2048,
    radius: Radius = 8,
    impl: Impl = "auto",
    dtype: Dtype = "float32",
    device: Device = None,
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """One denoising step of a model, full attention against CLEAR."""
    from .bench.denoise import bench_denoise as run
    from .bench.denoise import report
    from .generation.checks import find_device, find_dtype, find_window

    find_window(height, width, radius)
    result = run(
        model, height, width, radius, impl, find_dtype(dtype), find_device(device), repeats
    )
    print(report(result))
    if as_json:
        _print_json(result)
    if not result["correct"]:
        raise typer.Exit(1)


@bench.command("plan")
def bench_plan(
    model: Annotated[
        str,
        typer.Option(help="A published model, such as flux-dev; demo; or a folder of a pipeline."),
    ] = "flux-dev",
    height: Height = 8192,
    width: Width = 8192,
    radius: Radius = 8,
    down_factor: DownFactor = 1,
    text_length: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Text tokens; default the model's own.")
    ] = None,
    dtype: Dtype = "bfloat16",
    weights_dtype: Annotated[
        str | None,
        typer.Option(help="Of the transformer's linear layers: int8 or float8; default --dtype."),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(help="none; model: one part at a time; group: and its blocks two at a time."),
    ] = "none",
    train: Annotated[
        bool, typer.Option("--train", help="Memory of a distillation step instead, in bfloat16.")
    ] = False,
    train_batch_size: Annotated[
        int, typer.Option(min=1, max=1024, help="Samples at once, with --train.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """What a model will cost at a size: FLOPs and memory, without its weights or a GPU."""
    if train:
        from .bench.plan_training import plan_training
        from .bench.plan_training import report as training_report

        planned = plan_training(model, height, width, radius, down_factor, train_batch_size)
        print(training_report(planned))
        if as_json:
            _print_json(planned)
        return
    from .bench.plan import plan as run
    from .bench.plan import report
    from .generation.checks import find_dtype

    result = run(
        model,
        height,
        width,
        radius,
        down_factor,
        text_length,
        find_dtype(dtype),
        weights_dtype,
        offload,
    )
    print(report(result))
    if as_json:
        _print_json(result)


@bench.command("parallel")
def bench_parallel(
    model: Annotated[
        str, typer.Option(help="Under torchrun, measured: demo, a folder or a hub repository.")
    ] = "demo",
    height: Height = 2048,
    width: Width = 2048,
    radius: Radius = 8,
    impl: Impl = "auto",
    dtype: Dtype = "float32",
    device: Device = None,
    repeats: Repeats = 3,
    plan_model: Annotated[
        str, typer.Option(help="Planned: flux-dev, flux-schnell, demo, or a folder.")
    ] = "flux-dev",
    sides: Annotated[
        str, typer.Option(help="Planned: sides in pixels, with commas.")
    ] = "8192,16384",
    plan_radius: Annotated[int, typer.Option(help="Planned: radius, in tokens.")] = 16,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="TFLOP/s of a rank; default measured, or 400.")
    ] = None,
    gbps: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s a rank sends; default measured, or 200.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(min=0, help="Microseconds a message; default measured, or 20."),
    ] = None,
    as_json: Json = False,
) -> None:
    """One image on many GPUs: measured under torchrun, planned for up to 64 from rates."""
    from .bench.parallel import measure
    from .bench.parallel import report as measured_report
    from .bench.parallel_plan import ASSUMED, Rates, plan_parallel
    from .bench.parallel_plan import report as plan_report
    from .generation.checks import find_dtype, find_window
    from .generation.sharing import joined_ranks

    find_window(height, width, radius)
    found: dict[str, Any] = {}
    under_torchrun = "WORLD_SIZE" in os.environ
    with joined_ranks("patch" if under_torchrun else None, device) as ranks:
        rates = asdict(ASSUMED)
        if ranks is not None:
            measured = measure(
                model, height, width, radius, impl, find_dtype(dtype), ranks, repeats
            )
            if not ranks.is_first:
                return
            found["measured"] = measured
            rates = measured["rates"]
            print(measured_report(measured), end="\n\n")
        given = {"tflops": tflops, "gbps": gbps, "latency": latency}
        rates |= {name: value for name, value in given.items() if value is not None}
        numbers = [int(side) for side in _numbers("sides", sides)]
        found["plan"] = plan_parallel(plan_model, numbers, plan_radius, Rates(**rates))
        print(plan_report(found["plan"]))
    if as_json:
        _print_json(found)
    if "measured" in found and not found["measured"]["correct"]:
        raise typer.Exit(1)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise RequestError(
            f"--{option} must be numbers with commas between, got {text!r}."
        ) from error


def _problem(
    height: int,
    width: int,
    radius: int,
    down_factor: int,
    heads: int,
    head_dim: int,
    text_length: int,
    dtype: str,
    device: str | None,
) -> Any:
    from .bench.attention import Problem
    from .generation.checks import find_device, find_dtype, find_window

    return Problem(
        window=find_window(height, width, radius, down_factor, text_length),
        heads=heads,
        head_dim=head_dim,
        dtype=find_dtype(dtype),
        device=find_device(device),
    )


if __name__ == "__main__":
    main()
