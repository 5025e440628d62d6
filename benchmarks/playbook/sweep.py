"""Every entry of the forward tables for this device, at the production shape."""

from __future__ import annotations

from functools import partial

from clear_dit.kernels.triton import tables
from clear_dit.kernels.triton.launch import table_key

from .part_file import PartFile
from .production import measure
from .setting import Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """Radius by radius, so that entries can be compared early; then the smallest far window."""
    key = table_key(setting.device, setting.dtype, setting.head_dim)
    problems = [(radius, False) for radius in setting.radii] + [(setting.far_radii[0], True)]
    return [
        Task(
            f"{entry.name} {'far ' * far}r={radius}",
            partial(measure, setting, setting.sizes[-1], radius, far, entry.name),
        )
        for radius, far in problems
        for entry in tables.forward_configs(*key, far=far)
    ]


def fastest_entry(setting: Setting, radius: int) -> str:
    """Name of the entry that the sweep found fastest without far keys, or else of the default."""
    rows = [
        row
        for row in PartFile(setting.folder, "sweep").read().good_rows
        if row["radius"] == radius and not row["far"]
    ]
    if rows:
        return min(rows, key=lambda row: row["ms"])["entry"]
    key = table_key(setting.device, setting.dtype, setting.head_dim)
    return tables.forward_configs(*key)[0].name
