"""Predict the Triton kernels' rate on an H200 from their disassembly; no GPU is needed.

    python benchmarks/model_sm90.py --out benchmarks/results/model-sm90.json

FLUX.1-dev at 8192 px, one attention layer: image queries, text queries, and the merge of their
parts. The launches of every sm_90 entry are compiled and taken apart here and now. NOT a
measurement: `measured` stands beside each prediction, null until someone fills it in with what a
GPU took in ms, and is kept when the file is written again.

A tile is 64 queries by 64 keys. It costs a multiprocessor, in cycles:

- tensor cores: multiply-adds of its products / 2048 (512 for 128 channels);
- issue: the instructions of the loop, one warp of the group on each of the four schedulers;
- MUFU: 8 for each warp instruction on a scheduler;
- shared memory: bytes that products read (queries, keys, values) and copies write / 128;
- L2: bytes of keys and values / what the L2 gives a multiprocessor a cycle.

Inside a program these are serialised: Triton waits for the scores before the softmax, and the
barriers of a tile wait for copies. Programs on one multiprocessor, and the warp groups of one
program, overlap: they are the customers of a closed queueing network with three stations (tensor
cores; issue or MUFU, whichever takes longer; L2), solved by mean value analysis, and no faster than
any of the five costs allows. Groups of one program share its copies. Dependent loads before the
tiles are a delay in which nothing is served. Where softmax overlaps the tensor cores inside a
group (Gluon: the next scores are computed meanwhile, the products with values are not), half a
group more is a customer.

Assumed, and not known: the clock and the L2's rate under load; programs meet stations at random;
barriers that hold the groups of a program together cost nothing (entries of eight warps may be
slower). Checks: from the first version's loops it gets 322 / 293 / 307 useful TFLOP/s for
r=8/16/32, where a judgement of the same costs by hand had 320 (230-400) / 305 (225-385) / 325
(240-410). Of dense attention in two overlapped groups it expects 734, where FlashAttention-3 is
known for 650-700; in two groups that are not, 600, where plain Triton is known for 490.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from triton_compile import GRID, HEADS, TEXT_LENGTH, launches

HEAD_DIM, ELEMENT_SIZE, ROWS, KEYS, RADII = 128, 2, 64, 64, (8, 16, 32)

# NVIDIA H200 SXM. Data sheet: 989 TFLOP/s of dense bfloat16, 4.8 TB/s of HBM3e.
MULTIPROCESSORS = 132
CLOCK = 1.83e9  # 1/s, at which 132 x 2048 multiply-adds a cycle are those 989 TFLOP/s
HBM = 4.8e12  # bytes/s
# Hopper tuning guide and CUDA programming guide, compute capability 9.0.
MULTIPLY_ADDS, MUFU_CYCLES, SHARED_BYTES = 2048, 8, 128  # a cycle; a warp instruction; a cycle
REGISTERS, REGISTERS_STEP = 65536, 8
SHARED_MEMORY, SHARED_RESERVED = 233472, 1024  # bytes; of every program
# Public micro-benchmarks of an H200: bytes/s of all multiprocessors, cycles of a load from L2.
L2 = 9.7e12
LATENCY = 600
# Groups of a Gluon program that compute; a producer's warps copy for them.
CONSUMERS = 2
# Loads of a program that wait for each other: the first tile; offsets and tile of either list.
DEPENDENT_LOADS = 5


@dataclass(frozen=True)
class Cost:
    """Cycles that a tile of a warp group, or many, cost a multiprocessor."""

    tensor: float
    issue: float
    mufu: float
    shared: float
    l2: float

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Cost(*(one + another for one, another in pairs))

    def times(self, count: float) -> Cost:
        return Cost(*(count * each for each in asdict(self).values()))

    @property
    def bound(self) -> str:
        """What it costs most of."""
        return max(asdict(self), key=lambda name: asdict(self)[name])


@dataclass(frozen=True)
class Kernel:
    """What the model takes of a kernel.

    Attributes:
        loops: by their names, "text", "whole" and "border" tiles of image queries, "text" alone of
            text queries; as triton_compile.py writes them.
        groups: of four warps in a program; each computes tiles of its own.
        programs: on a multiprocessor at a time.
        overlapped: softmax overlaps the tensor cores inside a group.
    """

    name: str
    loops: dict[str, dict[str, Any]]
    groups: int
    programs: int
    overlapped: bool = False

    @property
    def customers(self) -> int:
        groups = self.programs * self.groups
        return groups * 3 // 2 if self.overlapped else groups


@dataclass(frozen=True)
class Visits:
    """Of a group's 64 queries, the mean over the image.

    Attributes:
        tiles: by the loops' names.
        copied: how many tiles are copied for a tile that is computed.
    """

    tiles: dict[str, float]
    copied: float


def cost_of(loop: dict[str, Any], copied: float) -> Cost:
    """Of a tile, of which a turn of the loop may compute several.

    copied: how many tiles of keys and values come from L2 for it.
    """
    multiply_adds = sum(
        count * math.prod(map(int, shape.split("x"))) for shape, count in loop["products"].items()
    )
    tiles = multiply_adds / (2 * ROWS * KEYS * HEAD_DIM)
    keys = 2 * KEYS * HEAD_DIM * ELEMENT_SIZE
    read = keys + ROWS * HEAD_DIM * ELEMENT_SIZE
    return Cost(
        tensor=multiply_adds / tiles / MULTIPLY_ADDS,
        issue=loop["instructions"] / tiles,
        mufu=loop["classes"]["mufu"] / tiles * MUFU_CYCLES,
        shared=(read + copied * keys) / SHARED_BYTES,
        l2=copied * keys / (L2 / MULTIPROCESSORS / CLOCK),
    )


def cycles_of(cost: Cost, customers: int, delay: float) -> float:
    """Between the ends of two customers' work, each of which is `cost` and `delay` cycles apart.

    Exact mean value analysis (Reiser and Lavenberg, 1980).
    """
    stations = (cost.tensor, max(cost.issue, cost.mufu), cost.l2)
    waiting = [0.0] * len(stations)
    cycles = 0.0
    for present in range(1, customers + 1):
        times = [own * (1 + queue) for own, queue in zip(stations, waiting, strict=True)]
        cycles = (delay + sum(times)) / present
        waiting = [time / cycles for time in times]
    return max(cycles, *asdict(cost).values())


def programs_of(registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor takes."""
    own = -(-registers // REGISTERS_STEP) * REGISTERS_STEP * 32 * warps
    return min(REGISTERS // own, SHARED_MEMORY // (shared + SHARED_RESERVED))


def listed(radius: int, tiling: Any) -> tuple[float, float]:
    """Whole tiles and border tiles that a query tile visits, the mean over the image."""
    import torch

    from clear_dit.kernels.triton.geometry import visits

    found = visits(*GRID, radius, tiling, torch.device("cpu"))
    begin, border, end = found.ranges[found.row_class.long()][:, found.column_class.long()].unbind(
        -1
    )
    return (border - begin).double().mean().item(), (end - border).double().mean().item()


def visits_of(kernel: Kernel, radius: int, tiling: Any) -> Visits:
    """Of an entry, whose `tiling` is the table's.

    Groups of a plain program share its list. Where softmax is overlapped the tiling is that of one
    group, which has a list of its own; what is copied is the list of the groups side by side.
    """
    text = TEXT_LENGTH / KEYS
    whole, border = listed(radius, tiling)
    tiles = {"text": text, "whole": whole, "border": border}
    if not kernel.overlapped:
        return Visits(tiles, 1 / kernel.groups)
    together = replace(tiling, columns=kernel.groups * tiling.columns)
    copied = text + sum(listed(radius, together))
    return Visits(tiles, copied / (sum(tiles.values()) * kernel.groups))


def image_seconds(kernel: Kernel, visits: Visits, dependent_loads: int) -> float:
    """Of the image queries of all heads."""
    cost = Cost(0, 0, 0, 0, 0)
    for name, count in visits.tiles.items():
        cost += cost_of(kernel.loops[name], visits.copied).times(count)
    tiles = math.prod(GRID) / ROWS * HEADS / MULTIPROCESSORS
    cycles = tiles * cycles_of(cost, kernel.customers, dependent_loads * LATENCY)
    moved = 4 * math.prod(GRID) * HEADS * HEAD_DIM * ELEMENT_SIZE
    return max(cycles / CLOCK, moved / HBM)


def text_seconds(kernel: Kernel, rows: int) -> tuple[float, float]:
    """Of the text queries of all heads, and of the merge of the parts of their keys.

    rows: queries of a program.
    """
    from clear_dit.kernels.triton.device import PROGRAMS_PER_MULTIPROCESSOR
    from clear_dit.kernels.triton.launch import MOST_SPLITS

    owners = math.ceil(TEXT_LENGTH / rows) * HEADS
    wanted = PROGRAMS_PER_MULTIPROCESSOR * MULTIPROCESSORS
    splits = min(MOST_SPLITS, math.ceil(wanted / owners))
    programs = owners * splits
    rounds = math.ceil(programs / (MULTIPROCESSORS * kernel.programs)) * kernel.programs
    tiles = (TEXT_LENGTH + math.prod(GRID)) / KEYS / splits
    cost = cost_of(kernel.loops["text"], 1 / kernel.groups).times(tiles)
    cycles = rounds * kernel.groups * cycles_of(cost, kernel.customers, LATENCY)
    parts = 2 * splits * TEXT_LENGTH * HEADS * HEAD_DIM * 4  # written and read
    return cycles / CLOCK, parts / HBM


def useful_flop(radius: int) -> float:
    """Of what is asked for: four for each channel of a pair of a query and a key that it sees."""
    from clear_dit.kernels.window import Window

    window = Window(*GRID, TEXT_LENGTH, radius)
    text = TEXT_LENGTH * (TEXT_LENGTH + 2 * math.prod(GRID))
    return 4 * HEAD_DIM * HEADS * (window.disc_pairs() + text)


def named_loops(loops: list[dict[str, Any]], overlapped: bool) -> dict[str, dict[str, Any]]:
    """The loops with products of a kernel without pooled keys and what is left of a run.

    Text, whole tiles and border tiles. Gluon has code for each group, and one loop for all tiles of
    the image, whose mask is skipped in whole tiles but counted here.
    """
    found = [loop for loop in loops if loop["products"]]
    if overlapped:
        found = found[: len(found) // CONSUMERS]
        found += found[1:]
    assert len(found) == 3, f"{len(found)} loops with products"
    return dict(zip(("text", "whole", "border"), found, strict=True))


def compiled(label: str, run: Any) -> tuple[Any, dict[str, Any]]:
    """The first kernel of a launch, and what it needs."""
    from clear_dit.kernels.triton.compile import compile_only, usage

    with compile_only("sm_90") as kernels:
        run()
    return kernels[0], asdict(usage(kernels[0]))


def predict(entries: dict[str, Any], dependent_loads: int) -> list[dict[str, Any]]:
    """A row for each entry and radius.

    entries: what `launches` compiles, by its label; "text" and entries of the tables.
    """
    from clear_dit.kernels.triton import tables

    kernel, used = entries["text"]
    config = tables.text_config("sm_90", HEAD_DIM, ELEMENT_SIZE)
    text = Kernel(
        "text", {"text": used["loops"][0]}, config.num_warps // 4,
        programs_of(used["registers"], used["shared"], kernel.metadata.num_warps),
    )  # fmt: skip
    text_s, merge_s = text_seconds(text, config.block)
    rows = []
    for entry in tables.forward_configs("sm_90", HEAD_DIM, ELEMENT_SIZE):
        kernel, used = entries[entry.name]
        tiling, overlapped = entry.tiling, entry.name.startswith("gluon-")
        image = Kernel(
            entry.name, named_loops(used["loops"], overlapped),
            CONSUMERS if overlapped else tiling.rows * tiling.columns // ROWS,
            programs_of(used["registers"], used["shared"], kernel.metadata.num_warps), overlapped,
        )  # fmt: skip
        for radius in RADII:
            visits = visits_of(image, radius, tiling)
            image_s = image_seconds(image, visits, dependent_loads)
            costs = {name: cost_of(loop, visits.copied) for name, loop in image.loops.items()}
            total = image_s + text_s + merge_s
            rows.append({
                "entry": entry.name, "radius": radius, "programs": image.programs,
                "groups": image.groups, "overlapped": image.overlapped,
                "registers": used["registers"], "shared": used["shared"],
                "tiles": visits.tiles, "copied": visits.copied,
                "cycles": {name: asdict(cost) for name, cost in costs.items()},
                "bound": {name: cost.bound for name, cost in costs.items()},
                "image_ms": image_s * 1e3, "text_ms": text_s * 1e3, "merge_ms": merge_s * 1e3,
                "ms": total * 1e3, "tflops": useful_flop(radius) / total / 1e12, "measured": None,
            })  # fmt: skip
    return rows


def keep_measured(rows: list[dict], path: Path) -> None:
    """Put in what was measured of the same entries and radii."""
    if path.exists():
        before = json.loads(path.read_text())["rows"]
        measured = {(row["entry"], row["radius"]): row["measured"] for row in before}
        for row in rows:
            row["measured"] = measured.get((row["entry"], row["radius"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON to write; what was measured is kept")
    parser.add_argument(
        "--dependent-loads", type=int, default=DEPENDENT_LOADS,
        help="of a program of image queries, one after the other",
    )  # fmt: skip
    options = parser.parse_args()
    # Triton decides at its import whether it interprets.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    from clear_dit.kernels.triton import tables
    from clear_dit.tables import table

    names = {entry.name for entry in tables.forward_configs("sm_90", HEAD_DIM, ELEMENT_SIZE)}
    entries = {
        label: compiled(label, run)
        for label, run in launches("sm_90", "bfloat16", HEAD_DIM)
        if label in names | {"text"}
    }
    rows = predict(entries, options.dependent_loads)
    if options.out is not None:
        keep_measured(rows, options.out)
    print(
        table([
            {name: row[name] for name in ("entry", "radius", "programs")}
            | {name: " ".join(f"{n:.1f}" for n in row[name].values()) for name in ("tiles",)}
            | {
                name: f"{max(cost.values()):.0f} {row['bound'][name]}"
                for name, cost in row["cycles"].items()
            }
            | {name: round(row[name], 2) for name in ("image_ms", "text_ms", "ms")}
            | {"tflops": round(row["tflops"]), "measured": row["measured"]}
            for row in rows
        ])
    )  # fmt: skip
    result = {
        "triton": triton.__version__, "device": "H200, predicted", "clock": CLOCK, "l2": L2,
        "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
