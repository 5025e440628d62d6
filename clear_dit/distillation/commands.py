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
    images: Annotated[bool, typer.Option(help="Write the images too.")] = False,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Sample n starts from the noise of seed + n.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Torch device; default cuda if there, else cpu.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 4,
    shard_size: Annotated[int, typer.Option(help="Samples in a file.")] = 32,
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
    )
    result = run(request, out)
    if as_json:
        print(json.dumps(result))
        return
    each = result["seconds_per_sample"]
    pace = "" if each is None else f", {each:.2f} s each"
    left = f"; {result['missing']} are still missing" if result["missing"] else ""
    print(f"{out}: {result['made']} of {result['count']} samples made now{pace}{left}")


def distill(
    samples: Annotated[Path, typer.Option(help="A folder that `clear-dit sample` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for adapter, card, checkpoints, logs.")],
    radius: Annotated[int, typer.Option(help="Radius of the window, in tokens of 16 pixels.")],
    down_factor: Annotated[int, typer.Option(help="Side of a pooling cell, in tokens.")] = 1,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    impl: Annotated[str, typer.Option(help="auto, triton, flex, tiled or reference.")] = "auto",
    lora: Annotated[int | None, typer.Option(help="Train a LoRA of this rank instead.")] = None,
    output_weight: Annotated[float, typer.Option(help="Of the output distillation.")] = 0.5,
    attention_weight: Annotated[float, typer.Option(help="Of the attention distillation.")] = 0.5,
    attention_layers: Annotated[
        str | None, typer.Option(help="Single blocks compared; default the paper's, scaled.")
    ] = None,
    prompt_dropout: Annotated[
        float | None, typer.Option(help="Share of empty prompts; default 0.1 with real guidance.")
    ] = None,
    max_train_samples: Annotated[
        int | None, typer.Option(help="Use the first so many samples.")
    ] = None,
    train_batch_size: Annotated[int, typer.Option(help="Samples at once, of a process.")] = 2,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches in a step.")] = 4,
    max_train_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10_000,
    optimizer: Annotated[str, typer.Option(help="prodigy or adamw.")] = "prodigy",
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1 for prodigy, 1e-4 for adamw.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = 1e-4,
    lr_scheduler: Annotated[
        str, typer.Option(help="constant, constant_with_warmup, linear or cosine.")
    ] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option(help="Steps of warm-up.")] = 0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this; 0 for not.")] = 1.0,
    mixed_precision: Annotated[str | None, typer.Option(help="no or bf16.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="The adapter is a moving average.")
    ] = False,
    ema_decay: Annotated[float, typer.Option(help="Of the moving average.")] = 0.999,
    checkpointing_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    checkpoints_total_limit: Annotated[int, typer.Option(help="Checkpoints kept.")] = 2,
    resume_from_checkpoint: Annotated[
        str | None, typer.Option(help="latest, or a checkpoint's folder.")
    ] = None,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb or none.")] = "tensorboard",
    validation_prompts: Annotated[
        str | None, typer.Option(help="Generate the first four of a file's prompts, or demo.")
    ] = None,
    validation_steps: Annotated[int, typer.Option(help="Steps between validations.")] = 500,
    seed: Annotated[int, typer.Option(help="Of order, noise and noise levels.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a last line of JSON.")] = False,
) -> None:
    """Train CLEAR's weights for a radius by distillation from the stock model."""
    arguments = {name: value for name, value in locals().items() if name != "as_json"}
    from .options import DistillOptions

    options = DistillOptions(**arguments)
    from .train import distill as run

    result = run(options)
    if result["process"] != 0:
        return
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{result['adapter']}: {result['parameters']:,} parameters, {result['steps']} steps of "
        f"{result['seconds_per_step']:.2f} s, loss {result['first']['total']:.4f} to "
        f"{result['last']['total']:.4f}"
    )
