"""Ranks that share an image predict what one process predicts, in every family: gloo, float32."""

import functools

import pytest
import torch
from support import family_ranks
from support.families.models import FAMILIES
from support.family_ranks import cases, predict
from support.processes import launch
from support.slow import slow_but

WORLDS = slow_but((2, 3), 3)  # ranks; 3 have bands of 2, 2 and 3 rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A function of the number of ranks: predictions by family and case, of every rank."""

    @functools.cache
    def run(world):
        folder = tmp_path_factory.mktemp(f"ranks-{world}")
        children = launch(family_ranks.predict_all, world, folder)
        for child in children:
            child.join()
        return [child.exitcode for child in children], folder

    def found(world):
        statuses, folder = run(world)
        assert statuses == [0] * world
        return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]

    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_predict_what_one_process_predicts(world, name, shared):
    for what, case in cases(name).items():
        expected = predict(name, **case)
        for found in shared(world):
            error = float((found[name, what] - expected).abs().max() / expected.abs().max())
            assert error <= 1e-5, (what, error)


@pytest.mark.parametrize("name", FAMILIES)
def test_cases_matter(name):
    """Otherwise the comparison above would say little."""
    found = [predict(name, **case) for case in cases(name).values()]
    for number, one in enumerate(found):
        for other in found[:number]:
            if one.shape == other.shape:
                assert (one - other).abs().max() > 1e-4 * one.abs().max()
