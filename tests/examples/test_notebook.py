"""The notebook runs from top to bottom with the demo, and is kept without what it printed."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.packages import need
from support.ray_cluster import ROOT, environment
from support.slow import slow

need("nbformat")

import nbformat  # noqa: E402

pytestmark = slow

PATH = ROOT / "examples" / "first-4k.ipynb"
# A kernel's client leaves sockets to the collector, of which pytest makes errors: not in here.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": "."}}
)
try:
    client.execute()
finally:
    nbformat.write(notebook, "ran.ipynb")
"""


def read():
    return nbformat.read(PATH, 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook, folder):
    """Run it in a folder; the notebook with its outputs, and what went wrong in one text."""
    nbformat.write(notebook, folder / "notebook.ipynb")
    command = [sys.executable, "-c", RUN, "notebook.ipynb"]
    env = environment(IPYTHONDIR=str(folder / "ipython"), PIP_NO_INDEX="1")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert (folder / "ran.ipynb").exists(), done.stderr
    return nbformat.read(folder / "ran.ipynb", 4), done.stderr if done.returncode else ""


def printed(cell):
    return "".join(each.text for each in cell.outputs if each.get("name") == "stdout")


def shown(cell):
    """The images under a cell."""
    data = [each.data["image/png"] for each in cell.outputs if "image/png" in each.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in data]


def test_it_is_kept_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert PATH.stat().st_size < 20_000


def test_the_lines_to_change_are_there():
    """Of each line that the end gives anew, the cells have one that it stands for."""
    *_, end = (cell.source for cell in read().cells)
    cells = "\n".join(cell.source for cell in code_cells(read()))
    lines = re.findall(r"^```python\n(.*?)\n```$", end, re.DOTALL | re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        compile(line, "line", "exec")
        beginning = re.match(r"[\w. =]*\w\(", line).group()
        assert len(re.findall(rf"^{re.escape(beginning)}", cells, re.MULTILINE)) == 1, beginning


def test_it_makes_an_image_of_4096_pixels(tmp_path):
    notebook, wrong = run(read(), tmp_path)
    assert not wrong, wrong
    install, *_, first, full, clear, both, large = code_cells(notebook)
    assert install.outputs == []  # nothing was installed
    assert printed(first).startswith("512 x 512 px in ")
    assert [image.size for image in shown(first)] == [(512, 512)]
    assert not shown(full)
    assert not shown(clear)
    assert re.fullmatch(r"1024 px: full attention [\d.]+ s, CLEAR [\d.]+ s\n", printed(both))
    assert [image.size for image in shown(both)] == [(1024, 512)]
    assert printed(large).startswith("4096 x 4096 px in ")
    (sheet,) = shown(large)
    with Image.open(tmp_path / "first-4k.png") as image:
        assert image.size == (4096, 4096)
        # What is shown is what was saved: all of it, small.
        small = image.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS)
    assert sheet.crop((0, 0, 512, 512)).tobytes() == small.tobytes()
    assert {path.name for path in tmp_path.glob("*.png")} == {"first-4k.png"}


@pytest.mark.parametrize("side", [1000, "large"])
def test_a_wrong_size_is_refused_before_work_starts(tmp_path, side):
    notebook = read()
    at = next(n for n, cell in enumerate(notebook.cells) if "def generate" in cell.source)
    notebook.cells = [*notebook.cells[: at + 1], nbformat.v4.new_code_cell(f"generate({side!r})")]
    notebook, wrong = run(notebook, tmp_path)
    *_, last = code_cells(notebook)
    (error,) = (each for each in last.outputs if each.output_type == "error")
    assert error.ename == "ValueError"
    assert "a multiple of 16" in error.evalue
    assert f"got {side!r}" in error.evalue
    assert not list(Path(tmp_path).glob("*.png"))
    assert wrong
