"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter holds bfloat16 as its bits, in uint16. Of itself it cuts off where a cast must
round, and sums, products and comparisons take the bits for integers. `make_exact` mends it: a cast
up is exact, one down rounds to nearest even, and what is computed is computed in float32 and
rounded once.
"""

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# Loads, stores and what only moves values (reshape, where, ...) are right as they are.
COMPUTING = ("binary_op", "unary_op", "create_clampf", "create_fma", "create_dot")


def widen(bits):
    """float32 of the same value as bfloat16 `bits`, uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_nearest_even(x):
    """Bits of the bfloat16 nearest to float32, uint16; of two as near, the even one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def is_bfloat16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x):
    return TensorHandle(widen(x.data), tl.float32) if is_bfloat16(x) else x


def rounded(x):
    return TensorHandle(round_to_nearest_even(x.data), tl.bfloat16)


def in_float32(method):
    """The builder's method for bfloat16 too; its last tensor has the dtype of the result."""

    @wraps(method)
    def computed(self, *args):
        result = method(self, *map(widened, args))
        last = [x for x in args if isinstance(x, TensorHandle)][-1]
        is_truth = result.data.dtype == np.bool_
        return rounded(result) if is_bfloat16(last) and not is_truth else result

    return computed


def cast_through_float32(cast):
    """`InterpreterBuilder.cast_impl`, all casts but those that ask for another rounding."""

    @wraps(cast)
    def exact(self, x, dtype):
        if dtype.scalar == tl.bfloat16:
            return rounded(cast(self, widened(x), tl.float32))
        return cast(self, widened(x), dtype)

    return exact


def reduce_in_float32(apply):
    """`ReduceScanOpInterface.apply`: a sum is rounded once, where a GPU may do so at every step."""

    @wraps(apply)
    def exact(self, tensors):
        if not isinstance(tensors, tuple):
            return exact(self, (tensors,))[0]
        wide = tuple(x.to(tl.float32) if x.dtype == tl.bfloat16 else x for x in tensors)
        return tuple(y.to(x.dtype) for x, y in zip(tensors, apply(self, wide), strict=True))

    return exact


def make_exact():
    """Change the interpreter of this process."""
    for name in COMPUTING:
        setattr(InterpreterBuilder, name, in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = cast_through_float32(InterpreterBuilder.cast_impl)
    ReduceScanOpInterface.apply = reduce_in_float32(ReduceScanOpInterface.apply)
