"""What Triton's releases name differently, 3.6 and 3.9 as one; and `jit` with its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# By its own annotation it may return a decorator.
jit: Callable[[Callable[..., Any]], Any] = gluon.jit

if hasattr(tma, "async_load"):
    load_tile: Any = tma.async_load
    partition_barrier: Any = gl.barrier

    @jit
    def view(buffer: Any, descriptor: Any) -> Any:
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer.reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)

else:
    load_tile = tma.async_copy_global_to_shared
    partition_barrier = gl.thread_barrier

    @jit
    def view(buffer: Any, descriptor: Any) -> Any:
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer._reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)
