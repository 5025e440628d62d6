"""How a denoising step grows with the image, full attention against CLEAR; and README's plot.

    python benchmarks/growth.py --out growth.json --plot growth.png

Every size is checked first (`clear-dit bench denoise`); from 4096 px on one timed run has to do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from plot_gpu import Panel, draw

from clear_dit.bench.denoise import bench_denoise
from clear_dit.tables import table


def measure(sizes: list[int], radius: int, repeats: int) -> dict[str, Any]:
    """Rows of bench_denoise, and exponents: seconds grow as pixels^exponent, first size to last."""
    results = [
        bench_denoise(
            "demo", size, size, radius, False, "auto", torch.float32, torch.device("cpu"),
            repeats if size < 4096 else 1,
        )
        for size in sizes
    ]  # fmt: skip
    rows = [
        {
            "size": result["height"],
            "full_s": result["rows"][0]["seconds"],
            "clear_s": result["rows"][1]["seconds"],
            "faster": result["speedup"],
            "flops_allow": result["flops_allow"],
            "full_tflop": result["rows"][0]["tflop"],
            "max_error": result["max_error"],
        }
        for result in results
    ]
    pixels = 2 * math.log(sizes[-1] / sizes[0])
    return {
        "rows": rows,
        "exponent": {
            name: math.log(rows[-1][f"{name}_s"] / rows[0][f"{name}_s"]) / pixels
            for name in ("full", "clear")
        },
        "correct": all(result["correct"] for result in results),
        "radius": radius,
        "model": "demo",
        "dtype": "float32",
        "hardware": results[0]["hardware"],
        "torch": torch.__version__,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    curves = {
        "full attention": [(row["size"], row["full_s"] * 1e3) for row in rows],
        f"CLEAR, r={result['radius']}": [(row["size"], row["clear_s"] * 1e3) for row in rows],
    }
    caption = f"demo pipeline, {result['dtype']}, {result['hardware']}, torch {result['torch']}"
    draw([Panel("one pass of the transformer", curves)], caption).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="512,1024,2048,4096", help="growing, in pixels a side")
    parser.add_argument("--radius", type=int, default=8, help="in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs below 4096 px")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--plot", type=Path, help="the PNG to write")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    if len(sizes) < 2 or sizes != sorted(set(sizes)):
        print("growth.py: --sizes must be two or more growing sizes", file=sys.stderr)
        return 2
    result = measure(sizes, options.radius, options.repeats)
    if not result["correct"]:
        print("growth.py: WRONG results, nothing is written", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot is not None:
        plot(result, options.plot)
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
