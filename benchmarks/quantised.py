"""The demo in int8 against float32 on this machine: how far images are, and seconds a step.

    PYTHONPATH=. python benchmarks/quantised.py --out benchmarks/results/quantised-cpu.json

An image of each size by both, from the same seed with the same CLEAR weights; the second of two
is timed. It fails where an image is further than 30 dB from float32's.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from clear_dit.bench.timing import measured_on, table
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner

PROMPT = "a red house by a lake at night"
LEAST_DB = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="images of each size; the last counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for kind in (None, "int8"):
            runner = None
            for size in args.sizes:
                for seed in range(args.seeds):
                    request = make_request(
                        PROMPT,
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
                    result = runner.generate(
                        request,
                        Path(folder) / f"{kind}-{size}-{seed}.png",
                        on_step=lambda step, calls=calls: calls.append(step.step),
                    )
                rows.append(
                    {
                        "layers": kind or "float32",
                        "size, px": size,
                        "steps": len(calls),
                        "seconds a step": result["seconds"]["denoise"] / len(calls),
                        "PSNR, dB": None
                        if kind is None
                        else min(
                            psnr(Path(folder), kind, size, seed) for seed in range(args.seeds)
                        ),
                    }
                )
    found = {"rows": rows, **measured_on(torch.float32, torch.device(args.device))}
    found["correct"] = all(
        row["PSNR, dB"] >= LEAST_DB for row in rows if row["PSNR, dB"] is not None
    )
    print(table(rows))
    text = json.dumps(found)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if found["correct"] else 1


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
