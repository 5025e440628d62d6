"""Every Triton kernel on awkward shapes; how, check_kinds.py says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from clear_dit.kernels.triton import launch, tables, trust
from clear_dit.kernels.triton.device import programs
from clear_dit.kernels.window import Window

from .check_kinds import KINDS, Check, poisoned
from .entries import waits
from .part_file import lost_alone
from .setting import Setting, Task

AWKWARD = (
    (Window(13, 18, 7, 4), "contiguous"),
    (Window(13, 18, 5, 4, 4), "heads first"),
    (Window(9, 17, 0, 5), "contiguous"),
    (Window(10, 9, 1, 1), "padded channels"),
    (Window(12, 17, 64, 40), "batch apart"),
    (Window(33, 26, 3, 16), "contiguous"),
    (Window(40, 56, 512, 8), "contiguous"),
    (Window(40, 56, 512, 32, 4), "contiguous"),
    (Window(37, 51, 33, 4, far_levels=10), "batch apart"),
    (Window(40, 56, 512, 8, far_levels=10), "padded channels"),
    (Window(13, 18, 5, 4, 4, pooled_weight="count"), "heads first"),
)
OF_ENTRIES = (Window(13, 19, 33, 6, 2), Window(40, 56, 64, 16))


def checks(device: torch.device, tiny: bool) -> list[list[Check]]:
    """What to check, in groups for a process each; the timed dtype first.

    tiny: a few of every kind, in the dtypes that Triton's interpreter knows.
    """
    if tiny:
        # The interpreter takes some 10 ms a tile: only what the code paths need.
        window, far = Window(3, 9, 2, 2, 2), Window(3, 9, 2, 2, far_levels=3)
        return [
            [
                Check("attention", "gradients", window, torch.float32, 16, batch=1),
                Check("attention", "gradients", far, torch.float32, 16, batch=1),
                *_of_entries(device, torch.float16, 16, window, few=True),
                Check("norm_rope", "norm_rope", window, torch.float32, 16, batch=1),
                Check("pooling", "pooling", far, torch.float32, 16, batch=1),
            ]
        ]
    groups = []
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (128, 64):
            cases = [
                Check("attention", "gradients", window, dtype, head_dim, layout=layout)
                for window, layout in AWKWARD
            ]
            groups += [cases[i : i + 2] for i in range(0, len(cases), 2)]
        groups += [
            list(_of_entries(device, dtype, 128, window))
            for window in (*OF_ENTRIES, Window(37, 51, 64, 4, far_levels=10))
        ]
        groups.append(list(_norm_rope(dtype)))
        groups.append(list(_pooling(dtype)))
    wide = [
        Check("attention", "gradients", window, torch.float32, 64, layout=layout)
        for window, layout in (*AWKWARD[:5], AWKWARD[8])
    ]
    groups += [wide[i : i + 2] for i in range(0, len(wide), 2)]
    return [*groups, [*_norm_rope(torch.float32), *_pooling(torch.float32)]]


def waiting_checks(device: torch.device) -> list[list[Check]]:
    """Of the entries that may hang, a group for a dtype."""
    groups = [
        [
            Check(f"forward {entry.name}", "forward", window, dtype, head_dim, entry=entry.name)
            for head_dim in (128, 64)
            for entry in tables.forward_configs(*launch.table_key(device, dtype, head_dim))
            if waits(entry)
            for window in OF_ENTRIES
        ]
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return [group for group in groups if group]


def _of_entries(
    device: torch.device, dtype: torch.dtype, head_dim: int, window: Window, few: bool = False
) -> Iterator[Check]:
    """Entries of the forward table that cannot hang, the text's by several splits; or a `few`.

    Of the gradients there is one entry, which "attention" checks.
    """
    key = launch.table_key(device, dtype, head_dim)
    make = partial(Check, window=window, dtype=dtype, head_dim=head_dim, batch=1 if few else 2)
    far = window.far_levels > 0
    entries = [entry for entry in tables.forward_configs(*key, far=far) if not waits(entry)]
    for entry in entries[: 1 if few else None]:
        yield make(f"forward {entry.name}", "forward", entry=entry.name)
    for count in (5,) if few else (1, 5, programs(device)):
        yield make("text", "text", entry=tables.text_config(*key), programs=count)


def _norm_rope(dtype: torch.dtype) -> Iterator[Check]:
    for window, head_dim, batch in (
        (Window(5, 7, 3, 1), 32, 2),
        (Window(9, 11, 0, 1), 128, 2),
        (Window(20, 31, 512, 1), 64, 1),
    ):
        yield Check("norm_rope", "norm_rope", window, dtype, head_dim, batch)


def _pooling(dtype: torch.dtype) -> Iterator[Check]:
    for window, layout in AWKWARD:
        for head_dim in (64, 128) if window.far_levels else ():
            yield Check("pooling", "pooling", window, dtype, head_dim, layout=layout)


def run_group(group: Sequence[Check], device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows with subject, case, what, error and bound, and `problem` where it is not right.

    Raises:
        Exception: what a check raised, when the others have had their turn.
    """
    raised: list[Exception] = []
    for check in group:
        about = {"subject": check.subject, "case": check.case}
        try:
            with poisoned():
                found = KINDS[check.kind](check, device)
        except Exception as error:
            yield about | {"problem": f"{type(error).__name__}: {error}"[:500]}
            raised.append(error)
            continue
        for row in found:
            ok = row.pop("ok")
            wrong = {} if ok else {"problem": row.get("problem", f"wrong: {row['what']}")}
            yield about | row | wrong
    if raised:
        raise raised[0]


def _subjects(group: Sequence[Check]) -> str:
    subjects = dict.fromkeys(check.subject.partition(" ")[0] for check in group)
    dtypes = dict.fromkeys(str(check.dtype).removeprefix("torch.") for check in group)
    return f"{' '.join(subjects)}, {' '.join(dtypes)}, head_dim {group[0].head_dim}"


def tasks(setting: Setting) -> list[Task]:
    """Groups of checks; a fault on the device takes no more than its group along.

    What may hang comes last.
    """
    device, tiny = setting.device, setting.device.type != "cuda"
    groups = [(group, False) for group in checks(device, tiny)]
    groups += [(group, True) for group in waiting_checks(device)]
    return [
        *(
            Task(f"{number}: {_subjects(group)}", partial(run_group, group, device), alone)
            for number, (group, alone) in enumerate(groups)
        ),
        Task("as users get them", partial(_as_users_get_them, setting, tiny)),
    ]


def _as_users_get_them(setting: Setting, tiny: bool) -> Iterator[dict[str, Any]]:
    """The kernels' own checks, with the seconds that they take; if `tiny`, the first."""
    if reason := lost_alone(setting.folder):
        yield {"skipped": f"waits for one that may hang: {reason}"}
        return
    found = trust.look_at_all(setting.device, setting.dtype, setting.head_dim)
    for each in itertools.islice(found, 1 if tiny else None):
        row = {"subject": f"{each.kernel.name} {each.entry}", "what": "as users get it"}
        row |= {"error": max(each.errors.values(), default=None), "seconds": each.seconds}
        yield row if each.wrong is None else row | {"problem": each.wrong}
