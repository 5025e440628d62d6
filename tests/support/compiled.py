"""The tiled path with its compiled kernel, or by PyTorch's operators."""

import pytest

from clear_dit.kernels import tiled
from clear_dit.kernels.native import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


def switch_off(monkeypatch):
    """From here on `tiled` runs on PyTorch's operators."""
    monkeypatch.setattr(tiled, "why_not_compiled", lambda *_: "is switched off")
