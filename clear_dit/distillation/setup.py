"""What a training loop is made from: accelerate's view, the optimizer, room on the disk."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from ..errors import RequestError, first_line
from ..generation.checks import find_device
from ..generation.dtypes import AUTO as AUTO_DTYPE
from ..generation.dtypes import resolve_dtype
from .files import refuse_full_disk
from .options import AUTO_PRECISION, DistillOptions

# Numbers an optimizer keeps for each parameter.
OPTIMIZER_STATES = {"prodigy": 4, "adamw": 2}
_BETAS = (0.9, 0.999)


def make_accelerator(options: DistillOptions) -> Accelerator:
    """accelerate's view of devices and processes.

    Raises:
        RequestError: float16, which this training does not do, packages that are missing, or
            Prodigy under FSDP.
    """
    needed = {"prodigy": "prodigyopt"}.get(options.optimizer, "torch")
    for package in (needed, options.report_to, "peft" if options.lora else "torch"):
        if package != "none" and find_spec(package) is None:
            raise RequestError(f"{package} is not installed: pip install 'clear-dit[training]'.")
    precision = options.mixed_precision
    if precision == AUTO_PRECISION:
        device = find_device("cpu" if options.cpu else None)
        fast = resolve_dtype(AUTO_DTYPE, device, training=True)
        precision = os.environ.get(
            "ACCELERATE_MIXED_PRECISION", "bf16" if fast == "bfloat16" else "no"
        )
    if precision not in ("no", "bf16"):
        raise RequestError(f"--mixed-precision must be no or bf16; accelerate says {precision!r}.")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            mixed_precision=precision,
            cpu=options.cpu,
            log_with=None if options.report_to == "none" else options.report_to,
            project_dir=options.out,
        )
    except (ImportError, ValueError) as error:
        raise RequestError(f"accelerate refuses: {first_line(error)}") from error
    if accelerator.distributed_type == DistributedType.FSDP and options.optimizer == "prodigy":
        raise RequestError(
            "--optimizer prodigy does not work on FSDP's sharded tensors; use adamw, or DeepSpeed "
            "ZeRO-2 (examples/accelerate/zero2.yaml)."
        )
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:  # which learns the batch from a data loader, and here is none
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.train_batch_size
    return accelerator


def make_optimizer(
    options: DistillOptions, parameters: Iterable[nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Prodigy as in the paper, or AdamW."""
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=options.rate, betas=_BETAS, weight_decay=options.weight_decay
        )
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return Prodigy(
            parameters,
            lr=options.rate,
            betas=_BETAS,
            weight_decay=options.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
            # Its step size is one number for all parameters, of which ZeRO shows it a part.
            fsdp_in_use=accelerator.distributed_type == DistributedType.DEEPSPEED,
        )


def make_schedule(options: DistillOptions, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate by step."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )


def check_room(options: DistillOptions, parameters: int) -> None:
    """Refuse a folder on a disk without room for the checkpoints.

    Raises:
        RequestError: how much is needed, and how much there is.
    """
    numbers = 1 + OPTIMIZER_STATES[options.optimizer] + options.use_ema + 1
    # One more than are kept: a new checkpoint is written before an old one goes.
    refuse_full_disk(options.out, 4 * numbers * parameters * (options.checkpoints_total_limit + 1))
