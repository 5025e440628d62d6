"""Tables as spreadsheets and pandas write them: which delimiter, which columns, which cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence

from ..errors import RequestError, first_line

# The line of the file in which a row begins, from 1, and its cells by column, None for one that
# is not there; or why it cannot be used.
Row = tuple[int, dict[str, str | None] | RequestError]

_DELIMITERS = (",", ";", "\t", "|")
# Of a table with one column: prompts in it have the others. No text has it that is taken.
_NONE = "\x1f"
# Where the first line is looked for.
_MAX_HEADER = 2**16
# What spreadsheets write above a table to tell each other, with the cells they may add to it.
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?[,;\t|]*(?:\r\n?|\n)', re.IGNORECASE)
# How pandas names columns that have no name.
_UNNAMED = re.compile(r"(unnamed: [0-9.]+)?", re.IGNORECASE)
_ROW_NUMBER = re.compile(r"[0-9]+(\.0*)?")
_LINE_BREAKS = re.compile(r"[ \t]*[\r\n]+\s*")
# Cells of pandas and of spreadsheets that stand for nothing.
_NOTHING = ("nan", "<na>", "#n/a")


def table_rows(
    text: str,
    known: Collection[str],
    check: Callable[[Sequence[str]], None],
    *,
    growing: bool = False,
) -> Iterator[Row]:
    """The rows of a table that are not empty, in their order.

    The delimiter is the one with which the first line has the most columns that are known: comma,
    semicolon, tab or bar; a line "sep=;" above it says which. With one column there is none, and
    whatever stands in a line is its cell. Columns without a name must be empty, but for the row
    numbers that pandas writes into the first ones. White space around cells is left out, a line
    break inside one is a blank, and "nan" is empty.

    Args:
        text: of the file.
        known: columns to look for, in lower case; they are found in capitals too, and with blanks
            or hyphens for underscores.
        check: refuses columns with a `RequestError`; it is given those that have a name.
        growing: somebody still writes: a last cell whose quotes are open is left out.
    """
    stream = io.StringIO(text, newline="")
    if found := _SEPARATOR_LINE.match(text):
        delimiter = found.group(1)
        stream.readline()
    else:
        delimiter = max(_DELIMITERS, key=lambda one: _rank(text, one, known))
        if len(_first_row(text, delimiter)) == 1:
            delimiter = _NONE
    above = 1 if found else 0
    reader = _reader(stream, delimiter)
    start, columns = 1 + above, None
    try:
        for cells in reader:
            cells = [_plain(cell) for cell in cells]
            if columns is not None:
                row = _row(columns, cells)
                if row is not None:
                    yield start, row
            elif any(cells):
                columns = [_name(cell, known) for cell in cells]
                try:
                    check([name for name in columns if name])
                except RequestError as error:
                    yield start, error
                    return
            start = reader.line_num + 1 + above
    except csv.Error as error:
        if growing and not stream.read(1):
            return
        reason = first_line(error).replace(_NONE, ",")
        yield start, RequestError(f"{reason}; the lines after it are not read.")


def _row(columns: Sequence[str], cells: list[str]) -> dict[str, str | None] | RequestError | None:
    """The cells that have a column; None where all are empty."""
    while len(cells) > len(columns) and not cells[-1]:
        cells.pop()
    if len(cells) > len(columns):
        return RequestError(
            f"has {len(cells)} cells, and the first line names {len(columns)} columns; put quotes "
            "around a cell that has the delimiter in it."
        )
    for number, (name, cell) in enumerate(zip(columns, cells, strict=False), 1):
        numbered = not any(columns[:number]) and _ROW_NUMBER.fullmatch(cell)
        if cell and not name and not numbered:
            return RequestError(
                f"has {cell[:100]!r} in column {number}, which has no name in the first line; put "
                "quotes around a cell that has the delimiter in it."
            )
    given = [*cells, *[None] * (len(columns) - len(cells))]
    row = {name: cell for name, cell in zip(columns, given, strict=True) if name}
    return row if any(row.values()) else None


def _rank(text: str, delimiter: str, known: Collection[str]) -> tuple[int, int]:
    names = [_name(cell, known) for cell in _first_row(text, delimiter)]
    return sum(name in known for name in names), len(names)


def _first_row(text: str, delimiter: str) -> list[str]:
    """The first that is not empty; nothing if it cannot be read so."""
    reader = _reader(io.StringIO(text[:_MAX_HEADER], newline=""), delimiter)
    try:
        rows = ([_plain(cell) for cell in cells] for cells in reader)
        return next((cells for cells in rows if any(cells)), [])
    except csv.Error:
        return []


def _reader(stream: io.StringIO, delimiter: str):
    return csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=True)


def _name(cell: str, known: Collection[str]) -> str:
    """As it is known, or as it stands there; "" for none."""
    folded = re.sub(r"[\s-]+", "_", cell.lower())
    if folded in known:
        return folded
    return "" if _UNNAMED.fullmatch(cell) else cell


def _plain(cell: str) -> str:
    cell = _LINE_BREAKS.sub(" ", cell.strip())
    return "" if cell.lower() in _NOTHING else cell
