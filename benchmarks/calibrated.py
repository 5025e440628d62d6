"""Radii by layer and noise level against one radius, at the same FLOPs of attention.

    for r in 4 8; do for far in far no-far; do
      clear-dit calibrate --radius $r --$far --out calibrated-$r-$far.json; done; done
    python benchmarks/calibrated.py calibrated-*.json --count 256 --out calibrated-table.json

For each of the demo's held-out prompts: full attention's own trajectory, and at POINTS of it the
relative squared error of the prediction under either attention, mean over the points; and the
image from the same noise, its PSNR against full attention's. The model's own weights, untuned.
"better" is the share of prompts whose error is less, "nearer" that of those whose image is. A line
of the checkpoint beside the JSON is written after each prompt: a stopped run goes on; after a
change of code or schedules take another name. The picture beside it shows the radii.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clear_dit import apply_clear, remove_clear
from clear_dit.attention.radii import Radii
from clear_dit.bench.timing import hardware
from clear_dit.calibration.forwards import forwards_of, predicted, relative_error
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.families.schedule import Schedule, read_schedule
from clear_dit.files import whole_file
from clear_dit.generation.denoising import decode
from clear_dit.generation.models import load_pipeline
from clear_dit.generation.request import GenerateRequest, make_request
from clear_dit.kernels.window import EVERYTHING
from clear_dit.tables import table

# Of a trajectory's steps, in shares of it.
POINTS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
SIDE, EDGE = 56, 8  # of a square of the picture, and around it, in pixels


def rows_of(schedules: list[Schedule]) -> dict[str, tuple[Radii, bool, float]]:
    """Of every row its radii, far keys, and FLOPs of attention, 1 for the uniform window's."""
    rows = {}
    for schedule in schedules:
        name = f"r={schedule.radius}{' far' if schedule.far else ''}"
        rows[f"{name}, uniform"] = (Radii(schedule.radius), schedule.far, 1.0)
        rows[f"{name}, calibrated"] = (schedule.radii, schedule.far, schedule.made["flops"])
    return rows


def measure(
    pipe: Any, rows: dict[str, tuple[Radii, bool, float]], request: GenerateRequest, images: bool
) -> dict[str, dict[str, float]]:
    """Every row's error and PSNR for one prompt."""
    forwards, latents = forwards_of(pipe, request, request.prompt, request.seed)
    points = [forwards[int(share * len(forwards))] for share in POINTS]
    expected = [predicted(pipe.transformer, point) for point in points]
    full, found = pixels(pipe, latents, request), {}
    for name, (radii, far, _) in rows.items():
        apply_clear(pipe, radius=radii, far=far)
        try:
            errors = [
                relative_error(predicted(pipe.transformer, point), value)
                for point, value in zip(points, expected, strict=True)
            ]
            found[name] = {"error": float(np.mean(errors)), "errors": errors}
            if images:
                _, own = forwards_of(pipe, request, request.prompt, request.seed)
                mean = np.square(pixels(pipe, own, request) - full).mean()
                found[name]["psnr"] = 10 * math.log10(255**2 / max(mean, 1e-9))
        finally:
            remove_clear(pipe)
    return found


def pixels(pipe: Any, latents: torch.Tensor, request: GenerateRequest) -> np.ndarray:
    """The image, (height, width, 3) from 0 to 255."""
    return np.asarray(decode(pipe, latents, request.height, request.width), dtype=np.float64)


