"""What `--dtype auto` is: by device, by processor, for images and in training."""

import pytest
import torch

from clear_dit.distillation import setup
from clear_dit.distillation.options import DistillOptions
from clear_dit.distillation.sample import make_request as make_sample_request
from clear_dit.doctor import examine, report
from clear_dit.errors import RequestError
from clear_dit.generation import dtypes
from clear_dit.generation.dtypes import cpu_has_bfloat16, resolve_dtype
from clear_dit.generation.request import make_request

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture(params=[True, False], ids=["units", "no units"])
def units(request, monkeypatch):
    """Whether processors have bfloat16 units."""
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: request.param)
    monkeypatch.setattr(dtypes, "_cuda_has_bfloat16", lambda device: request.param)
    return request.param


def test_images_are_float32_on_every_cpu(units):
    assert resolve_dtype("auto", CPU) == "float32"
    for settings in ({}, {"dtype": "auto"}):
        assert make_request("a house", device="cpu", **settings).dtype == "float32"


def test_training_on_a_cpu_is_in_what_is_fast(units):
    fast = "bfloat16" if units else "float32"
    assert resolve_dtype("auto", CPU, training=True) == fast
    for settings in ({}, {"dtype": "auto"}):
        request = make_sample_request("demo", "demo", 1, device="cpu", **settings)
        assert request.dtype == fast


def test_gpus(units):
    for training in (True, False):
        assert resolve_dtype("auto", CUDA, training=training) == (
            "bfloat16" if units else "float16"
        )
        assert resolve_dtype("auto", MPS, training=training) == "bfloat16"


def test_what_is_named_is_taken(units):
    for name in dtypes.DTYPES:
        assert resolve_dtype(name, CPU, training=True) == name
        assert make_request("a house", device="cpu", dtype=name).dtype == name
    with pytest.raises(RequestError, match=r"--dtype must be one of auto, float32, .*; got 'int8'"):
        resolve_dtype("int8", CPU)


@pytest.mark.parametrize("asked", ["auto", "no", "bf16"])
@pytest.mark.parametrize("environment", [None, "no", "bf16"])
def test_mixed_precision(monkeypatch, tmp_path, units, asked, environment):
    monkeypatch.setattr(setup, "Accelerator", Told)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    options = DistillOptions("demo", tmp_path, tmp_path, 2, mixed_precision=asked, cpu=True)
    found = setup.make_accelerator(options).mixed_precision
    if asked != "auto":
        assert found == asked
    else:
        assert found == (environment or ("bf16" if units else "no"))


class Told:
    """An Accelerator that only keeps what it is told."""

    distributed_type = state = None

    def __init__(self, mixed_precision, **_):
        self.mixed_precision = mixed_precision


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\nflags\t\t: fpu\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: bf16\n", False),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_units_are_read_off_the_processor(monkeypatch, tmp_path, text, found):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(dtypes, "_CPU_INFO", path)
    assert cpu_has_bfloat16.__wrapped__() is found


def test_where_they_cannot_be_read_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(dtypes, "_CPU_INFO", tmp_path / "none")
    assert cpu_has_bfloat16.__wrapped__() is False


def test_doctor_says_what_auto_is(monkeypatch, units):
    monkeypatch.setattr("clear_dit.doctor.cpu_has_bfloat16", lambda: units)
    found = examine()
    training = "bfloat16" if units else "float32"
    assert found["dtypes"]["cpu"] == {"images": "float32", "training": training}
    said = "this CPU has bfloat16 units" if units else "this CPU has no bfloat16 units"
    assert said in report(found)
