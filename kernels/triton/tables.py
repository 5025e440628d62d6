"""Tile shapes, warps and stages per architecture: data, and what picks among them.

Chosen by what the compiler says of them (benchmarks/results/triton-compile.json: registers, spills,
shared memory) and by the work beyond the window's that they do (`executed_keys`), not by a clock.
The first of a list is the default; the first three are measured on a GPU (tuning.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from .geometry import Tiling

# Shared memory a program may have, bytes: CUDA C++ programming guide, table of compute
# capabilities; AMD CDNA 3 and 4 instruction sets, local data share.
SHARED_MEMORY = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_120": 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip


@dataclass(frozen=True)
class ForwardConfig:
    """Of the image queries' kernel.

    Attributes:
        tiling: query tile and key tile, in tokens.
        dense_keys: text or pooled keys of a step.
        num_warps, num_stages: of a program and of its loops.
        descriptor: image keys come by tensor descriptor (TMA) where strides allow.
        far_keys: listed keys of a step; where they are fewer than those of a tile, more would
            spill.
    """

    tiling: Tiling
    dense_keys: int
    num_warps: int
    num_stages: int
    descriptor: bool = False
    far_keys: int = 32

    @property
    def name(self) -> str:
        """For the pin and for reports, such as q8x8-k8x8-d64-w4-s3-tma."""
        tile = self.tiling
        return (
            f"q{tile.rows}x{tile.columns}-k{tile.step_rows}x{tile.step_columns}"
            f"-d{self.dense_keys}-w{self.num_warps}-s{self.num_stages}" + "-tma" * self.descriptor
        )

    def shared_memory(self, channels: int, element_size: int) -> int:
        """Bytes of shared memory, about: the queries, and keys and values of every stage."""
        tile = self.tiling
        keys = max(self.dense_keys, tile.step_rows * tile.step_columns)
        queries = tile.rows * tile.columns
        return (queries + 2 * self.num_stages * keys) * channels * element_size


@dataclass(frozen=True)
class GluonConfig:
    """Of the image queries' kernel in Gluon, for Hopper, whose shapes are its own.

    It takes what `ForwardConfig`'s takes but far keys, which are gathered one by one.

    Attributes:
        num_stages: tiles of keys and values in shared memory.
    """

    num_stages: int

    @property
    def tiling(self) -> Tiling:
        """Of one group of warps: two of them side by side share a program and what it loads."""
        return _SQUARE

    @property
    def dense_keys(self) -> int:
        """Text or pooled keys of a step."""
        return 64

    @property
    def descriptor(self) -> bool:
        """Keys come by tensor descriptor."""
        return True

    @property
    def name(self) -> str:
        """For the pin and for reports: gluon-q8x16-k8x8-s6."""
        tile = self.tiling
        return (
            f"gluon-q{tile.rows}x{2 * tile.columns}-k{tile.step_rows}x{tile.step_columns}"
            f"-s{self.num_stages}"
        )

    def shared_memory(self, channels: int, element_size: int) -> int:
        """Bytes of shared memory, about: the queries, and keys and values of every stage."""
        tile = self.tiling
        keys, queries = tile.step_rows * tile.step_columns, 2 * tile.rows * tile.columns
        return (queries + 2 * self.num_stages * keys) * channels * element_size


AnyForwardConfig = ForwardConfig | GluonConfig


@dataclass(frozen=True)
class TileConfig:
    """Of a kernel of gradients whose programs own tiles of the image; see `ForwardConfig`."""

    tiling: Tiling
    num_warps: int
    num_stages: int
    descriptor: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Of a kernel whose programs own `block` tokens and visit runs of `step` tokens.

    descriptor: of the text queries' kernel, see `ForwardConfig`.
    """

    block: int
    step: int
    num_warps: int
    num_stages: int
    descriptor: bool = False


@dataclass(frozen=True)
class BackwardConfig:
    """Of the kernels of gradients.

    Attributes:
        query: of image queries.
        key: of image keys and values.
        far_query: of image queries with far keys; a step is as many listed keys as its tile has.
        far_key: of tokens and cells, which own tiles of one level, with far keys.
        text_query: of text queries.
        common_key: of text and pooled keys and values.
    """

    query: TileConfig
    key: TileConfig
    far_query: TileConfig
    far_key: TileConfig
    text_query: RunConfig
    common_key: RunConfig


