"""Every kernel and every table entry compiles for GPUs that are not here, within their limits."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from support.slow import slow
from support.triton_mode import interpreted

from clear_dit.kernels.triton import tables

if not interpreted:
    pytest.skip("needs Triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import triton_compile

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {
    "image_forward", "text_forward", "text_merge", "prepare_rows", "image_query_backward",
    "image_key_backward", "text_query_backward", "common_key_backward",
    "far_forward", "far_query_backward", "far_key_backward",
    "norm_rope_kernel", "norm_rope_backward_kernel", "pool_tiles",
}  # fmt: skip


@slow
@pytest.mark.parametrize("group", [1, 4])
def test_every_kernel_compiles_for_one_gpu(group, monkeypatch):
    """Of few channels, which compile soonest; all else is the same."""
    # Triton decides at its import whether it interprets: a process of its own.
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pool.submit(triton_compile.compile_kind, "sm_90", "bfloat16", 16, group).result()
    assert not [row["error"] for row in rows if "error" in row]
    assert {entry.name for entry in tables.FORWARD["sm_90"]} <= {row["entry"] for row in rows}
    assert {row["name"] for row in rows} >= KERNELS
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert row["loop_spills"] == 0, row
    default = tables.FORWARD["sm_90"][0]
    text, whole, border = next(row["loops"] for row in rows if row["entry"] == default.name)
    assert text["products"] == whole["products"] == border["products"]
    assert text["instructions"] < whole["instructions"] < border["instructions"]
    # One multiply-add for each of a thread's 32 scores, and one exponential.
    assert all(32 <= loop["classes"]["ffma"] == loop["classes"]["mufu"] for loop in (text, border))
    buffers = {row["entry"]: row["buffers"] for row in rows if row["name"] == "image_forward"}
    # Lists of 32-bit numbers would be copied ahead too, and leave the tiles one buffer less.
    assert buffers[default.name]["1x8x8x1x16xbf16"] == default.num_stages
    assert [shape for shape in buffers[default.name] if "i32" in shape or "i16" in shape] == []


# Every kind for one architecture, and what most models have for the others; the program's own
# choice is all of both.
JOBS = [("sm_90", *kind) for kind in triton_compile.KINDS]
JOBS += [(name, *triton_compile.KINDS[0]) for name in ARCHITECTURES if name != "sm_90"]


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        # Triton decides at its import whether it interprets: processes of their own.
        patch.delenv("TRITON_INTERPRET")
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        found = triton_compile.compile_all(JOBS, os.cpu_count() or 1)
    assert not [row["error"] for row in found if "error" in row]
    return found


@slow
def test_every_entry_is_there(rows):
    for architecture in ARCHITECTURES:
        compiled = {row["entry"] for row in rows if row["architecture"] == architecture}
        entries = tables.FORWARD[architecture]
        if architecture == "sm_90":
            entries += tables.WIDE_FORWARD + tables.FLOAT32_FORWARD
        assert {entry.name for entry in entries} <= compiled
        kernels = {row["name"] for row in rows if row["architecture"] == architecture}
        assert kernels >= KERNELS


@slow
def test_shared_memory_is_within_the_limit(rows):
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row


@slow
@pytest.mark.parametrize(
    ("architecture", "memory"), [("sm_89", 102400), ("sm_90", 233472), ("sm_120", 102400)]
)
def test_two_programs_of_the_default_share_a_multiprocessor(rows, architecture, memory):
    """One's softmax then hides behind the other's products."""
    entry = tables.FORWARD[architecture][0]
    wanted = {"architecture": architecture, "head_dim": 128, "dtype": "bfloat16"}
    wanted |= {"entry": entry.name, "name": "image_forward"}
    (row,) = (row for row in rows if wanted.items() <= row.items())
    assert 2 * (row["shared"] + 1024) <= memory
    assert 2 * 32 * entry.num_warps * (-(-row["registers"] // 8) * 8) <= 65536


@slow
def test_no_spills_in_half_precision_up_to_128_channels(rows):
    spilling = [
        row
        for row in rows
        if row["dtype"] == "bfloat16" and row["head_dim"] <= 128 and row["loop_spills"]
    ]
    assert not spilling


@slow
def test_hopper_runs_warp_group_products(rows):
    names = {"image_forward", "text_forward", "image_query_backward", "image_key_backward"}
    seen = [row for row in rows if row["architecture"] == "sm_90" and row["name"] in names]
    assert seen
    half = [row for row in seen if row["dtype"] == "bfloat16" and row["head_dim"] <= 128]
    assert all(row["wgmma"] for row in half)
