"""Telling what became of a tensor's values: whether they are the same, cast, or a LoRA was added.

All of it goes by values, not bits of storage: a bfloat16 number is the same in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

# Casts, one or two, that leave their rounding behind: of `model.to` and of layerwise casting.
_NARROW = (torch.bfloat16, torch.float16)
_STORED = (torch.float8_e4m3fn, torch.float8_e5m2)
CASTS: tuple[tuple[torch.dtype, ...], ...] = (
    (),
    *((dtype,) for dtype in (*_NARROW, *_STORED)),
    *((first, last) for first in _NARROW for last in (*_NARROW, *_STORED) if first != last),
)
# Where a difference between parameters can be told from rounding.
_MERGED_IN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OVERSAMPLING = 8
_MULTIPLIER = 6364136223846793005  # https://en.wikipedia.org/wiki/Linear_congruential_generator
# Of the norm: the rounding of merging and unmerging a dozen times.
_ROUNDING = 4


def fingerprint(tensor: torch.Tensor) -> int:
    """A number of 64 bits for values and their places, computed where the tensor is.

    One value that differs always changes it.
    """
    bits = _exact(tensor).flatten()
    bits = bits.view(torch.int64 if bits.dtype == torch.float64 else torch.int32).to(torch.int64)
    place = torch.arange(bits.numel(), device=bits.device)
    return int((bits * (place * _MULTIPLIER | 1)).sum())


def digest(fingerprints: Iterable[int]) -> str:
    """One short name for many fingerprints, in their order."""
    return hashlib.sha256(repr(list(fingerprints)).encode()).hexdigest()[:16]


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, wherever they are, hold equal numbers."""
    return torch.equal(_exact(one).cpu(), _exact(other).cpu())


def cast(tensor: torch.Tensor, dtypes: Iterable[torch.dtype]) -> torch.Tensor:
    """A tensor after casts, one after the other."""
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor


def casts_between(before: torch.Tensor, now: torch.Tensor) -> list[tuple[torch.dtype, ...]]:
    """Those of `CASTS` that make one tensor of the other, which has the same shape."""

    def makes(dtypes: Iterable[torch.dtype], rows: slice) -> bool:
        return same_values(cast(before[rows], (*dtypes, now.dtype)), now[rows])

    # Most that do not differ in the first row already.
    return [each for each in CASTS if makes(each, slice(1)) and makes(each, slice(None))]


def precision_of(tensor: torch.Tensor) -> torch.dtype:
    """The coarsest of the usual dtypes that holds all values exactly, at most the tensor's own.

    After `model.to(torch.bfloat16).to(torch.float32)` it is bfloat16.
    """
    for dtype in (*_STORED, *_NARROW):
        narrower = dtype.itemsize < tensor.element_size()
        if narrower and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def is_lora(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a weight differs by a matrix of low rank, up to the rounding of merging it.

    Rounding alone counts as one: what merging and unmerging leaves behind.

    Args:
        now, before: (rows, columns), in one dtype and place.
    """
    precision = precision_of(now)
    if now.ndim != 2 or precision not in _MERGED_IN:
        return False
    change = difference(now, before)
    if not change.isfinite().all():
        return False
    allowed = _ROUNDING * torch.finfo(precision).eps * (before.double().norm() + change.norm())
    most = min(change.shape) // 2 + _OVERSAMPLING
    ranks = [rank for rank in (24, 72, 264) if rank < most]
    return bool(change.norm() <= allowed) or any(
        _outside(change, rank) <= allowed for rank in [*ranks, most]
    )


def difference(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """now - before, in float64 (float32 where the device has none)."""
    wide = torch.float32 if now.device.type == "mps" else torch.float64
    return now.to(wide) - before.to(wide)


def _outside(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The norm of what a range of a rank, found at random, leaves out (Halko et al., 2011)."""
    random = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], rank, generator=random, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
    return (matrix - basis @ (basis.T @ matrix)).norm()


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is: dtypes that PyTorch compares everywhere."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
