"""Attention with far keys over an image that ranks share: gloo on the CPU, float32."""

import pytest
import torch
from support import far_ranks
from support.far_ranks import CASES
from support.processes import launch
from support.slow import slow


@slow
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_attend_as_one_process_does(world, tmp_path):
    children = launch(far_ranks.attend_all, world, tmp_path)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * world
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(world)]
    for name, case in CASES.items():
        expected = far_ranks.whole(case)
        outs, counted, sent = zip(*(of_rank[name] for of_rank in found), strict=True)
        first = case.text + case.references
        for out in outs:
            assert torch.equal(out[:, :first], outs[0][:, :first]), name
        together = torch.cat([outs[0][:, :first], *(out[:, first:] for out in outs)], dim=1)
        error = float((together - expected).abs().max() / expected.abs().max())
        print(f"{name}, {world} ranks: {error:.1e}, {counted[0]}")
        assert error <= 1e-5, (name, error)
        assert [sum(kinds.values()) for kinds in counted] == list(sent), name


def test_what_is_learned_matters():
    """Otherwise the comparison above would say little."""
    learned, odd = (far_ranks.whole(CASES[name]) for name in ("learned", "odd"))
    assert (learned - odd).abs().max() > 1e-2 * odd.abs().max()
