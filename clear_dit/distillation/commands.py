"""The commands `clear-dit sample` and `clear-dit distill`; their work is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options


def sample(
    prompts: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .csv file, such as prompts.txt; demo: the demo's captions."
        ),
    ],
    count: Annotated[int, typer.Option(help="How many samples, such as 200.")],
    out: Annotated[Path, typer.Option(help="The folder to write or go on with, such as samples.")],
    model: options.Model = "demo",
    images: Annotated[bool, typer.Option(help="Write the images too.")] = False,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[
        int, typer.Option(help="Sample n starts from the noise of seed + n; such as 7.")
    ] = 0,
    dtype: options.TrainingDtype = "auto",
    device: options.Device = None,
    batch: options.Batch = 4,
    shard_size: Annotated[int, typer.Option(help="Samples in a file, such as 32.")] = 32,
    as_json: options.Json = False,
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
        options.print_json(result)
        return
    each = result["seconds_per_sample"]
    pace = "" if each is None else f", {each:.2f} s each"
    left = f"; {result['missing']} are still missing" if result["missing"] else ""
    print(f"{out}: {result['made']} of {result['count']} samples made now{pace}{left}")


def distill(
    samples: Annotated[
        Path, typer.Option(help="A folder that `clear-dit sample` wrote, such as samples.")
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for adapter, card, checkpoints, logs, such as run.")
    ],
    radius: options.Radius,
    down_factor: options.DownFactor = 1,
    far: Annotated[
        bool | None,
        typer.Option(
            "--far/--no-far",
            help="Train with far keys, which see the whole image, or the paper's CLEAR; default "
            "far keys unless --down-factor is above 1.",
        ),
    ] = None,
    model: options.Model = "demo",
    impl: options.Impl = "auto",
    lora: Annotated[
        int | None, typer.Option(help="Train a LoRA of this rank instead, such as 16.")
    ] = None,
    output_weight: Annotated[
        float, typer.Option(help="Weight of the output distillation, such as 0.5.")
    ] = 0.5,
    attention_weight: Annotated[
        float, typer.Option(help="Weight of the attention distillation, such as 0.5.")
    ] = 0.5,
    attention_layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks of the last stack compared, such as 1,5,9; default the paper's, scaled."
        ),
    ] = None,
    prompt_dropout: Annotated[
        float | None,
        typer.Option(help="Share of empty prompts, such as 0.1, the default with real guidance."),
    ] = None,
    max_train_samples: Annotated[
        int | None, typer.Option(help="Use the first so many samples, such as 1000.")
    ] = None,
    train_batch_size: Annotated[
        int, typer.Option(help="Samples at once, of a process, such as 4.")
    ] = 2,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches in a step, such as 4.")
    ] = 4,
    max_train_steps: Annotated[int, typer.Option(help="Optimizer steps, such as 250.")] = 10_000,
    optimizer: Annotated[
        str, typer.Option(help="The optimizer, one of prodigy, adamw.")
    ] = "prodigy",
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate, such as 5e-4; default 1 for prodigy, 1e-4 for adamw."),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="Decoupled weight decay, such as 1e-4.")
    ] = 1e-4,
    lr_scheduler: Annotated[
        str,
        typer.Option(
            help="The learning rate by step, one of constant, constant_with_warmup, linear, cosine."
        ),
    ] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option(help="Steps of warm-up, such as 50.")] = 0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Clip gradients to this norm, such as 1; 0 for not.")
    ] = 1.0,
    mixed_precision: Annotated[
        str,
        typer.Option(
            help="What is computed in, one of no (float32), bf16, auto (as accelerate launch says, "
            "else bf16 where the CPU or GPU has it; doctor says which)."
        ),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="The adapter is a moving average.")
    ] = False,
    ema_decay: Annotated[
        float, typer.Option(help="Decay of the moving average, such as 0.99.")
    ] = 0.999,
    checkpointing_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints, such as 500.")
    ] = 500,
    checkpoints_total_limit: Annotated[int, typer.Option(help="Checkpoints kept, such as 2.")] = 2,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(help="latest, or a checkpoint's folder, such as run/checkpoint-500."),
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="Who gets the losses, one of tensorboard, wandb, none.")
    ] = "tensorboard",
    validation_prompts: Annotated[
        str | None,
        typer.Option(
            help="Generate the first four prompts of a file, such as prompts.txt, or of demo."
        ),
    ] = None,
    validation_steps: Annotated[
        int, typer.Option(help="Steps between validations, such as 500.")
    ] = 500,
    seed: Annotated[
        int, typer.Option(help="Seed of order, noise and noise levels, such as 7.")
    ] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train CLEAR's weights for a radius, from the stock model."""
    arguments = {name: value for name, value in locals().items() if name != "as_json"}
    from .options import DistillOptions

    request = DistillOptions(**arguments)
    from .train import distill as run

    result = run(request)
    if result["process"] != 0:
        return
    if as_json:
        options.print_json(result)
        return
    print(
        f"{result['adapter']}: {result['parameters']:,} parameters, {result['steps']} steps of "
        f"{result['seconds_per_step']:.2f} s, loss {result['first']['total']:.4f} to "
        f"{result['last']['total']:.4f}"
    )
