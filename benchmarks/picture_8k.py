"""A whole 8192 x 8192 px picture with the demo pipeline, and what full attention would take.

    python benchmarks/picture_8k.py --picture picture.png --out picture-8k.json

The picture is painted by `clear-dit generate` in a process of its own. Full attention's time for
the last stage is not measured: it is that stage's FLOPs at the rate measured at 2048 px.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from clear_dit.bench.denoise import bench_denoise, step_flops
from clear_dit.generation.denoising import two_passes
from clear_dit.generation.models import TOKEN_PIXELS, load_pipeline, model_defaults
from clear_dit.pipelines.cascade.resolution import applied
from clear_dit.pipelines.cascade.schedule import sigmas_for
from clear_dit.pipelines.cascade.stages import plan_stages

RATE_AT = 2048  # pixels a side at which full attention is measured


def full_attention(size: int, radius: int, steps: int, guidance: float) -> dict[str, Any]:
    """What the last stage would take with full attention."""
    device = torch.device("cpu")
    measured = bench_denoise("demo", RATE_AT, RATE_AT, radius, "auto", torch.float32, device, 2)
    if not measured["correct"]:
        raise SystemExit("picture_8k.py: WRONG results at 2048 px, nothing is written")
    row = measured["rows"][0]
    pipe = load_pipeline("demo", torch.float32, device)
    stage = plan_stages(size, size, native_size=pipe.native_size, attention="clear")[-1]
    with applied(pipe, stage.resolution):
        sigmas = sigmas_for(
            pipe.scheduler, steps, size, size, strength=stage.strength, token_pixels=TOKEN_PIXELS
        )
    flops = step_flops(pipe, size // TOKEN_PIXELS, size // TOKEN_PIXELS, radius)
    passes = len(sigmas) * (2 if two_passes(pipe, guidance) else 1)
    rate = row["tflop"] / row["seconds"]
    return {
        "tflop_per_pass": {name: count / 1e12 for name, count in flops.items()},
        "passes_of_last_stage": passes,
        "tflops_measured": rate,
        "full_attention_hours_of_last_stage": passes * flops["full"] / 1e12 / rate / 3600,
        "hardware": measured["hardware"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a green tower by the sea at sunset, a golden sun")
    parser.add_argument("--size", type=int, default=8192, help="pixels a side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, required=True, help="the PNG or TIFF to write")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    defaults = model_defaults("demo")
    command = [
        sys.executable, "-m", "clear_dit", "generate", options.prompt, "--seed", str(options.seed),
        "--height", str(options.size), "--width", str(options.size),
        "--out", str(options.picture), "--json",
    ]  # fmt: skip
    painted = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(painted.stdout.splitlines()[-1]) | full_attention(
        options.size, defaults.radius, defaults.steps, defaults.guidance
    )
    result |= {"prompt": options.prompt, "seed": options.seed, "torch": torch.__version__}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    seconds = result["seconds"]
    print(
        f"{options.size} px: {seconds['total']:.0f} s (denoising {seconds['denoise']:.0f}, "
        f"decoding {seconds['decode']:.0f}), {result['peak_memory_mb'] / 1024:.1f} GB; full "
        f"attention would take {result['full_attention_hours_of_last_stage']:.1f} hours for the "
        "last stage alone"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
