"""The card beside an adapter: what it is for, how it was made, how to use it."""

from __future__ import annotations

import platform
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..versions import versions
from .options import DistillOptions
from .samples import SampleIndex

_WINDOW = 100  # steps that a printed loss is the mean of


def command_line(options: DistillOptions) -> str:
    """The command that has these options, without those at their default."""
    words = ["clear-dit", "distill"]
    for field in fields(options):
        value = getattr(options, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value == field.default or field.name == "resume_from_checkpoint":
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def hardware(device: torch.device, processes: int) -> str:
    """What a run was made on, in words."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {processes} process(es) of {threads} thread(s)"


def mean_losses(losses: list[list[float]], last: bool) -> list[float]:
    """Means over the first or the last steps: the weighted sum, flow, output, attention."""
    window = losses[-_WINDOW:] if last else losses[:_WINDOW]
    return [sum(column) / len(window) for column in zip(*window, strict=True)]


def card(
    options: DistillOptions,
    index: SampleIndex,
    adapter: Path,
    facts: dict[str, Any],
    losses: list[list[float]],
) -> str:
    """The card in Markdown, with the metadata the hub reads.

    Args:
        options: of the run.
        index: of the samples.
        adapter: the adapter's file.
        facts: parameters (trained), samples, effective_batch, stack and layers (compared), trained
            (names of linear layers), hours, hardware, mixed_precision.
        losses: of each step.
    """
    sees = f", pooled by {options.down_factor}" if options.down_factor > 1 else ""
    sees = ", with far keys" if options.takes_far else sees
    setting = f"radius={options.radius}, down_factor={options.down_factor}"
    setting += f", far={options.takes_far}"
    rows = [
        f"| {name} | {before:.5f} | {after:.5f} |"
        for name, before, after in zip(
            ("weighted sum", "flow matching", "output distillation", "attention distillation"),
            mean_losses(losses, last=False),
            mean_losses(losses, last=True),
            strict=True,
        )
    ]
    table = "\n".join(rows)
    linears = "the image stream's {} and {}".format(
        ", ".join(facts["trained"][:-1]), facts["trained"][-1]
    )
    if options.lora is None:
        kind = linears
        kind += " and the pooling weights" if options.down_factor > 1 else ""
        kind += ", the far keys' pooling weights and offsets" if options.takes_far else ""
        use = f'apply_clear(pipe, {setting}, weights="{adapter.name}")'
    else:
        kind = f"a LoRA of rank {options.lora} on {linears}"
        use = f"apply_clear(pipe, {setting})\n"
        use += f'pipe.load_lora_weights(".", weight_name="{adapter.name}")'
    window = min(_WINDOW, len(losses))
    layers = ", ".join(map(str, facts["layers"]))
    return f"""\
---
base_model: {index.model}
library_name: diffusers
tags: [clear, local-attention, text-to-image]
---

# CLEAR local attention for {index.model}: radius {options.radius} tokens{sees}

Trained: {kind}; {facts["parameters"]:,} parameters in `{adapter.name}`. Everything else is as in
{index.model}. The method: [arXiv 2412.16112](https://arxiv.org/abs/2412.16112).

```python
from clear_dit import apply_clear

{use}
```

## How it was made

    {command_line(options)}

- {facts["samples"]:,} images that {index.model} made itself at {index.height} x {index.width} px,
  {index.steps} steps, guidance {index.guidance:g}, seeds from {index.seed}.
- {len(losses):,} steps of {facts["effective_batch"]} samples, {options.optimizer} at learning rate
  {options.rate:g}, mixed precision {facts["mixed_precision"]}.
- Loss: flow matching + {options.output_weight:g} x output distillation +
  {options.attention_weight:g} x attention distillation, the latter on
  {facts["stack"]} {layers}.
- {facts["hours"]:.2f} hours on {facts["hardware"]}.
- {", ".join(f"{name} {version}" for name, version in versions().items())}.

| loss, mean of {window} steps | first | last |
|---|---|---|
{table}
"""
