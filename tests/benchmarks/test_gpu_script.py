"""benchmarks/gpu.py on tiny problems in Triton's interpreter, what it refuses, and its plot."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from support.slow import slow
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_checks
import gpu_speed
import plot_gpu

from clear_dit.kernels.triton import tuning

CPU = torch.device("cpu")


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


@slow
def test_every_part_runs(monkeypatch, tmp_path, capsys):
    tried = tuning.TRIED
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert command(monkeypatch, "--out", tmp_path, "--interpret", "--seconds", 600) == 0
    assert tried == tuning.TRIED
    assert not torch.are_deterministic_algorithms_enabled()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == read(tmp_path, "summary")
    assert last["right"] is True
    assert last["interpreted"] is True
    assert last["missing"] == {}
    checks = read(tmp_path, "checks")["rows"]
    assert {row["subject"].split()[0] for row in checks} == {
        "attention",
        "forward",
        "text",
        "norm_rope",
        "pooling",
    }
    assert {row["what"] for row in checks} >= {
        "text rows",
        "image rows",
        "query",
        "key",
        "value",
        "spatial_weight",
        "far_offset",
    }
    assert all(row["ok"] for row in checks)
    attention = read(tmp_path, "attention")
    assert attention["torch"] == torch.__version__
    assert {row["impl"] for row in attention["rows"]} == {"tiled", "sdpa", "reference"}
    assert all(row["ms"] > 0 for row in attention["rows"])
    assert all(row["dense_tflops"] > 0 for row in attention["rows"] if row["impl"] == "sdpa")
    steps = [row for row in read(tmp_path, "blocks")["rows"] if "step_s" in row]
    assert [(row["size"], row["radius"], row["fused"]) for row in steps] == [
        (size, *variant)
        for size in (32, 64)
        for variant in ((None, None), (2, True), (3, True), (2, False))
    ]
    for row in steps:
        assert row["step_s"] == pytest.approx(19e-3 * row["double_ms"] + 38e-3 * row["single_ms"])
    assert [row["size"] for row in read(tmp_path, "norm_rope")["rows"]] == [32, 64]
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path, capsys):
    right = gpu_checks.triton_attention
    monkeypatch.setattr(
        gpu_checks, "triton_attention", lambda *a, **k: (right(*a, **k)[0] * 1.01, None)
    )
    few = gpu_checks.checks(CPU, tiny=True)
    monkeypatch.setattr(gpu_checks, "checks", lambda *a: [few[0][:1]])
    assert gpu.run(tmp_path, 600, interpret=True) == 1
    out = capsys.readouterr().out
    assert "FAILED: attention" in out
    for name in ("attention", "blocks"):
        part = read(tmp_path, name)
        assert part["rows"] == []
        assert part["missing"].startswith("not timed: attention")
    assert read(tmp_path, "norm_rope")["missing"] == "not timed: norm_rope was not found right"
    last = json.loads(out.splitlines()[-1])
    assert last["right"] is False
    assert set(last["missing"]) == {"attention", "blocks", "norm_rope"}


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    assert gpu.run(tmp_path, 0, interpret=True) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["missing"]["checks"] == "no time"
    assert set(last["missing"]) == set(gpu.UNTIL)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, "--out", tmp_path / "results") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_fault_on_the_device_fails_what_comes_after(monkeypatch):
    def fault(check, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_checks.KINDS, "gradients", fault)
    group = gpu_checks.checks(CPU, tiny=True)[0][:2]
    first, second = gpu_checks.run_group(group, CPU)
    assert "illegal memory access" in first["problem"]
    assert second["problem"] == gpu_checks.LOST
    assert not first["ok"]
    assert not second["ok"]


def test_the_checks_of_a_gpu_cover_what_they_should():
    groups = gpu_checks.checks(CPU, tiny=False)
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
        moved = gpu_checks._laid_out(x, layout)
        assert torch.equal(moved, x)
        assert not moved.is_contiguous()
        assert moved.stride(-1) == 1


@pytest.mark.parametrize("size", [64, 4096])
def test_cells_are_in_order_of_importance(size):
    setting = gpu_speed.FULL(device=CPU, sizes=(32, size))
    cells = gpu_speed.attention_cells(setting, {"forward q8x16-k8x8-d64-w8-s2"})
    assert (cells[0].impl, cells[0].size, cells[0].backward) == ("triton", size, True)
    entries = {cell.entry for cell in cells if cell.entry}
    assert entries == {"q8x8-k8x8-d64-w4-s2"}
    assert {cell.impl for cell in cells} == {
        "triton",
        "sdpa-cudnn",
        "sdpa-flash",
        "flex",
        "flex-tiled",
    }
    assert len(set(cells)) == len(cells)


def test_a_cell_that_cannot_run_says_why():
    setting = gpu_speed.SMOKE(device=CPU)
    row = gpu_speed.measure(gpu_speed.Cell("sdpa-cudnn", 32, 2, False), setting, 1)
    assert "needs a CUDA device" in row["problem"]
    assert "ms" not in row


def parts(tmp_path, attention, blocks):
    made = {name: gpu.Part(name, tmp_path, {}) for name in gpu.UNTIL}
    made["attention"].rows, made["blocks"].rows = attention, blocks
    return made


def layer(impl, size, radius, ms, **more):
    return {"impl": impl, "entry": None, "size": size, "radius": radius, "ms": ms, **more}


ATTENTION = [
    layer("triton", 1024, 8, 1.0, useful_tflops=100.0, backward_ms=2.0),
    layer("triton", 8192, 8, 10.0, useful_tflops=210.0, backward_ms=31.0),
    layer("triton", 8192, 8, 5.0, useful_tflops=420.0) | {"entry": "q8x8"},
    layer("triton", 8192, 16, 9.0, problem="wrong"),
    layer("sdpa-cudnn", 1024, None, 2.0, dense_tflops=500.0),
    layer("sdpa-cudnn", 8192, None, 900.0, dense_tflops=600.0),
    layer("sdpa-flash", 1024, None, 3.0, dense_tflops=400.0),
    layer("flex", 8192, 8, 50.0),
]
BLOCKS = [
    {"check": "past the diagonal", "fused": True, "error": 0.0},
    {"size": 1024, "radius": None, "fused": None, "step_s": 1.0},
    {"size": 1024, "radius": 8, "fused": True, "step_s": 1.1},
    {"size": 8192, "radius": None, "fused": None, "step_s": 50.0},
    {"size": 8192, "radius": 8, "fused": True, "step_s": 4.0},
    {"size": 8192, "radius": 8, "fused": False, "step_s": 6.0},
]


def test_headline(tmp_path):
    result = gpu.summary(parts(tmp_path, ATTENTION, BLOCKS), {"hardware": "none"}, 1.0)
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
    assert result["right"] is False
    nothing = gpu.summary(parts(tmp_path, [], []), {}, 1.0)["headline"]
    assert {each["met"] for each in nothing.values()} == {None}


def test_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_gpu.py", str(tmp_path), str(tmp_path / "plot.png")])
    environment = {"hardware": "none", "torch": "0", "triton": "0"}
    for part in parts(tmp_path, [], []).values():
        part.environment = environment
        part.save()
    assert plot_gpu.main() == 1
    assert "nothing was measured" in capsys.readouterr().err
    drawn = plot_gpu.panels(ATTENTION, BLOCKS)
    assert drawn[0].curves["CLEAR, r=8"] == [(1024, 1.0), (8192, 10.0)]
    assert drawn[1].curves["CLEAR, r=8"] == [(1024, 1100.0), (8192, 4000.0)]
    for part in parts(tmp_path, ATTENTION, BLOCKS).values():
        part.environment = environment
        part.save()
    assert plot_gpu.main() == 0
    with plot_gpu.Image.open(tmp_path / "plot.png") as image:
        assert image.size == (plot_gpu.WIDTH, plot_gpu.HEIGHT)


@slow
def test_processes_of_their_own_and_their_deadline(monkeypatch):
    monkeypatch.setattr(gpu_checks, "checks", lambda *a: [[], []])
    assert list(gpu_checks.run_checks(CPU, True, 1, time.monotonic() + 60)) == [[], []]
    with pytest.raises(TimeoutError, match="2 of 2 groups"):
        list(gpu_checks.run_checks(CPU, True, 1, time.monotonic()))
