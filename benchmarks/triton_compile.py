"""Compile the Triton kernels ahead of time for every architecture, and table what they need.

    python benchmarks/triton_compile.py --out benchmarks/results/triton-compile.json

No GPU is needed. What is compiled are the launches that `local_attention` and the processor make
for FLUX.1-dev at 8192 px, for every entry of kernels/triton/tables.py. "loops" are the instructions
of the innermost loops, in the order of the code: text, pooled keys, whole tiles, border tiles; what
is left of a run has a loop of its own. The JSON, which is the last line too, has them by class.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

HEADS, GRID, TEXT_LENGTH, RADIUS, LEVELS = 24, (512, 512), 512, 8, 9
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# What a table is asked for: dtype, head_dim.
KINDS = (("bfloat16", 128), ("bfloat16", 64), ("bfloat16", 256), ("float32", 128))


def launches(
    architecture: str, dtype: str, head_dim: int, group: int = 1
) -> Iterator[tuple[str, Callable]]:
    """(label, launch) of every table entry that serves a kind of problem, on meta tensors.

    group: heads that read the same key head.
    """
    import torch

    from clear_dit.kernels.cells import cell_count
    from clear_dit.kernels.opaque import Geometry
    from clear_dit.kernels.triton import launch, tables
    from clear_dit.kernels.triton.backward import attention_backward
    from clear_dit.kernels.triton.entry import attention_of
    from clear_dit.kernels.triton.far_backward import far_attention_backward
    from clear_dit.kernels.triton.norm_rope import run_backward, run_forward, streams
    from clear_dit.kernels.triton.pooling import pool_cells

    (height, width), scale, programs = GRID, head_dim**-0.5, 1056
    sequence = TEXT_LENGTH + height * width
    shape = (1, sequence, HEADS, head_dim)
    query, out, grad = (
        torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for _ in range(3)
    )
    key, value = (torch.empty_like(query[:, :, : HEADS // group]) for _ in range(2))
    lse = torch.empty(shape[:3], device="meta")
    none, pooled = key[:, :0], torch.empty_like(key[:, : height * width // 16])
    key_of_table = architecture, launch.channels(head_dim)["D"], query.element_size()
    geometry = Geometry(height, width, TEXT_LENGTH, RADIUS, scale, 0, height)
    no_bias = torch.empty(0, HEADS, device="meta")

    entries = tables.forward_configs(*key_of_table)
    for entry in entries:
        yield (
            entry.name,
            lambda entry=entry: attention_of(entry, far=False)(
                query, key, value, none, none, no_bias, out, lse, geometry, entry
            ),
        )
    for entry in entries:
        if entry is entries[0] or isinstance(entry, tables.GluonConfig):
            yield (
                f"{entry.name} pooled",
                lambda entry=entry: attention_of(entry, far=False)(
                    query, key, value, pooled, pooled, no_bias, out, lse, geometry, entry
                ),
            )
    cells = sum(cell_count(height, one) * cell_count(width, one) for one in range(1, LEVELS + 1))
    far, of_cells = geometry._replace(far_levels=LEVELS), (key[:, :cells].contiguous(),) * 2
    bias = torch.empty(cells, 1, device="meta").expand(-1, HEADS)
    for entry in tables.forward_configs(*key_of_table, far=True):
        yield (
            f"{entry.name} far",
            lambda entry=entry: launch.far_attention(
                query, key, value, *of_cells, bias, out, lse, far, entry
            ),
        )
    text = tables.text_config(*key_of_table)
    yield (
        "text",
        lambda: launch.text_attention(
            query, key, value, out, lse, TEXT_LENGTH, scale, text, programs
        ),
    )
    backward = tables.backward_config(*key_of_table)
    yield (
        "backward",
        lambda: attention_backward(
            grad, query, key, value, pooled, pooled, no_bias, out, lse, geometry,
            config=backward, programs=programs,
        ),
    )  # fmt: skip
    yield (
        "backward far",
        lambda: far_attention_backward(
            grad, query, key, value, *of_cells, bias, out, lse, far,
            config=backward, programs=programs,
        ),
    )  # fmt: skip
    learned = torch.empty(LEVELS, 2, 2, device="meta")
    images = key[:, TEXT_LENGTH:], value[:, TEXT_LENGTH:]
    yield "pooling", lambda: pool_cells(*images, learned[:0], height, width, LEVELS, scale)
    yield "pooling weighted", lambda: pool_cells(*images, learned, height, width, LEVELS, scale)
    weight, table = query[0, 0, 0], torch.empty(sequence, head_dim, device="meta")
    image, words = query[:, TEXT_LENGTH:], query[:, :TEXT_LENGTH]
    stream = streams(image, words, weight, weight, table, table, out)[0]
    yield "norm_rope", lambda: run_forward(stream, 1e-6)
    yield "norm_rope", lambda: run_backward(stream, 1e-6)


def compile_kind(
    architecture: str, dtype: str, head_dim: int, group: int = 1
) -> list[dict[str, Any]]:
    """Rows of one architecture and kind; `error` instead of figures where it does not compile."""
    from clear_dit.kernels.triton.compile import compile_only, usage
    from clear_dit.kernels.triton.tables import SHARED_MEMORY

    rows = []
    for label, run in launches(architecture, dtype, head_dim, group):
        about = {
            "architecture": architecture, "dtype": dtype, "head_dim": head_dim, "entry": label,
            "shared_limit": SHARED_MEMORY[architecture],
        }  # fmt: skip
        try:
            with compile_only(architecture) as kernels:
                run()
        except Exception as error:
            rows.append(about | {"error": f"{type(error).__name__}: {error}"[:1000]})
            continue
        rows += [about | asdict(usage(kernel)) for kernel in dict.fromkeys(kernels)]
    return rows


def compile_all(jobs: Sequence[tuple[str, str, int]], workers: int) -> list[dict[str, Any]]:
    """Rows of (architecture, dtype, head_dim), in processes of their own that do not interpret."""
    os.environ.pop("TRITON_INTERPRET", None)
    # Multiply-add in one instruction, as the launches ask for; unset, Triton warns.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [row for rows in pool.map(compile_kind, *zip(*jobs, strict=True)) for row in rows]


def main(
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
    architecture: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(ARCHITECTURES)}; repeatable.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Compile, print a table, and write it as JSON."""
    import triton

    from clear_dit.tables import table

    jobs = [(name, *kind) for name in architecture or ARCHITECTURES for kind in KINDS]
    rows = compile_all(jobs, workers)
    good = [row for row in rows if "error" not in row]
    shown = ("architecture", "dtype", "head_dim", "name", "entry", "registers", "loop_spills",
             "stack", "shared")  # fmt: skip
    print(
        table([
            {name: row[name] for name in shown}
            | {"loops": " ".join(str(loop["instructions"]) for loop in row["loops"])}
            for row in good
        ])
    )  # fmt: skip
    for row in rows:
        if "error" in row:
            print(f"{row['architecture']} {row['dtype']} {row['entry']}: {row['error']}")
    result = {"triton": triton.__version__, "rows": rows}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if len(good) < len(rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
