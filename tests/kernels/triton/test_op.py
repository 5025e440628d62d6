"""The Triton op as PyTorch sees it: schema, compiler, FLOPs; refusals; offsets of 64 bits."""

from types import SimpleNamespace

import pytest
import torch
from support.agreement import inputs, problem
from support.operators import check_operator
from support.slow import slow, slow_but
from support.triton_mode import interpreted
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.reference import reference_attention
from clear_dit.kernels.triton import device
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton import launch, ops, tables
from clear_dit.kernels.triton.geometry import Tiling


def tensors(window, **shape):
    made = inputs(**problem(window, **shape), dtype=torch.float32)
    return [x.half().requires_grad_() for x in made[:3]]


@pytest.mark.parametrize(
    ("window", "group"),
    [
        (Window(5, 6, 3, 3), 1),
        (Window(5, 6, 3, 3, 2), 2),
        (Window(5, 6, 0, 2, far_levels=3), 2),
    ],
    ids=["disc", "pooled, grouped heads", "far, grouped heads without text"],
)
def test_custom_op_is_well_formed(window, group):
    query, key, value = tensors(window, batch=1, heads=1, head_dim=16, group=group)
    check_operator("triton", query, key, value, window)


@slow
def test_no_graph_break_under_compile():
    window = Window(5, 9, 3, 3, 2)
    leaves = tensors(window, batch=1, heads=1, head_dim=16)

    def run(query, key, value):
        return ops.triton_attention(query, key, value, window, scale=0.25)[0] * 2

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    expected = run(*leaves)
    torch.testing.assert_close(out, expected)
    for grad, other in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(grad, other)


def test_flop_counter_counts_the_windows_flops():
    window = Window(6, 5, 3, 3, 2)
    leaves = tensors(window, batch=2, heads=1, head_dim=16)
    with FlopCounterMode(display=False) as counter:
        out = ops.triton_attention(*leaves, window, scale=0.25)[0]
    counts = counter.get_flop_counts()["Global"]
    exact = 2 * window.attention_flops(heads=1, head_dim=16)
    assert counts[torch.ops.clear_dit.triton_attention] == exact
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.clear_dit.triton_attention_backward] == exact * 5 // 2


SMALL = Window(5, 9, 3, 2, far_levels=2)


@pytest.mark.parametrize("window", slow_but([Window(9, 10, 7, 4, 2), SMALL]))
def test_the_same_result_every_time(window):
    leaves = tensors(window, heads=1, group=2)
    results = []
    for _ in range(2):
        out = ops.triton_attention(*leaves, window, scale=0.25)[0]
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def on_gpu(dtype=torch.bfloat16, head_dim=128):
    return SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, shape=torch.Size((1, 9, 2, head_dim))
    )


@pytest.mark.parametrize(
    ("query", "capability", "reason"),
    [
        (on_gpu(), (9, 0), None),
        (on_gpu(torch.float32, 24), (8, 0), None),
        (on_gpu(torch.float64), (9, 0), "takes float16, bfloat16 or float32, got torch.float64"),
        (on_gpu(head_dim=320), (9, 0), "takes a head_dim of 1 to 256, got 320"),
        (on_gpu(), (7, 5), "needs compute capability 8.0 (Ampere) or later, got 7.5"),
    ],
)
def test_what_runs_on_a_gpu_and_why_not(monkeypatch, query, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.why_not_triton(query, False, False) == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gfx942:sramecc+:xnack-", None),
        ("gfx950", None),
        ("gfx1100", "needs one of gfx942, gfx950, got gfx1100"),
        ("gfx90a:sramecc+", "needs one of gfx942, gfx950, got gfx90a"),
    ],
)
def test_amds_devices_that_no_table_fits_are_refused(monkeypatch, name, reason):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device.why_not_triton(on_gpu(), False, False) == reason


def test_triton_missing_is_named(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    reason = device.why_not_triton(on_gpu(), False, False)
    assert reason == "needs the package triton, which is not installed"


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"),
     ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_120"),
     ((12, 1), "sm_120")],
)  # fmt: skip
def test_every_gpu_has_a_table(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device.architecture.cache_clear()
    assert device.architecture(torch.device("cuda")) == name
    assert name in tables.SHARED_MEMORY
    device.architecture.cache_clear()


def test_offsets_beyond_2_to_the_31():
    # Rows so far apart that their offsets need 64 bits; untouched memory is never taken.
    window = Window(4, 4, 2, 3)
    stride = 2**31 // (window.sequence_length - 2)
    far = torch.empty(window.sequence_length * stride, dtype=torch.float16)
    far = far.as_strided((1, window.sequence_length, 1, 16), (0, stride, 16, 1))
    near = torch.randn(1, window.sequence_length, 1, 16).half()
    far.copy_(near)
    out = torch.full(near.shape, float("nan"), dtype=torch.float16)
    lse = torch.full(near.shape[:3], float("nan"))
    config = tables.ForwardConfig(Tiling(4, 4, 4, 4), 16, 4, 1)
    launch.image_attention(
        far, far, far, far[:, :0], far[:, :0], torch.empty(0, 1), out, lse,
        Geometry.of(window, 0.25), config,
    )  # fmt: skip
    launch.text_attention(far, far, far, out, lse, 2, 0.25, tables.RunConfig(16, 16, 4, 1), 4)
    exact, _ = reference_attention(*(near.double(),) * 3, window, scale=0.25)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=2e-3)
