"""What is measured: FLUX.1-dev's attention layer on a GPU, or the same code on tiny problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clear_dit.bench.attention import Problem
from clear_dit.bench.published import FLUX_TRANSFORMER
from clear_dit.generation.models import TOKEN_PIXELS
from clear_dit.kernels.cells import FAR_LEVELS
from clear_dit.kernels.window import Window


@dataclass(frozen=True)
class Task:
    """A piece of a part: lost alone if it crashes, and not done twice.

    Attributes:
        run: yields rows; one that is not right has `problem` and no times, one that was not tried
            has `skipped`, and says why.
        alone: it may hang, or write where it should not: in a process that does nothing else, and
            where one of its kind is lost with its process, the others are not tried.
    """

    label: str
    run: Callable[[], Iterator[dict[str, Any]]]
    alone: bool = False


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        folder: of the results, those of other parts among them.
        sizes: sides of square images, in pixels; the last is that of production.
        radii, far_radii: in tokens, without far keys and with them.
        replayed: sizes where the host bounds the time.
        impl: the implementation of CLEAR beside its peers.
        dense, peers: names of `bench.peers`: full attention, and the rest.
        transformer: configuration of the model whose blocks are timed.
        layers: (double, single) blocks of the whole model, for the extrapolated step.
        repeats: timed runs; where one takes seconds, one is enough.
    """

    folder: Path
    sizes: tuple[int, ...]
    radii: tuple[int, ...]
    far_radii: tuple[int, ...]
    replayed: tuple[int, ...]
    text_length: int
    dtype: torch.dtype
    device: torch.device
    impl: str
    dense: tuple[str, ...]
    peers: tuple[str, ...]
    transformer: dict[str, Any]
    layers: tuple[int, int]
    repeats: int

    @property
    def heads(self) -> int:
        return self.transformer["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        return self.transformer["attention_head_dim"]

    def window(self, size: int, radius: int, far: bool = False) -> Window:
        """Of a square image of `size` pixels."""
        side = size // TOKEN_PIXELS
        levels = FAR_LEVELS if far else 0
        return Window(side, side, self.text_length, radius, far_levels=levels)

    def problem(self, window: Window) -> Problem:
        """A layer under a window."""
        return Problem(window, self.heads, self.head_dim, self.dtype, self.device)


# FLUX.1-dev's layer and blocks.
FULL = partial(
    Setting,
    sizes=(1024, 2048, 4096, 8192),
    radii=(8, 16, 32),
    far_radii=(4, 8),
    replayed=(1024, 2048),
    text_length=512,
    dtype=torch.bfloat16,
    device=torch.device("cuda"),
    impl="triton",
    dense=("sdpa-cudnn", "sdpa-flash"),
    peers=("flex-tiled", "flex", "flex-flash", "natten", "xformers"),
    transformer=FLUX_TRANSFORMER | {"guidance_embeds": True},
    layers=(19, 38),
    repeats=5,
)
# The same code paths in Triton's interpreter, in seconds.
SMOKE = partial(
    Setting,
    sizes=(32, 64),
    radii=(2, 3),
    far_radii=(2,),
    replayed=(32,),
    text_length=4,
    dtype=torch.float16,
    device=torch.device("cpu"),
    impl="tiled",
    dense=("sdpa",),
    peers=("reference", "natten"),
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
