"""Six samples of the demo at 64 x 96 px (4 x 6 tokens), and small distillations on them."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from clear_dit.distillation.options import DistillOptions
from clear_dit.distillation.sample import make_request, sample
from clear_dit.distillation.train import Run, distill

SMALL = {"height": 64, "width": 96, "steps": 2, "shard_size": 2, "batch": 2, "device": "cpu"}


def make_samples(out, count=6, prompts="demo", **changes):
    request = make_request("demo", str(prompts), count, **(SMALL | changes))
    return sample(request, out, progress=False)


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

    def make(**changes):
        settings = {
            "model": "demo",
            "samples": samples,
            "out": tmp_path / "run",
            "radius": 2,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 3,
            "checkpointing_steps": 2,
            "report_to": "none",
            "cpu": True,
        }
        return DistillOptions(**(settings | changes))

    return make


@pytest.fixture
def run(options):
    """A function that runs `distill` with changes."""

    def start(**changes):
        return distill(options(**changes), progress=False)

    return start


@pytest.fixture
def prepared(options):
    """A function that makes a `Run` of changes, ready to step."""

    def make(**changes):
        from clear_dit.distillation.samples import read_index

        chosen = options(**changes)
        prepared = Run(chosen, read_index(chosen.samples), only_transformer=True)
        prepared.prepare(None)
        return prepared

    return make
