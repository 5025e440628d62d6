"""The training card that lies beside the demo's weights."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

_FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# clear-dit demo pipeline

A small text-to-image pipeline of FLUX architecture ({parameters:.1f}M parameters in the
transformer), trained from nothing on rendered images of a procedural world. It exists to run
clear-dit's main job, its tests and its distillation on a CPU.

```python
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("assets/demo")
image = pipe(
    "a blue house in the hills at night, a golden moon on the left",
    negative_prompt="",
    true_cfg_scale=2.0,
    height=512,
    width=512,
    num_inference_steps=20,
).images[0]
```

Recommended: 512x512, 20 steps, `true_cfg_scale=2` with an empty negative prompt (two passes a
step; without it objects are less certain). Give `height` and `width`: the stock
pipeline's own default of 1024 px cannot be configured and is twice the size the transformer was
trained for. `guidance_scale` has no effect, as there is no guidance embedding. Prompts may be
padded to any length up to 512 tokens.
"""

_CAPTIONS = """
## What it understands
Captions name a sky (day, sunset, night), a land (hills, sea, desert), a sun or moon (white,
golden, crimson; on the left, in the middle, on the right) and an object (house, tree, tower,
balloon; blue, green, violet, pink). The grammar is in `clear_dit/demo/captions.py`, the world in
`clear_dit/demo/world.py`. Words outside the grammar are passed over.

## Limitations
It knows its world and nothing else. One combination of attributes in sixteen was held out of
training; the measurements are made on those.
"""


def processor_name() -> str:
    """The CPU's name as the system gives it, with the number of cores."""
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        lines = listing.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def stage_seconds(times: Path) -> dict[str, float]:
    """Seconds spent per stage, summed over restarts, from lines of "name<TAB>seconds"."""
    total: dict[str, float] = defaultdict(float)
    if times.exists():
        for line in times.read_text().splitlines():
            name, seconds = line.split("\t")
            total[name] += float(seconds)
    return dict(total)


def training_card(
    parameters: int,
    rows: Mapping[str, str],
    times: Mapping[str, float],
    measurements: str,
) -> str:
    """The card as Markdown.

    parameters: of the transformer; rows: what was trained, by stage; times: seconds by stage;
    measurements: the output of `clear_dit.demo.evaluate`, or nothing.
    """
    lines = [_FRONT.format(parameters=parameters / 1e6), "## Training", ""]
    lines += [
        "    python -m clear_dit.demo.train",
        "",
        "| stage | what | minutes |",
        "|---|---|---|",
    ]
    for name, what in rows.items():
        lines.append(f"| {name} | {what} | {times.get(name, 0) / 60:.0f} |")
    hours = sum(times.values()) / 3600
    lines += [
        "",
        f"Hardware: {processor_name()}; {hours:.1f} hours in all; torch {torch.__version__}. "
        "Flow matching, Muon for the matrices inside the blocks, AdamW for the rest, averaged "
        "weights, full attention.",
        "",
        "![Loss](loss.png)",
    ]
    if measurements:
        lines += ["", "## Measured", "", "    python -m clear_dit.demo.evaluate", "", "```"]
        lines += [measurements.strip(), "```"]
    return "\n".join(lines) + _CAPTIONS
