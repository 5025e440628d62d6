"""Ranks that meet, agree, and stop together when one of them fails."""

import re

import pytest
import torch
from support import rank_tasks
from support.rank_tasks import run_ranks
from support.slow import slow

from clear_dit.pipelines.parallel.progress import HangDetector
from clear_dit.pipelines.parallel.start import start_ranks

SILENT = r"no sign of life for \d+ s \(stopped, or its host is unreachable\)"
HANGING = r"no progress for \d+ s, in .*rank_tasks.py, line \d+"
PLACE = {
    "RANK": "0",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@slow
@pytest.mark.parametrize(
    ("how", "who", "own_status", "reason"),
    [
        ("killed", 1, -9, "its process ended"),
        ("out of memory", 1, 1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB."),
        ("killed", 0, -9, "its process ended"),
        ("stopped", 2, None, SILENT),
        ("hanging", 0, 1, HANGING),
    ],
)
def test_one_that_fails_stops_all(how, who, own_status, reason, tmp_path):
    statuses, said = run_ranks(
        rank_tasks.fail, 3, tmp_path, how, who, stays=who if how == "stopped" else None
    )
    assert statuses[who] == own_status
    for rank in {0, 1, 2} - {who}:
        assert statuses[rank] == 1
        pattern = rf"clear-dit: rank {who} \(.+, process \d+\) failed in step 3 of 20: {reason}; "
        assert re.fullmatch(rf"{pattern}rank {rank} stops.\n", said[rank]), said[rank]


@slow
def test_all_finish(tmp_path):
    assert run_ranks(rank_tasks.fail, 2, tmp_path, "not at all", 0) == ([0, 0], ["finished\n"] * 2)


@slow
def test_what_differs_is_named_with_its_rank(tmp_path):
    statuses, said = run_ranks(rank_tasks.disagree, 3, tmp_path)
    assert 0 not in statuses
    # All find out; one says it.
    told = [text for text in said if "ValueError" in text]
    assert len(told) == 1
    assert re.search(r"rank 1 \(.+\) has model digest of adapter 1, rank 0 \(.+\) has dig", told[0])
    assert re.search(r"rank 2 \(.+\) has torch 2.12, rank 0 \(.+\) has 2.13", told[0])
    assert "seed" not in told[0]


@slow
def test_other_adapters_and_seeds_are_found_before_the_first_step(tmp_path):
    statuses, said = run_ranks(rank_tasks.generate_with_other_adapters, 2, tmp_path)
    assert 0 not in statuses
    told = next(text for text in said if "the ranks do not agree" in text)
    assert re.search(r"rank 1 \(.+\) has seed \w+, rank 0", told)
    assert re.search(r"rank 1 \(.+\) has transformer weights or adapter \w+, rank 0", told)
    # All else is the same.
    assert told.count("rank 1 (") == 2
    assert "step" not in told


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"RANK": None, "MASTER_ADDR": None}, {}, "RANK, MASTER_ADDR not set; start with torchrun"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE must be a number from 0, got 'two'"),
        ({"RANK": "3"}, {}, "RANK 3 is not below WORLD_SIZE 3"),
        ({}, {"guidance": 2}, "3 ranks do not divide into 2 halves of guidance"),
        ({}, {"guidance": 3}, "guidance must be 1 or 2, got 3"),
        ({}, {"device": "mps"}, "the device must be cuda or cpu, got 'mps'"),
        ({"LOCAL_RANK": "9"}, {"device": "cuda"}, "rank 9 of this node has no GPU"),
    ],
)
def test_a_bad_start_is_refused(monkeypatch, change, options, message):
    for name, value in (PLACE | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), start_ranks(**options):
        raise AssertionError
    assert not torch.distributed.is_initialized()


def test_what_counts_as_hanging():
    detector = HangDetector(None)
    now = 0.0
    for count in range(30):
        now += 10
        assert detector.overdue(count, False, now) is None
    # Ten times as long as usual; one that waits is not the first to blame.
    assert detector.overdue(29, False, now + 99) is None
    assert detector.overdue(29, False, now + 101) == 101
    assert detector.overdue(29, True, now + 101) is None
    assert detector.overdue(29, True, now + 151) == 151
    # Another part of the work has not begun, and its usual time is not known.
    assert detector.overdue(0, False, now + 1000) is None
    assert detector.overdue(1, False, now + 2000) is None
    assert detector.overdue(1, False, now + 3000) is None
    # A given limit holds from the first step on.
    given = HangDetector(2)
    assert given.overdue(0, False, 100) is None
    assert given.overdue(1, False, 101) is None
    assert given.overdue(1, False, 104) == 3
