"""Far keys of an image that ranks share: exact, and bytes that do not grow with the ranks."""

import pytest
import torch
import torch.distributed as dist
from support import far_ranks
from support.far_ranks import CASES
from support.processes import launch
from support.slow import slow_but
from torch.testing._internal.distributed.fake_pg import FakeStore

from clear_dit.kernels.window import Window
from clear_dit.pipelines.parallel import pooled
from clear_dit.pipelines.parallel.bands import Bands
from clear_dit.pipelines.parallel.exchange import Traffic
from clear_dit.pipelines.parallel.pooled import CellBands, FarCells


@pytest.mark.parametrize("world", slow_but((1, 2, 3, 5), 3))
def test_ranks_attend_as_one_process_does(world, tmp_path):
    children = launch(far_ranks.attend_all, world, tmp_path)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * world
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(world)]
    for name, case in CASES.items():
        expected = far_ranks.whole(case)
        outs = [of_rank[name][0] for of_rank in found]
        first = case.text + case.references
        for out in outs:
            assert torch.equal(out[:, :first], outs[0][:, :first]), name
        together = torch.cat([outs[0][:, :first], *(out[:, first:] for out in outs)], dim=1)
        error = float((together - expected).abs().max() / expected.abs().max())
        assert error <= 1e-5, (name, error)
