"""What `clear-dit render` costs beside the bare pipeline calls, for small images of the demo.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/render_overhead.py

Both ways generate the same images with one loaded pipeline on a CPU, in turns: the bare way calls
the pipeline and saves a PNG with its settings, and `render` reads a job file, claims every job,
writes images, sidecars and manifest. The pixels must be equal before a time counts. The result is
the ratio of the medians over the rounds; loading is in neither. The last line printed is JSON; the
exit status is 1 if pixels differ or the overhead is above its target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clear_dit.generation.denoising import decode, denoise
from clear_dit.generation.image_output import save_png
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner
from clear_dit.render.run import render

TARGET = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description="render against bare pipeline calls.")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--side", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    flags = {"height": options.side, "width": options.side, "steps": options.steps, "device": "cpu"}
    runner = PipelineRunner("demo", "float32", "cpu")
    seconds: dict[str, list[float]] = {"bare": [], "render": []}
    equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = folder / "jobs.jsonl"
        lines = [{"prompt": f"a red house, {n}", "id": str(n)} for n in range(options.images)]
        jobs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        for number in range(-1, options.rounds):  # the first is not counted
            bare, ours = folder / f"bare{number}", folder / f"render{number}"
            bare.mkdir()
            start = time.perf_counter()
            result = render(jobs, ours, flags, make_runner=lambda *_: runner)
            middle = time.perf_counter()
            generate_bare(runner, lines, flags, bare)
            end = time.perf_counter()
            equal &= result["generated"] == len(lines) and all(
                np.array_equal(*(np.array(Image.open(f / f"{n}.png")) for f in (bare, ours)))
                for n in range(len(lines))
            )
            if number >= 0:
                seconds["render"].append(middle - start)
                seconds["bare"].append(end - middle)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    overhead = medians["render"] / medians["bare"] - 1
    report = {
        "images": options.images,
        "side": options.side,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "pixels_equal": bool(equal),
        "bare_seconds": round(medians["bare"], 4),
        "render_seconds": round(medians["render"], 4),
        "overhead": round(overhead, 4),
        "target": TARGET,
    }
    if not equal:
        print("render_overhead: the images differ: no time counts", file=sys.stderr)
        report |= {"bare_seconds": None, "render_seconds": None, "overhead": None}
    else:
        print(
            f"{options.images} images of {options.side} px: {medians['bare']:.3f} s bare, "
            f"{medians['render']:.3f} s by render, {overhead:+.1%} (target {TARGET:.0%})"
        )
    print(json.dumps(report))
    return 0 if equal and overhead <= TARGET else 1


def generate_bare(
    runner: PipelineRunner, lines: list[dict[str, str]], flags: dict, folder: Path
) -> None:
    """The pipeline as `render` left it, called for one image after the other."""
    pipe = runner.pipe
    for line in lines:
        request = make_request(line["prompt"], **flags)
        latents = denoise(
            pipe,
            [request.prompt],
            [request.seed],
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance=request.guidance,
        )
        image = decode(pipe, latents, request.height, request.width)
        save_png(image, folder / f"{line['id']}.png", asdict(request))


if __name__ == "__main__":
    sys.exit(main())
