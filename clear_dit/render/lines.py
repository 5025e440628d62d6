"""The lines of a .jsonl, .csv or .txt file of jobs; a bad one does not hide the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..generation.prompts import prompt_lines, read_text, text_lines
from ..generation.tables import table_rows
from .fields import FIELDS, check_names, check_values, from_text

# The number of a line, from 1, and what stands there or why it cannot be used.
Line = tuple[int, dict[str, Any] | RequestError]


def read_lines(path: Path, *, growing: bool = False) -> Iterator[Line]:
    """The lines of a job file, in their order; empty ones are left out.

    Args:
        path: a .jsonl, .csv (see `table_rows`) or .txt (see `prompt_lines`), see `read_text`.
        growing: somebody still writes: a last line without its end is left out.

    Raises:
        RequestError: the file cannot be read, or is not of these kinds.
    """
    text = read_text(path)
    if growing:
        text = text[: text.rfind("\n") + 1]
    kind = path.suffix.lower()
    return _csv(text, growing) if kind == ".csv" else _READERS[kind](text)


def _checked(number: int, make: Any) -> Line:
    try:
        return number, make()
    except RequestError as error:
        return number, error


def _txt(text: str) -> Iterator[Line]:
    for number, prompt in prompt_lines(text):
        yield _checked(number, lambda prompt=prompt: check_values({"prompt": prompt}))


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


def _csv(text: str, growing: bool) -> Iterator[Line]:
    def check(columns: Sequence[str]) -> None:
        check_names(columns, "column")

    for number, row in table_rows(text, FIELDS, check, growing=growing):
        if isinstance(row, RequestError):
            yield number, row
        else:
            yield _checked(number, lambda row=row: _from_row(row))


def _from_row(row: Mapping[str, str | None]) -> dict[str, Any]:
    cells = {name: cell for name, cell in row.items() if cell is not None}
    if len(cells) < len(row):
        raise RequestError(f"has {len(cells)} cells, and the first line names {len(row)} columns.")
    return check_values({name: from_text(name, cell) for name, cell in cells.items()})


_READERS = {".txt": _txt, ".jsonl": _jsonl}
