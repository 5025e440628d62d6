"""Processes of benchmarks/gpu.py and what they write, whatever becomes of them."""

import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from playbook import supervise, worker
from playbook.part_file import PartFile, lost_alone
from playbook.parts import Part
from playbook.setting import Task
from support.part_lines import ENVIRONMENT, begin, end, failed, tasks_line, written


def test_what_a_part_s_file_says(tmp_path):
    file = written(
        tmp_path, "sweep",
        tasks_line("a", "b", "c", "d", "e", "f"),
        begin("a"), {"task": "a", "ms": 1.0}, end("a"),
        begin("b", 1), {"task": "b", "problem": "wrong"}, end("b"),
        begin("c"), {"task": "c", "ms": 2.0},
        failed("c"),
        begin("d", 1, 5.0), {"task": "d", "ms": 3.0},
        begin("e"), {"task": "e", "skipped": "is not installed"}, end("e"),
    )  # fmt: skip
    with file.path.open("a") as cut_short:
        cut_short.write('{"task": "d", "m')
    record = file.read()
    assert record.complete == {"a", "e"}
    assert record.problems == {"b": "wrong", "c": "killed by SIGKILL"}
    assert record.missing == ["d", "f"]
    assert record.running == {1: ("d", 5.0)}
    # Rows so far of what did not end are there.
    assert [row["ms"] for row in record.good_rows] == [1.0, 2.0, 3.0]
    assert not record.all_is_right
    file.keep_done()
    kept = file.read()
    assert kept.labels == record.labels
    assert kept.environment == ENVIRONMENT
    # What was skipped may be possible by now.
    assert [row["task"] for row in kept.rows] == ["a"]
    assert kept.missing == ["b", "c", "d", "e", "f"]
    assert kept.failed_before == {"c"}
    file.keep_done()
    assert file.read().failed_before == {"c"}


# A worker without PyTorch. It goes on where another one ended.
WORKER = """
import os, sys, time
from pathlib import Path
from playbook.part_file import PartFile
file = PartFile(Path(sys.argv[1]), "sweep")
tried = file.read().ended | file.read().failed.keys()
file.append({"event": "tasks", "labels": ["a", "slow", "ends", "z"], "environment": {}})
for task in ("a", "slow", "ends", "z"):
    if task not in tried:
        file.append(
            {"event": "begin", "task": task, "shard": 0, "at": time.time(), "alone": True}
        )
        file.append({"task": task, "ms": 1.0})
        if task == "slow":
            time.sleep(60)
        if task == "ends":
            sys.exit("the reason")
        file.append({"event": "end", "task": task})
"""


def test_a_task_that_hangs_or_ends_its_process_is_named_and_the_next_one_runs(tmp_path):
    part, deadline = Part(30, 1), time.monotonic() + 30
    file = PartFile(tmp_path, "sweep")
    supervise._run_shard(file, part, 0, ["-c", WORKER, str(tmp_path)], deadline)
    record = file.read()
    assert record.ended == {"a", "z"}
    assert record.failed == {"slow": "took longer than 1 s", "ends": "exit status 1: the reason"}
    assert [row["task"] for row in record.rows] == ["a", "slow", "ends", "z"]
    assert record.lost == {"slow", "ends"}
    assert lost_alone(tmp_path).startswith("sweep: ")


def test_a_part_ends_with_its_time(tmp_path):
    begin, file = time.monotonic(), PartFile(tmp_path, "sweep")
    arguments = ["-c", WORKER, str(tmp_path)]
    supervise._run_shard(file, Part(30, 100), 0, arguments, begin + 2)
    assert time.monotonic() < begin + 10
    record = file.read()
    assert record.failed["slow"].startswith("no time")
    assert record.missing == ["ends", "z"]
    assert record.lost == set()


