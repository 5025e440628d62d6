"""The tables of families for `docs/families.md`: `python -m clear_dit.families.markdown`.

They are printed; a test compares them with the page's.
"""

from __future__ import annotations

from collections.abc import Iterable

from .family import FEATURES, Family
from .table import all_families

ATTENTION = (
    "family",
    "class in diffusers",
    "processors replaced",
    "order of tokens",
    "reference images",
    "grid from",
    "heads x channels",
    "largest size",
)
BESIDES = (
    "family",
    "tuned, and held by CLEAR weights",
    "layers left as they are",
    "torch.compile",
    "supported besides",
    "why not the rest",
)


def families_tables() -> str:
    """Two tables in Markdown with a row for every family: its attention, and what is besides."""
    families = all_families()
    attention = _table(ATTENTION, [_attention(family) for family in families])
    return attention + "\n" + _table(BESIDES, [_besides(family) for family in families])


def _attention(family: Family) -> tuple[str, ...]:
    return (
        family.title,
        _code([family.transformer]),
        _code(family.processors),
        family.order,
        _references(family),
        family.grid_from,
        family.heads,
        family.positions,
    )


def _references(family: Family) -> str:
    if family.reference_grids is not None:
        return "dense to all, or local within themselves"
    return family.references or "none"


def _besides(family: Family) -> tuple[str, ...]:
    supported = [feature for feature in FEATURES if feature not in family.unsupported]
    kept = [f"`{prefix}` {why}" for prefix, why in family.kept.items()]
    reasons = dict.fromkeys(family.unsupported.values())
    return (
        family.title,
        _code(family.tuned),
        "; ".join(kept) or "none",
        "`compile_repeated_blocks`" if family.repeated_blocks else "`compile` of each block",
        ", ".join(supported) or "nothing",
        "; ".join(reasons) or "-",
    )


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(families_tables(), end="")
