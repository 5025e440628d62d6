"""What Triton's releases name differently: 3.6 and 3.9 as one."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    load_tile = tma.async_load
    partition_barrier = gl.barrier

    @gluon.jit
    def view(buffer, descriptor):
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer.reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)

else:
    load_tile = tma.async_copy_global_to_shared
    partition_barrier = gl.thread_barrier

    @gluon.jit
    def view(buffer, descriptor):
        """Shared memory by the shape and layout that a tensor descriptor writes."""
        return buffer._reinterpret(buffer.dtype, descriptor.block_shape, descriptor.layout)
