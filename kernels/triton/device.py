"""What a device can run, told without importing Triton."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
# Where there is no GPU, Triton's interpreter runs, and any table serves it.
INTERPRETER = "sm_80"
# AMD's for which the tables do not spill.
HIP_ARCHITECTURES = ("gfx942", "gfx950")
# Several run at a time, and a few rounds of them even out the last one.
PROGRAMS_PER_MULTIPROCESSOR = 8


class NoEntryError(RuntimeError):
    """A kernel of Triton does not work on this device, with any entry of the tables."""


class CaptureError(RuntimeError):
    """A CUDA graph is being captured of what has not run before."""

    def __init__(self) -> None:
        super().__init__(
            "local_attention: a CUDA graph cannot be captured with an image size, radius or dtype "
            "that has not run before; call once, then capture."
        )


class Kernel(NamedTuple):
    """What is trusted, and found wanting, as one.

    Attributes:
        name: one of trust.KERNELS.
        group: query heads that read the same key head: each is a binary of its own.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    name: str
    group: int = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        group = f", {self.group} heads a key head" if self.group > 1 else ""
        return (
            f"Triton's {self.name} kernel on {self.device} "
            f"({dtype}, head_dim {self.head_dim}{group})"
        )


def kernels_of(far: bool, pooled: bool, needs_grad: bool) -> tuple[str, ...]:
    """Names of the kernels that attention runs, with far keys or else maybe pooled ones."""
    if far:
        return ("text", "far", *(("backward far",) if needs_grad else ()))
    forward = "pooled" if pooled else "forward"
    return ("text", forward, *(("backward",) if needs_grad else ()))


def why_not_triton(query: torch.Tensor, needs_grad: bool, return_lse: bool) -> str | None:
    """Why the Triton kernels cannot run on these inputs; None if they can."""
    if query.device.type != "cuda":
        return f"needs a CUDA or ROCm device, got a query on {query.device.type!r}"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if query.dtype not in DTYPES:
        return f"takes float16, bfloat16 or float32, got {query.dtype}"
    if not 1 <= query.shape[-1] <= LARGEST_HEAD_DIM:
        return f"takes a head_dim of 1 to {LARGEST_HEAD_DIM}, got {query.shape[-1]}"
    if torch.version.hip is not None:
        found = hip_architecture(query.device)
        if found not in HIP_ARCHITECTURES:
            return f"needs one of {', '.join(HIP_ARCHITECTURES)}, got {found}"
    elif torch.cuda.get_device_capability(query.device) < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability(query.device)))
        return f"needs compute capability 8.0 (Ampere) or later, got {found}"
    return None


def hip_architecture(device: torch.device) -> str:
    """AMD's name of a device, such as gfx942."""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


@functools.cache
def architecture(device: torch.device) -> str:
    """The tables' name of a device's architecture: its own, or that of the nearest relative."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return hip_architecture(device)
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    if major == 8:
        return f"sm_8{minor}" if minor in (0, 6, 9) else "sm_86"
    return "sm_120"  # later ones too: no more shared memory than this for sure


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs fill a device evenly; long walks are split until there are as many."""
    if device.type != "cuda":
        return 8
    return PROGRAMS_PER_MULTIPROCESSOR * (
        torch.cuda.get_device_properties(device).multi_processor_count
    )


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def run_apart(device: torch.device, run: Callable[[], Result]) -> Result:
    """`run()` in a thread of its own, on the device's default stream.

    Nothing of the caller's reaches it: no pool of a CUDA graph's warm-up (which is a thread's), no
    fake tensors, autocast or gradients.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                results.append(run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="clear-dit apart")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
