"""Which entries of the forward tables run: the default, or what the sweep found right and fast.

Nothing here is chosen by the kernels themselves: they would try what nobody has looked at.
"""

from __future__ import annotations

from clear_dit.kernels.triton import tables
from clear_dit.kernels.triton.launch import table_key

from .part_file import PROBLEM, PartFile, lost_alone
from .setting import Setting


def entries(setting: Setting, far: bool) -> tuple[tables.AnyForwardConfig, ...]:
    """All for the device, the default first."""
    key = table_key(setting.device, setting.dtype, setting.head_dim)
    return tables.forward_configs(*key, far=far)


def default_entry(setting: Setting, far: bool = False) -> str:
    """Name of the first."""
    return entries(setting, far)[0].name


def waits(entry: tables.AnyForwardConfig) -> bool:
    """Whether its warps wait for each other: it may hang."""
    return isinstance(entry, tables.GluonConfig)


def chosen_entry(setting: Setting, radius: int) -> str:
    """Name of the entry that the sweep found fastest without far keys, or else of the default.

    An entry that failed or was wrong anywhere is out; and all that may hang, if one did.
    """
    record, checks = (PartFile(setting.folder, name).read() for name in ("sweep", "checks"))
    out = {label.partition(" ")[0] for label in record.failed}
    out |= {row["entry"] for row in record.rows if PROBLEM in row}
    out |= {row["subject"].removeprefix("forward ") for row in checks.rows if PROBLEM in row}
    if lost_alone(setting.folder):
        out |= {entry.name for entry in entries(setting, far=False) if waits(entry)}
    right = [
        row
        for row in record.good_rows
        if row["radius"] == radius and not row["far"] and row["entry"] not in out
    ]
    if right:
        return min(right, key=lambda row: row["ms"])["entry"]
    return default_entry(setting)


def entry_of(setting: Setting, impl: str, radius: int | None) -> str | None:
    """The chosen entry of what runs by Triton's kernels; None of all else."""
    return chosen_entry(setting, radius) if impl == "triton" and radius is not None else None
