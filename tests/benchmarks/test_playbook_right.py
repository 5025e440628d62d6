"""What benchmarks/gpu.py runs and times was right first."""

import os
import sys
from pathlib import Path

import pytest
import torch
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from playbook import blocks, checks, entries, layers, production, sweep
from playbook.setting import FULL, SMOKE
from support.part_lines import begin, end, failed, tasks_line, written

import clear_dit.bench.attention as attention_bench
from clear_dit.kernels.triton import tuning

CPU = torch.device("cpu")
GLUON = "gluon-q8x16-k8x8-s6"
HOPPER = "q8x8-k8x8-d64-w4-s3-tma", "q8x16-k8x8-d64-w8-s2-tma"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(entries, "table_key", lambda *_: ("sm_90", 128, 2))
    monkeypatch.setattr(checks.launch, "table_key", lambda *_: ("sm_90", 128, 2))


def test_gluon_is_tried_last_and_then_the_fastest(hopper, tmp_path):
    tasks = sweep.tasks(FULL(folder=tmp_path, device=CPU))
    of_gluon = [f"{GLUON} r={radius}" for radius in (8, 16, 32)]
    assert [task.label for task in tasks if task.alone] == of_gluon
    assert [task.label for task in tasks[-6:-3]] == of_gluon
    assert [task.label for task in tasks[-3:]] == [f"as chosen r={r}" for r in (8, 16, 32)]
    tasks = checks.tasks(FULL(folder=tmp_path, device=CPU))
    assert [task.alone for task in tasks[-4:]] == [False, True, True, False]
    groups = checks.waiting_checks(CPU)
    assert {check.entry for group in groups for check in group} == {GLUON}
    assert {check.head_dim for check in groups[0]} == {64, 128}
    everything = [check for group in checks.checks(CPU, tiny=False) for check in group]
    assert GLUON not in {check.entry for check in everything}


def test_what_runs_is_the_fastest_that_was_right_everywhere(hopper, tmp_path):
    setting = FULL(folder=tmp_path, device=CPU)
    assert entries.chosen_entry(setting, 8) == HOPPER[0]
    rows = [
        {"task": f"{entry} r={radius}", "entry": entry, "radius": radius, "far": False, "ms": ms}
        for radius in (8, 16)
        for entry, ms in ((HOPPER[0], 3.0), (HOPPER[1], 2.0), (GLUON, 1.0))
    ]
    file = written(tmp_path, "sweep", *rows[:3])
    assert entries.chosen_entry(setting, 8) == GLUON
    checked = written(tmp_path, "checks", {"subject": f"forward {GLUON}", "problem": "wrong"})
    assert entries.chosen_entry(setting, 8) == HOPPER[1]
    checked.path.unlink()
    written(tmp_path, "checks", begin("a", alone=True), failed("a"))
    assert entries.chosen_entry(setting, 8) == HOPPER[1]
    checked.path.unlink()
    assert entries.entry_of(setting, "triton", 8) == GLUON
    assert entries.entry_of(setting, "flex", 8) is None
    written(tmp_path, "sweep", *rows[3:5], failed(rows[5]["task"]))
    assert entries.chosen_entry(setting, 8) == HOPPER[1]
    file.append(rows[4] | {"radius": 32, "problem": "wrong"})
    assert entries.chosen_entry(setting, 8) == HOPPER[0]


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        (None, None),
        ("again", "wrong: other bits when it ran again"),
        ("a row", "wrong: other tiles give other results"),
        ("nowhere sampled", "wrong: some results are not written"),
    ],
)
def test_what_a_sample_does_not_see(monkeypatch, tmp_path, breaks, problem):
    calls, right = [], production.triton_attention
    monkeypatch.setattr(attention_bench, "CHECKED_QUERIES", 0)
    window = SMOKE(folder=tmp_path).window(64, 2)
    sampled = set(attention_bench._sampled_queries(window).tolist())
    place = next(at for at in range(window.sequence_length) if at not in sampled)

    def attention(*inputs, **options):
        out, lse = right(*inputs, **options)
        calls.append(os.environ[tuning.PIN])
        if breaks == "again" and len(calls) > 4:
            out[0, 0, 0, 0] += 1e-3
        if breaks == "a row" and len(calls) == 1:
            out[:, place] *= 1.1
        if breaks == "nowhere sampled" and len(calls) == 1:
            out[:, place] = float("nan")
        return out, lse

    monkeypatch.setattr(production, "triton_attention", attention)
    setting = SMOKE(folder=tmp_path)
    default, other = (entry.name for entry in entries.entries(setting, far=False))
    (row,) = production.measure(setting, 64, 2, False, other)
    assert row.get("problem", "").startswith(problem or "")
    assert ("ms" in row) == (problem is None)
    assert calls[0] == other
    assert set(calls) <= {default, other}


def test_the_backward_pass_is_not_timed_before_its_gradients_were_right(tmp_path):
    setting = SMOKE(folder=tmp_path)
    (row,) = layers._layer(setting, "tiled", 64, 2, True, repeats=1)
    assert row["problem"] == "not timed: 'gradients 64 px r=2' is not right, or was not looked at"
    assert "ms" not in row
    label = layers.gradients_label(64, 2)
    written(tmp_path, "layers", tasks_line(label), begin(label), end(label))
    (row,) = layers._layer(setting, "tiled", 64, 2, True, repeats=1)
    assert row["backward_ms"] is not None


def test_blocks_are_not_timed_where_attention_is_wrong(monkeypatch, tmp_path):
    setting = SMOKE(folder=tmp_path)
    assert blocks.why_wrong(setting, 64, 2) is None
    right = blocks.local_attention
    monkeypatch.setattr(blocks, "local_attention", lambda *x, **options: right(*x, **options) * 1.1)
    (row,) = blocks._time(None, setting, 64, 2, True)
    assert row["problem"].startswith("not timed, for a check failed: wrong: text rows")
