"""What a user says of the window: vLLM-Omni has no options for backends that are not its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RequestError
from ..kernels.cells import FAR_LEVELS
from ..kernels.choice import IMPLS

VARIABLE = "CLEAR_DIT_VLLM_OMNI"


@dataclass(frozen=True)
class Settings:
    """Of every layer.

    Attributes:
        radius: of the disc, in tokens, at least 1; at least 2 with far keys.
        far: whether image tokens see the whole image, by far keys; what untuned weights need.
        impl: as in `local_attention`.

    Raises:
        RequestError: a field is out of its range.
    """

    radius: int = 16
    far: bool = True
    impl: str = "auto"

    def __post_init__(self) -> None:
        least = 2 if self.far is True else 1
        if isinstance(self.radius, bool) or not isinstance(self.radius, int) or self.radius < least:
            raise RequestError(
                f"{VARIABLE}: radius must be an integer of {least} or more"
                f"{' with far keys' if self.far is True else ''}, got {self.radius!r}."
            )
        if not isinstance(self.far, bool):
            raise RequestError(f"{VARIABLE}: far must be true or false, got {self.far!r}.")
        if self.impl not in IMPLS:
            raise RequestError(
                f"{VARIABLE}: impl must be one of {', '.join(IMPLS)}; got {self.impl!r}."
            )

    @property
    def far_levels(self) -> int:
        """Levels of far keys, of a `Window`."""
        return FAR_LEVELS if self.far else 0

    @classmethod
    def of_environment(cls) -> Settings:
        """Those in the environment variable, a JSON object; defaults for what it does not say.

        Raises:
            RequestError: it is no such object, or has something else in it.
        """
        text = os.environ.get(VARIABLE, "").strip() or "{}"
        try:
            given: Any = json.loads(text)
        except ValueError:
            given = None
        names = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or set(given) - set(names):
            raise RequestError(
                f"{VARIABLE} must be a JSON object of {', '.join(names)}, such as "
                f'{{"radius": 16, "far": true}}; got {text}'
            )
        return cls(**given)
