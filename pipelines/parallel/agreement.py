"""Ranks that are about to generate one image, compared before the first step.

Two that differ in a seed, a prompt or an adapter would exchange rows of two images, and none
would notice.
"""

from __future__ import annotations

from collections.abc import Mapping

from clear_dit.process_group import RankGroup

from .watch import Member


def agree(process_group: RankGroup, facts: Mapping[str, str]) -> None:
    """Refuse facts that are not the same on all ranks of a process group; all must call this.

    Args:
        facts: names people know, to values or digests.

    Raises:
        ValueError: they differ, on every rank; what differs and on which ranks is named.
    """
    everywhere = process_group.gather([str(Member.here()), dict(facts)])
    first_name, first = everywhere[0]
    differences = [
        f"{name} has {key} {_shown(other.get(key))}, {first_name} has {_shown(first.get(key))}"
        for name, other in everywhere
        for key in sorted(first.keys() | other.keys())
        if other.get(key) != first.get(key)
    ]
    if differences:
        raise ValueError(
            f"patch parallel: the ranks do not agree: {'; '.join(differences)}. Start all with "
            "the same arguments, packages and files."
        )


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= 60 else f"{value[:57]}..."
