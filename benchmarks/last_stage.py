"""CLEAR against full attention in the cascade's last stage: as the paper's Table 3.

    python benchmarks/last_stage.py --count 32 --out last-stage.json

One image for each of the demo's held-out prompts at its native size, by full attention. From each
the same stage at twice the size with the same noise: by full attention, and by CLEAR with and
without far keys, with the demo's distilled weights and without. With --size 2048 the stage before
is a stage by full attention too. Rows "yarn" have positions alike, so that only attention differs;
"two" is what the pipeline does by itself with CLEAR, unless keys are pooled. PSNR and SSIM are
against full attention's image. Beside them, against the image before: PSNR of the result, scaled
down, and gradient energy in multiples of that image's Lanczos enlargement (above 1 is sharper).
"keys" are the image keys of a query.
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
from clear_dit.generation.checks import find_window
from clear_dit.generation.denoising import decode, denoise, encode
from clear_dit.generation.models import load_pipeline, model_defaults
from clear_dit.pipelines.cascade.resolution import settings_for
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


def measure(count: int, steps: int, size: int, rows: list[Row], out: Path) -> dict[str, Any]:
    defaults, device = model_defaults("demo"), torch.device("cpu")
    pipe = load_pipeline("demo", torch.float32, device)
    pipe.set_progress_bar_config(disable=True)
    native = {"height": defaults.size, "width": defaults.size}
    prompts = evaluation_prompts("demo", count)
    texts, empty = [encode(pipe, [prompt]) for prompt in prompts], encode(pipe, [""])
    bases, full = [], []
    for seed, text in enumerate(tqdm(texts, desc="native size")):
        options: dict[str, Any] = {"steps": steps, "guidance": defaults.guidance}
        latents = denoise(pipe, text, empty, [seed], **native, **options)
        base = decode(pipe, latents, **native)
        while 2 * base.height < size:
            base, _ = enlarge(pipe, FULL, base, text, empty, seed, steps)
        bases.append(base)
    result: dict[str, Any] = {
        "rows": [], "count": count, "steps": steps, "size": size,
        "dtype": "float32", "hardware": hardware(device), "torch": torch.__version__,
    }  # fmt: skip
    for row in rows:
        if row.radius is not None:
            setting = row.radius, row.down_factor
            weights = known_weights("demo", *setting, row.far) if row.tuned else None
            assert row.tuned == (weights is not None), f"no weights for {row.label}"
            apply_clear(pipe, *setting, weights, far=row.far)
        found = []
        for seed, (text, base) in enumerate(zip(tqdm(texts, desc=row.label), bases, strict=True)):
            image, seconds = enlarge(pipe, row, base, text, empty, seed, steps)
            if row is FULL:
                full.append(image)
            found.append(compare(image, full[seed], base) | {"step_s": seconds})
        remove_clear(pipe)
        means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        means["base_psnr_least"] = min(one["base_psnr"] for one in found)
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
    parser.add_argument("--only", default="", help="rows whose label has this, and full attention")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    rows = [row for row in ROWS if row is FULL or options.only in row.label]
    result = measure(options.count, options.steps, options.size, rows, options.out)
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
