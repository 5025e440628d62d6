"""The Ray example without a cluster: what an actor does, the manifest, bad requests."""

import importlib.util
import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.packages import need
from support.slow import slow

from clear_dit.files import TEMPORARY_PREFIX
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
    begun = []
    actor = example.Generate(str(jobs), str(out), FLAGS, lambda *names: begun.append(names), runner)
    entries = [actor({"id": name}) for name in ("house", "cat", "house")]
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    assert begun == [(name, actor.name) for name in ("house", "cat", "house")]
    assert {frozenset(entry) for entry in entries} == {frozenset(entries[0])}
    assert entries[1]["error"] == "too large"
    assert (tmp_path / "log").read_text().split() == ["house.png", "cat.png"]
    actor.claims.close()
    result = render(jobs, out, FLAGS, progress=False, make_runner=fake_runner())
    assert (result["done"], result["generated"]) == (2, 1)
    assert read_manifest(out / "manifest.jsonl").keys() == {"house", "cat"}


@pytest.fixture
def alone(example, monkeypatch, fake_runner):
    """The example with one actor, in this process."""
    need("ray")

    def generate(jobs, options, settings):
        places = str(options.jobs), str(options.out)
        actor = example.Generate(*places, settings, lambda *_: None, fake_runner())
        with closing(actor.claims):
            for job in jobs:
                yield actor({"id": job.name}), [actor.name]

    monkeypatch.setattr(example, "generate", generate)
    return example


@slow
def test_another_job_file_adds_to_the_manifest(alone, tmp_path, capsys):
    out = tmp_path / "out"
    manifest = out / "manifest.jsonl"

    def main(name, **prompts):
        jobs = tmp_path / name
        lines = ({"prompt": prompt, "id": label} for label, prompt in prompts.items())
        sizes = {"height": 32, "width": 32, "steps": 1}
        jobs.write_text("".join(f"{json.dumps(line | sizes)}\n" for line in lines))
        return alone.main([str(jobs), "--out", str(out)])

    assert main("a.jsonl", house="a house", cat="a cat") == 0
    first = read_manifest(manifest)
    assert main("b.jsonl", tree="a tree", cat="a cat") == 0
    both = read_manifest(manifest)
    assert list(both) == ["house", "cat", "tree"]
    assert both.items() >= first.items()
    capsys.readouterr()
    assert main("b.jsonl", cat="a red cat") == 2
    told = capsys.readouterr().err
    assert told.startswith("render.py: the id 'cat' is that of another job in this folder")
    assert read_manifest(manifest) == both
    manifest.write_text("mine\n")
    assert main("a.jsonl", house="a house") == 2
    assert "that no render wrote" in capsys.readouterr().err
    assert manifest.read_text() == "mine\n"


@slow
def test_a_half_written_file_of_a_lost_actor_is_removed(alone, tmp_path):
    (tmp_path / "jobs.txt").write_text("a house\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{TEMPORARY_PREFIX}x.png").write_bytes(b"half")
    assert alone.main([str(tmp_path / "jobs.txt"), "--out", str(out)]) == 0
    assert not list(out.glob(f"{TEMPORARY_PREFIX}*"))


@slow
def test_what_was_done_is_told_when_an_actor_fails_for_good(alone, tmp_path, monkeypatch, capsys):
    import ray.exceptions

    def generate(jobs, options, settings):
        with closing(whole(jobs, options, settings)) as entries:
            yield next(entries)
        raise ray.exceptions.RayError("Traceback\nOSError: full\n\nThe above exception was ...")

    whole = alone.generate
    monkeypatch.setattr(alone, "generate", generate)
    (tmp_path / "jobs.txt").write_text("a house\na cat\n")
    out = tmp_path / "out"
    assert alone.main([str(tmp_path / "jobs.txt"), "--out", str(out)]) == 1
    assert capsys.readouterr().err == "render.py: an actor failed: OSError: full\n"
    entries = read_manifest(out / "manifest.jsonl").values()
    assert [entry["status"] for entry in entries] == ["done", "waiting"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--actors", "0"], "--actors must be at least 1, got 0."),
        (["--gpus", "-1"], "--gpus must be 0 or more, got -1.0."),
        (["--gpus", "nan"], "--gpus must be 0 or more, got nan."),
        (["--actors", "two"], "invalid int value: 'two'"),
    ],
)
def test_bad_options_are_refused(example, tmp_path, capsys, options, told):
    with pytest.raises(SystemExit) as caught:
        example.main([str(tmp_path / "jobs.txt"), "--out", str(tmp_path / "out"), *options])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@slow
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"prompt": "a house", "height": 33}\n', "line 1: --height must be"),
        ("\n", "there is no job in it"),
        (None, "jobs.jsonl"),
    ],
)
def test_a_bad_file_is_refused_before_ray_is_asked(example, tmp_path, capsys, text, told):
    need("ray")
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    if text is not None:
        jobs.write_text(text)
    assert example.main([str(jobs), "--out", str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_without_ray_it_says_what_to_install(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    assert example.main([str(tmp_path / "jobs.txt"), "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "ray[data]"' in capsys.readouterr().err
