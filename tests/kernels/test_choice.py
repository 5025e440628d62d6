"""Which implementation runs, and what is said of the faster ones."""

import logging

import torch

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

WINDOW = Window(4, 6, 3, 2)


def test_auto_says_once_which_runs_and_why_not_the_faster(caplog):
    choice._announce.cache_clear()
    query, key, value = (torch.randn(1, 27, 2, 8) for _ in range(3))
    with caplog.at_level(logging.INFO, logger="clear_dit.kernels.choice"):
        for _ in range(3):
            local_attention(query, key, value, WINDOW)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "local attention runs on 'tiled'; triton needs a CUDA or ROCm device, got a query on 'cpu'"
    ]


def test_every_preference_names_every_implementation():
    for device in ("cpu", "cuda", "mps"):
        assert sorted(choice.preference(device)) == sorted(choice.IMPLS[1:])
