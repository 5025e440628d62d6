"""The demo in int8 against float32 on this machine: how far images are, and seconds a step.

    PYTHONPATH=. python benchmarks/quantised.py --out benchmarks/results/quantised-cpu.json

Images of each size by both, of the demo's held-out prompts, from the same seed with the same CLEAR
weights; the last is timed. It fails where one is further than 30 dB from float32's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from clear_dit.bench.timing import measured_on
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner
from clear_dit.tables import table

LEAST_DB = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    rows, prompts = [], evaluation_prompts("demo", args.count)
    with TemporaryDirectory() as folder:
        for kind in (None, "int8"):
            runner = None
            for size in args.sizes:
                for seed, prompt in enumerate(prompts):
                    request = make_request(
                        prompt,
                        height=size,
                        width=size,
                        steps=args.steps,
                        seed=seed,
                        dtype="float32",
                        quantize=kind,
                        device=args.device,
                    )
                    runner = runner or PipelineRunner.of(request)
                    calls: list[int] = []
                    made = runner.generate(
                        request,
                        Path(folder) / f"{kind}-{size}-{seed}.png",
                        on_step=lambda step, calls=calls: calls.append(step.step),
                    )
                found = []
                if kind is not None:
                    found = [psnr(Path(folder), kind, size, seed) for seed in range(args.count)]
                rows.append(
                    {
                        "layers": kind or "float32",
                        "size, px": size,
                        "steps": len(calls),
                        "seconds a step": made["seconds"]["denoise"] / len(calls),
                        "PSNR, dB": statistics.median(found) if found else None,
                        "least": min(found) if found else None,
                    }
                )
    result = {"rows": rows, **measured_on(torch.float32, torch.device(args.device))}
    result["correct"] = all(row["least"] >= LEAST_DB for row in rows if row["least"] is not None)
    print(table(rows))
    text = json.dumps(result)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if result["correct"] else 1


def psnr(folder: Path, kind: str, size: int, seed: int) -> float:
    """Of an image, to that of float32, in dB."""
    one, other = (
        np.asarray(Image.open(folder / f"{name}-{size}-{seed}.png")).astype(float)
        for name in (kind, None)
    )
    error = ((one - other) ** 2).mean()
    return 10 * math.log10(255**2 / error)


if __name__ == "__main__":
    raise SystemExit(main())
