"""Progress that is no terminal's: lines now and then, without carriage returns."""

import ast
import io
import re
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from clear_dit import progress

ROOT = Path(progress.__file__).parent


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    list(tqdm(range(2), "sampling", unit="image", **progress.bar_options()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sampling 0/2, 00:00 passed, ? left"
    assert [line.split(",")[0] for line in lines[1:]] == ["sampling 1/2", *["sampling 2/2"] * 2]


def test_what_is_done_soon_says_nothing(capsys):
    list(tqdm(range(100), "sampling", **progress.bar_options()))
    assert capsys.readouterr().err == ""


def test_a_line_every_so_often(monkeypatch, capsys):
    now = 1000.0
    bar = tqdm(total=100, desc="sampling", **progress.bar_options())
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    for _ in range(100):
        now += progress.LINE_SECONDS / 10
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"sampling {n}/100" for n in range(10, 101, 10)
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    list(tqdm(range(2), "sampling", **progress.bar_options()))
    assert "\rsampling: 100%|" in terminal.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_none_at_all(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    list(tqdm(range(2), "sampling", **progress.bar_options(False)))
    assert stream.getvalue() == ""


def test_every_bar_of_a_command_is_such():
    bars, other = 0, []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        # The demo's are programs of their own, which train it.
        if path.parent.name == "demo" or "tqdm(" not in path.read_text():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
                bars += 1
                if not re.search(r"bar_options\(|\*\*shown", ast.unparse(node)):
                    other.append(f"{path.name}: {ast.unparse(node)}")
    assert bars > 6
    assert other == []
