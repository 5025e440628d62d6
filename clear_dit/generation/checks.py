"""Checks of a request that several commands share; each refuses with a `RequestError`."""

from __future__ import annotations

import torch

from ..errors import RequestError, first_line
from ..kernels.cells import FAR_LEVELS
from ..kernels.choice import select_impl
from ..kernels.window import Window
from .models import TOKEN_PIXELS

# Bounds before memory is taken: 16384 px a side is a million tokens.
MAX_SIDE = 16384
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_size(name: str, pixels: int, token_pixels: int = TOKEN_PIXELS) -> None:
    """Refuse a side that is not whole tokens, or larger than this program takes."""
    if pixels < token_pixels or pixels % token_pixels or pixels > MAX_SIDE:
        raise RequestError(
            f"--{name} must be a multiple of {token_pixels} from {token_pixels} to {MAX_SIDE} "
            f"pixels, got {pixels}."
        )


def find_dtype(name: str) -> torch.dtype:
    """A dtype by name, one of DTYPES."""
    if name not in DTYPES:
        raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}; got {name!r}.")
    return DTYPES[name]


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
    except ValueError as error:
        raise RequestError(str(error)) from error
