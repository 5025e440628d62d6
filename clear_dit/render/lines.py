"""The lines of a .jsonl, .csv or .txt file of jobs; a bad one does not hide the others."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..generation.prompts import read_text, text_lines
from .fields import check_names, check_values, from_text

# The number of a line, from 1, and what stands there or why it cannot be used.
Line = tuple[int, dict[str, Any] | RequestError]


def read_lines(path: Path, *, growing: bool = False) -> Iterator[Line]:
    """The lines of a job file, in their order; empty ones are left out.

    Args:
        path: a .jsonl, .csv or .txt (a prompt on each line), UTF-8.
        growing: somebody still writes: a last line without its end is left out.

    Raises:
        RequestError: the file cannot be read, or is not of these kinds.
    """
    text = read_text(path)
    if growing:
        text = text[: text.rfind("\n") + 1]
    return _READERS[path.suffix.lower()](text)


def _checked(number: int, make: Any) -> Line:
    try:
        return number, make()
    except RequestError as error:
        return number, error


def _txt(text: str) -> Iterator[Line]:
    for number, line in text_lines(text):
        yield _checked(number, lambda line=line: check_values({"prompt": line}))


def _jsonl(text: str) -> Iterator[Line]:
    for number, line in text_lines(text):
        yield _checked(number, lambda line=line: _from_json(line))


def _from_json(line: str) -> dict[str, Any]:
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f'not JSON ({first_line(error)}); write {{"prompt": "..."}} on each line.'
        ) from error
    if not isinstance(pairs, _Pairs):
        raise RequestError('must be an object, such as {"prompt": "..."}.')
    check_names([name for name, _ in pairs], "key")
    return check_values(dict(pairs))


class _Pairs(list):
    """An object of JSON with the keys that are twice there."""


def _csv(text: str) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            return
        try:
            check_names(header, "column")
        except RequestError as error:
            yield 1, error
            return
        start = reader.line_num + 1
        for row in reader:
            if any(cell.strip() for cell in row):
                yield _checked(start, lambda row=row: _from_row(header, row))
            start = reader.line_num + 1
    except csv.Error as error:
        yield start, RequestError(f"{first_line(error)}; the lines after it are not read.")


def _from_row(header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise RequestError(f"has {len(row)} cells, and the first line names {len(header)} columns.")
    cells = zip(header, row, strict=True)
    return check_values({name: from_text(name, cell) for name, cell in cells})


_READERS = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}
