"""The pieces of benchmarks/gpu.py: files of parts, processes and their limits, checks, headline."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.slow import slow
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plot_gpu
from playbook import checks, counters, layers, production, summary, supervise
from playbook.cache import prune, relocate
from playbook.gradients import sampled_gradient_errors
from playbook.kernel_times import kernel_times
from playbook.part_file import PartFile
from playbook.parts import Part
from playbook.setting import FULL, SMOKE

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
ENVIRONMENT = {"hardware": "none", "torch": "0", "triton": "0"}


def tasks_line(*labels):
    return {"event": "tasks", "labels": labels, "environment": ENVIRONMENT}


def begin(task, shard=0, at=0.0):
    return {"event": "begin", "task": task, "shard": shard, "at": at}


def end(task):
    return {"event": "end", "task": task}


def written(folder, name, *lines):
    file = PartFile(folder, name)
    for line in lines:
        file.append(line)
    return file


def test_what_a_part_s_file_says(tmp_path):
    file = written(
        tmp_path, "sweep",
        tasks_line("a", "b", "c", "d", "e", "f"),
        begin("a"), {"task": "a", "ms": 1.0}, end("a"),
        begin("b", 1), {"task": "b", "problem": "wrong"}, end("b"),
        begin("c"), {"task": "c", "ms": 2.0},
        {"event": "failed", "task": "c", "problem": "killed by SIGKILL"},
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
        file.append({"event": "begin", "task": task, "shard": 0, "at": time.time()})
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


def test_a_part_ends_with_its_time(tmp_path):
    begin, file = time.monotonic(), PartFile(tmp_path, "sweep")
    arguments = ["-c", WORKER, str(tmp_path)]
    supervise._run_shard(file, Part(30, 100), 0, arguments, begin + 2)
    assert time.monotonic() < begin + 10
    record = file.read()
    assert record.failed["slow"].startswith("no time")
    assert record.missing == ["ends", "z"]


def test_a_process_that_never_comes_to_a_task_is_not_started_again(tmp_path):
    file = PartFile(tmp_path, "sweep")
    arguments = ["-c", "raise ImportError('no such thing')"]
    supervise._run_shard(file, Part(30, 30), 0, arguments, time.monotonic() + 30)
    assert file.read().problems == {"all": "exit status 1: ImportError: no such thing"}


def test_a_fault_on_the_device_fails_its_group_and_says_so(monkeypatch):
    def fault(check, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(checks.KINDS, "gradients", fault)
    group = checks.checks(CPU, tiny=True)[0][:2]
    rows = []
    with pytest.raises(RuntimeError, match="CUDA error"):
        rows.extend(checks.run_group(group, CPU))
    monkeypatch.setitem(checks.KINDS, "gradients", lambda *_: [{"what": "output", "ok": False}])
    assert [row["problem"] for row in checks.run_group(group, CPU)] == ["wrong: output"] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_checks_of_a_gpu_cover_what_they_should():
    groups = checks.checks(CPU, tiny=False)
    everything = [check for group in groups for check in group]
    assert groups[0][0].dtype == torch.bfloat16
    assert groups[0][0].head_dim == 128
    assert {check.dtype for check in everything} == {torch.bfloat16, torch.float16, torch.float32}
    attention = [check for check in everything if check.kind == "gradients"]
    assert {0, 7, 512} <= {check.window.text_length for check in attention}
    assert {1, 2, 4} >= {check.window.down_factor for check in attention} > {1}
    assert any(check.window.radius == 1 for check in attention)
    assert {check.dtype for check in attention if check.window.far_levels} == {
        check.dtype for check in everything
    }
    assert any(check.window.far_levels for check in everything if check.kind == "forward")
    assert any(check.window.pooled_weight == "count" for check in attention)
    assert any(
        check.window.radius > check.window.height + check.window.width for check in attention
    )
    assert {check.head_dim for check in attention} == {64, 128}
    for layout in {check.layout for check in attention} - {"contiguous"}:
        x = torch.randn(2, 5, 3, 16)
        moved = checks._laid_out(x, layout)
        assert torch.equal(moved, x)
        assert not moved.is_contiguous()
        assert moved.stride(-1) == 1
    assert len({task.label for task in checks.tasks(SMOKE(folder=Path()))}) == 1


def test_the_production_shape_is_that_of_flux():
    setting = FULL(folder=Path(), device=CPU)
    labels = [task.label for task in production.tasks(setting)]
    assert labels == ["r=8", "r=16", "r=32", "far r=4", "far r=8"]
    assert setting.window(8192, 8).sequence_length == 512 + 512 * 512
    assert (setting.heads, setting.head_dim, setting.dtype) == (24, 128, torch.bfloat16)


def test_layers_are_in_order_of_importance():
    labels = [task.label for task in layers.tasks(FULL(folder=Path(), device=CPU))]
    assert len(set(labels)) == len(labels)
    order = [
        labels.index(label)
        for label in (
            "triton 4096 px r=8", "sdpa-cudnn 8192 px", "sdpa-flash 1024 px", "flex 8192 px r=8",
            "flex-flash 8192 px r=8", "natten 8192 px r=8", "xformers 8192 px r=8",
            "replay 1024 px r=8", "replay 2048 px r=32", "gradients 8192 px r=8",
            "triton 8192 px r=8 backward", "sdpa-cudnn 4096 px backward", "norm_rope 8192 px",
        )
    ]  # fmt: skip
    assert order == sorted(order)


def test_times_of_kernels_by_name():
    window = Window(4, 4, 2, 2)
    tensors = SMOKE(folder=Path()).problem(window).tensors()
    run = partial(production.triton_attention, *tensors, window, scale=0.25)
    times = kernel_times(run, 2, CPU)
    assert list(times) == ["text_forward", "text_merge", "image_forward"]
    assert min(times.values()) > 0
    # The text's queries see 18 keys each, half of them in twice the time of all of the image's.
    found = production.rates(SMOKE(folder=Path()), window, 10.0, {"text_merge": 1, "x": 4})
    flops = 4 * 16
    assert found["text_tflops"] == pytest.approx(flops * 2 * 18 / 1e9)
    image = window.attended_pairs() - 2 * 18
    assert found["image_tflops"] == pytest.approx(flops * image / 4e9)
    assert found["useful_tflops"] == pytest.approx(flops * (image + 36) / 1e10)


@pytest.mark.parametrize("broken", [None, "query", "key", "value"])
def test_sampled_gradients(broken):
    window = Window(9, 11, 5, 3)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, 104, 2, 16, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    for x in (query, key, value):
        x.requires_grad_()
    out, lse = local_attention(query, key, value, window, impl="reference", return_lse=True)
    out.backward(grad)
    if broken is not None:
        {"query": query, "key": key, "value": value}[broken].grad[0, :5] *= 1.1
    errors = sampled_gradient_errors(query, key, value, out.detach(), lse, grad, window)
    for name in ("query", "key", "value"):
        expected = 0.1 if name == broken else 0
        assert errors[f"{name}_error"] == pytest.approx(expected, abs=1e-8)


def test_what_nsight_compute_prints():
    printed = (
        '==PROF== Connected\n==PROF== Disconnected\n"ID","Kernel Name","sm__cycles.avg","x"\n'
        '"","","cycle",""\n"0","image_forward","1,234","5"\n"1","other","7","8"\n'
    )
    assert counters.read_ncu(printed) == {
        "ID": "0", "Kernel Name": "image_forward", "sm__cycles.avg [cycle]": "1,234", "x": "5"
    }  # fmt: skip
    assert counters.read_ncu("==ERROR== ERR_NVGPUCTRPERM") is None
    assert counters.read_ncu('==PROF==\n"ID"\n') is None


def test_a_carried_cache_is_found_where_it_lies(tmp_path):
    made = tmp_path / "made" / "KEY"
    made.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "k.ttir"):
        (made / name).write_text(name)
    paths = {name: f"/elsewhere/KEY/{name}" for name in ("k.cubin", "k.json", "k.ptx")}
    (made / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    assert prune(tmp_path / "made") == sum(path.stat().st_size for path in made.iterdir())
    assert {path.name for path in made.iterdir()} == {"k.cubin", "k.json", "__grp__k.json"}
    carried = (tmp_path / "made").rename(tmp_path / "carried")
    assert relocate(carried) == 1
    found = json.loads((carried / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert Path(found["k.cubin"]).read_text() == "k.cubin"


# As on a device, but for running: of one size only, which is enough to tell keys apart.
PRECOMPILE = """
import functools, sys
import gpu_precompile, playbook.setting
playbook.setting.FULL = functools.partial(
    playbook.setting.FULL, sizes=(1024,), radii=(8,), far_radii=(4,)
)
sys.exit(gpu_precompile.main())
"""


@slow
def test_a_cache_that_was_moved_is_hit_by_every_launch(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("PYTHONPATH", f"{BENCHMARKS}:{BENCHMARKS.parent}")

    def compiled(cache):
        command = [sys.executable, "-c", PRECOMPILE, "--cache", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return {path.name for path in cache.iterdir()}

    made = compiled(tmp_path / "made")
    assert len(made) > 10
    carried = (tmp_path / "made").rename(tmp_path / "carried")
    times = {path: path.stat().st_mtime_ns for path in carried.rglob("*.cubin")}
    assert relocate(carried) > 10
    assert compiled(carried) == made
    assert {path: path.stat().st_mtime_ns for path in carried.rglob("*.cubin")} == times


def layer(impl, size, radius, ms, **more):
    return {"task": f"{impl} {size} {radius}", "impl": impl, "size": size, "radius": radius,
            "ms": ms, **more}  # fmt: skip


PRODUCTION = [
    layer("", 8192, 8, 10.0, useful_tflops=210.0, far=False, kernels_ms={"image_forward": 9.0}),
    layer("", 8192, 16, 9.0, far=False, kernels_ms={}) | {"problem": "wrong"},
    layer("", 8192, 4, 9.0, far=True, kernels_ms={}),
]
LAYERS = [
    layer("triton", 1024, 8, 1.0, useful_tflops=100.0),
    layer("sdpa-cudnn", 1024, None, 2.0, dense_tflops=500.0),
    layer("sdpa-cudnn", 8192, None, 900.0, dense_tflops=600.0),
    layer("sdpa-flash", 1024, None, 3.0, dense_tflops=400.0),
    layer("flex", 8192, 8, 50.0),
    layer("triton", 8192, 8, 10.0, useful_tflops=211.0, backward_ms=31.0),
    {"task": "replay", "impl": "triton", "size": 1024, "radius": 8, "replay_ms": 0.5},
    {"task": "norm_rope", "impl": "norm_rope", "size": 8192, "fused_ms": 0.5},
]
BLOCKS = [
    {"task": "past the diagonal", "fused": True, "error": 0.0},
    {"task": "1", "size": 1024, "radius": None, "fused": None, "step_s": 1.0},
    {"task": "2", "size": 1024, "radius": 8, "fused": True, "step_s": 1.1},
    {"task": "3", "size": 8192, "radius": None, "fused": None, "step_s": 50.0},
    {"task": "4", "size": 8192, "radius": 8, "fused": True, "step_s": 4.0},
    {"task": "5", "size": 8192, "radius": 8, "fused": False, "step_s": 6.0},
]


def results(folder):
    for name, rows in (("production", PRODUCTION), ("layers", LAYERS), ("blocks", BLOCKS)):
        ends = [end(row["task"]) for row in rows]
        written(folder, name, tasks_line(*(row["task"] for row in rows)), *rows, *ends)
    return folder


def test_headline(tmp_path):
    result = summary.summary(results(tmp_path))
    found = {name: (each["value"], each["met"]) for name, each in result["headline"].items()}
    assert found == {
        "useful TFLOP/s at 8192 px, r=8": (210.0, True),
        "useful rate over cuDNN's dense rate at 8192 px, r=8": (0.35, False),
        "times faster than raster FlexAttention at 8192 px, r=8": (5.0, True),
        "time of attention over the fastest full attention at 1024 px, r=8": (0.5, True),
        "time of a step over full attention's at 1024 px, r=8": (1.1, False),
        "times faster a step at 8192 px, r=8": (12.5, True),
        "backward over forward, at most": (3.1, False),
    }
    assert result["wrong"] == {"production": {" 8192 16": "wrong"}}
    assert set(result["missing"]) == {"ceilings", "sweep", "counters", "checks"}
    assert result["kernels_ms"][" 8192 8"] == {"image_forward": 9.0}
    assert result["complete"] is False
    assert result["hardware"] == "none"
    (nothing,) = summary.headline([], []).values()
    assert nothing["met"] is None


def test_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_gpu.py", str(tmp_path), str(tmp_path / "plot.png")])
    assert plot_gpu.main() == 1
    assert "nothing was measured" in capsys.readouterr().err
    results(tmp_path)
    records = {name: PartFile(tmp_path, name).read() for name in ("production", "layers", "blocks")}
    drawn = plot_gpu.panels(summary.layer_rows(records), summary.steps_of(records["blocks"]))
    assert drawn[0].curves["CLEAR, r=8"] == [(1024, 1.0), (8192, 10.0)]
    assert drawn[1].curves["CLEAR, r=8"] == [(1024, 1100.0), (8192, 4000.0)]
    assert plot_gpu.main() == 0
    with plot_gpu.Image.open(tmp_path / "plot.png") as image:
        assert image.size == (plot_gpu.WIDTH, plot_gpu.HEIGHT)
