"""What the Ray example maps over jobs works without Ray."""

import importlib.util
import json
from pathlib import Path

import pytest

from clear_dit.render.manifest import read_manifest
from clear_dit.render.run import render

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray" / "render.py"
FLAGS = {"height": 32, "width": 32, "steps": 1, "radius": 2, "weights": "none", "device": "cpu"}


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("ray_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_actor_generates_rows_and_render_knows_them(example, tmp_path, fake_runner):
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    out.mkdir()
    lines = [{"prompt": "a house", "id": "house"}, {"prompt": "a cat", "id": "cat"}]
    jobs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    runner = fake_runner(fail={"a cat": MemoryError("too large")}, log=tmp_path / "log")
    actor = example.Generate(str(jobs), str(out), FLAGS, runner)
    entries = [actor({"id": name}) for name in ("house", "cat", "house")]
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert {frozenset(entry) for entry in entries} == {frozenset(entries[0])}
    assert entries[1]["error"] == "too large"
    assert (tmp_path / "log").read_text().split() == ["house.png", "cat.png"]
    actor.claims.close()
    result = render(jobs, out, FLAGS, progress=False, make_runner=fake_runner())
    assert (result["done"], result["generated"]) == (2, 1)
    assert read_manifest(out / "manifest.jsonl").keys() == {"house", "cat"}
