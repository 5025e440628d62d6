"""How an image is enlarged: presets of the cascade against each other, at twice the native size.

    python benchmarks/presets.py --count 32 --out presets.json

One image for each of the demo's held-out prompts at its native size, by full attention; from each
the stage at twice the size, by CLEAR with the demo's weights. "base PSNR" is of the result, scaled
down, to the image it was made from; "sharpness" is gradient energy in multiples of its Lanczos
enlargement; "attributes" the share that the demo's probe reads as asked. "s" is the whole stage:
encoding, denoising and decoding. "TFLOP" are the transformer's, of both stages. Images are kept in
a folder named as the JSON is, and used again: a stopped run goes on, with the seconds it had.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from last_stage import compare
from PIL import Image
from tqdm import tqdm

from clear_dit import apply_clear
from clear_dit.bench.timing import hardware
from clear_dit.demo.evaluate import score
from clear_dit.demo.probe import load_probe
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.files import whole_file
from clear_dit.generation.checks import DTYPES
from clear_dit.generation.denoising import decode, denoise
from clear_dit.generation.models import DEMO, load_pipeline, model_defaults
from clear_dit.generation.request import make_request
from clear_dit.generation.stage_plan import StagePlanner
from clear_dit.tables import table
from clear_dit.weights.known import known_weights

RADIUS = 8
ROWS: dict[str, dict[str, Any]] = {
    "repaint": {"preset": "repaint"},
    "repaint, 3 steps": {"preset": "repaint", "stage_steps": 3},
    "refine, 1 step": {"preset": "refine", "stage_steps": 1},
    "refine, 2 steps": {"preset": "refine", "stage_steps": 2},
    "refine, 3 steps": {"preset": "refine", "stage_steps": 3},
    "enlarged only": {"strength": 0.0},
}


class Images:
    """Images on the disk with the seconds that each took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        if (folder / "seconds.json").exists():
            self.seconds = json.loads((folder / "seconds.json").read_text())

    def of(self, number: int, make: Callable[[], Image.Image]) -> Image.Image:
        path = self.folder / f"{number}.png"
        if not path.exists() or str(number) not in self.seconds:
            start = time.perf_counter()
            image = make()
            self.seconds[str(number)] = time.perf_counter() - start
            with whole_file(path) as part:
                image.save(part, "PNG")
            (self.folder / "seconds.json").write_text(json.dumps(self.seconds))
        with Image.open(path) as image:
            return image.convert("RGB")


def measure(count: int, dtype: str, out: Path) -> dict[str, Any]:
    defaults, device = model_defaults("demo"), torch.device("cpu")
    pipe = load_pipeline("demo", DTYPES[dtype], device)
    pipe.set_progress_bar_config(disable=True)
    prompts, probe = evaluation_prompts("demo", count), load_probe(DEMO / "probe/probe.safetensors")
    settings = {"steps": defaults.steps, "guidance": defaults.guidance}
    size, folder = 2 * defaults.size, out.with_suffix("")

    def made(number: int, side: int, **stage: Any) -> Image.Image:
        latents = denoise(
            pipe, [prompts[number]], [number], height=side, width=side, **settings, **stage
        )
        return decode(pipe, latents, side, side)

    native = Images(folder / "native size")
    numbers = range(count)
    bases = [native.of(n, lambda n=n: made(n, defaults.size)) for n in tqdm(numbers, "native size")]
    apply_clear(pipe, RADIUS, weights=known_weights("demo", RADIUS, 1, None))
    planner, rows = StagePlanner("demo"), []
    for label, options in ROWS.items():
        kept = Images(folder / label)
        images = [
            kept.of(n, partial(made, n, size, enlarge=bases[n], **options))
            for n in tqdm(numbers, label)
        ]
        found = [compare(image, None, base) for image, base in zip(images, bases, strict=True)]
        request = make_request("x", "demo", height=size, width=size, **options)
        row = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        row["base_psnr_least"] = min(one["base_psnr"] for one in found)
        read = score(probe, np.stack([np.asarray(image) for image in images]), prompts)
        row["attributes"] = float(read["hits"].mean())
        row["s"] = statistics.median(kept.seconds[str(n)] for n in numbers)
        row["tflop"] = sum(stage.flops for stage in planner.plan(request)) / 1e12
        rows.append({"stage": label} | row)
    return {
        "rows": rows,
        "count": count,
        "size": size,
        "dtype": dtype,
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    if options.out.suffix != ".json":
        parser.error(f"--out must end with .json, got {options.out}")
    result = measure(options.count, options.dtype, options.out)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
