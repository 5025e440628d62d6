"""What the commands of several rooms share: options, reading their values, and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from .errors import RequestError

# The help of what takes a value has an example ("such as") or the choices ("one of").
Model = Annotated[
    str,
    typer.Option(
        help="demo, demo-sd3, a folder in diffusers format, or a hub repository, such as "
        "Qwen/Qwen-Image."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Torch device, such as cuda:1 or cpu; default cuda if there, else cpu."),
]
Json = Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")]

# What is None here is as the model has it.
Height = Annotated[int | None, typer.Option(help="Height in pixels, such as 2048.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels, such as 2048.")]
Preset = Annotated[
    str,
    typer.Option(
        help="How images are enlarged above the native size, one of repaint (half the noise and "
        "steps), refine (little noise, few steps), auto (repaint up to twice the native size, "
        "then refine)."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps, such as 28.")]
Guidance = Annotated[float | None, typer.Option(help="Strength of guidance, such as 3.5.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="What is computed in, one of float32, bfloat16, float16, auto (float32 on a CPU, "
        "bfloat16 on a GPU that has it; doctor says which)."
    ),
]
TrainingDtype = Annotated[
    str,
    typer.Option(
        help="What is computed in, one of float32, bfloat16, float16, auto (bfloat16 where the "
        "CPU or GPU has it; doctor says which)."
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="What the image should not be, such as 'a tree': the prompt of guidance's second "
        "pass; default the model's own, often an empty one."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Linear layers of the transformer in 8 or 4 bits, one of int8 (any device), fp8 "
        "(GPUs from Ada on), nvfp4 (Blackwell)."
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="What waits on the CPU, one of none, model (all parts but the one that runs), group "
        "(of the transformer all but two blocks, too)."
    ),
]
ModelRadius = Annotated[
    int | None, typer.Option(help="Radius of the window, in tokens, such as 8.")
]

Radius = Annotated[int, typer.Option(help="Radius of the window, in tokens, such as 8.")]
DownFactor = Annotated[
    int,
    typer.Option(help="Side of a pooling cell, in tokens, such as 4; 1 for no pooling."),
]
Far = Annotated[
    bool | None,
    typer.Option(
        "--far/--no-far",
        help="Far keys, which see the whole image, or the paper's CLEAR; default as the weights "
        "were made for, without weights far keys unless --down-factor is above 1.",
    ),
]
# Of commands that have no weights to go by.
WithFar = Annotated[bool, typer.Option("--far", help="With far keys, which see the whole image.")]
Weights = Annotated[
    str,
    typer.Option(
        help="CLEAR weights: a file, a folder or a hub repository, such as Huage001/CLEAR; auto: "
        "those known to fit model, radius, --down-factor and --far; none: the model's own."
    ),
]
Lora = Annotated[
    str | None, typer.Option(help="A LoRA for the model, a file such as ink.safetensors.")
]
LoraScale = Annotated[float, typer.Option(help="How strongly the LoRA acts, -4 to 4, such as 0.8.")]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="Radii by layer and noise level, a file of clear-dit calibrate for this model, such "
        "as schedule.json; in the place of --radius, --down-factor and --far."
    ),
]
Attention = Annotated[str, typer.Option(help="Which attention, one of clear, full.")]
Impl = Annotated[
    str,
    typer.Option(help="What computes it, one of auto, triton, flex, tiled, reference."),
]
Upscaler = Annotated[
    str | None,
    typer.Option(
        help="The network that enlarges images before they are repainted, such as "
        "4x-network.safetensors."
    ),
]
Batch = Annotated[int, typer.Option(help="Images at once, such as 4.")]


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between.

    Args:
        name: of the option or field, for errors.

    Raises:
        RequestError: something else.
    """
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise RequestError(
            f"{name} must be numbers with commas between, got {text[:100]!r}."
        ) from error


def fractions(name: str, text: str) -> tuple[float, ...]:
    """As `numbers`; several have a decimal point among them.

    Raises:
        RequestError: something else, or what may be one number with a decimal comma.
    """
    if "," in text and "." not in text:
        raise RequestError(
            f"{name} {text[:100]!r} may be one number with a decimal comma, or several; write 0.5 "
            "for one, and several with points: 0.0,1.0."
        )
    return numbers(name, text)


def optional(
    read: Callable[[str, str], tuple[float, ...]], name: str, text: str | None
) -> tuple[float, ...] | None:
    """What `numbers` or `fractions` reads; None of None."""
    return None if text is None else read(name, text)


def print_json(result: dict[str, Any]) -> None:
    """The last line of `--json`."""
    print(json.dumps(result))


def fail(error: object, status: int) -> NoReturn:
    """One line on standard error, and the exit status."""
    print(f"clear-dit: {error}", file=sys.stderr)
    sys.exit(status)
