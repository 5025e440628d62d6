"""Freed memory is used again."""

import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys
from clear_dit.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def fill():
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str) -> int:
    command = [sys.executable, "-c", ALLOCATE, what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_large_tensor_takes_the_place_of_one_that_is_gone():
    assert page_faults("keep") < 1000 < page_faults("give back")
