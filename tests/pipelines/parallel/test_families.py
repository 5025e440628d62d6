"""Ranks that share an image predict what one process predicts, in every family: gloo, float32."""

import pytest
import torch
from support import family_ranks
from support.families.models import FAMILIES
from support.family_ranks import cases, predict
from support.processes import launch
from support.slow import few, slow

WORLDS = (2, 3)  # ranks; 3 have bands of 2, 2 and 3 rows


@slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_predict_what_one_process_predicts(world, name, tmp_path):
    ranks = launch(family_ranks.predict_all, world, tmp_path, name)
    found = {what: predict(name, **case) for what, case in cases(name).items()}
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world
    for rank in range(world):
        shared = torch.load(tmp_path / str(rank), weights_only=True)
        for what, expected in found.items():
            error = float((shared[what] - expected).abs().max() / expected.abs().max())
            assert error <= 1e-5, (what, error)


@pytest.mark.parametrize("name", few(FAMILIES, "krea2"))
def test_cases_matter(name):
    """Otherwise the comparison above would say little."""
    found = [predict(name, **case) for case in cases(name).values()]
    for number, one in enumerate(found):
        for other in found[:number]:
            if one.shape == other.shape:
                assert (one - other).abs().max() > 1e-4 * one.abs().max()
