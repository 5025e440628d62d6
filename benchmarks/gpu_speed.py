"""Attention, FLUX blocks, and norm with rotation, timed: parts two to four of gpu.py.

Each part yields rows as they are measured, the important ones first; whoever runs it stops when
the time is up. A row that could not be measured has `problem` instead of numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from clear_dit import CLEARProcessor
from clear_dit.attention import norm_rope as fused_or_not
from clear_dit.bench.attention import TOLERANCE, Problem, bench_attention
from clear_dit.bench.published import FLUX_TRANSFORMER
from clear_dit.bench.step import TOLERANCE as STEP_TOLERANCE
from clear_dit.bench.timing import time_in_turn
from clear_dit.generation.models import TOKEN_PIXELS
from clear_dit.kernels.triton import tables, tuning
from clear_dit.kernels.triton.launch import table_key
from clear_dit.kernels.window import Window
from clear_dit.memory import peak_mb, reset_peak

CUDNN, FLASH, RASTER, TILED = "sdpa-cudnn", "sdpa-flash", "flex", "flex-tiled"
# Processes that compile side by side; each may hold a layer of 8192 px, forward and backward.
COMPILERS = 5


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        sizes: sides of square images, in pixels.
        radii: in tokens.
        impl: the implementation of CLEAR under test.
        dense, peers: names of `bench.peers`: full attention, and the rest.
        transformer: configuration of the model whose blocks are timed.
        layers: (double, single) blocks of the whole model, for the extrapolated step.
        repeats: timed runs of a cell; where one takes seconds, one is enough.
    """

    sizes: tuple[int, ...]
    radii: tuple[int, ...]
    text_length: int
    dtype: torch.dtype
    device: torch.device
    impl: str
    dense: tuple[str, ...]
    peers: tuple[str, ...]
    transformer: dict[str, Any]
    layers: tuple[int, int]
    repeats: int

    def window(self, size: int, radius: int) -> Window:
        """Of a square image of `size` pixels."""
        side = size // TOKEN_PIXELS
        return Window(side, side, self.text_length, radius)


# FLUX.1-dev's layer and blocks.
FULL = partial(
    Setting,
    sizes=(1024, 2048, 4096, 8192),
    radii=(8, 16, 32),
    text_length=512,
    dtype=torch.bfloat16,
    impl="triton",
    dense=(CUDNN, FLASH),
    peers=(RASTER, TILED),
    transformer=FLUX_TRANSFORMER | {"guidance_embeds": True},
    layers=(19, 38),
    repeats=5,
)
# The same code paths on a CPU, in seconds.
SMOKE = partial(
    Setting,
    sizes=(32, 64),
    radii=(2, 3),
    text_length=4,
    dtype=torch.float32,
    impl="tiled",
    dense=("sdpa",),
    peers=("reference",),
    transformer=FLUX_TRANSFORMER
    | {
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
    },
    layers=(19, 38),
    repeats=1,
)


@dataclass(frozen=True)
class Cell:
    """One layer to time: an implementation, perhaps with a pinned entry of the tables."""

    impl: str
    size: int
    radius: int
    backward: bool
    entry: str | None = None


def attention_cells(setting: Setting, failed: set[str]) -> list[Cell]:
    """In order of importance; entries whose check failed are left out."""
    sizes = setting.sizes[::-1]
    grid = [(size, radius) for size in sizes for radius in setting.radii]
    cells = [Cell(setting.impl, size, radius, True) for size, radius in grid]
    # Full attention knows no radius.
    cells += [Cell(impl, size, setting.radii[0], True) for impl in setting.dense for size in sizes]
    cells += [Cell(impl, size, radius, False) for impl in setting.peers for size, radius in grid]
    if setting.impl == "triton":
        head_dim = setting.transformer["attention_head_dim"]
        key = table_key(setting.device, setting.dtype, head_dim)
        for entry in tables.forward_configs(*key):
            if f"forward {entry.name}" not in failed:
                cells += [
                    Cell(setting.impl, size, radius, False, entry.name) for size, radius in grid
                ]
    cells += [Cell(impl, size, radius, True) for impl in setting.peers for size, radius in grid]
    return cells


@contextmanager
def _pinned(entry: str | None) -> Iterator[None]:
    """The tables' entry that runs, by name."""
    before = os.environ.pop(tuning.PIN, None)
    if entry is not None:
        os.environ[tuning.PIN] = entry
    try:
        yield
    finally:
        os.environ.pop(tuning.PIN, None)
        if before is not None:
            os.environ[tuning.PIN] = before


