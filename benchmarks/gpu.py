"""Everything this project claims about one GPU, in one command of nine minutes at most.

    PYTHONPATH=. python benchmarks/gpu.py --out DIR

1. every Triton kernel in bfloat16, float16 and float32 against float64: a kernel that is wrong, or
   that could not be checked in time, is not timed;
2. one attention layer (24 heads x 128, 512 text tokens, bfloat16) at 1K to 8K: CLEAR as tuned and
   with each entry of its tables, full attention by cuDNN and by FlashAttention, FlexAttention on
   raster-order tokens and on tokens in tiles; forward and backward;
3. a double and a single FLUX block with random weights, full attention against CLEAR, and the step
   of the whole model that follows: 19 double blocks and 38 single ones;
4. QK-norm and rotation, fused against step by step.

FLOPs of a useful rate are those the method needs, `Window.attention_flops`: 4 per attended pair and
channel, softmax not counted. Times are by CUDA events, medians, with the host running ahead.

Results go to DIR as JSON, a file for each part, written after every row; what there was no time
for is named there. The last line printed is JSON: the headline numbers beside their targets. The
exit status is 0 if all was right and all was done, 1 if not, 2 without a CUDA device.

`--interpret` goes through the same code on a CPU in Triton's interpreter, with tiny problems: a
test of this program and no measurement.

Where the packages of pyproject.toml cannot be installed, PyTorch with Triton, transformers,
accelerate, typer and tqdm are enough beside these wheels (pure Python, 7 MB):

    python3 -m pip download --no-deps --only-binary=:all: -d .whl diffusers==0.42.1 \\
        importlib_metadata==10.2.0 lazy-importer==0.1.0 zipp==4.1.2
    python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=.:/tmp/site python3 benchmarks/gpu.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Share of the time by which a part must have ended.
UNTIL = {"checks": 0.34, "attention": 0.85, "blocks": 0.97, "norm_rope": 1.0}
SECONDS = 530
CHECKING_PROCESSES = 12
# Useful TFLOP/s at the largest image, by radius.
RATES = {8: 200, 16: 240, 32: 300}
RASTER_SPEEDUP, STEP_SPEEDUP, BACKWARD_OVER_FORWARD = 4, 10, 3


@dataclass
class Part:
    """Rows of one part, kept on disk as they come.

    Attributes:
        missing: why the part is not complete; None if it is.
    """

    name: str
    folder: Path
    environment: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: str | None = None
    seconds: float = 0.0

    def collect(self, rows: Iterator[Any], deadline: float) -> None:
        """Take rows, or lists of them, until there are no more or the time is up."""
        begin = time.monotonic()
        try:
            while True:
                if time.monotonic() > deadline:
                    self.missing = "no time"
                    break
                try:
                    row = next(rows)
                except StopIteration:
                    break
                new = row if isinstance(row, list) else [row]
                self.rows += new
                for each in new if self.name != "checks" else filter(_wrong, new):
                    print(_line(self.name, each), flush=True)
                self.seconds = time.monotonic() - begin
                self.save()
        except Exception as error:
            self.missing = f"{type(error).__name__}: {error}"[:1000]
        self.save()

    def save(self) -> None:
        """Write DIR/NAME.json, whole or not at all."""
        text = json.dumps(
            {
                "part": self.name,
                "missing": self.missing,
                "seconds": self.seconds,
                **self.environment,
                "rows": self.rows,
            },
            indent=1,
        )
        path = self.folder / f"{self.name}.json"
        path.with_suffix(".part").write_text(text + "\n")
        path.with_suffix(".part").replace(path)

    @property
    def right(self) -> bool:
        """Whether it is complete and nothing in it went wrong."""
        return not self.missing and not any(_wrong(row) for row in self.rows)


def _wrong(row: dict[str, Any]) -> bool:
    return "problem" in row or row.get("ok") is False


def _line(name: str, row: dict[str, Any]) -> str:
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in row.items()
        if value is not None
    }
    return f"{name}: " + " ".join(f"{key}={value}" for key, value in shown.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Check, then measure, on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all parts")
    parser.add_argument("--interpret", action="store_true", help="test this program on a CPU")
    options = parser.parse_args()
    # A graph here is one kernel: more compilers in each of many processes only crowd the machine.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if options.interpret:
        # Both are read when PyTorch and Triton are imported.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print("gpu.py: needs a CUDA device (--interpret tests it without one)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    return run(options.out, options.seconds, options.interpret)


def run(folder: Path, seconds: float, interpret: bool) -> int:
    """All parts, and the headline; the exit status."""
    import torch
    from gpu_checks import run_checks
    from gpu_speed import FULL, SMOKE, attention, blocks, ceilings, norm_rope

    start = time.monotonic()
    until = {name: start + share * seconds for name, share in UNTIL.items()}
    device = torch.device("cpu" if interpret else "cuda")
    environment = describe(device) | {"interpreted": interpret}
    if not interpret:
        environment |= ceilings(device)
        torch.cuda.empty_cache()
    print(_line("environment", environment), flush=True)
    parts = {name: Part(name, folder, environment) for name in UNTIL}
    # Which path runs, and which entry of the tables is chosen.
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("clear_dit").setLevel(logging.INFO)

    workers = 0 if interpret else CHECKING_PROCESSES
    checks = parts["checks"]
    checks.collect(run_checks(device, interpret, workers, until["checks"]), until["checks"])
    right, wrong = _verdict(checks.rows)
    print(f"checks: {len(checks.rows)} results, {len(wrong)} kernels wrong", flush=True)
    setting = (SMOKE if interpret else FULL)(device=device)
    for name, needs, rows in (
        ("attention", {"attention"}, attention(setting, wrong, until["attention"])),
        ("blocks", {"attention", "norm_rope"}, blocks(setting)),
        ("norm_rope", {"norm_rope"}, norm_rope(setting)),
    ):
        if needs <= right:
            parts[name].collect(rows, until[name])
        else:
            lacking = ", ".join(sorted(needs - right))
            parts[name].missing = f"not timed: {lacking} was not found right"
            parts[name].save()
    result = summary(parts, environment, time.monotonic() - start)
    (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if all(part.right for part in parts.values()) else 1


def _verdict(rows: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Which of "attention" and "norm_rope" are right as a model calls them; what is wrong.

    An entry of the forward table that is wrong is left out of what follows, and nothing else is.
    """
    from clear_dit.kernels.triton import tuning

    wrong = {row["subject"] for row in rows if _wrong(row)}
    for subject in sorted(wrong):
        print(f"FAILED: {subject}", flush=True)
    right = {row["subject"] for row in rows} & {"attention", "norm_rope"} - wrong
    if wrong & {"text", "pooling"}:
        right.discard("attention")
    if any(subject.startswith("forward ") for subject in wrong):
        tuning.TRIED = 1  # "as tuned" is then the default, which is right
    return right, wrong