_SQUARE, _WIDE, _WIDE_HALF = Tiling(8, 8, 8, 8), Tiling(8, 16, 8, 8), Tiling(8, 16, 4, 8)
_HALF, _QUARTER, _TINY = Tiling(8, 8, 4, 8), Tiling(4, 8, 4, 8), Tiling(4, 4, 4, 4)

# Where a multiprocessor has 100 KB: two programs of the first entry share one, and the softmax of
# either hides behind the other's products.
_SHARING = (
    ForwardConfig(_HALF, 32, 4, 2),
    ForwardConfig(_SQUARE, 64, 4, 2, far_keys=16),
    ForwardConfig(_WIDE, 64, 8, 2),
)
_CDNA = (ForwardConfig(_SQUARE, 64, 4, 1), ForwardConfig(_WIDE, 64, 8, 1))

# float16 and bfloat16, head_dim to 128.
FORWARD: dict[str, tuple[ForwardConfig, ...]] = {
    "sm_80": (ForwardConfig(_SQUARE, 64, 4, 2), ForwardConfig(_WIDE, 64, 8, 2)),
    "sm_86": _SHARING,
    "sm_89": _SHARING,
    "sm_90": (
        ForwardConfig(_SQUARE, 64, 4, 3, descriptor=True, far_keys=64),
        ForwardConfig(_WIDE, 64, 8, 2, descriptor=True),
        ForwardConfig(_SQUARE, 64, 4, 2, far_keys=64),
    ),
    "sm_100": (
        ForwardConfig(_SQUARE, 64, 4, 2, descriptor=True),
        ForwardConfig(_WIDE, 64, 8, 2, descriptor=True),
        ForwardConfig(_SQUARE, 64, 4, 2),
    ),
    "sm_120": _SHARING,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
# float16 and bfloat16, head_dim of 40 to 128, no far keys; after the default of FORWARD. From
# Triton 3.6 on: before, Gluon had other names.
GLUON = {"sm_90": (GluonConfig(6),)}
TEXT = {
    "sm_80": RunConfig(64, 32, 4, 2),
    "sm_86": RunConfig(64, 32, 4, 2),
    "sm_89": RunConfig(64, 32, 4, 2),
    "sm_90": RunConfig(128, 64, 8, 3, descriptor=True),
    "sm_100": RunConfig(128, 64, 8, 3),
    "sm_120": RunConfig(64, 32, 4, 2),
    "gfx942": RunConfig(128, 64, 8, 1),
    "gfx950": RunConfig(128, 64, 8, 1),
}
_LONG = RunConfig(128, 64, 8, 2)
# Where a whole multiprocessor has 99 KB: one program of 8 warps.
_SINGLE = TileConfig(_SQUARE, 8, 2)
_ADA_BACKWARD = BackwardConfig(
    _SINGLE, _SINGLE, _SINGLE, _SINGLE, RunConfig(64, 32, 4, 2), RunConfig(128, 32, 8, 2)
)
_CDNA_BACKWARD = BackwardConfig(
    TileConfig(_SQUARE, 4, 1), TileConfig(_HALF, 4, 1),
    TileConfig(_SQUARE, 4, 1), TileConfig(_HALF, 4, 1),
    RunConfig(64, 64, 4, 1), RunConfig(64, 32, 4, 1),
)  # fmt: skip
BACKWARD = {
    "sm_80": BackwardConfig(
        TileConfig(_SQUARE, 4, 2), TileConfig(_HALF, 4, 2),
        TileConfig(_SQUARE, 4, 2), _SINGLE,
        RunConfig(64, 64, 4, 2), _LONG,
    ),
    "sm_86": _ADA_BACKWARD,
    "sm_89": _ADA_BACKWARD,
    "sm_90": BackwardConfig(
        TileConfig(_SQUARE, 4, 2, True), TileConfig(_HALF, 4, 2, True),
        TileConfig(_HALF, 4, 2), TileConfig(_HALF, 4, 2), _LONG, _LONG,
    ),
    "sm_100": BackwardConfig(
        TileConfig(_WIDE, 8, 2, True), TileConfig(_WIDE, 8, 2, True),
        TileConfig(_WIDE_HALF, 8, 2), TileConfig(_WIDE, 8, 2), _LONG, _LONG,
    ),
    "sm_120": BackwardConfig(
        _SINGLE, _SINGLE, _SINGLE, TileConfig(_HALF, 8, 2),
        RunConfig(64, 32, 4, 2), RunConfig(64, 32, 4, 2),
    ),
    "gfx942": _CDNA_BACKWARD,
    "gfx950": _CDNA_BACKWARD,
}  # fmt: skip

# float16 and bfloat16, head_dim above 128.
WIDE_FORWARD = (ForwardConfig(_HALF, 32, 4, 1),)
WIDE_FAR_FORWARD = (ForwardConfig(_HALF, 32, 8, 1, far_keys=16),)
WIDE_TEXT = RunConfig(64, 32, 4, 1)
_WIDE_TILE, _WIDE_RUN = TileConfig(_QUARTER, 4, 1), RunConfig(32, 32, 4, 1)
WIDE_BACKWARD = BackwardConfig(
    _WIDE_TILE, _WIDE_TILE, _WIDE_TILE, TileConfig(_QUARTER, 8, 1), _WIDE_RUN, _WIDE_RUN
)

# float32: no tensor cores, for its products are not rounded; larger tiles spill.
FLOAT32_FORWARD = (ForwardConfig(_TINY, 16, 4, 1, far_keys=16),)
FLOAT32_TEXT = RunConfig(16, 16, 4, 1)
_TINY_TILE, _TINY_RUN = TileConfig(_TINY, 4, 1), RunConfig(16, 16, 4, 1)
FLOAT32_BACKWARD = BackwardConfig(
    _TINY_TILE, _TINY_TILE, _TINY_TILE, _TINY_TILE, _TINY_RUN, _TINY_RUN
)


# Below, `channels` is head_dim rounded up to a power of two, `element_size` the bytes of a number.


@functools.cache
def forward_configs(
    architecture: str, channels: int, element_size: int, far: bool = False
) -> tuple[AnyForwardConfig, ...]:
    """Entries for the image queries' kernel that fit into shared memory, the default first.

    far: with far keys, which are gathered by pointers: one entry for each shape of tiles.
    """
    wide = WIDE_FAR_FORWARD if far else WIDE_FORWARD
    entries: tuple[AnyForwardConfig, ...] = FORWARD[architecture] if channels <= 128 else wide
    if element_size == 4:
        entries = FLOAT32_FORWARD
    elif 64 <= channels <= 128 and not far and _triton() >= (3, 6):
        entries = (*entries[:1], *GLUON.get(architecture, ()), *entries[1:])
    if far:
        firsts: dict[Tiling, AnyForwardConfig] = {}
        for entry in entries:
            firsts.setdefault(entry.tiling, entry)
        entries = tuple(firsts.values())
    limit = SHARED_MEMORY[architecture]
    kept = tuple(entry for entry in entries if entry.shared_memory(channels, element_size) <= limit)
    assert kept, f"no entry of {architecture} fits {channels} channels of {element_size} bytes"
    return kept


def _triton() -> tuple[int, ...]:
    """The version of Triton; (0,) without it, where the tables only serve to count."""
    try:
        from triton import __version__
    except ImportError:
        return (0,)
    return tuple(map(int, __version__.split(".")[:2]))


def text_config(architecture: str, channels: int, element_size: int) -> RunConfig:
    """Shape of the text queries' kernel."""
    if element_size == 4:
        return FLOAT32_TEXT
    return TEXT[architecture] if channels <= 128 else WIDE_TEXT


def backward_config(architecture: str, channels: int, element_size: int) -> BackwardConfig:
    """Shapes of the gradients' kernels."""
    if element_size == 4:
        return FLOAT32_BACKWARD
    if channels > 128:
        return WIDE_BACKWARD
    if architecture in ("sm_86", "sm_89", "sm_120") and channels < 128:
        # 8 warps would do the same rows twice; larger steps of the cells' gradients spill there.
        few = replace(BACKWARD["sm_80"], far_key=TileConfig(_HALF, 8, 2))
        if architecture == "sm_120":
            few = replace(few, query=TileConfig(_HALF, 4, 2), far_query=TileConfig(_HALF, 4, 2))
        return few
    return BACKWARD[architecture]