def measure(cell: Cell, setting: Setting, repeats: int) -> dict[str, Any]:
    """A row of one cell: that of `bench_attention`, and `dense_tflops` of full attention."""
    config = setting.transformer
    problem = Problem(
        setting.window(cell.size, cell.radius),
        config["num_attention_heads"],
        config["attention_head_dim"],
        setting.dtype,
        setting.device,
    )
    row: dict[str, Any] = {
        "impl": cell.impl,
        "entry": cell.entry,
        "size": cell.size,
        "radius": None if cell.impl in setting.dense else cell.radius,
    }
    try:
        with _pinned(cell.entry):
            result = bench_attention(problem, [cell.impl], repeats, cell.backward)
    except Exception as error:  # of PyTorch, its compiler or Triton: the others go on
        return row | {"problem": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    (found,) = result["rows"]
    row |= found
    if row["ms"] is None:
        row["problem"] = "wrong"
    elif cell.impl in setting.dense:
        flops = 4 * problem.window.sequence_length**2 * problem.heads * problem.head_dim
        row |= {"useful_tflops": None, "dense_tflops": flops / row["ms"] / 1e9}
    return row


def _compile(cell: Cell, setting: Setting) -> None:
    measure(cell, setting, 1)


def compile_ahead(cells: list[Cell], setting: Setting, deadline: float) -> None:
    """Run cells once in processes of their own: Triton and PyTorch keep what they compile on disk.

    Args:
        deadline: of `time.monotonic`.
    """
    run = partial(_compile, setting=setting)
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        done = pool.map_async(run, cells, chunksize=1)
        done.wait(max(0.0, deadline - time.monotonic()))


def attention(setting: Setting, failed: set[str], deadline: float) -> Iterator[dict[str, Any]]:
    """Part two: one attention layer, forward and backward."""
    cells = attention_cells(setting, failed)
    if setting.device.type == "cuda":
        # A third of the time at most, and what will be measured first is compiled first. Ours
        # compiles for no radius in particular.
        until = time.monotonic() + (deadline - time.monotonic()) / 3
        first = setting.radii[0]
        worth = [
            c
            for c in cells
            if c.impl in setting.peers or (c.impl, c.radius) == (setting.impl, first)
        ]
        compile_ahead(worth, setting, until)
    for cell in cells:
        long = cell.impl in setting.dense and cell.size == setting.sizes[-1]
        yield measure(cell, setting, 1 if long else setting.repeats)


@contextmanager
def _fused(on: bool, device: torch.device) -> Iterator[None]:
    """Whether the processor may norm and rotate by the fused kernel."""
    before = fused_or_not.FUSED_DEVICES
    fused_or_not.FUSED_DEVICES = (device.type if on else "none",)
    try:
        yield
    finally:
        fused_or_not.FUSED_DEVICES = before


class Blocks:
    """One double and one single block with random weights, and inputs of one image."""

    def __init__(self, setting: Setting) -> None:
        config = setting.transformer | {"num_layers": 1, "num_single_layers": 1}
        torch.manual_seed(0)
        with torch.device(setting.device):
            self.model = FluxTransformer2DModel.from_config(config).to(setting.dtype).eval()
        self.setting = setting
        self.stock = self.model.attn_processors

    def inputs(self, window: Window) -> dict[str, Any]:
        """Arguments of both blocks; the rotary tables are the model's own."""
        width, device = self.model.inner_dim, self.setting.device
        ids = torch.zeros(window.sequence_length, 3, device=device)
        token = torch.arange(window.image_length, device=device)
        ids[window.text_length :, 1] = token // window.width
        ids[window.text_length :, 2] = token % window.width
        image, text, time_embedding = (
            torch.randn(*shape, width, device=device).to(self.setting.dtype)
            for shape in ((1, window.image_length), (1, window.text_length), (1,))
        )
        return {
            "hidden_states": image,
            "encoder_hidden_states": text,
            "temb": time_embedding,
            "image_rotary_emb": self.model.pos_embed(ids),
        }

    def attend(self, radius: int | None) -> None:
        """Full attention by diffusers where `radius` is None, else CLEAR."""
        if radius is None:
            self.model.set_attn_processor(dict(self.stock))
        else:
            self.model.set_attn_processor(CLEARProcessor(radius, impl=self.setting.impl, far=False))

    def run(self, block: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, image) after a block, "double" or "single"."""
        blocks = {
            "double": self.model.transformer_blocks,
            "single": self.model.single_transformer_blocks,
        }
        with torch.no_grad():
            return blocks[block][0](**inputs)

    def error(self, fused: bool) -> float:
        """Largest relative error of CLEAR past the diagonal to full attention, on a small grid."""
        inputs = self.inputs(Window(8, 12, self.setting.text_length, 20))
        errors = []
        with _fused(fused, self.setting.device):
            for block in ("double", "single"):
                self.attend(None)
                full = self.run(block, inputs)
                self.attend(20)
                for ours, theirs in zip(self.run(block, inputs), full, strict=True):
                    errors.append((ours - theirs).float().norm() / theirs.float().norm())
        return float(torch.stack(errors).max())


def blocks(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part three: milliseconds of a double and a single block, and of a step of the whole model."""
    both = Blocks(setting)
    for fused in (True, False):
        error = both.error(fused)
        row = {"check": "past the diagonal", "fused": fused, "error": error}
        if not error <= STEP_TOLERANCE[setting.dtype]:
            yield row | {"problem": "wrong"}
            return
        yield row
    # Full attention, CLEAR, and one CLEAR step by step, at every size from the smallest.
    variants = [(None, True), *((radius, True) for radius in setting.radii)]
    variants.append((setting.radii[0], False))
    for size in setting.sizes:
        for radius, fused in variants:
            yield _block_row(both, size, radius, fused)


def _block_row(both: Blocks, size: int, radius: int | None, fused: bool) -> dict[str, Any]:
    setting = both.setting
    row: dict[str, Any] = {"size": size, "radius": radius, "fused": fused}
    if radius is None:
        row["fused"] = None
    inputs = both.inputs(setting.window(size, radius or 1))
    long = radius is None and size == setting.sizes[-1]
    try:
        both.attend(radius)
        with _fused(fused, setting.device):
            for block in ("double", "single"):
                run = partial(both.run, block, inputs)
                run()
                reset_peak(setting.device)
                repeats = 1 if long else setting.repeats
                row[f"{block}_ms"] = (
                    time_in_turn({block: run}, repeats, setting.device)[block] * 1e3
                )
                row[f"{block}_peak_mb"] = peak_mb(setting.device)
    except Exception as error:  # of PyTorch, its compiler or Triton: the others go on
        return row | {"problem": f"{type(error).__name__}: {error}"[:300]}
    double, single = setting.layers
    row["step_s"] = (double * row["double_ms"] + single * row["single_ms"]) / 1e3
    return row


def norm_rope(setting: Setting) -> Iterator[dict[str, Any]]:
    """Part four: query or key of a double block, normed, joined and rotated."""
    config, device = setting.transformer, setting.device
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    norms = [torch.nn.RMSNorm(head_dim, 1e-6, device=device, dtype=setting.dtype) for _ in range(2)]
    for size in setting.sizes:
        window = setting.window(size, 1)
        image, text = (
            torch.randn(1, length, heads, head_dim, device=device).to(setting.dtype)
            for length in (window.image_length, window.text_length)
        )
        angles = torch.rand(window.sequence_length, head_dim // 2, device=device)
        tables_of = [f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin)]
        rotary = (tables_of[0], tables_of[1])

        def run(on: bool, image=image, text=text, rotary=rotary) -> torch.Tensor:
            with _fused(on, device), torch.no_grad():
                return fused_or_not.norm_and_rotate(image, norms[0], rotary, text, norms[1])

        fused, stock = run(True).float(), run(False).float()
        error = float((fused - stock).norm() / stock.norm())
        row = {"size": size, "error": error}
        if not error <= TOLERANCE[setting.dtype]:
            yield row | {"problem": "wrong"}
            continue
        del fused, stock
        runs = {"fused": partial(run, True), "stock": partial(run, False)}
        seconds = time_in_turn(runs, setting.repeats, device)
        # Tokens read and written once, and the rotary tables read.
        moved = 2 * window.sequence_length * heads * head_dim * setting.dtype.itemsize
        moved += 2 * window.sequence_length * head_dim * 4
        for name, time_taken in seconds.items():
            row |= {f"{name}_ms": time_taken * 1e3, f"{name}_gb_s": moved / time_taken / 1e9}
        yield row


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches at best: GB/s of a copy, TFLOP/s of a bfloat16 product."""
    side = 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = time_in_turn(runs, 5, device)
    return {
        "copy_gb_s": 2 * source.nbytes / seconds["copy"] / 1e9,
        "bf16_product_tflops": 2 * side**3 / seconds["product"] / 1e12,
    }
