"""Checks of a request that several commands share; each refuses with a `RequestError`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import RequestError, first_line
from ..kernels.cells import FAR_LEVELS
from ..kernels.choice import select_impl
from ..kernels.numbers import as_integer, integer, number, shown
from ..kernels.window import Window
from .models import TOKEN_PIXELS

# Bounds before memory is taken: 16384 px a side is a million tokens.
MAX_SIDE = 16384
# Least and most; the latter may be left out.
Bounds = tuple[float] | tuple[float, float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def take_numbers(request: Any, bounds: Mapping[str, Bounds]) -> None:
    """Leave Python's own numbers in the fields of a request, or refuse them.

    Args:
        request: a frozen dataclass; a field whose type is int must be whole, one that is None
            stays so.
        bounds: by field.

    Raises:
        RequestError: which option, its bounds and what came.
    """
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name in bounds and value is not None:
            check: Callable[..., float] = integer if "int" in str(field.type) else number
            who = f"--{field.name.replace('_', '-')}"
            value = check(who, value, *bounds[field.name], error=RequestError)
            object.__setattr__(request, field.name, value)


def check_size(name: str, pixels: Any, token_pixels: int = TOKEN_PIXELS) -> int:
    """A side in pixels, or refuse what is not whole tokens, or larger than this program takes."""
    side = as_integer(pixels)
    if side is None or side % token_pixels or not token_pixels <= side <= MAX_SIDE:
        raise RequestError(
            f"--{name} must be a multiple of {token_pixels} from {token_pixels} to {MAX_SIDE} "
            f"pixels, got {shown(pixels)}."
        )
    return side


def find_dtype(name: str, choices: Iterable[str] = DTYPES) -> torch.dtype:
    """A dtype by name, one of DTYPES.

    Args:
        choices: what else the error lists.
    """
    if name not in DTYPES:
        raise RequestError(f"--dtype must be one of {', '.join(choices)}; got {name!r}.")
    return DTYPES[name]


def check_quantize(kind: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a way to quantise that is not known, or that a device or an installation lacks.

    Raises:
        RequestError: what it lacks, and what to use.
    """
    if kind is not None:
        from ..weights.quantise import check_kind

        try:
            check_kind(kind, device, dtype)
        except ValueError as error:
            raise RequestError(f"--{error}") from error


def find_device(name: str | None) -> torch.device:
    """A device by name, or the best there is."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device {name}: cannot be used ({first_line(error)}).") from error
    return device


def find_impl(
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int = 64,
    kernels: tuple[str, ...] = (),
) -> str:
    """The implementation of local attention that will run without gradients.

    Args:
        kernels: of Triton, that must be right on this device; see `select_impl`.
    """
    query = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    try:
        return select_impl(impl, query, kernels=kernels)
    except ValueError as error:
        raise RequestError(str(error)) from error


def takes_far(far: bool | None, radius: int, down_factor: int) -> bool:
    """What `far` means where no weights say it: None takes far keys wherever there can be some."""
    return radius > 1 and down_factor == 1 if far is None else far


def find_window(
    height: int,
    width: int,
    radius: int,
    down_factor: int = 1,
    text_length: int = 0,
    token_pixels: int = TOKEN_PIXELS,
    *,
    far: bool = False,
) -> Window:
    """The window of an image of height x width pixels.

    Args:
        height, width: of the image, in pixels.
        radius, down_factor: in tokens.
        text_length: in tokens.
        token_pixels: side of a token, in pixels.
        far: whether it has far keys.

    Raises:
        RequestError: sizes or settings that no window has.
    """
    if far and down_factor > 1:
        raise RequestError(
            f"--far and --down-factor {down_factor} exclude each other; leave one of them out."
        )
    check_size("height", height, token_pixels)
    check_size("width", width, token_pixels)
    try:
        return Window(
            height // token_pixels,
            width // token_pixels,
            text_length,
            radius,
            down_factor,
            far_levels=FAR_LEVELS if far else 0,
        )
    except (TypeError, ValueError) as error:
        raise RequestError(str(error)) from error


def check_upscaler(path: str) -> None:
    """Refuse a file that holds no upscaler, as far as it can be told without reading it.

    Raises:
        RequestError: see `load_upscaler`.
    """
    from ..pipelines.cascade.upscaler import check_upscaler_file

    try:
        check_upscaler_file(Path(path))
    except ValueError as error:
        raise RequestError(f"--{error}") from error
