"""What the Ray example maps over jobs works without Ray."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from clear_dit.errors import RequestError
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


class OneActor:
    """What the example uses of Ray, in this process."""

    def __init__(self, runner):
        self.data, self.runner = self, runner

    def from_items(self, rows, **options):
        self.rows = rows
        return self

    def map(self, actor, fn_constructor_args, **options):
        self.actor = actor(*fn_constructor_args, self.runner)
        return self

    def iter_rows(self):
        yield from map(self.actor, self.rows)
        self.actor.claims.close()


def test_another_job_file_adds_to_the_manifest(example, tmp_path, monkeypatch, fake_runner):
    out = tmp_path / "out"
    manifest = out / "manifest.jsonl"
    monkeypatch.setitem(sys.modules, "ray", OneActor(fake_runner()))

    def main(name, **prompts):
        jobs = tmp_path / name
        lines = ({"prompt": prompt, "id": label} for label, prompt in prompts.items())
        sizes = {"height": 32, "width": 32, "steps": 1}
        jobs.write_text("".join(f"{json.dumps(line | sizes)}\n" for line in lines))
        monkeypatch.setattr(sys, "argv", ["render.py", str(jobs), "--out", str(out)])
        return example.main()

    assert main("a.jsonl", house="a house", cat="a cat") == 0
    first = read_manifest(manifest)
    assert main("b.jsonl", tree="a tree", cat="a cat") == 0
    both = read_manifest(manifest)
    assert list(both) == ["house", "cat", "tree"]
    assert both.items() >= first.items()
    with pytest.raises(RequestError, match="the id 'cat' is that of another job in this folder"):
        main("b.jsonl", cat="a red cat")
    manifest.write_text("mine\n")
    with pytest.raises(RequestError, match="that no render wrote"):
        main("a.jsonl", house="a house")
    assert manifest.read_text() == "mine\n"
