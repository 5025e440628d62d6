"""The tiled path with its compiled kernel, or by PyTorch's operators."""

import pytest

from clear_dit.kernels.tiled import bands
from clear_dit.kernels.tiled.native import build


def _why_not() -> str:
    try:
        return "" if build.compiler() else "no command"
    except build.BuildError as error:
        return str(error)


needs_compiler = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


def switch_off(monkeypatch):
    """From here on `tiled` runs on PyTorch's operators."""
    monkeypatch.setattr(bands, "why_not_compiled", lambda *_: "is switched off")
