"""Which implementation of local attention runs, and why the faster ones cannot.

Importing this module also lets far keys be pooled by Triton and by the compiled CPU kernel, where
these can.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from .flex import flex_attention, why_not_flex
from .groups import group_of
from .pooling import pool_cells_by_operators, pool_cells_op
from .reference import reference_attention
from .tiled.bands import tiled_attention
from .tiled.native.pool import pool_cells as pool_cells_compiled
from .tiled.native.pool import why_not_pooled
from .triton.device import Kernel, NoEntryError, kernels_of, why_not_triton
from .window import Window

logger: logging.Logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "flex", "tiled", "reference")


def runs_everywhere(query: torch.Tensor, needs_grad: bool, return_lse: bool) -> str | None:
    """Never refuses: the tiled path and the oracle run on any device."""
    return None


def _triton_attention(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Imports Triton on the first call only: most machines without a GPU do not have it."""
    from .triton.ops import triton_attention

    return triton_attention(*args, **options)


_WHY_NOT: dict[str, Callable[[torch.Tensor, bool, bool], str | None]] = {
    "triton": why_not_triton,
    "flex": why_not_flex,
    "tiled": runs_everywhere,
    "reference": runs_everywhere,
}
_RUN: dict[str, Callable[..., tuple[torch.Tensor, Any]]] = {
    "triton": _triton_attention,
    "flex": flex_attention,
    "tiled": tiled_attention,
    "reference": reference_attention,
}


def preference(device_type: str) -> tuple[str, ...]:
    """Implementations in the order `impl="auto"` tries them on a device type, fastest first.

    On a CPU the tiled path is several times faster than compiled FlexAttention and also has a
    backward pass (`clear-dit bench attention` measures both).
    """
    if device_type == "cuda":
        return ("triton", "flex", "tiled", "reference")
    return ("triton", "tiled", "flex", "reference")


def why_not(
    impl: str, query: torch.Tensor, needs_grad: bool = False, return_lse: bool = False
) -> str | None:
    """Why `impl` cannot run on these inputs, in a few words; None if it can."""
    return _WHY_NOT[impl](query, needs_grad, return_lse)


def select_impl(
    impl: str,
    query: torch.Tensor,
    needs_grad: bool = False,
    return_lse: bool = False,
    kernels: tuple[str, ...] = (),
    but: tuple[str, ...] = (),
    group: int = 1,
) -> str:
    """The implementation that runs for a request.

    An explicit choice is checked and never replaced. "auto" takes the first of `preference` that
    can run and logs, once per choice and at INFO, why the faster ones cannot.

    Args:
        kernels: names of Triton's (triton/device.py `kernels_of`) that must be right on this
            device; each is looked at on its first use.
        but: implementations that "auto" does not take.
        group: query heads that read the same key head.

    Raises:
        ValueError: unknown `impl`, or an explicit one that cannot run here.
    """

    def cannot(name: str) -> str | None:
        reason = why_not(name, query, needs_grad, return_lse)
        if reason is None and name == "triton" and kernels:
            reason = why_not_trusted(query, kernels, group)
        return reason

    if impl not in IMPLS:
        raise ValueError(f"local_attention: impl must be one of {', '.join(IMPLS)}; got {impl!r}.")
    if impl != "auto":
        reason = cannot(impl)
        if reason is not None:
            raise ValueError(
                f"local_attention: impl={impl!r} cannot run here: it {reason}. "
                "Use impl='auto' or another one."
            )
        return impl
    refused: list[str] = []
    for name in preference(query.device.type):
        reason = "failed" if name in but else cannot(name)
        if reason is None:
            if not torch.compiler.is_compiling():  # a log call breaks the graph
                _announce(name, tuple(refused))
            return name
        refused.append(f"{name} {reason}")
    raise AssertionError("the reference implementation runs everywhere")


def run_chosen(
    impl: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    needs_grad: bool = False,
    return_lse: bool = False,
    **of_pooled: Any,
) -> tuple[torch.Tensor, Any]:
    """`local_attention` by the implementation that `select_impl` finds, on checked inputs.

    Args:
        of_pooled: spatial_weight, far_offset and pooled, as in `local_attention`.

    Returns:
        (out, lse); without `return_lse` the latter is not to be used.

    Raises:
        ValueError: see `select_impl`.
        NoEntryError: an explicit `impl` whose kernels fail on this device. "auto" goes on with the
            next implementation.
    """
    options = {"scale": scale, "return_lse": return_lse, **of_pooled}
    kernels = kernels_of(window.far_levels > 0, window.down_factor > 1, needs_grad)
    group = group_of(query, key)
    name = select_impl(impl, query, needs_grad, return_lse, kernels, group=group)
    try:
        return _RUN[name](query, key, value, window, **options)
    except NoEntryError:  # what failed was logged as a warning
        if impl != "auto":
            raise
    name = select_impl(impl, query, needs_grad, return_lse, but=("triton",))
    return _RUN[name](query, key, value, window, **options)


def why_not_trusted(query: torch.Tensor, kernels: tuple[str, ...], group: int = 1) -> str | None:
    """Why one of Triton's kernels may not be used for such queries; None if all may.

    What is traced for torch.compile has the answer of the time it was traced.

    Args:
        group: query heads that read the same key head.
    """
    # Plain numbers even where the compiler keeps sizes symbolic.
    head_dim, group = operator.index(query.shape[-1]), operator.index(group)
    return _why_not_trusted(query.device, query.dtype, head_dim, kernels, group)


@torch.compiler.assume_constant_result
def _why_not_trusted(
    device: torch.device, dtype: torch.dtype, head_dim: int, kernels: tuple[str, ...], group: int
) -> str | None:
    if device.type != "cuda":
        return None
    from .triton import trust

    reasons = (
        trust.why_not_trusted(Kernel(device, dtype, head_dim, name, group)) for name in kernels
    )
    return next((reason for reason in reasons if reason is not None), None)


@pool_cells_op.register_kernel("cuda")
def pool_cells_on_gpu(key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`pool_cells` in a few launches by Triton where it can run, else by PyTorch's operators."""
    kernel = Kernel(key.device, key.dtype, key.shape[-1], "pooling")
    refused = why_not_triton(key, needs_grad=False, return_lse=False)
    if refused is None and why_not_trusted(key, (kernel.name,)) is None:
        from .triton.failures import without_choice
        from .triton.pooling import pool_cells

        with suppress(NoEntryError), without_choice(kernel):  # logged as a warning
            return pool_cells(key, *others)
    return pool_cells_by_operators(key, *others)


@pool_cells_op.register_kernel("cpu")
def pool_cells_on_cpu(key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`pool_cells` by the compiled kernel where it can run, else by PyTorch's operators."""
    if why_not_pooled(key) is not None:
        return pool_cells_by_operators(key, *others)
    return pool_cells_compiled(key, *others)


@functools.cache
def _announce(impl: str, refused: tuple[str, ...]) -> None:
    logger.info("local attention runs on %r%s", impl, "".join(f"; {reason}" for reason in refused))
