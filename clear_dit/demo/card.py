"""The training cards that lie beside the demos' weights."""

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

_SD3_FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# clear-dit demo pipeline of SD3 architecture

A small text-to-image pipeline of SD3 architecture ({parameters:.1f}M parameters in the
transformer; image tokens before text, positions from a table), for the same procedural world as
`assets/demo`. It exists to run clear-dit's work on a second architecture on a CPU.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("assets/demo-sd3")
image = pipe(
    "a blue house in the hills at night, a golden moon on the left",
    guidance_scale=2.0,
    num_inference_steps=20,
).images[0]
```

Recommended: 512x512 (the default), 20 steps, `guidance_scale=2`; the stock pipeline's own default
of 7 is far too much. The position table ends at 1024 px a side.

The autoencoder, the probe and the text encoders are those of `assets/demo`. The pipeline needs a
second CLIP encoder: an untrained one of 8 channels stands in, of which only the pooled vector
reaches the transformer (the stock pipeline cuts CLIP's tokens to the width of T5's, 128).
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


# Front of the card, options of the commands, how the transformer was trained.
_MODEL = {"flux": "", "sd3": " --model assets/demo-sd3 --guidance 2"}
_TEXTS = {
    "flux": (_FRONT, "", "Flow matching with full attention"),
    "sd3": (
        _SD3_FRONT,
        " --architecture sd3",
        "Started from the weights of `assets/demo` where shapes allow; flow matching, then "
        "the velocity that the transformer of `assets/demo` predicts as the target",
    ),
}


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
    architecture: str = "flux",
) -> str:
    """The card as Markdown.

    parameters: of the transformer; rows: what was trained, by stage; times: seconds by stage;
    measurements: the output of `clear_dit.demo.evaluate`, or nothing; architecture: flux or sd3.
    """
    front, options, how = _TEXTS[architecture]
    lines = [front.format(parameters=parameters / 1e6), "## Training", ""]
    lines += [
        f"    python -m clear_dit.demo.train{options}",
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
        f"{how}, Muon for the matrices inside the blocks, AdamW for the rest, averaged weights.",
        "",
        "![Loss](loss.png)",
    ]
    if measurements:
        lines += [
            "",
            "## Measured",
            "",
            f"    python -m clear_dit.demo.evaluate{_MODEL[architecture]}",
            "",
            "```",
        ]
        lines += [measurements.strip(), "```"]
    return "\n".join(lines) + _CAPTIONS
