"""Whether the Triton kernels of these tests run in Triton's interpreter, on a CPU.

`conftest.py` sets TRITON_INTERPRET before anything imports Triton, and where it is not installed
nothing can run.
"""

import os
from importlib.util import find_spec

interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
