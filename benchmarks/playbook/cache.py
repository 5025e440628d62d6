"""Triton's cache of compiled kernels, made on one machine and read on another."""

from __future__ import annotations

import json
from pathlib import Path

# Of those that compile and of those that launch: Triton's keys depend on it. Multiply-add in one
# instruction, as the launches ask for; unset, newer versions warn.
COMPILER = {"TRITON_DEFAULT_FP_FUSION": "1"}
# What a launch needs of a compiled kernel; the rest is for reading.
NEEDED = (".cubin", ".json")


def relocate(cache: Path) -> int:
    """Make the entries of a cache findable where it lies now, and tell how many there are.

    Triton keeps absolute paths in them, and passes over entries of which a file is not there.
    """
    groups = list(cache.glob("*/__grp__*.json"))
    for group in groups:
        files = (group.parent / name for name in json.loads(group.read_text())["child_paths"])
        paths = {file.name: str(file.resolve()) for file in files if file.exists()}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)


def prune(cache: Path) -> int:
    """Leave out what no launch reads; the bytes that are left."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix not in NEEDED:
            path.unlink()
    return sum(path.stat().st_size for path in files if path.suffix in NEEDED)
