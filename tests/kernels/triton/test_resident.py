"""What kernels read at every call stays where a CUDA graph has read it, and is made outside it."""

import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from support.triton_mode import interpreted

from clear_dit.kernels.triton import device, resident

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lists:
    tiles: torch.Tensor
    longest: int


def make(count: int) -> Lists:
    return Lists(torch.arange(count), count)


@pytest.fixture
def capture(monkeypatch):
    """Says whether a graph is being captured."""
    state = {"on": False}
    monkeypatch.setattr(resident, "capturing", lambda device: state["on"])
    return state


def test_the_same_arguments_give_the_same_tensors():
    kept = resident.Residents()
    first = kept.get(make, (5,), CPU)
    assert kept.get(make, (5,), CPU) is first
    assert kept.get(make, (6,), CPU).longest == 6


def test_the_least_recently_used_goes_first():
    kept = resident.Residents(most_bytes=3 * 8 * 10)
    alive = {count: weakref.ref(kept.get(make, (count,), CPU)) for count in (8, 9, 10)}
    kept.get(make, (8,), CPU)
    kept.get(make, (11,), CPU)
    gc.collect()
    assert [count for count, lists in alive.items() if lists() is not None] == [8, 10]


def test_a_number_of_lists_is_a_limit_too(monkeypatch):
    monkeypatch.setattr(resident, "MOST_LISTS", 2)
    kept = resident.Residents()
    alive = [weakref.ref(kept.get(make, (count,), CPU)) for count in range(4)]
    gc.collect()
    assert [lists() is not None for lists in alive] == [False, False, True, True]


def test_what_is_dropped_is_no_longer_read(monkeypatch):
    """Lists of one device may be dropped by those of another."""
    awaited = []
    monkeypatch.setattr(resident, "MOST_LISTS", 1)
    monkeypatch.setattr(resident, "run_apart", lambda device, run: make(3))
    monkeypatch.setattr(resident, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "synchronize", awaited.append)
    kept = resident.Residents()
    for place in (torch.device("cuda", 1), CPU, torch.device("cuda", 0)):
        kept.get(make, (3,), place)
    assert awaited == [torch.device("cuda", 1)]


def test_what_is_larger_than_the_limit_is_kept_while_it_is_the_last():
    kept = resident.Residents(most_bytes=1)
    assert kept.get(make, (5,), CPU) is kept.get(make, (5,), CPU)


def test_nothing_that_a_replay_reads_is_freed(capture):
    kept = resident.Residents(most_bytes=200)
    lists = kept.get(make, (20,), CPU)
    capture["on"] = True
    address = kept.get(make, (20,), CPU).tiles.data_ptr()
    capture["on"] = False
    alive = weakref.ref(lists)
    del lists
    for count in range(100, 200):
        kept.get(make, (count,), CPU)
    gc.collect()
    assert alive() is not None
    again = kept.get(make, (20,), CPU)
    assert again.tiles.data_ptr() == address
    assert torch.equal(again.tiles, torch.arange(20))


def test_nothing_is_made_while_a_graph_is_captured(capture):
    kept = resident.Residents()
    capture["on"] = True
    with pytest.raises(device.CaptureError, match="call once, then capture"):
        kept.get(make, (5,), CPU)
    capture["on"] = False
    assert kept.get(make, (5,), CPU).longest == 5


def test_apart_knows_nothing_of_the_callers_modes():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def work():
        assert threading.current_thread() is not threading.main_thread()
        assert not torch.is_grad_enabled()
        return torch.ones(3) + 1

    with FakeTensorMode():
        found = device.run_apart(CPU, work)
    assert not isinstance(found, FakeTensor)
    assert found.tolist() == [2, 2, 2]
    with pytest.raises(ZeroDivisionError):
        device.run_apart(CPU, lambda: 1 // 0)


@pytest.mark.skipif(not interpreted, reason="needs Triton and its interpreter")
def test_an_operator_under_capture(capture):
    """A graph that is captured after one call reads the lists of that call, for good."""
    from clear_dit.kernels.triton import geometry

    tiling = geometry.Tiling(4, 4, 4, 4)
    first = geometry.visits(9, 11, 3, tiling, CPU)
    capture["on"] = True
    assert geometry.visits(9, 11, 3, tiling, CPU) is first
    with pytest.raises(RuntimeError, match="image size"):
        geometry.visits(9, 97, 3, tiling, CPU)
