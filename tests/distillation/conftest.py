"""Six samples of the demo at 64 x 96 px (4 x 6 tokens), and small distillations on them."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from support.distilling import make_options, make_run, make_samples

from clear_dit.distillation.train import distill


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """A finished folder; do not change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("samples") / "six"
    make_samples(out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def options(samples, tmp_path):
    """A function that makes options of a short run from changes."""
    return lambda **changes: make_options(**{"samples": samples, "out": tmp_path / "run"} | changes)


@pytest.fixture
def run(options):
    """A function that runs `distill` with changes."""
    return lambda **changes: distill(options(**changes), progress=False)


@pytest.fixture
def prepared(options):
    """A function that makes a `Run` of changes, ready to step."""
    return lambda **changes: make_run(options(**changes))
