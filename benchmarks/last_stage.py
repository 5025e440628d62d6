"""CLEAR against full attention in the cascade's last stage: as the paper's Table 3.

    python benchmarks/last_stage.py --count 32 --out last-stage.json

One image for each of the demo's held-out prompts at its native size, by full attention. From each
the same stage at twice the size with the same noise: by full attention and by every distilled
adapter of the demo. Rows "yarn" have positions alike, so that only attention differs; "two" is what
the pipeline does by itself with CLEAR, unless keys are pooled. PSNR and SSIM are against full
attention's image. Beside them, against the native image: PSNR of the result, scaled down, and
gradient energy in multiples of the native image's Lanczos enlargement (above 1 is sharper).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from tqdm import tqdm

from clear_dit import apply_clear, remove_clear
from clear_dit.bench.timing import hardware, table
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.generation.denoising import decode, denoise, encode
from clear_dit.generation.models import load_pipeline, model_defaults
from clear_dit.pipelines.cascade.resolution import settings_for
from clear_dit.weights.known import known_weights


@dataclass(frozen=True)
class Row:
    """An attention, full where radius is None, and its positions."""

    label: str
    radius: int | None
    down_factor: int
    local: bool


ROWS = (
    Row("full, yarn", None, 1, False),
    *(
        Row(f"CLEAR r={radius}{pooled}, {name}", radius, factor, name == "two")
        for radius, factor, pooled in ((4, 1, ""), (4, 4, " down 4"), (8, 1, ""))
        for name in (("yarn", "two") if factor == 1 else ("yarn",))
    ),
)


def enlarge(
    pipe: Any, row: Row, base: Image.Image, text: Any, empty: Any, seed: int, steps: int
) -> tuple[Image.Image, float]:
    """The image at twice the size, and the median seconds of a step."""
    height, width = 2 * base.height, 2 * base.width
    settings = settings_for(
        height, width, pipe.native_size, text_length=text.words.shape[1], local=row.local
    )
    marks = [time.perf_counter()]

    def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return tensors

    latents = denoise(
        pipe, text, empty, [seed], height=height, width=width, steps=steps,
        guidance=model_defaults("demo").guidance, image=base,
        resolution=lambda height, width: settings, callback_on_step_end=mark,
    )  # fmt: skip
    seconds = statistics.median(np.diff(marks[1:]))
    return decode(pipe, latents, height, width), float(seconds)


def compare(result: Image.Image, full: Image.Image, base: Image.Image) -> dict[str, float]:
    def tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 255

    def gradient(image: Image.Image) -> float:
        grey = np.asarray(image.convert("L"), dtype=np.float64)
        return float((np.diff(grey, axis=0) ** 2).mean() + (np.diff(grey, axis=1) ** 2).mean())

    lanczos = Image.Resampling.LANCZOS
    small, large = result.resize(base.size, lanczos), base.resize(result.size, lanczos)
    same = result is full
    psnr, ssim = peak_signal_noise_ratio, structural_similarity_index_measure
    return {
        "psnr": float("inf") if same else float(psnr(tensor(result), tensor(full), 1.0)),
        "ssim": 1.0 if same else float(ssim(tensor(result), tensor(full), data_range=1.0)),
        "base_psnr": float(psnr(tensor(small), tensor(base), 1.0)),
        "sharpness": gradient(result) / gradient(large),
    }


def measure(count: int, steps: int) -> dict[str, Any]:
    defaults, device = model_defaults("demo"), torch.device("cpu")
    pipe = load_pipeline("demo", torch.float32, device)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": defaults.size, "width": defaults.size}
    prompts = evaluation_prompts("demo", count)
    texts, empty = [encode(pipe, [prompt]) for prompt in prompts], encode(pipe, [""])
    bases, full, results = [], [], []
    for seed, text in enumerate(tqdm(texts, desc="native size")):
        options: dict[str, Any] = {"steps": steps, "guidance": defaults.guidance}
        latents = denoise(pipe, text, empty, [seed], **size, **options)
        bases.append(decode(pipe, latents, **size))
    for row in ROWS:
        if row.radius is not None:
            weights = known_weights("demo", row.radius, row.down_factor)
            apply_clear(pipe, row.radius, row.down_factor, weights)
        found = []
        for seed, (text, base) in enumerate(zip(tqdm(texts, desc=row.label), bases, strict=True)):
            image, seconds = enlarge(pipe, row, base, text, empty, seed, steps)
            if row.radius is None:
                full.append(image)
            found.append(compare(image, full[seed], base) | {"step_s": seconds})
        remove_clear(pipe)
        means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        means["base_psnr_least"] = min(one["base_psnr"] for one in found)
        if row.radius is None:
            means["psnr"] = means["ssim"] = None
        results.append({"attention": row.label} | means)
    return {
        "rows": results, "count": count, "steps": steps, "size": 2 * defaults.size,
        "dtype": "float32", "hardware": hardware(device), "torch": torch.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--steps", type=int, default=12, help="of a whole schedule")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    result = measure(options.count, options.steps)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
