"""The tables of families for `docs/families.md`: `python -m clear_dit.families.markdown`.

They are printed; a test compares them with the page's.
"""

from __future__ import annotations

from collections.abc import Iterable

from .family import Family
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
)
WHOLE = (
    "family",
    "attention",
    "references local within themselves",
    "any size, cascade",
    "generate, render, page",
    "sample, distil, evaluate",
    "patch parallelism",
    "torch.compile",
    "weights known",
)


def families_tables() -> str:
    """Tables in Markdown with a row for every family: what works, its attention, its layers."""
    families = all_families()
    tables = ((WHOLE, _whole), (ATTENTION, _attention), (BESIDES, _besides))
    return "\n".join(
        _table(headings, [row(family) for family in families]) for headings, row in tables
    )


def _whole(family: Family) -> tuple[str, ...]:
    local = "yes"
    if family.reference_grids is None:
        local = f"no: they are {family.references}" if family.references else "it takes none"
    return (
        family.title,
        "yes",
        local,
        "yes",
        "yes",
        "yes",
        "yes",
        "`compile_repeated_blocks`" if family.repeated_blocks else "`compile` of each block",
        family.weights,
    )


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
    kept = [f"`{prefix}` {why}" for prefix, why in family.kept.items()]
    return (
        family.title,
        _code(family.tuned),
        "; ".join(kept) or "none",
    )


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(families_tables(), end="")
