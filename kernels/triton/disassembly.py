"""The loops of a kernel in NVIDIA's disassembly: there its time is spent."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# Mnemonics of a class of instructions; what is in none is "other".
CLASSES: dict[str, tuple[str, ...]] = {
    "tensor": ("HGMMA", "HMMA", "UTCHMMA"),
    "fmul": ("FMUL", "FMUL2"),
    "fadd": ("FADD", "FADD2"),
    "ffma": ("FFMA", "FFMA2"),
    "fmnmx": ("FMNMX", "FMNMX3"),
    "mufu": ("MUFU",),
    "bar": ("BAR",),
    "utmaldg": ("UTMALDG",),
    "ldgsts": ("LDGSTS",),
    "ldg": ("LDG",),
    "local": ("STL", "LDL"),
}
_CLASS_OF = {mnemonic: name for name, own in CLASSES.items() for mnemonic in own}
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"HGMMA\.(\d+x\d+x\d+)|HMMA\.(16)(8)(\d+)")
# A loop of fewer only waits for a barrier.
FEWEST = 8


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as each warp issues it.

    Attributes:
        instructions: of one turn, in all; of branches within, all sides count.
        classes: how many of them are of each of `CLASSES`, and "other".
        products: how many products the tensor cores do, by rows x columns x depth: of a warp, or,
            where there are 64 rows, of four warps together. Empty where the code does not tell.
    """

    instructions: int
    classes: dict[str, int]
    products: dict[str, int]


def loops(listing: str) -> list[Loop]:
    """The innermost loops of `nvdisasm -c`, in their order; without those that only wait."""
    lines = listing.splitlines()
    spans = [span for span in _spans(lines) if len(_instructions(lines, span)) >= FEWEST]
    return [
        _loop(lines, span)
        for span in spans
        if not any(other != span and other[0] in span and other[-1] in span for other in spans)
    ]


def loop_spills(listing: str) -> int:
    """Loads and stores of local memory in all loops."""
    lines = listing.splitlines()
    inside = {number for span in _spans(lines) for number in span}
    return sum(bool(re.search(r"\b(STL|LDL)\b", lines[number])) for number in inside)


def _spans(lines: list[str]) -> list[range]:
    """Lines of every loop: from a label to the last branch back to it, without leaving between."""
    labels = {match[1]: n for n, line in enumerate(lines) if (match := _LABEL.match(line))}
    ends = {
        labels[match[1]]: number
        for number, line in enumerate(lines)
        if (match := _BRANCH.search(line)) and labels.get(match[1], number) < number
    }
    exits = [
        n for n, line in enumerate(lines) if (m := _INSTRUCTION.match(line)) and m[2] == "EXIT"
        and not m[1]
    ]  # fmt: skip
    spans = [range(first, last + 1) for first, last in sorted(ends.items())]
    # What waits for a barrier may stand behind the end, and branch back into a loop.
    return [span for span in spans if not any(number in span for number in exits)]


def _instructions(lines: list[str], span: range) -> list[str]:
    return [match[2] for number in span if (match := _INSTRUCTION.match(lines[number]))]


def _loop(lines: list[str], span: range) -> Loop:
    found = _instructions(lines, span)
    counts = Counter(_CLASS_OF.get(name.split(".")[0], "other") for name in found)
    products = Counter(
        match[1] or "x".join(match.groups()[1:])
        for name in found
        if (match := _PRODUCT.match(name))
    )
    classes = {name: counts[name] for name in (*CLASSES, "other")}
    return Loop(len(found), classes, dict(products))
