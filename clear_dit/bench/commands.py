"""The commands `clear-dit bench ...`; their work is imported when they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import options
from ..errors import RequestError

bench: typer.Typer = typer.Typer(help="Measure this machine.", no_args_is_help=True)

Height = Annotated[int, typer.Option(help="Height in pixels, whole tokens, such as 2048.")]
Width = Annotated[int, typer.Option(help="Width in pixels, whole tokens, such as 2048.")]
Heads = Annotated[int, typer.Option(min=1, max=128, help="Attention heads, such as 24.")]
HeadDim = Annotated[int, typer.Option(min=1, max=512, help="Channels of a head, such as 128.")]
TextLength = Annotated[int, typer.Option(min=0, max=4096, help="Text tokens, such as 512.")]
Repeats = Annotated[
    int, typer.Option(min=1, max=1000, help="Timed runs, such as 5; the median counts.")
]


@bench.command("attention")
def bench_attention(
    height: Height = 2048,
    width: Width = 2048,
    radius: options.Radius = 8,
    down_factor: options.DownFactor = 1,
    far: options.WithFar = False,
    heads: Heads = 4,
    head_dim: HeadDim = 128,
    text_length: TextLength = 512,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    impls: Annotated[
        str,
        typer.Option(
            help="With commas, such as tiled,sdpa: auto, triton, flex, tiled, reference; full "
            "attention by sdpa, sdpa-cudnn, sdpa-flash, xformers; natten (a square); flex-tiled "
            "and flex-flash (tokens permuted)."
        ),
    ] = "tiled,flex,sdpa",
    backward: Annotated[bool, typer.Option(help="Time the backward pass too.")] = False,
    repeats: Repeats = 5,
    as_json: options.Json = False,
) -> None:
    """One attention layer: correct first, then timed against peers."""
    from ..generation.checks import find_device, find_dtype, find_window
    from ..generation.dtypes import resolve_dtype
    from .attention import Problem, report
    from .attention import bench_attention as run

    found = find_device(device)
    problem = Problem(
        find_window(height, width, radius, down_factor, text_length, far=far),
        heads,
        head_dim,
        find_dtype(resolve_dtype(dtype, found)),
        found,
    )
    result = run(problem, [name.strip() for name in impls.split(",")], repeats, backward)
    _show(result, report, as_json)


@bench.command("growth")
def bench_growth(
    sizes: Annotated[
        str, typer.Option(help="Sides in pixels, with commas, such as 1024,2048.")
    ] = "1024,2048,4096",
    radius: options.Radius = 8,
    far: options.WithFar = False,
    heads: Heads = 4,
    head_dim: HeadDim = 128,
    text_length: TextLength = 512,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    impl: options.Impl = "auto",
    repeats: Repeats = 3,
    as_json: options.Json = False,
) -> None:
    """How time and memory of one attention layer grow with the image."""
    from ..generation.checks import find_device, find_dtype, find_window
    from ..generation.dtypes import resolve_dtype
    from .attention import Problem
    from .growth import bench_growth as run
    from .growth import report

    try:
        sides = [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise RequestError(f"--sizes must be pixels with commas between, got {sizes!r}.") from error
    windows = [find_window(side, side, radius, 1, text_length, far=far) for side in sides]
    found = find_device(device)
    layer = (heads, head_dim, find_dtype(resolve_dtype(dtype, found)), found)
    problems = [Problem(window, *layer) for window in windows]
    result = run(problems, impl, repeats)
    _show(result, report, as_json)


@bench.command("denoise")
def bench_denoise(
    model: options.Model = "demo",
    height: Height = 2048,
    width: Width = 2048,
    radius: options.Radius = 8,
    far: options.WithFar = False,
    schedule: options.Schedule = None,
    impl: options.Impl = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device: options.Device = None,
    repeats: Repeats = 3,
    as_json: options.Json = False,
) -> None:
    """One denoising step of a model, full attention against CLEAR."""
    from ..generation.checks import find_device, find_dtype
    from ..generation.dtypes import resolve_dtype
    from ..generation.request import find_schedule
    from .denoise import bench_denoise as run
    from .denoise import report

    radii = None if schedule is None else find_schedule(schedule)
    found = find_device(device)
    layer = (impl, find_dtype(resolve_dtype(dtype, found)), found)
    result = run(model, height, width, radius, far, *layer, repeats, quantize, radii)
    _show(result, report, as_json)


@bench.command("plan")
def bench_plan(
    model: Annotated[
        str,
        typer.Option(
            help="A published model, such as flux-dev; demo; a folder in diffusers format or a hub "
            "repository, of which the configuration files alone are fetched."
        ),
    ] = "flux-dev",
    height: Height = 8192,
    width: Width = 8192,
    radius: options.Radius = 8,
    down_factor: options.DownFactor = 1,
    far: options.WithFar = False,
    text_length: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Text tokens, such as 512; default the model's own."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights, one of float32, bfloat16, float16.")
    ] = "bfloat16",
    quantize: options.Quantize = None,
    offload: options.Offload = "none",
    fit: Annotated[
        str | None,
        typer.Option(
            help="A card's memory, such as 24GB, or several with commas: the largest square image "
            "that fits, and the flags it takes, instead."
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Memory of a distillation step instead, in bfloat16.")
    ] = False,
    train_batch_size: Annotated[
        int, typer.Option(min=1, max=1024, help="Samples at once, with --train, such as 4.")
    ] = 1,
    as_json: options.Json = False,
) -> None:
    """What a model will cost at a size, in FLOPs and memory.

    Takes neither its weights nor a GPU.
    """
    if train:
        if quantize is not None or offload != "none" or fit is not None:
            raise RequestError(
                "--train counts weights in bfloat16, all on the device; leave out --quantize, "
                "--offload and --fit."
            )
        from .plan_training import plan_training
        from .plan_training import report as training_report

        planned = plan_training(
            model, height, width, radius, down_factor, far, train_batch_size, text_length
        )
        _show(planned, training_report, as_json)
        return
    from ..generation.checks import find_dtype

    if fit is not None:
        if offload != "none" or down_factor > 1:
            raise RequestError("--fit tries --offload itself, without pooling; leave both out.")
        from .fit import fit as run_fit
        from .fit import parse_memory
        from .fit import report as fit_report

        found = run_fit(
            model, parse_memory(fit), radius, far, text_length, find_dtype(dtype), quantize
        )
        _show(found, fit_report, as_json)
        return
    from .plan import plan as run
    from .plan import report

    result = run(
        model,
        height,
        width,
        radius,
        down_factor,
        far,
        text_length,
        find_dtype(dtype),
        quantize,
        offload,
    )
    _show(result, report, as_json)


@bench.command("parallel")
def bench_parallel(
    model: Annotated[
        str,
        typer.Option(
            help="Under torchrun, measured: demo, a folder or a hub repository, such as "
            "Qwen/Qwen-Image."
        ),
    ] = "demo",
    height: Height = 2048,
    width: Width = 2048,
    radius: options.Radius = 8,
    far: options.WithFar = False,
    impl: options.Impl = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    repeats: Repeats = 3,
    plan_model: Annotated[
        str, typer.Option(help="Planned: as --model of bench plan, such as flux-dev.")
    ] = "flux-dev",
    sides: Annotated[
        str, typer.Option(help="Planned: sides in pixels, with commas, such as 8192,16384.")
    ] = "8192,16384",
    plan_radius: Annotated[int, typer.Option(help="Planned: radius, in tokens, such as 16.")] = 16,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="TFLOP/s of a rank, such as 700; default what was measured, or 400."
        ),
    ] = None,
    gbps: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="GB/s a rank sends, such as 50; default what was measured, or 200."
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            min=0, help="Microseconds a message, such as 10; default what was measured, or 20."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """One image on many GPUs, measured or planned.

    Measured under torchrun, planned for up to 64 from rates.
    """
    from ..generation.checks import find_dtype
    from ..generation.dtypes import resolve_dtype
    from ..generation.sharing import joined_ranks
    from .parallel import measure
    from .parallel import report as measured_report
    from .parallel_plan import ASSUMED, Rates, plan_parallel
    from .parallel_plan import report as plan_report

    found: dict[str, Any] = {}
    under_torchrun = "WORLD_SIZE" in os.environ
    with joined_ranks("patch" if under_torchrun else None, device) as ranks:
        rates = asdict(ASSUMED)
        if ranks is not None:
            shared = find_dtype(resolve_dtype(dtype, ranks.device))
            measured = measure(model, height, width, radius, far, impl, shared, ranks, repeats)
            if not ranks.is_first:
                return
            found["measured"] = measured
            rates = measured["rates"]
            print(measured_report(measured), end="\n\n")
        given = {"tflops": tflops, "gbps": gbps, "latency": latency}
        rates |= {name: value for name, value in given.items() if value is not None}
        numbers = [int(side) for side in options.numbers("--sides", sides)]
        found["plan"] = plan_parallel(plan_model, numbers, plan_radius, far, Rates(**rates))
        print(plan_report(found["plan"]))
    if as_json:
        options.print_json(found)
    if "measured" in found and not found["measured"]["correct"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], report: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Print a result; exit with status 1 if it says of itself that it is not correct."""
    print(report(result))
    if as_json:
        options.print_json(result)
    if not result.get("correct", True):
        raise typer.Exit(1)
