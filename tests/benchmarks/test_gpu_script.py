"""benchmarks/gpu.py on tiny problems in Triton's interpreter, whatever becomes of its processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.slow import slow
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from playbook.part_file import PartFile
from playbook.parts import PARTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Put before all else in every process of the program: `patch` gets a module when it is loaded.
SABOTAGE = """
import importlib.abc, importlib.util, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), patch(module))
        return spec

sys.meta_path.insert(0, Finder())
{patch}
"""
# A process ends, in the way of `how`, when the second window of `production` is looked at.
ENDS = """
def patch(module):
    right = module.sampled_errors
    def sampled_errors(out, tensors, window, *rest, **options):
        if window.radius == 3 and window.height == 4:
            {how}
        return right(out, tensors, window, *rest, **options)
    module.sampled_errors = sampled_errors
"""
NO_TEXT = """
def patch(module):
    right = module.text_attention
    def text_attention(query, key, value, out, lse, text_length, *rest):
        right(query, key, value, out, lse, text_length, *rest)
        out[:, :text_length] = 0
    module.text_attention = text_attention
"""


def dry_run(*arguments, path=None):
    """What the program prints and its exit status; `path` holds a sitecustomize.py."""
    paths = [str(path)] if path else []
    paths += [str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--interpret", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def sabotage(folder, module, patch):
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SABOTAGE.format(module=module, patch=patch))
    return folder


def read(folder):
    return {name: PartFile(folder, name).read() for name in PARTS}


def last(done):
    return json.loads(done.stdout.splitlines()[-1])


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


@slow
def test_every_part_runs(tmp_path):
    folder = tmp_path / "results"
    done = dry_run("--out", folder, "--seconds", 3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert last(done) == json.loads((folder / "summary.json").read_text())
    assert last(done)["complete"] is True
    assert last(done)["wrong"] == last(done)["missing"] == {}
    assert last(done)["torch"] == torch.__version__
    # What a device machine gives back is 8 files at most.
    files = {path.name for path in folder.iterdir()}
    assert files == {"summary.json", *(f"{name}.jsonl" for name in PARTS)}
    assert len(files) < 8  # and a log
    found = read(folder)
    production = [row for row in found["production"].rows if "kernels_ms" in row]
    for row in production:
        assert set(row["kernels_ms"]) >= {"text_forward", "text_merge"}
        assert len(row["kernels_ms"]) >= 3
        assert max(row["text_error"], row["image_error"]) < 2e-3
        assert row["lse_error"] < 1e-3
        assert row["entry"] == "q8x8-k8x8-d64-w4-s2"
    assert [row["far"] for row in production] == [False, False, True]
    assert last(done)["ceilings"]["copy_gb_s"] > 0
    sweep = found["sweep"].rows
    assert len({row["entry"] for row in sweep}) > 1
    assert all("row_difference" in row for row in sweep if row["entry"] != production[0]["entry"])
    assert [row["task"] for row in sweep[-2:]] == ["as chosen r=2", "as chosen r=3"]
    chosen = {row["radius"]: row["entry"] for row in sweep[-2:]}
    for radius, entry in chosen.items():
        rows = [row for row in sweep[:-2] if row["radius"] == radius and not row["far"]]
        assert entry == min(rows, key=lambda row: row["ms"])["entry"]
    subjects = {row["subject"].split()[0] for row in found["checks"].rows}
    assert subjects == {"attention", "forward", "text", "norm_rope", "pooling"}
    (own,) = [row for row in found["checks"].rows if row["task"] == "as users get them"]
    assert own["seconds"] > 0
    assert {row["what"] for row in found["checks"].rows} >= {"text rows", "image rows", "key"}
    layers = found["layers"].rows
    assert {row["impl"] for row in layers} == {
        *("tiled", "triton", "sdpa", "reference", "natten", "norm_rope")
    }
    assert all("skipped" in row for row in layers if row["impl"] == "natten")
    assert all(row["dense_tflops"] > 0 for row in layers if row["impl"] == "sdpa")
    assert all(row["entry"] == chosen[row["radius"]] for row in layers if row["impl"] == "triton")
    steps = [row for row in found["blocks"].rows if "step_s" in row]
    assert [(row["size"], row["radius"], row["fused"]) for row in steps] == [
        (size, *variant)
        for size in (32, 64)
        for variant in ((None, None), (2, True), (3, True), (2, False))
    ]
    for row in steps:
        assert row["step_s"] == pytest.approx(19e-3 * row["double_ms"] + 38e-3 * row["single_ms"])


@slow
def test_a_process_that_crashes_loses_one_task_and_resume_does_it(tmp_path):
    folder = tmp_path / "results"
    path = sabotage(tmp_path / "path", "clear_dit.bench.attention", ENDS.format(how="os.abort()"))
    done = dry_run("--out", folder, "--parts", "production", path=path)
    assert done.returncode == 1
    record = read(folder)["production"]
    assert [row["task"] for row in record.rows] == ["r=2", "far r=2", "copy", "L2", "product"]
    assert record.failed["r=3"].startswith("killed by SIGABRT")
    assert "production: r=3: FAILED: killed by SIGABRT" in done.stdout
    assert set(last(done)["wrong"]["production"]) == {"r=3"}
    again = dry_run("--resume", folder, "--parts", "production")
    assert again.returncode == 0
    record = read(folder)["production"]
    assert len(record.rows) == 6
    assert record.rows[-1]["task"] == "r=3"
    assert record.failed == {}
    # Nothing else was done again.
    assert [line.split(": ")[1] for line in again.stdout.splitlines()[:-2]] == ["r=3"]


@slow
def test_a_process_that_is_killed_loses_no_other_rows(tmp_path):
    folder = tmp_path / "results"
    how = "os.kill(os.getpid(), signal.SIGKILL)"
    path = sabotage(tmp_path / "path", "clear_dit.bench.attention", ENDS.format(how=how))
    parts = ("--parts", "production,sweep", "--seconds", 3000)
    done = dry_run("--out", folder, *parts, path=path)
    assert done.returncode == 1
    found = read(folder)
    assert found["production"].failed == {"r=3": "killed by SIGKILL"}
    assert len(found["production"].rows) == 5
    lost = [label for label in found["sweep"].labels if label.endswith(" r=3")]
    assert found["sweep"].failed == dict.fromkeys(lost, "killed by SIGKILL")
    assert len(found["sweep"].rows) == len(found["sweep"].labels) - len(lost)


@slow
def test_a_wrong_kernel_is_not_timed(tmp_path):
    folder = tmp_path / "results"
    path = sabotage(tmp_path / "path", "clear_dit.kernels.triton.ops", NO_TEXT)
    done = dry_run("--out", folder, "--seconds", 3000, path=path)
    assert done.returncode == 1
    found = read(folder)
    for name in ("production", "sweep"):
        assert found[name].ended == set(found[name].labels)
        for row in (row for row in found[name].rows if "far" in row):
            assert row["problem"].startswith("wrong: text rows 1.")
            assert "ms" not in row
    assert all("counters" not in row for row in found["counters"].rows)
    wrong = {row["what"] for row in found["checks"].rows if "problem" in row and "what" in row}
    assert "text rows" in wrong
    assert "image rows" not in wrong
    layers = found["layers"].rows
    assert all("problem" in row for row in layers if row["task"].startswith("replay"))
    assert any(row.get("ms") for row in layers if row["impl"] == "tiled")
    # Full attention is measured; CLEAR, which was found wrong, is not.
    blocks = [row for row in found["blocks"].rows if "size" in row]
    assert all(("step_s" in row) == (row["radius"] is None) for row in blocks)


@slow
def test_without_diffusers_only_blocks_is_skipped(tmp_path):
    folder = tmp_path / "results"
    path = tmp_path / "path"
    path.mkdir()
    hidden = "import sys\nsys.modules.update(diffusers=None, transformers=None, typer=None)\n"
    (path / "sitecustomize.py").write_text(hidden)
    parts = ("--parts", "production,layers,blocks", "--seconds", 3000)  # of all that is imported
    done = dry_run("--out", folder, *parts, path=path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "production" not in last(done)["missing"]
    (reason,) = (why for task, why in last(done)["skipped"].items() if "blocks" in task)
    assert reason.startswith("needs the package diffusers, which is not installed")
    assert "\n" not in reason


def test_what_there_is_no_time_for_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.os, "environ", dict(os.environ))
    assert command(monkeypatch, "--out", tmp_path, "--interpret", "--seconds", 0) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["missing"] == dict.fromkeys(PARTS, "not started")
    assert result["complete"] is False


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, "--out", tmp_path / "results") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "new", "--parts", "speed"), "--parts must be of production, sweep, "),
        (("--out", "old"), "has results; complete them with --resume"),
        (("--resume", "none"), "there is no folder"),
        (("--out", "new", "--cache", "none"), "--cache: there is no folder"),
        ((), "one of the arguments --out --resume is required"),
    ],
)
def test_refusals(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    PartFile(tmp_path / "old", "sweep").append({"task": "a"})
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "--interpret", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
