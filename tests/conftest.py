"""Tiny random FLUX models and pipelines, built on the fly: no network, no files."""

import os
from functools import partial

# What these tests say of implementations and devices is what a machine without a GPU says.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Triton kernels run in its interpreter; read when Triton is imported (see support/triton_mode.py).
os.environ["TRITON_INTERPRET"] = "1"
# Workers share the cores; so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support.families.models import make_inputs, make_model, raster_ids
from support.families.pipelines import make_pipeline


@pytest.fixture
def tiny_transformer():
    """A function of the seed and changes to the configuration: 2 double and 2 single blocks."""
    return partial(make_model, "flux")


@pytest.fixture
def tiny_inputs():
    """A function of rows, columns, text, batch and seed: random inputs of `tiny_transformer`."""

    def make(rows, columns, text=3, **more):
        return make_inputs("flux", rows, columns, text, **more)

    return make


@pytest.fixture
def tiny_pipeline():
    """A function that makes a pipeline of a class from tiny random parts; prompts of 8 words."""
    return partial(make_pipeline, "flux")


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
