"""Prompts from a file, refused by line number before any work is done for them."""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from .tables import table_rows

# Text encoders read some hundred tokens; what is longer is a file of another kind.
MAX_WORDS = 2000
MAX_CHARACTERS = 20_000
MAX_FILE_MB = 256
SUFFIXES = (".txt", ".jsonl", ".csv")
# By name, and by the first bytes of one that has another: packed XML, and Excel's before 2007.
_WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
_WORKBOOK_BYTES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def read_prompts(source: str | Path, limit: int | None = None) -> list[str]:
    """The prompts of a file, in its order, without the white space around them.

    Args:
        source: a file: .txt with a prompt on each line (see `prompt_lines`), .jsonl with an object
            on each line that has "prompt", or .csv with a column "prompt" (see `table_rows`); see
            `read_text` for its encoding.
        limit: how many to take from the beginning; what follows is not looked at. None for all.

    Returns:
        At least one prompt, none of them empty.

    Raises:
        RequestError: the file cannot be read, is not of one of these kinds or holds no prompt; a
            prompt is empty, has control characters, or more than MAX_WORDS words or MAX_CHARACTERS
            characters. Says which line.
    """
    path = Path(source)
    text = read_text(path)
    lines = _LINES[path.suffix.lower()](path, text)
    prompts = [check_prompt(value, f"{path}, line {n}") for n, value in islice(lines, limit)]
    if not prompts:
        raise RequestError(f"{path}: there is no prompt in it; write one on each line.")
    return prompts


def check_prompt(prompt: object, who: str) -> str:
    """A prompt without the white space around it, or the reason why it cannot be used.

    Raises:
        RequestError: see `read_prompts`; begins with `who`.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"{who}: a prompt must be text, got {type(prompt).__name__}.")
    prompt = prompt.strip()
    if not prompt:
        raise RequestError(f"{who}: the prompt is empty; describe an image.")
    if len(prompt) > MAX_CHARACTERS:
        raise RequestError(
            f"{who}: a prompt may have {MAX_CHARACTERS} characters, got {len(prompt)}."
        )
    words = len(prompt.split())
    if words > MAX_WORDS:
        raise RequestError(f"{who}: a prompt may have {MAX_WORDS} words, got {words}.")
    # Cc: controls; Cs: lone surrogates, which JSON can spell and UTF-8 cannot.
    bad = next((c for c in prompt if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad is not None:
        raise RequestError(
            f"{who}: the prompt has the control character U+{ord(bad):04X}; remove it."
        )
    return prompt


def read_text(path: Path) -> str:
    """What stands in a file of prompts, in UTF-8 or UTF-16, without its byte order mark.

    Raises:
        RequestError: it cannot be read, is too large, neither of the two, a workbook, or its
            suffix not in SUFFIXES.
    """
    if path.suffix.lower() in _WORKBOOKS:
        raise _workbook(path)
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files.")
    try:
        if not path.exists():
            raise RequestError(f"{path}: there is no such file.")
        if not path.is_file():
            raise RequestError(f"{path}: prompts are read from a file, and this is none.")
        size = path.stat().st_size
        if size > MAX_FILE_MB * 2**20:
            raise RequestError(f"{path}: prompts may fill {MAX_FILE_MB} MB, got {size >> 20} MB.")
        data = path.read_bytes()
        if data.startswith(_WORKBOOK_BYTES):
            raise _workbook(path)
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: not {error.encoding.upper()} at byte {error.start}; save it as UTF-8 (in a "
            "spreadsheet: CSV UTF-8)."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path}: cannot be read ({first_line(error)}).") from error


def _workbook(path: Path) -> RequestError:
    return RequestError(
        f"{path}: is a spreadsheet's workbook, not text; save the sheet as CSV (UTF-8) there, and "
        "give that file."
    )


def _encoding(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without its mark: what is ASCII has a zero in every other byte, and UTF-8 has none.
    if data[1:4:2] == b"\0\0":
        return "utf-16-le"
    return "utf-16-be" if data[0:3:2] == b"\0\0" else "utf-8-sig"


def text_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, without those that are empty."""
    # Not `splitlines`: it also splits at control characters, which are to be refused.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def prompt_lines(text: str) -> Iterator[tuple[int, str]]:
    """The prompts of a .txt file with the numbers of their lines, from 1.

    Empty lines are left out, and comments, which begin with #. A prompt that begins with # is
    written with \\# there.
    """
    for number, line in text_lines(text):
        prompt = line.strip()
        if not prompt.startswith("#"):
            yield number, prompt[1:] if prompt.startswith("\\#") else prompt


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in text_lines(text):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{path}, line {number}: not JSON ({first_line(error)}); "
                'write {"prompt": "..."} on each line.'
            ) from error
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise RequestError(f'{path}, line {number}: must be an object with the key "prompt".')
        yield number, entry["prompt"]


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, row in table_rows(text, ("prompt",), _check_columns):
        if isinstance(row, RequestError):
            raise RequestError(f"{path}, line {number}: {row}") from row
        yield number, row["prompt"] or ""


def _check_columns(columns: Sequence[str]) -> None:
    if columns.count("prompt") != 1:
        there = "no" if "prompt" not in columns else "more than one"
        raise RequestError(
            f'there is {there} column "prompt"; the columns are: {", ".join(columns)[:200]}.'
        )


def _plain_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    return prompt_lines(text)


_LINES = {".txt": _plain_lines, ".jsonl": _json_lines, ".csv": _csv_lines}
