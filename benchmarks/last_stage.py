"""CLEAR against full attention in the cascade's last stage: as the paper's Table 3.

    python benchmarks/last_stage.py --count 32 --out last-stage.json

One image for each of the demo's held-out prompts at its native size, by full attention. From each
the same stage at twice the size with the same noise: by full attention, and by CLEAR with and
without far keys, with the demo's distilled weights and without. With --size 2048 the stage before
is a stage by full attention too. Rows "yarn" have positions alike, so that only attention differs;
"two" is what the pipeline does by itself with CLEAR, unless keys are pooled. PSNR and SSIM are
against full attention's image. Beside them, against the image before: PSNR of the result, scaled
down, and gradient energy in multiples of that image's Lanczos enlargement (above 1 is sharper).
"keys" are the image keys of a query. Images are kept in a folder named as the JSON is, and used
again: a stopped run goes on; after a change of code or weights take another name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
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
from clear_dit.bench.timing import hardware
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.files import whole_file
from clear_dit.generation.checks import find_window
from clear_dit.generation.denoising import decode, denoise, text_length
from clear_dit.generation.models import load_pipeline, model_defaults
from clear_dit.pipelines.cascade.resolution import settings_for
from clear_dit.tables import table
from clear_dit.weights.known import known_weights


@dataclass(frozen=True)
class Row:
    """An attention, full where radius is None, and its positions.

    Attributes:
        radius, down_factor, far: of the window.
        tuned: with the demo's weights for it.
        local: positions "two", which are for local attention, in place of "yarn".
    """

    radius: int | None
    down_factor: int = 1
    far: bool = False
    tuned: bool = False
    local: bool = False

    @property
    def label(self) -> str:
        positions = "two" if self.local else "yarn"
        if self.radius is None:
            return f"full, {positions}"
        kind = " far" if self.far else f" down {self.down_factor}" if self.down_factor > 1 else ""
        tuned = "distilled" if self.tuned else "untuned"
        return f"CLEAR r={self.radius}{kind}, {tuned}, {positions}"

    def keys(self, pixels: int) -> float:
        """Image keys of a query, in the mean."""
        radius = pixels if self.radius is None else self.radius
        window = find_window(pixels, pixels, radius, self.down_factor, far=self.far)
        return window.attended_pairs() / window.image_length


LANCZOS = Image.Resampling.LANCZOS

Made = tuple[list[Image.Image], float | None]

FULL = Row(None)
ROWS = (
    FULL,
    Row(4, 4, tuned=True),
    *(
        Row(radius, far=far, tuned=tuned, local=local)
        for radius, far, tuned in (
            (4, False, True), (8, False, False), (8, False, True), (16, False, False),
            (4, True, False), (4, True, True), (8, True, False),
        )
        for local in (False, True)
    ),
)  # fmt: skip


def enlarge(
    pipe: Any, row: Row, base: Image.Image, prompt: str, seed: int, steps: int
) -> tuple[Image.Image, float]:
    """The image at twice the size, and the median seconds of a step."""
    height, width = 2 * base.height, 2 * base.width
    settings = settings_for(
        height, width, pipe.native_size, text_length=text_length(pipe), local=row.local
    )
    marks = [time.perf_counter()]

    def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return tensors

    latents = denoise(
        pipe, [prompt], [seed], height=height, width=width, steps=steps, preset="repaint",
        guidance=model_defaults("demo").guidance, enlarge=base,
        resolution=lambda height, width: settings, callback_on_step_end=mark,
    )  # fmt: skip
    seconds = statistics.median(np.diff(marks[1:]))
    return decode(pipe, latents, height, width), float(seconds)


def compare(result: Image.Image, full: Image.Image | None, base: Image.Image) -> dict[str, float]:
    """Measures of an image against full attention's, where there is one, and the image before."""
    small, large = result.resize(base.size, LANCZOS), base.resize(result.size, LANCZOS)
    psnr, ssim = peak_signal_noise_ratio, structural_similarity_index_measure
    found: dict[str, float] = {}
    if full is not None:
        same = result is full
        found["psnr"] = inf if same else float(psnr(tensor(result), tensor(full), 1.0))
        found["ssim"] = 1.0 if same else float(ssim(tensor(result), tensor(full), data_range=1.0))
    return found | {
        "base_psnr": float(psnr(tensor(small), tensor(base), 1.0)),
        "sharpness": gradient(result) / gradient(large),
    }


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 255