def describe(device: Any) -> dict[str, Any]:
    """Hardware and software."""
    import torch
    import triton

    from clear_dit.bench.timing import hardware

    found = {"hardware": hardware(device), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def summary(parts: dict[str, Part], environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Headline numbers, each with its target and whether it is met; None where not measured."""
    layers = [row for row in parts["attention"].rows if not _wrong(row)]
    steps = [row for row in parts["blocks"].rows if "step_s" in row]
    sizes = sorted({row["size"] for row in layers})
    small, large = (sizes[0], sizes[-1]) if sizes else (None, None)
    tuned = {
        (row["size"], row["radius"]): row
        for row in layers
        if row["radius"] and row["impl"] in ("triton", "tiled") and not row["entry"]
    }
    radii = sorted({radius for _, radius in tuned})

    def layer(impl: str, size: int | None, radius: int | None, name: str) -> float | None:
        found = [
            row[name]
            for row in layers
            if (row["impl"], row["size"], row["radius"]) == (impl, size, radius) and row.get(name)
        ]
        return found[0] if found else None

    def step(size: int | None, radius: int | None) -> float | None:
        found = [r["step_s"] for r in steps if (r["size"], r["radius"]) == (size, radius)]
        return found[0] if found else None

    headline: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float | None, target: float, at_most: bool = False) -> None:
        met = None if value is None else bool(value <= target if at_most else value >= target)
        headline[name] = {"value": value, "target": target, "met": met}

    for radius in radii:
        row = tuned.get((large, radius), {})
        rate = row.get("useful_tflops")
        if radius in RATES:
            add(f"useful TFLOP/s at {large} px, r={radius}", rate, RATES[radius])
        add(
            f"useful rate over cuDNN's dense rate at {large} px, r={radius}",
            _ratio(rate, layer("sdpa-cudnn", large, None, "dense_tflops")),
            0.5,
        )
        add(
            f"times faster than raster FlexAttention at {large} px, r={radius}",
            _ratio(layer("flex", large, radius, "ms"), row.get("ms")),
            RASTER_SPEEDUP,
        )
        small_ms = tuned.get((small, radius), {}).get("ms")
        dense = [layer(impl, small, None, "ms") for impl in ("sdpa-cudnn", "sdpa-flash", "sdpa")]
        add(
            f"time of attention over the fastest full attention at {small} px, r={radius}",
            _ratio(small_ms, min((ms for ms in dense if ms), default=None)),
            1,
            at_most=True,
        )
        add(
            f"time of a step over full attention's at {small} px, r={radius}",
            _ratio(step(small, radius), step(small, None)),
            1,
            at_most=True,
        )
        add(
            f"times faster a step at {large} px, r={radius}",
            _ratio(step(large, None), step(large, radius)),
            STEP_SPEEDUP,
        )
    ratios = [_ratio(row.get("backward_ms"), row["ms"]) for row in tuned.values()]
    add(
        "backward over forward, at most",
        max((ratio for ratio in ratios if ratio), default=None),
        BACKWARD_OVER_FORWARD,
        at_most=True,
    )
    return {
        "headline": headline,
        "right": all(not _wrong(row) for part in parts.values() for row in part.rows),
        "missing": {part.name: part.missing for part in parts.values() if part.missing},
        "seconds": seconds,
        **environment,
    }


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


if __name__ == "__main__":
    sys.exit(main())
