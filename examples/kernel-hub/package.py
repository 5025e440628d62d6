"""CLEAR's local attention (arXiv 2412.16112): tensors in, tensors out.

`local_attention(query, key, value, Window(height, width, text_length, radius))`
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (nothing was installed that could ask)
    raise ImportError(
        "clear-local-attention needs Python 3.11 or newer, "
        f"this is {sys.version_info.major}.{sys.version_info.minor}."
    )

from .attention import local_attention
from .window import Window

__all__ = ["Window", "local_attention"]
