"""Tiny random FLUX models and pipelines, built on the fly: no network, no files."""

import logging
import os
from functools import cache, partial

# What these tests say of implementations and devices is what a machine without a GPU says.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Triton kernels run in its interpreter; read when Triton is imported (see support/triton_mode.py).
os.environ["TRITON_INTERPRET"] = "1"
# Workers share the cores; so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support.families.folders import save_folder
from support.families.models import make_inputs as make_family_inputs
from support.families.models import make_model, raster_ids
from support.families.pipelines import make_parts, make_pipeline
from support.triton_mode import interpreted

if interpreted:
    from support.interpreter_bfloat16 import make_exact

    make_exact()


def make_transformer(seed: int = 0, **config) -> torch.nn.Module:
    """A FLUX transformer with 2 double and 2 single blocks, 2 heads of 16 channels."""
    return make_model("flux", seed, **config)


def make_inputs(rows: int, columns: int, text: int = 3, **more) -> dict:
    """Random inputs for `make_transformer()`; the ids are those of a stock pipeline."""
    return make_family_inputs("flux", rows, columns, text, **more)


def make_components() -> dict:
    """The parts of a FLUX pipeline; a token is 4 x 4 pixels, prompts are known words only."""
    return make_parts("flux")


def pytest_xdist_auto_num_workers(config) -> int:
    """As many as cores; one more for slow tests, which often wait for processes they started."""
    return (os.cpu_count() or 1) + (config.option.markexpr == "slow")


@pytest.fixture(autouse=True)
def _logger_as_imported():
    """A command sets the level of the package's logger for its process, which here goes on."""
    logging.getLogger("clear_dit").setLevel(logging.NOTSET)


@pytest.fixture
def tiny_transformer():
    """`make_transformer`, a function of the seed and changes to the configuration."""
    return make_transformer


@pytest.fixture
def tiny_inputs():
    """`make_inputs`, a function of rows, columns, text, batch and seed."""
    return make_inputs


@pytest.fixture
def tiny_pipeline():
    """A function that makes a pipeline of a class from tiny random parts; prompts of 8 words."""
    return partial(make_pipeline, "flux")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """A function of a family's name: the folder of its tiny pipeline, see `save_folder`."""
    return cache(lambda name: save_folder(name, tmp_path_factory.mktemp("models") / name))


@pytest.fixture
def position_ids():
    """A function of rows, columns and dtype: ids of an image, (rows * columns, 3)."""

    def make(rows, columns, dtype=torch.float32):
        return raster_ids(rows, columns, 0, 3).to(dtype)

    return make


@pytest.fixture
def poisoned_memory():
    """What `torch.empty` and its like return is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
