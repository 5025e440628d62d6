"""Headline numbers beside their targets, and what is wrong or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .part_file import PartFile, Record
from .parts import PARTS

# Useful TFLOP/s at the largest image, by radius.
RATES = {8: 200, 16: 240, 32: 300}
RASTER_SPEEDUP, STEP_SPEEDUP, BACKWARD_OVER_FORWARD = 4, 10, 3
Rows = list[dict[str, Any]]


def summary(folder: Path) -> dict[str, Any]:
    """Of all parts that have a file.

    Returns:
        headline: value, target and whether it is met, None where not measured; far: times beside
        those without far keys; ceilings; wrong: reasons by part and task; missing: tasks by part;
        skipped: reasons by part and task; complete; hardware and software.
    """
    records = {name: PartFile(folder, name).read() for name in PARTS}
    environment = next((each.environment for each in records.values() if each.environment), {})
    wrong = {name: each.problems for name, each in records.items() if each.problems}
    missing = {
        name: each.missing or "not started"
        for name, each in records.items()
        if each.missing or not (each.labels or each.problem)
    }
    skipped = {
        f"{name}: {row['task']}": row["skipped"]
        for name, each in records.items()
        for row in each.rows
        if "skipped" in row
    }
    ceilings = {
        key: value
        for row in records["ceilings"].good_rows
        for key, value in row.items()
        if key not in ("task", "bytes", "side")
    }
    return {
        "headline": headline(layer_rows(records), steps_of(records["blocks"])),
        "kernels_ms": {row["task"]: row["kernels_ms"] for row in records["production"].good_rows},
        "ceilings": ceilings,
        "wrong": wrong,
        "missing": missing,
        "skipped": skipped,
        "complete": not wrong and not missing,
        **environment,
    }


def layer_rows(records: dict[str, Record]) -> Rows:
    """Rows of a timed attention layer, of production too: impl, size, radius, ms and more."""
    production = [
        row | {"impl": "triton"} for row in records["production"].good_rows if not row["far"]
    ]
    return [*production, *(row for row in records["layers"].good_rows if "ms" in row)]


def steps_of(blocks: Record) -> Rows:
    """Rows of whole steps."""
    return [row for row in blocks.good_rows if "step_s" in row]


def headline(layers: Rows, steps: Rows) -> dict[str, dict[str, Any]]:
    """Numbers by name, each with its target and whether it is met."""
    sizes = sorted({row["size"] for row in layers})
    small, large = (sizes[0], sizes[-1]) if sizes else (None, None)
    ours = [row for row in layers if row["impl"] in ("triton", "tiled")]
    radii = sorted({row["radius"] for row in ours})

    def layer(impl: str, size: int | None, radius: int | None, name: str) -> float | None:
        impls = ("triton", "tiled") if impl == "clear" else (impl,)
        found = [
            row[name]
            for row in layers
            if row["impl"] in impls and (row["size"], row["radius"]) == (size, radius)
            if row.get(name)
        ]
        return found[0] if found else None

    def step(size: int | None, radius: int | None) -> float | None:
        found = [r["step_s"] for r in steps if (r["size"], r["radius"]) == (size, radius)]
        return found[0] if found else None

    numbers: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float | None, target: float, at_most: bool = False) -> None:
        met = None if value is None else bool(value <= target if at_most else value >= target)
        numbers[name] = {"value": value, "target": target, "met": met}

    for radius in radii:
        rate = layer("clear", large, radius, "useful_tflops")
        if radius in RATES:
            add(f"useful TFLOP/s at {large} px, r={radius}", rate, RATES[radius])
        add(
            f"useful rate over cuDNN's dense rate at {large} px, r={radius}",
            _ratio(rate, layer("sdpa-cudnn", large, None, "dense_tflops")),
            0.5,
        )
        add(
            f"times faster than raster FlexAttention at {large} px, r={radius}",
            _ratio(layer("flex", large, radius, "ms"), layer("clear", large, radius, "ms")),
            RASTER_SPEEDUP,
        )
        dense = [layer(impl, small, None, "ms") for impl in ("sdpa-cudnn", "sdpa-flash", "sdpa")]
        add(
            f"time of attention over the fastest full attention at {small} px, r={radius}",
            _ratio(layer("clear", small, radius, "ms"), min(filter(None, dense), default=None)),
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
    ratios = [_ratio(row.get("backward_ms"), row["ms"]) for row in ours]
    add(
        "backward over forward, at most",
        max(filter(None, ratios), default=None),
        BACKWARD_OVER_FORWARD,
        at_most=True,
    )
    return numbers


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None
