"""Folders of `clear-dit render` as they must be, and the command in a process of its own."""

import json
import os

import numpy as np
import torch
from PIL import Image

from clear_dit.generation.runner import PipelineRunner
from clear_dit.render.manifest import read_manifest

from .command_line import run


def images(folder):
    """By name; what is half-written has a name that begins with a dot."""
    return {path.name: np.array(Image.open(path)) for path in folder.glob("[!.]*.png")}


def assert_same(folder, expected):
    found = images(folder)
    assert found.keys() == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels)


def assert_true_so_far(folder):
    """Nothing is called done that is not there, and there is nothing but whole images."""
    entries = read_manifest(folder / "manifest.jsonl")
    found = images(folder)  # reads every pixel
    assert {entry["image"] for entry in entries.values() if entry["status"] == "done"} <= set(found)
    assert all(entry["status"] in ("done", "waiting") for entry in entries.values())
    return len(found)


def assert_complete(folder, count):
    """One line and one sidecar for each job, and nothing else."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == count
    assert all(line["status"] == "done" for line in lines)
    assert [line["line"] for line in lines] == list(range(1, count + 1))
    names = {name for line in lines for name in (line["image"], f"{line['id']}.json")}
    assert {path.name for path in folder.iterdir()} == names | {"manifest.jsonl", ".claims"}
    for line in lines:
        assert json.loads((folder / f"{line['id']}.json").read_text())["job"] == line["job"]


def render_command(arguments, state, log):
    """`clear-dit render` with these arguments; the end of the process.

    Args:
        arguments: of the command.
        state: shared integers, kept up to date: how many images this process has begun, and
            whether it is making one (1) or writes it (2).
        log: a file for what it says.
    """
    torch.set_num_threads(1)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    PipelineRunner.generate = _noted(PipelineRunner.generate, state, 1)
    PipelineRunner._write = _noted(PipelineRunner._write, state, 2)
    raise SystemExit(run("render", *arguments))


def _noted(function, state, what):
    def noted(*args, **options):
        before, state[1] = state[1], what
        state[0] += what == 1
        try:
            return function(*args, **options)
        finally:
            state[1] = before

    return noted
