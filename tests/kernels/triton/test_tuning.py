"""Which entry runs: pinned, remembered, measured, or the next one where one fails."""

import json
import logging

import pytest
import torch
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton", allow_module_level=True)

from clear_dit.kernels.triton import failures, tables, tuning
from clear_dit.kernels.triton.device import Kernel, NoEntryError

ENTRIES = tables.FORWARD["sm_90"]
DEFAULT = ENTRIES[0]
POINTERS = next(entry for entry in ENTRIES if not entry.descriptor)
LARGE = tuning.size_class(24 * 2**18)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, on which every entry is right; nothing is known of it yet."""
    monkeypatch.setattr(failures, "_failed", {})
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_path", lambda: tmp_path / "cache" / "fastest.json")
    monkeypatch.setattr(tuning, "why_not_entry", failures.failure)
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.delenv(tuning.PIN, raising=False)
    tuning._kept.cache_clear()
    yield
    tuning._kept.cache_clear()


def kind(size=LARGE, radius=8, device="cuda:0"):
    kernel = Kernel(torch.device(device), torch.bfloat16, 128, "forward")
    return tuning.Kind(kernel, radius, True, size)


class Launches:
    """What stands for a kernel: which entries ran, how long they take, and which fail."""

    def __init__(self, monkeypatch, milliseconds=None, failing=None):
        self.ran, self.measured, self.failing = [], [], failing or {}
        self.milliseconds = milliseconds or {}
        monkeypatch.setattr(tuning, "_milliseconds", self.measure)

    def __call__(self, entry):
        if entry.name in self.failing:
            raise self.failing[entry.name]
        self.ran.append(entry.name)

    def measure(self, run, entry):
        self.measured.append(entry.name)
        return self.milliseconds.get(entry.name, 50.0)


def test_a_pin_decides_and_an_unknown_one_is_refused(monkeypatch):
    assert tuning.pinned(ENTRIES, True) is None
    monkeypatch.setenv(tuning.PIN, ENTRIES[1].name)
    assert tuning.pinned(ENTRIES, True) is ENTRIES[1]
    monkeypatch.setenv(tuning.PIN, "fast")
    with pytest.raises(ValueError, match=r"CLEAR_DIT_TRITON_FORWARD must be one of q8x8.*'fast'"):
        tuning.pinned(ENTRIES, True)


def test_a_pinned_descriptor_falls_to_its_twin_or_is_refused_by_name(monkeypatch):
    monkeypatch.setenv(tuning.PIN, DEFAULT.name)
    assert DEFAULT.descriptor
    assert tuning.pinned(ENTRIES, False) is POINTERS
    without_twin = [entry for entry in ENTRIES if entry is not POINTERS]
    with pytest.raises(ValueError, match=f"{DEFAULT.name} reads keys .* by tensor descriptor"):
        tuning.pinned(without_twin, False)


def test_a_pinned_entry_that_is_wrong_is_refused(monkeypatch):
    failures.record_failure(kind().kernel, DEFAULT.name, "is wrong")
    with pytest.raises(RuntimeError, match=f"{DEFAULT.name} cannot run: it is wrong"):
        tuning.run_pinned(DEFAULT, kind().kernel, Launches(monkeypatch))


def test_measured_once_for_a_kind_and_kept_on_disk(monkeypatch):
    launches = Launches(monkeypatch, {ENTRIES[1].name: 40.0})
    for _ in range(3):
        tuning.run_fastest(ENTRIES, kind(), launches)
    assert launches.measured == [entry.name for entry in ENTRIES[: tuning.TRIED]]
    assert launches.ran[-1] == ENTRIES[1].name
    # Another process.
    monkeypatch.setattr(tuning, "_fastest", {})
    tuning._kept.cache_clear()
    other = Launches(monkeypatch)
    tuning.run_fastest(ENTRIES, kind(), other)
    assert other.measured == []
    assert other.ran == [ENTRIES[1].name]


def test_a_small_picture_decides_nothing_for_a_large_one(monkeypatch):
    small = kind(tuning.size_class(24 * 64))
    launches = Launches(monkeypatch, {DEFAULT.name: 0.2, ENTRIES[1].name: 0.1})
    tuning.run_fastest(ENTRIES, small, launches)
    assert launches.measured == [DEFAULT.name]
    assert launches.ran[-1] == DEFAULT.name
    assert not tuning._path().exists()
    launches.milliseconds = {ENTRIES[1].name: 40.0}
    tuning.run_fastest(ENTRIES, kind(), launches)
    assert launches.ran[-1] == ENTRIES[1].name


@pytest.mark.parametrize("failing", [[DEFAULT.name], [ENTRIES[1].name]])
def test_an_entry_that_fails_gives_way_and_that_is_said_once(monkeypatch, caplog, failing):
    error = RuntimeError("out of resource: shared memory, Required: 300000")
    launches = Launches(monkeypatch, failing=dict.fromkeys(failing, error))
    with caplog.at_level(logging.WARNING):
        for size in (LARGE, LARGE + 1):
            tuning.run_fastest(ENTRIES, kind(size), launches)
    assert launches.ran
    assert failing[0] not in launches.measured
    [record] = caplog.records
    assert failing[0] in record.getMessage()
    assert "Required: 300000" in record.getMessage()


def test_where_every_entry_fails_that_is_one_error(monkeypatch):
    failing = {entry.name: RuntimeError("no image for this device") for entry in ENTRIES}
    with pytest.raises(NoEntryError, match=r"no entry of the tables runs: q8x8.*no image"):
        tuning.run_fastest(ENTRIES, kind(), Launches(monkeypatch, failing=failing))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("30 GB"), RuntimeError("CUDA error: unspecified launch")]
)
def test_what_is_not_an_entrys_fault_is_passed_on(monkeypatch, error):
    launches = Launches(monkeypatch, failing={DEFAULT.name: error})
    with pytest.raises(type(error), match=str(error)):
        tuning.run_fastest(ENTRIES, kind(), launches)
    assert failures.failure(kind().kernel, DEFAULT.name) is None


def test_nothing_is_measured_in_a_capture(monkeypatch):
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    launches = Launches(monkeypatch)
    tuning.run_fastest(ENTRIES, kind(), launches)
    assert launches.measured == []
    assert launches.ran == [DEFAULT.name]


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_broken_file_is_none(monkeypatch, text):
    tuning._path().parent.mkdir()
    tuning._path().write_text(text)
    launches = Launches(monkeypatch)
    tuning.run_fastest(ENTRIES, kind(), launches)
    assert launches.measured
    assert list(json.loads(tuning._path().read_text()).values()) == [DEFAULT.name]
    assert [path.name for path in tuning._path().parent.iterdir()] == ["fastest.json"]


def test_a_folder_that_cannot_be_written_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tuning, "_path", lambda: tmp_path / "file" / "fastest.json")
    launches = Launches(monkeypatch)
    for _ in range(2):
        tuning.run_fastest(ENTRIES, kind(), launches)
    assert len(launches.measured) == tuning.TRIED


def test_a_kernel_without_a_choice_fails_as_one_error_and_at_once_next_time():
    kernel = kind().kernel._replace(name="backward")
    with pytest.raises(NoEntryError, match=r"backward kernel .* no registers"):
        fail_in(kernel, RuntimeError("no registers"))
    with pytest.raises(NoEntryError, match="no registers"):
        fail_in(kernel, AssertionError("must not run"))


def fail_in(kernel, error):
    with failures.without_choice(kernel):
        raise error
