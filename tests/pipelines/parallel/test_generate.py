"""One picture painted by several processes, from the command to the file."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import rank_tasks
from support.rank_tasks import PICTURE, run_ranks

from clear_dit.errors import RequestError
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import generate
from clear_dit.generation.sharing import joined_ranks


@pytest.fixture(autouse=True)
def server_finds_modules(monkeypatch):
    """The server's own `sys.path` is not this one, in Python 3.11."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_torchrun_paints_the_picture_of_one_process(tmp_path):
    generate(make_request(**PICTURE), tmp_path / "one.png", progress=False)
    options = {name: value for name, value in PICTURE.items() if name != "prompt"}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "clear_dit", "generate", PICTURE["prompt"], *given]
    command += ["--parallel", "patch", "--out", "two.png"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    # One rank speaks.
    assert re.fullmatch(r"two.png: 256 x 256 px, .+\n", done.stdout)
    assert np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).max() <= 1
    assert pixels(tmp_path / "one.png").std() > 10
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}


@pytest.mark.parametrize(
    ("dies", "where"), [("step", r"step [12] of 3 of 256x256"), ("decoding", "decoding")]
)
def test_a_killed_rank_leaves_no_picture(dies, where, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    statuses, said = run_ranks(rank_tasks.paint, 2, tmp_path, out / "two.png", dies)
    assert statuses == [1, -9], said
    reason = rf"failed in {where}: its process ended; rank 0 stops\."
    assert re.search(rf"clear-dit: rank 1 \(.+, process \d+\) {reason}", said[0]), said[0]
    assert list(out.iterdir()) == []


def test_a_bad_choice_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match=r"WORLD_SIZE is 2.* add --parallel patch"):
        joined_ranks(None, None).__enter__()
    with pytest.raises(RequestError, match="--parallel must be patch or guidance, got 'rows'"):
        joined_ranks("rows", None).__enter__()
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RequestError, match=r"--parallel patch: start_ranks: RANK.* not set; start"):
        joined_ranks("patch", None).__enter__()
