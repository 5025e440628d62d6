"""CLEAR's convolution-like local attention for diffusion transformers, as a plugin to diffusers.

The names below are imported on first use: `import clear_dit` loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compat import check_version, check_versions
from .versions import __version__ as __version__

check_versions()

if TYPE_CHECKING:
    from .attention.processor import CLEARProcessor
    from .kernels.attention import local_attention
    from .kernels.window import Window
    from .pipelines.flux import CLEARFluxPipeline
    from .pipelines.pipeline import CLEARPipeline
    from .plugin import apply_clear, remove_clear
    from .weights.load import load_clear_weights, save_clear_weights
    from .weights.quantise import quantize

__all__ = [
    "CLEARFluxPipeline",
    "CLEARPipeline",
    "CLEARProcessor",
    "Window",
    "apply_clear",
    "load_clear_weights",
    "local_attention",
    "quantize",
    "remove_clear",
    "save_clear_weights",
]

_HOME = {
    "CLEARFluxPipeline": "pipelines.flux",
    "CLEARPipeline": "pipelines.pipeline",
    "CLEARProcessor": "attention.processor",
    "Window": "kernels.window",
    "apply_clear": "plugin",
    "load_clear_weights": "weights.load",
    "local_attention": "kernels.attention",
    "quantize": "weights.quantise",
    "remove_clear": "plugin",
    "save_clear_weights": "weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name].startswith("kernels."):
        check_version("diffusers")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