def summary(
    rows: dict[str, tuple[Radii, bool, float]], prompts: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A line for each row; of two that belong together the second says how often it is better."""
    lines, before = [], ""
    for name, (_, _, flops) in rows.items():
        own = [found[name] for found in prompts]
        line = {
            "attention": name,
            "flops": flops,
            "error": float(np.mean([one["error"] for one in own])),
            "errors": np.mean([one["errors"] for one in own], axis=0).round(6).tolist(),
        }
        images = [one["psnr"] for one in own if "psnr" in one]
        if images:
            line["psnr"] = float(np.mean(images))
        if name.endswith("calibrated"):
            others = [found[before] for found in prompts]
            pairs = list(zip(own, others, strict=True))
            line["better"] = float(np.mean([a["error"] < b["error"] for a, b in pairs]))
            if images:
                nearer = [a["psnr"] > b["psnr"] for a, b in pairs if "psnr" in a]
                line["nearer"] = float(np.mean(nearer))
        lines.append(line)
        before = name
    return lines


def draw(schedule: Schedule) -> Image.Image:
    """The radii, a row for each layer and a column for each interval; darker sees farther."""
    levels = [1.0, *schedule.levels, 0.0]
    font = ImageFont.load_default(14)
    left = EDGE + max(int(font.getlength(name)) for name, _ in schedule.layers) + EDGE
    width = left + 2 * SIDE * (len(levels) - 1) + EDGE
    image = Image.new("RGB", (width, SIDE * (len(schedule.layers) + 1) + EDGE), "white")
    pen = ImageDraw.Draw(image)
    sees = ", far keys" if schedule.far else ""
    pen.text((EDGE, EDGE), f"radius {schedule.radius}{sees}", "black", font)
    pen.text((EDGE, SIDE - 20), "noise level", "black", font)
    for column, (high, low) in enumerate(itertools.pairwise(levels)):
        centre = left + 2 * SIDE * column + SIDE
        pen.text((centre, SIDE - 12), f"{high:.2f} to {low:.2f}", "black", font, "mm")
        for row, (name, radii) in enumerate(schedule.layers):
            top, radius = SIDE * (row + 1), radii[column]
            # White at a quarter of the uniform radius, darkest at four times that and above.
            share = (math.log(min(radius, 4 * schedule.radius) / schedule.radius, 4) + 1) / 2
            share = min(max(share, 0.0), 1.0)
            shade = tuple(round(a + (b - a) * share) for a, b in ((250, 20), (250, 60), (240, 120)))
            box = (left + 2 * SIDE * column, top, left + 2 * SIDE * (column + 1), top + SIDE)
            pen.rectangle(box, shade, "white", 2)
            text = "all" if radius == EVERYTHING else str(radius)
            colour = "white" if share > 0.5 else "black"
            pen.text((centre, top + SIDE // 2), text, colour, font, "mm")
            if column == 0:
                pen.text((left - EDGE, top + SIDE // 2), name, "black", font, "rm")
    return image


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Two in a row."""
    width, height = (max(getattr(one, side) for one in pictures) for side in ("width", "height"))
    whole = Image.new("RGB", (2 * width, height * -(-len(pictures) // 2)), "white")
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % 2 * width, index // 2 * height))
    return whole


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schedules", nargs="+", type=Path, help="files of clear-dit calibrate")
    parser.add_argument("--count", type=int, default=256, help="held-out prompts")
    parser.add_argument("--images", type=int, help="of so many first ones also images; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("calibrated-table.json"))
    options = parser.parse_args()
    schedules = [read_schedule(path) for path in options.schedules]
    side_by_side([draw(schedule) for schedule in schedules]).save(options.out.with_suffix(".png"))
    rows = rows_of(schedules)
    asked = {"seed": options.seed, "schedules": [schedule.digest for schedule in schedules]}
    kept = options.out.with_suffix(".jsonl")
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if done and done[0] != asked:
        parser.error(f"{kept} is of other schedules or another seed; take another --out.")
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    prompts = evaluation_prompts("demo", options.count)
    with kept.open("a") as file:
        if not done:
            file.write(json.dumps(asked) + "\n")
        found = done[1:]
        for index in tqdm(range(len(found), options.count), "prompts"):
            request = make_request(prompts[index], "demo", seed=options.seed + index)
            images = options.images is None or index < options.images
            found.append(measure(pipe, rows, request, images))
            file.write(json.dumps(found[-1]) + "\n")
            file.flush()
    lines = summary(rows, found[: options.count])
    shown = ("attention", "flops", "error", "psnr", "better", "nearer")
    print(table([{name: line.get(name) for name in shown} for line in lines]))
    result = {"rows": lines, "prompts": options.count, "points": POINTS, **asked}
    result["hardware"] = hardware(torch.device("cpu"))
    with whole_file(options.out) as out:
        out.write(json.dumps(result, indent=1).encode())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
