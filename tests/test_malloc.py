"""Freed memory is used again."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.slow import slow

ALLOCATE = """
import resource, runpy, sys
if sys.argv[1] == "keep":
    runpy.run_path(sys.argv[2])["keep_freed_memory"]()
import torch
def fill():
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
# Small pieces that glibc holds ready for each thread (tcache) lie beside the first tensors and keep
# their places from being whole: after 1 to 16 tensors (of 180 processes) it has taken its fill.
for _ in range(40):
    fill()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The middle one: something else may take a piece of the heap now and then.
print(sorted(faults() for _ in range(9))[4])
"""


def page_faults(what: str) -> int:
    source = Path(__file__).parents[1] / "clear_dit/malloc.py"  # the file alone: sooner imported
    command = [sys.executable, "-c", ALLOCATE, what, str(source)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_large_tensor_takes_the_place_of_one_that_is_gone():
    assert 4 * page_faults("keep") < page_faults("give back")