def gradient(image: Image.Image) -> float:
    """Mean squared difference of neighbouring pixels' brightness."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    return sum(float((np.diff(grey, axis=axis) ** 2).mean(dtype=np.float64)) for axis in (0, 1))


def measure(count: int, steps: int, size: int, rows: list[Row], out: Path) -> dict[str, Any]:
    """What `main` prints; images go to a folder beside `out`, and those there are used again."""
    defaults, device = model_defaults("demo"), torch.device("cpu")
    pipe = load_pipeline("demo", torch.bfloat16, device)
    pipe.set_progress_bar_config(disable=True)
    native = {"height": defaults.size, "width": defaults.size}
    prompts = evaluation_prompts("demo", count)
    folder = out.with_suffix("") / f"{steps} steps"

    def images(label: str, make: Callable[[int], tuple[Image.Image, float]]) -> Made:
        """Every prompt's image, and the median seconds of a step; None if all were there."""
        (folder / label).mkdir(parents=True, exist_ok=True)
        found, seconds = [], []
        for seed in tqdm(range(count), desc=label):
            path = folder / label / f"{seed}.png"
            if not path.exists():
                image, taken = make(seed)
                seconds.append(taken)
                with whole_file(path) as part:
                    image.save(part, "PNG")
            with Image.open(path) as image:
                found.append(image.convert("RGB"))
        return found, statistics.median(seconds) if seconds else None

    def at_native_size(seed: int) -> tuple[Image.Image, float]:
        options: dict[str, Any] = {"steps": steps, "guidance": defaults.guidance}
        latents = denoise(pipe, [prompts[seed]], [seed], **native, **options)
        return decode(pipe, latents, **native), 0.0

    def enlarged(row: Row, bases: list[Image.Image]) -> Made:
        def make(seed: int) -> tuple[Image.Image, float]:
            return enlarge(pipe, row, bases[seed], prompts[seed], seed, steps)

        return images(f"{2 * bases[0].height} px, {row.label}", make)

    bases, _ = images("native size", at_native_size)
    while 2 * bases[0].height < size:
        bases, _ = enlarged(FULL, bases)
    result: dict[str, Any] = {
        "rows": [], "count": count, "steps": steps, "size": size,
        "dtype": "bfloat16", "hardware": hardware(device), "torch": torch.__version__,
    }  # fmt: skip
    full: list[Image.Image] = []
    for row in rows:
        if row.radius is not None:
            setting = row.radius, row.down_factor
            weights = known_weights("demo", *setting, row.far) if row.tuned else None
            assert row.tuned == (weights is not None), f"no weights for {row.label}"
            apply_clear(pipe, *setting, weights, far=row.far)
        made, seconds = enlarged(row, bases)
        remove_clear(pipe)
        full = full or made
        found = [compare(*three) for three in zip(made, full, bases, strict=True)]
        means: dict[str, Any] = {
            name: statistics.mean(one[name] for one in found) for name in found[0]
        }
        means |= {"base_psnr_least": min(one["base_psnr"] for one in found), "step_s": seconds}
        if row is FULL:
            means["psnr"] = means["ssim"] = None
        result["rows"].append({"attention": row.label, "keys": row.keys(size)} | means)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--steps", type=int, default=12, help="of a whole schedule")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side, 1024 or 2048")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose label has one of these")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    if options.out.suffix != ".json":
        parser.error(f"--out must end with .json, got {options.out}")
    rows = [row for row in ROWS if row is FULL or any(part in row.label for part in options.only)]
    result = measure(options.count, options.steps, options.size, rows, options.out)
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
