"""What Triton's releases name differently, 3.6 to 3.9 as one; and `jit` with its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# By its own annotation it may return a decorator.
jit: Callable[[Callable[..., Any]], Any] = gluon.jit

# Each name changed in a release of its own: 3.7 has the old loads and the new barrier.
load_tile: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
partition_barrier: Any = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @jit
    def _view(buffer, descriptor):
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer.reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)

else:

    @jit
    def _view(buffer, descriptor):
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer._reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)


view: Any = _view
