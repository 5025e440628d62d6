"""A kernel that is wrong or fails on a device is not used, and that is said."""

import json
import logging
import re

import pytest
import torch
from support.slow import slow, slow_but
from support.triton_mode import interpreted

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

import triton

from clear_dit.kernels.triton import backward, failures, on_disk, ops, tables, trust
from clear_dit.kernels.triton.device import Kernel, NoEntryError, kernels_of
from clear_dit.kernels.triton.geometry import Tiling, visits
from clear_dit.kernels.triton.launch import image_attention, text_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# As the product's, small enough for the interpreter.
SMALL = trust.Problems(
    (Window(9, 11, 5, 6), Window(8, 8, 16, 3), Window(8, 8, 0, 2)),
    (Window(9, 11, 5, 4, 4, pooled_weight="count"), Window(8, 8, 16, 3, 2)),
    (Window(9, 13, 5, 2, far_levels=3),),
    (Window(7, 9, 5, 4, 2),),
    (Window(7, 9, 5, 2, far_levels=3),),
)
WINDOW = Window(4, 6, 3, 2)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is known of any kernel, and nothing that is found out stays."""
    monkeypatch.setattr(failures, "_failed", {})
    trust._why_wrong.cache_clear()
    trust._truth.cache_clear()
    yield
    trust._why_wrong.cache_clear()


def kernel(name, dtype=torch.float16, device=CPU, group=1):
    return Kernel(device, dtype, 16, name, group)


@slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", trust.KERNELS)
def test_right_kernels_are_found_right(name, dtype):
    check_right(kernel(name, dtype))


@pytest.mark.parametrize(
    "name", slow_but(("text", "forward", "pooled", "far", "backward", "backward far"), "text")
)
def test_right_kernels_of_grouped_heads_are_found_right(name):
    check_right(kernel(name, group=2))


def check_right(asked):
    found = trust.look_at(asked, trust.entries_of(asked)[0], SMALL)
    assert found.wrong is None
    assert found.errors
    assert all(0 < error <= trust._limit(asked, name) / 2 for name, error in found.errors.items())


def test_heads_that_read_other_keys_are_noticed(monkeypatch):
    """As if key heads took turns."""

    def take_turns(query, *others):
        places = torch.arange(query.shape[2]).view(2, -1).T.flatten()
        text_attention(query[:, :, places], *others)

    monkeypatch.setattr(trust, "text_attention", take_turns)
    asked = kernel("text", group=2)
    assert "output" in trust.look_at(asked, trust.entries_of(asked)[0], SMALL).wrong


def test_grouped_heads_are_named():
    assert str(kernel("far", group=4)) == (
        "Triton's far kernel on cpu (float16, head_dim 16, 4 heads a key head)"
    )


def test_the_products_problems_are_of_both_binaries_with_whole_tiles_within():
    problems = trust.Problems()
    assert set(trust._WINDOWS_OF.values()) == set(problems._fields)
    for windows in problems:
        first, *more = windows
        assert first.height % 2 == first.width % 2 == 1
        assert first.text_length % 16
        for other in more:
            sizes = (other.height, other.width, other.text_length)
            assert not any(size % 16 for size in sizes)
    texts = {-(-window.text_length // 64) for window in problems.forward}
    assert texts == {0, 3, 4}
    first = problems.forward[0]
    ranges = visits(first.height, first.width, first.radius, Tiling(8, 8, 8, 8), CPU).ranges
    assert (ranges[..., 1] > ranges[..., 0]).any()
    assert (ranges[..., 2] > ranges[..., 1]).any()


@pytest.mark.parametrize(
    "fault",
    slow_but(
        ["a smaller disc", "text rows of zero", "splits not added up", "one row of zero"],
        "text rows of zero",
    ),
)
def test_a_wrong_kernel_is_noticed(monkeypatch, fault):
    name, results = "forward", {"output", "log-sum-exp"}
    if fault == "a smaller disc":
        monkeypatch.setattr(trust, "attention_of", lambda config, far: smaller_disc)
    elif fault == "one row of zero":
        monkeypatch.setattr(trust, "attention_of", lambda config, far: row_of_zeros)
        results = {"output"}
    elif fault == "text rows of zero":
        monkeypatch.setattr(trust, "text_attention", text_of_zeros)
        name, results = "text", {"output"}
    else:
        monkeypatch.setattr(backward, "add_up", lambda targets, parts: None)
        name, results = "backward", {"gradient of key", "gradient of value"}
        monkeypatch.setattr(trust, "programs", lambda device: 64)
    found = trust.look_at(kernel(name), trust.entries_of(kernel(name))[0], SMALL)
    assert all(result in found.wrong for result in results)


def smaller_disc(*arguments):
    *before, geometry, config = arguments
    image_attention(*before, geometry._replace(radius=geometry.radius - 1), config)


def row_of_zeros(*arguments):
    image_attention(*arguments)
    arguments[6][0, -3, 0] = 0


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
    with pytest.raises(RuntimeError, match="out of memory") as told:
        run(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert trust.SWITCH in told.value.__notes__[0]


def test_an_error_of_the_oracle_is_not_the_kernels(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no room")

    monkeypatch.setattr(trust, "reference_attention", fail)
    with pytest.raises(RuntimeError, match="no room"):
        trust.look_at(kernel("forward"), trust.entries_of(kernel("forward"))[0], SMALL)


def looked_at(monkeypatch, wrong):
    """On a GPU that is not there every kernel of `wrong` is wrong; returns what was looked at."""
    seen = []

    def look_at(asked, entry):
        seen.append((asked.name, entry))
        reason = "is wrong: error of image 1.0e+00" if asked.name in wrong else None
        return trust.Finding(asked, entry, {}, reason, 0.1)

    monkeypatch.setattr(trust, "look_at", look_at)
    monkeypatch.setattr(trust, "entries_of", lambda asked: ("first", "second"))
    monkeypatch.setattr(trust, "may_hang", lambda asked, entry: False)
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
    assert kernels_of(False, False, False) == ("text", "forward")
    assert kernels_of(False, True, True) == ("text", "pooled", "backward")
    assert kernels_of(True, False, True) == ("text", "far", "backward far")
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
    said = [record for record in caplog.records if record.name == "clear_dit.kernels.choice"]
    assert [record.getMessage() for record in said] == [
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_asks_while_it_is_traced(monkeypatch, triton_here, dynamic):
    torch._dynamo.reset()
    asked = []

    @torch.compiler.assume_constant_result
    def trusted(device, dtype, head_dim, kernels, group):
        asked.append((device.type, dtype, head_dim, kernels, group))
        return "does not work"

    monkeypatch.setattr(choice, "_why_not_trusted", trusted)
    query, key, value = tensors()
    run = torch.compile(
        lambda *inputs: local_attention(*inputs, WINDOW),
        fullgraph=True, dynamic=dynamic, backend="eager",
    )  # fmt: skip
    torch.testing.assert_close(
        run(query, key, value), local_attention(query, key, value, WINDOW, impl="reference")
    )
    assert asked[0] == ("cpu", torch.float32, 16, ("text", "forward"), 1)


@pytest.fixture
def found_out(monkeypatch, tmp_path):
    """What a machine kept on disk: nothing yet."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(trust, "_findings", on_disk.Kept("findings.json"))
    return tmp_path / "findings.json"


