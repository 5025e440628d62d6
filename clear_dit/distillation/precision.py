"""Computing in bfloat16: on a CPU for the matrix products alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def weights_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load a model in that is to compute in `dtype`.

    On a CPU, bfloat16 is for the matrix products alone (see `autocast`): the elementwise work in
    between is faster in float32 there.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


@contextmanager
def autocast(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Under which a model in `weights_dtype` computes in `dtype`."""
    if weights_dtype(dtype, device) == dtype:
        yield
    else:
        with quiet_norms(), torch.autocast(device.type, dtype):
            yield


@contextmanager
def quiet_norms() -> Iterator[None]:
    """Hide that QK-norm has float32 weights for bfloat16 inputs under autocast: as intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
