"""Headline numbers beside their targets, and what is wrong or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .part_file import PartFile, Record
from .parts import CHOSEN, PARTS

# Useful TFLOP/s at the largest image, by radius; and what a model of the kernels lets expect of an
# H200 (model_sm90.py).
RATES = {8: 200, 16: 240, 32: 300}
PREDICTED = {8: 380, 16: 370, 32: 400}
# Seven products of the backward pass against two, and some more.
RASTER_SPEEDUP, STEP_SPEEDUP, BACKWARD_OVER_FORWARD = 4, 10, 4.5
# What of Nsight Compute's counters is in the summary.
SHARES = "pct_of_peak_sustained_elapsed"
Rows = list[dict[str, Any]]


def summary(folder: Path) -> dict[str, Any]:
    """Of all parts that have a file.

    Returns:
        headline: value, target and whether it is met, None where not measured; kernels_ms: of the
        production shape; compiled: kernels that were not in the cache by then; sweep, replay:
        times by task; counters: by kernel; ceilings; wrong: reasons by part and task; missing:
        tasks by part; skipped: reasons by part and task; complete; hardware and software.
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
    production = [row for row in records["production"].good_rows if "kernels_ms" in row]
    ceilings = {
        key: value
        for row in records["production"].good_rows
        if row not in production
        for key, value in row.items()
        if key not in ("task", "bytes", "side")
    }
    return {
        "headline": headline(layer_rows(records), steps_of(records["blocks"])),
        "kernels_ms": {row["task"]: row["kernels_ms"] for row in production},
        "compiled": sum(row["compiled"] for row in production),
        "sweep": _by_task(records["sweep"], ("entry", "ms", "useful_tflops", "image_tflops")),
        "replay": _by_task(records["layers"], ("called_ms", "replay_ms")),
        "counters": {
            row["kernel"]: {
                name: value
                for name, value in row["counters"].items()
                if SHARES in name or row["by"] != "ncu"
            }
            for row in records["counters"].good_rows
        },
        "ceilings": ceilings,
        "wrong": wrong,
        "missing": missing,
        "skipped": skipped,
        "complete": not wrong and not missing,
        **environment,
    }


def _by_task(record: Record, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """These of rows that have them all."""
    return {
        row["task"]: {name: row[name] for name in names}
        for row in record.good_rows
        if all(name in row for name in names)
    }


def layer_rows(records: dict[str, Record]) -> Rows:
    """Rows of a timed attention layer: impl, size, radius, ms and more.

    Of the production shape the entry that the sweep chose comes before the default.
    """
    chosen = [row for row in records["sweep"].good_rows if row["task"].startswith(CHOSEN)]
    ours = [
        row | {"impl": "triton"}
        for row in (*chosen, *records["production"].good_rows)
        if "ms" in row and not row["far"]
    ]
    others = ("ms", "replay_ms")
    return [*ours, *(row for row in records["layers"].good_rows if any(n in row for n in others))]


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

    def add(
        name: str, value: float | None, target: float, at_most: bool = False, **beside: Any
    ) -> None:
        met = None if value is None else bool(value <= target if at_most else value >= target)
        numbers[name] = {"value": value, "target": target, "met": met, **beside}

    for radius in radii:
        rate = layer("clear", large, radius, "useful_tflops")
        if radius in RATES:
            name = f"useful TFLOP/s at {large} px, r={radius}"
            add(name, rate, RATES[radius], predicted=PREDICTED[radius])
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
        fastest = min(filter(None, dense), default=None)
        # Called from Python, a small image takes the host's time; replayed it does not.
        add(
            f"time of attention over the fastest full attention at {small} px, r={radius}",
            _ratio(layer("clear", small, radius, "ms"), fastest),
            1,
            at_most=True,
            replayed=_ratio(layer("clear", small, radius, "replay_ms"), fastest),
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
    # Below, the host's time is in both.
    ratios = [
        _ratio(row["backward_ms"], row["ms"])
        for row in ours
        if row["size"] == large and row.get("backward_ms")
    ]
    add(
        f"backward over forward at {large} px, at most",
        max(filter(None, ratios), default=None),
        BACKWARD_OVER_FORWARD,
        at_most=True,
    )
    return numbers


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None