def process_that(monkeypatch, told):
    """Stands for the process that looks; returns what it was asked."""
    asked = []

    def ask(about):
        asked.append(about)
        return told

    monkeypatch.setattr(trust, "_ask", ask)
    return asked


RIGHT = {"errors": {"output": 0.001}, "wrong": None}


def test_a_kernel_that_may_hang_is_looked_at_once_in_a_process(monkeypatch, found_out):
    asked = process_that(monkeypatch, RIGHT)
    for _ in range(2):
        found = trust.look_in_a_process(kernel("forward", device=GPU), "gluon")
        assert (found.errors, found.wrong) == ({"output": 0.001}, None)
    assert asked == [["cuda:0", "float16", 16, "forward", 1, "gluon"]]


def test_a_kernel_that_hangs_twice_is_wrong_for_good(monkeypatch, found_out):
    about = kernel("forward", device=GPU), "gluon"
    for count in (1, 1, 0):  # of processes that look
        monkeypatch.setattr(trust, "_findings", on_disk.Kept("findings.json"))  # another process
        asked = process_that(monkeypatch, None)
        assert trust.look_in_a_process(*about).wrong == f"did not end within {trust.SECONDS} s"
        assert len(asked) == count
    found_out.unlink()
    monkeypatch.setattr(trust, "_findings", on_disk.Kept("findings.json"))
    process_that(monkeypatch, RIGHT)
    assert trust.look_in_a_process(*about).wrong is None


@slow
def test_a_true_process_that_finds_no_device_is_tried_again_by_the_next(found_out):
    found = trust.look_in_a_process(kernel("forward", device=GPU), "gluon")
    assert found.wrong.startswith("could not be tried: its process ended with status 1: ")
    assert not found_out.exists()


def test_a_true_process_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(trust, "SECONDS", 0.01)
    assert trust._ask(["cpu", "float16", 16, "forward", 1, "gluon"]) is None


def test_what_a_process_prints_is_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(
        trust, "look_at", lambda asked, entry: trust.Finding(asked, entry, {"output": 0.5}, "no", 1)
    )
    alarms = []
    monkeypatch.setattr(trust.signal, "alarm", alarms.append)  # it would end the tests' process
    trust.main(json.dumps(["cpu", "float16", 16, "forward", 1, "gluon"]))
    assert json.loads(capsys.readouterr().out) == {"errors": {"output": 0.5}, "wrong": "no"}
    assert alarms == [int(trust.SECONDS) + 1]


def test_only_kernels_with_barriers_of_their_own_may_hang(monkeypatch):
    entries = (*tables.FORWARD["sm_90"], tables.GluonConfig(4))
    monkeypatch.setattr(tables, "forward_configs", lambda *key, far: entries)
    hanging = [entry for entry in entries if trust.may_hang(kernel("forward"), entry.name)]
    assert hanging == [entries[-1]]
    assert not trust.may_hang(kernel("backward"), failures.ONLY)