def test_a_process_that_does_not_end_is_named_and_left(monkeypatch, capsys):
    monkeypatch.setattr(supervise, "END_SECONDS", 0.1)
    kill = supervise.os.killpg
    monkeypatch.setattr(supervise.os, "killpg", lambda *_: None)
    with supervise.process(["-c", "import time; time.sleep(60)"]) as running:
        pass
    assert "was killed and does not end" in capsys.readouterr().out
    kill(running.pid, supervise.signal.SIGKILL)
    running.wait()


def part_of(monkeypatch, *tasks):
    """A part of these tasks, (label, alone, what happens), as `worker.work` finds it."""

    def rows(happens):
        happens()
        yield {"ms": 1.0}

    made = [Task(label, partial(rows, happens), alone) for label, alone, happens in tasks]
    monkeypatch.setattr(worker, "import_module", lambda *_: SimpleNamespace(tasks=lambda _: made))
    monkeypatch.setattr(worker, "environment", lambda _: ENVIRONMENT)


def nothing():
    pass


def illegal_access():
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def test_what_may_hang_has_a_process_of_its_own(monkeypatch, tmp_path):
    tasks = ("a", False), ("g1", True), ("g2", True), ("z", False)
    part_of(monkeypatch, *((*task, nothing) for task in tasks))
    work = partial(worker.work, "sweep", tmp_path, True, 0, 1)
    done = []
    for status in (1, 1, 0):
        assert work() == status
        done.append(len(PartFile(tmp_path, "sweep").read().ended))
    assert done == [1, 3, 4]


def test_one_that_may_hang_and_is_lost_stands_for_the_others(monkeypatch, tmp_path, capsys):
    part_of(
        monkeypatch,
        ("g1", True, illegal_access), ("g2", True, nothing), ("z", False, nothing),
    )  # fmt: skip
    for status in (1, 0):
        assert worker.work("sweep", tmp_path, True, 0, 1) == status
    record = PartFile(tmp_path, "sweep").read()
    assert record.lost == {"g1"}
    assert record.failed["g2"].startswith("not tried: sweep: g1: RuntimeError: Triton Error [CUDA]")
    assert record.ended == {"z"}
    # In a later part too.
    assert worker.work("checks", tmp_path, True, 0, 1) == 0
    assert PartFile(tmp_path, "checks").read().failed.keys() == {"g1", "g2"}
    assert "checks: g1: FAILED: not tried: sweep: g1" in capsys.readouterr().out


def test_what_failed_before_is_tried_last(monkeypatch, tmp_path):
    file = written(tmp_path, "sweep", tasks_line("a", "b"), begin("a"), failed("a"))
    file.keep_done()
    part_of(monkeypatch, ("a", False, nothing), ("b", False, nothing))
    assert worker.work("sweep", tmp_path, True, 0, 1) == 0
    assert [row["task"] for row in file.read().rows] == ["b", "a"]


def test_what_is_chosen_is_measured_again_after_what_was_missing(monkeypatch, tmp_path):
    labels = "a", "as chosen"
    lines = [line for task in labels for line in (begin(task), {"task": task}, end(task))]
    assert written(tmp_path, "sweep", tasks_line(*labels), *lines).read().done == set(labels)
    file = written(tmp_path, "checks", tasks_line("g", *labels), begin("g"), failed("g"), *lines)
    file.keep_done()
    part_of(monkeypatch, *((label, False, nothing) for label in ("g", *labels)))
    assert worker.work("checks", tmp_path, True, 0, 1) == 0
    assert [row["task"] for row in file.read().rows] == ["a", "g", "as chosen"]


def test_a_process_that_never_comes_to_a_task_is_not_started_again(tmp_path):
    file = PartFile(tmp_path, "sweep")
    arguments = ["-c", "raise ImportError('no such thing')"]
    supervise._run_shard(file, Part(30, 30), 0, arguments, time.monotonic() + 30)
    assert file.read().problems == {"all": "exit status 1: ImportError: no such thing"}
