"""A kernel that is wrong or fails on a device is not used, and that is said."""

import logging
import re

import pytest
import torch
from support.triton_mode import interpreted

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton import backward, failures, ops, trust
from clear_dit.kernels.triton.device import Kernel, NoEntryError, kernels_of
from clear_dit.kernels.triton.geometry import Tiling, visits
from clear_dit.kernels.triton.launch import image_attention, text_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# As the product's, small enough for the interpreter.
SMALL = trust.Problem(
    Window(9, 11, 5, 6),
    Window(9, 11, 5, 4, 4, pooled_weight="count"),
    Window(9, 13, 5, 2, far_levels=3),
    Window(7, 9, 5, 4, 2),
    Window(7, 9, 5, 2, far_levels=3),
)
WINDOW = Window(4, 6, 3, 2)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is known of any kernel, and nothing that is found out stays."""
    monkeypatch.setattr(failures, "_failed", {})
    trust._why_wrong.cache_clear()
    yield
    trust._why_wrong.cache_clear()


def kernel(name, dtype=torch.float16, device=CPU):
    return Kernel(device, dtype, 16, name)


@pytest.mark.parametrize("name", trust.KERNELS)
def test_right_kernels_are_found_right(name):
    entry = trust.entries_of(kernel(name))[0]
    found = trust.look_at(kernel(name), entry, SMALL)
    assert found.wrong is None
    assert found.errors
    assert all(0 < error < 2e-3 for error in found.errors.values())


def test_the_products_problems_have_odd_sides_and_whole_tiles_within():
    for window in trust.Problem():
        assert window.height % 2 == 1
        assert window.width % 2 == 1
        assert window.text_length % 16
    first = trust.Problem().forward
    ranges = visits(first.height, first.width, first.radius, Tiling(8, 8, 8, 8), CPU).ranges
    assert (ranges[..., 1] > ranges[..., 0]).any()
    assert (ranges[..., 2] > ranges[..., 1]).any()


@pytest.mark.parametrize("fault", ["a smaller disc", "text rows of zero", "splits not added up"])
def test_a_wrong_kernel_is_noticed(monkeypatch, fault):
    name, results = "forward", {"image", "log-sum-exp"}
    if fault == "a smaller disc":
        monkeypatch.setattr(trust, "attention_of", lambda config, far: smaller_disc)
    elif fault == "text rows of zero":
        monkeypatch.setattr(trust, "text_attention", text_of_zeros)
        results = {"text"}
    else:
        monkeypatch.setattr(backward, "add_up", lambda targets, parts: None)
        name, results = "backward", {"gradient of key", "gradient of value"}
        monkeypatch.setattr(trust, "programs", lambda device: 64)
    found = trust.look_at(kernel(name), trust.entries_of(kernel(name))[0], SMALL)
    assert all(result in found.wrong for result in results)


def smaller_disc(*arguments):
    *before, geometry, config = arguments
    image_attention(*before, geometry._replace(radius=geometry.radius - 1), config)


def text_of_zeros(query, key, value, out, lse, text, *others):
    text_attention(query, key, value, out, lse, text, *others)
    out[:, :text] = 0


def test_a_kernel_that_raises_is_wrong_but_for_what_is_not_its_fault(monkeypatch):
    def run(error):
        def fail(*arguments):
            raise error

        monkeypatch.setattr(trust, "attention_of", lambda config, far: fail)
        return trust.look_at(kernel("forward"), trust.entries_of(kernel("forward"))[0], SMALL)

    assert run(RuntimeError("out of resource: shared memory")).wrong == (
        "failed with RuntimeError: out of resource: shared memory"
    )
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(RuntimeError("CUDA error: an illegal memory access was encountered"))


def looked_at(monkeypatch, wrong):
    """On a GPU that is not there every kernel of `wrong` is wrong; returns what was looked at."""
    seen = []

    def look_at(asked, entry):
        seen.append((asked.name, entry))
        reason = "is wrong: error of image 1.0e+00" if asked.name in wrong else None
        return trust.Finding(asked, entry, {}, reason, 0.1)

    monkeypatch.setattr(trust, "look_at", look_at)
    monkeypatch.setattr(trust, "entries_of", lambda asked: ("first", "second"))
    monkeypatch.setattr(trust, "capturing", lambda device: False)
    return seen


def test_each_kernel_is_looked_at_once_and_what_is_wrong_is_said_once(monkeypatch, caplog):
    seen = looked_at(monkeypatch, {"far"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert trust.why_not_trusted(kernel("forward", device=GPU)) is None
            assert "is wrong" in trust.why_not_trusted(kernel("far", device=GPU))
    assert seen == [("forward", "first"), ("far", "first"), ("far", "second")]
    assert len(caplog.records) == 2
    assert "Triton's far kernel on cuda:0" in caplog.records[0].getMessage()


def test_the_switch(monkeypatch):
    seen = looked_at(monkeypatch, {"forward"})
    monkeypatch.setenv(trust.SWITCH, "0")
    assert trust.why_not_trusted(kernel("forward", device=GPU)) is None
    assert seen == []


def test_a_capture_does_not_begin_with_a_look(monkeypatch):
    looked_at(monkeypatch, set())
    monkeypatch.setattr(trust, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call once, then capture"):
        trust.why_not_trusted(kernel("forward", device=GPU))


def test_which_kernels_attention_runs():
    assert kernels_of(False, False, False) == ("forward",)
    assert kernels_of(False, True, True) == ("pooled", "backward")
    assert kernels_of(True, False, True) == ("far", "pooling", "backward far")
    assert {name for far in (True, False) for name in kernels_of(far, not far, True)} <= set(
        trust.KERNELS
    )


@pytest.fixture
def triton_here(monkeypatch):
    """Triton runs on this CPU, in its interpreter, as if it were a GPU."""
    monkeypatch.setitem(choice._WHY_NOT, "triton", lambda *asked: None)
    choice._announce.cache_clear()


def tensors():
    torch.manual_seed(0)
    return torch.randn(3, 1, WINDOW.sequence_length, 1, 16)


def test_auto_goes_on_with_the_next_and_says_so(monkeypatch, triton_here, caplog):
    query, key, value = tensors()
    reason = "does not work on cuda:0: it is wrong"
    monkeypatch.setattr(choice, "why_not_trusted", lambda *asked: reason)
    with caplog.at_level(logging.INFO, logger="clear_dit.kernels.choice"):
        out = local_attention(query, key, value, WINDOW)
    assert [record.getMessage() for record in caplog.records] == [
        f"local attention runs on 'tiled'; triton {reason}"
    ]
    exact = local_attention(query, key, value, WINDOW, impl="reference")
    torch.testing.assert_close(out, exact)
    with pytest.raises(ValueError, match=re.escape(f"cannot run here: it {reason}")):
        local_attention(query, key, value, WINDOW, impl="triton")


def test_auto_goes_on_when_all_entries_fail_at_a_call(monkeypatch, triton_here, caplog):
    def fail(*arguments, **options):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(ops, "attention_of", lambda entry, far: fail)
    query, key, value = tensors()
    with caplog.at_level(logging.WARNING):
        out = local_attention(query, key, value, WINDOW)
    torch.testing.assert_close(out, local_attention(query, key, value, WINDOW, impl="reference"))
    assert "PassManager" in caplog.records[0].getMessage()
    with pytest.raises(NoEntryError, match="PassManager"):
        local_attention(query, key, value, WINDOW, impl="triton")


def test_a_compiled_graph_asks_while_it_is_traced(monkeypatch, triton_here):
    asked = []

    @torch.compiler.assume_constant_result
    def trusted(device, dtype, head_dim, kernels):
        asked.append((device.type, dtype, head_dim, kernels))
        return "does not work"

    monkeypatch.setattr(choice, "why_not_trusted", trusted)
    query, key, value = tensors()
    run = torch.compile(
        lambda *inputs: local_attention(*inputs, WINDOW), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(
        run(query, key, value), local_attention(query, key, value, WINDOW, impl="reference")
    )
    assert asked[0] == ("cpu", torch.float32, 16, ("forward",))
