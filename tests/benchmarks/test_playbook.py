"""The pieces of benchmarks/gpu.py: checks, counters, the carried cache, the headline, the plot."""

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
from playbook import check_kinds, checks, counters, layers, production, summary
from playbook.cache import prune, relocate
from playbook.gradients import sampled_gradient_errors
from playbook.kernel_times import kernel_times
from playbook.part_file import PartFile
from playbook.parts import PARTS
from playbook.setting import FULL, SMOKE
from support.part_lines import end, tasks_line, written

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


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
        moved = check_kinds._laid_out(x, layout)
        assert torch.equal(moved, x)
        assert not moved.is_contiguous()
        assert moved.stride(-1) == 1
    assert len({task.label for task in checks.tasks(SMOKE(folder=Path()))}) == 2


def test_the_production_shape_is_that_of_flux():
    setting = FULL(folder=Path(), device=CPU)
    labels = [task.label for task in production.tasks(setting)]
    assert labels == ["r=8", "r=16", "r=32", "far r=4", "far r=8", "copy", "L2", "product"]
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
        '"","","cycle",""\n"0","text_forward","1,234","5"\n"1","image_forward","7","8"\n'
        "==PROF== Done\n"
    )
    assert counters.read_ncu(printed) == {
        "text_forward": {
            "ID": "0", "Kernel Name": "text_forward", "sm__cycles.avg [cycle]": "1,234", "x": "5"
        },
        "image_forward": {
            "ID": "1", "Kernel Name": "image_forward", "sm__cycles.avg [cycle]": "7", "x": "8"
        },
    }  # fmt: skip
    assert counters.read_ncu("==ERROR== ERR_NVGPUCTRPERM") == {}
    assert counters.read_ncu('==PROF==\n"ID"\n') == {}


# Nsight Compute that does not end, nor what it watches.
HANGING_NCU = """#!/bin/sh
sleep 60 &
echo $! > {pid}
wait
"""


def test_what_nsight_compute_watches_ends_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert counters.find_ncu(tmp_path) is None
    for version in ("2024.3.2", "2025.1.0"):
        tool = tmp_path / "opt/nvidia/nsight-compute" / version / "ncu"
        tool.parent.mkdir(parents=True)
        tool.write_text(HANGING_NCU.format(pid=tmp_path / "pid"))
        tool.chmod(0o755)
    assert counters.find_ncu(tmp_path) == str(tool)
    monkeypatch.setattr(counters, "find_ncu", lambda _: str(tool))
    monkeypatch.setattr(counters, "NCU_SECONDS", 1)
    assert counters._by_ncu(8, "entry") == (None, "took longer than 1 s")
    watched = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30  # a busy machine takes a while to end what was killed
    while is_alive(watched) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(watched)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
    assert found.keys() == {"k.cubin", "k.json"}  # newer versions of Triton want all that is named


# As on a device, but for running: of one size and few entries, enough to tell keys apart.
PRECOMPILE = """
import functools, sys
import gpu_precompile, playbook.setting
from clear_dit.kernels.triton import tables
tables.FORWARD["sm_90"] = tables.FORWARD["sm_90"][:1]
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
    layer("", 8192, 8, 12.0, useful_tflops=190.0, far=False, compiled=2,
          kernels_ms={"image_forward": 9.0}),
    layer("", 8192, 16, 9.0, far=False, kernels_ms={}) | {"problem": "wrong"},
    layer("", 8192, 4, 9.0, far=True, kernels_ms={}, compiled=1),
    {"task": "copy", "bytes": 1, "copy_gb_s": 4000.0},
]  # fmt: skip
SWEEP = [
    {"task": task, "entry": entry, "far": False, "size": 8192, "radius": 8, "ms": ms,
     "useful_tflops": rate, "image_tflops": rate}
    for task, entry, ms, rate in (("a r=8", "a", 9.9, 212.0), ("as chosen r=8", "a", 10.0, 210.0))
]  # fmt: skip
COUNTERS = [
    {"task": "r=8", "kernel": "image_forward", "by": "ncu",
     "counters": {"a.pct_of_peak_sustained_elapsed [%]": "70", "b": "1"}}
]  # fmt: skip
LAYERS = [
    layer("triton", 1024, 8, 1.0, useful_tflops=100.0, backward_ms=9.0),
    layer("sdpa-cudnn", 1024, None, 2.0, dense_tflops=500.0),
    layer("sdpa-cudnn", 8192, None, 900.0, dense_tflops=600.0),
    layer("sdpa-flash", 1024, None, 3.0, dense_tflops=400.0),
    layer("flex", 8192, 8, 50.0),
    layer("triton", 8192, 8, 10.0, useful_tflops=211.0, backward_ms=31.0),
    {
        "task": "replay",
        "impl": "triton",
        "size": 1024,
        "radius": 8,
        "called_ms": 1.0,
        "replay_ms": 0.5,
    },
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
    parts = {
        "production": PRODUCTION, "sweep": SWEEP, "counters": COUNTERS, "layers": LAYERS,
        "blocks": BLOCKS,
    }  # fmt: skip
    for name, rows in parts.items():
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
        "backward over forward at 8192 px, at most": (3.1, True),
    }
    assert result["headline"]["useful TFLOP/s at 8192 px, r=8"]["predicted"] == 380
    small = "time of attention over the fastest full attention at 1024 px, r=8"
    assert result["headline"][small]["replayed"] == 0.25
    assert result["compiled"] == 3
    assert result["sweep"]["a r=8"]["ms"] == 9.9
    assert result["replay"] == {"replay": {"called_ms": 1.0, "replay_ms": 0.5}}
    assert result["counters"] == {"image_forward": {"a.pct_of_peak_sustained_elapsed [%]": "70"}}
    assert result["ceilings"] == {"copy_gb_s": 4000.0}
    assert result["wrong"] == {"production": {" 8192 16": "wrong"}}
    assert set(result["missing"]) == {"checks"}
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
    records = {name: PartFile(tmp_path, name).read() for name in PARTS}
    drawn = plot_gpu.panels(summary.layer_rows(records), summary.steps_of(records["blocks"]))
    assert drawn[0].curves["CLEAR, r=8"] == [(1024, 1.0), (8192, 10.0)]
    assert drawn[1].curves["CLEAR, r=8"] == [(1024, 1100.0), (8192, 4000.0)]
    assert plot_gpu.main() == 0
    with plot_gpu.Image.open(tmp_path / "plot.png") as image:
        assert image.size == (plot_gpu.WIDTH, plot_gpu.HEIGHT)
