"""Files that replace none: their names, writers at once, file systems without links."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.slow import slow

from clear_dit.files import write_new

WRITER = """
import sys
from pathlib import Path
from clear_dit.files import write_new
for number in range(20):
    text = f"{sys.argv[2]} {number}".encode()
    write_new(Path(sys.argv[1]), lambda file: file.write(text))
"""


def write(path, text):
    return write_new(path, lambda file: file.write(text.encode()))


def test_a_name_that_is_taken_is_counted_on(tmp_path):
    path = tmp_path / "image.png"
    names = [write(path, f"image {number}").name for number in range(3)]
    assert names == ["image.png", "image-2.png", "image-3.png"]
    assert [(tmp_path / name).read_text() for name in names] == ["image 0", "image 1", "image 2"]
    assert len(list(tmp_path.iterdir())) == 3
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_gap_is_filled_and_a_link_to_nowhere_stays(tmp_path):
    path = tmp_path / "image.png"
    path.symlink_to("nowhere")
    (tmp_path / "image-3.png").touch()
    assert [write(path, "").name for _ in range(2)] == ["image-2.png", "image-4.png"]
    assert path.is_symlink()


def test_the_longest_name_there_is(tmp_path):
    path = tmp_path / ("ü" * 125 + "x.png")
    names = [write(path, "").name for _ in range(2)]
    assert names == [path.name, "ü" * 124 + "-2.png"]


@slow
def test_processes_at_once_lose_nothing(tmp_path):
    path = tmp_path / "image.png"
    arguments = [sys.executable, "-c", WRITER, path]
    writers = [
        subprocess.Popen([*arguments, name], cwd=Path(__file__).parents[2]) for name in "abc"
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    written = sorted(file.read_text() for file in tmp_path.iterdir())
    assert written == sorted(f"{name} {number}" for name in "abc" for number in range(20))


@pytest.mark.parametrize("links", [True, False])
def test_threads_at_once_lose_nothing(monkeypatch, tmp_path, links):
    def refused(*_):
        raise PermissionError("no links on this file system")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    path = tmp_path / "image.png"
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda number: write(path, str(number)), range(40)))
    assert [name.read_text() for name in names] == [str(number) for number in range(40)]
    assert set(tmp_path.iterdir()) == set(names)


def test_what_fails_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_new(tmp_path / "image.png", fail)
    assert list(tmp_path.iterdir()) == []
