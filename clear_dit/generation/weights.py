"""The CLEAR weights a request means, and with them whether it takes far keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import RequestError, first_line
from ..weights.format import made_for_far
from ..weights.known import AUTO, PUBLISHED, known_weights
from ..weights.load import find_weights
from .checks import takes_far

if TYPE_CHECKING:
    from .request import GenerateRequest


class Settled(NamedTuple):
    """What "auto" and None stand for.

    Attributes:
        weights: as `apply_clear` takes them; None for the model's own.
        far: whether there are far keys.
    """

    weights: str | None
    far: bool


def settled(request: GenerateRequest) -> Settled:
    """A request's weights, and whether it takes far keys.

    Weights known to fit are taken as they are; without any the model sees the whole image.

    Raises:
        RequestError: weights that cannot be found or read.
    """
    weights, far = request.weights, request.far
    if request.schedule is not None:
        # It was made for the model's own weights.
        return Settled(None if weights == AUTO else weights, request.schedule.far)
    if weights == AUTO:
        weights = known_weights(request.model, request.radius, request.down_factor, far)
    if far is None and weights == PUBLISHED:  # nothing need be fetched to tell
        far = False
    elif far is None and weights is not None:
        far = made_for_far_keys(weights_file(weights, request))
        if far and not takes_far(None, request.radius, request.down_factor):
            raise RequestError(
                f"--weights {weights}: made for far keys, which need --radius 2 or more and no "
                f"--down-factor; got --radius {request.radius} --down-factor "
                f"{request.down_factor}. Change these, or name other weights."
            )
    return Settled(weights, takes_far(far, request.radius, request.down_factor))


def weights_file(weights: str, request: GenerateRequest) -> Path:
    """The file of CLEAR weights that a request loads; fetched where it is on the hub.

    Raises:
        RequestError: it cannot be found.
    """
    try:
        return find_weights(weights, request.radius, request.down_factor, request.far)
    except (OSError, ValueError) as error:
        raise RequestError(first_line(error)) from error


def made_for_far_keys(path: Path) -> bool:
    """Whether a file of CLEAR weights was made for far keys.

    Raises:
        RequestError: it is not safetensors.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return made_for_far(file)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"--weights: {path} is not a safetensors file, or truncated.") from error
