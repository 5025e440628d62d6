"""The attention backend CLEAR for vLLM-Omni: see docs/vllm-omni.md.

vLLM-Omni calls `register` in each of its processes, by the entry point in pyproject.toml. Nothing
changes there until the backend is chosen.
"""

from __future__ import annotations

import logging

logger: logging.Logger = logging.getLogger(__name__)

NAME = "CLEAR"
BACKEND = f"{__name__}._backend.CLEARBackend"


def register() -> None:
    """Make the backend CLEAR known to vLLM-Omni in this process; any number of times.

    Never raises: what it raised would end every process of vLLM-Omni, also of those who chose
    another backend.
    """
    try:
        from aenum import extend_enum
        from vllm_omni.diffusion.attention.backends.registry import (
            DiffusionAttentionBackendEnum as Backends,
        )
        from vllm_omni.diffusion.attention.backends.registry import register_diffusion_backend

        if NAME not in Backends.__members__:
            extend_enum(Backends, NAME, "")  # of no path until it is registered
        register_diffusion_backend(Backends[NAME], BACKEND)
    except Exception as error:
        logger.warning(
            "the attention backend CLEAR is not there: this version of vLLM-Omni does not take it "
            "(%s: %s). Versions that do: docs/vllm-omni.md of clear-dit.",
            type(error).__name__,
            error,
        )
