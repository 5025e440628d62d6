"""The way in: what it refuses."""

import re

import pytest
import torch

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.pooling import pool_tokens
from clear_dit.kernels.window import Window

WINDOW = Window(4, 6, 3, 2)


def tensors(shape=(1, 27, 2, 8), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(1, 26, 2, 8)},
            "key must be (batch, sequence, key heads, head_dim), here (1, 27, 2, 8), got",
        ),
        (
            {"v": torch.zeros(1, 27, 1, 8)},
            "value must be (batch, sequence, key heads, head_dim), here (1, 27, 2, 8), got",
        ),
        ({"k": torch.zeros(1, 27, 2, 8, dtype=torch.float64)}, "key must have query's dtype"),
        ({"k": torch.zeros(1, 27, 2, 8, device="meta")}, "key must have query's device cpu"),
        ({"q": torch.zeros(27, 2, 8)}, "query must be (batch, sequence, heads, head_dim)"),
        ({"window": Window(4, 5, 3, 2)}, "has 27 tokens, but the window says 3 text + 4 x 5"),
        ({"impl": "fast"}, "impl must be one of auto, triton, flex, tiled, reference; got 'fast'"),
        ({"impl": "triton"}, "needs a CUDA or ROCm device, got a query on 'cpu'"),
        (
            {"window": Window(4, 6, 3, 2, 2), "spatial_weight": torch.ones(4)},
            "spatial_weight must have shape (2, 2) or (1, 1, 1, 2, 1, 2, 1)",
        ),
        ({"spatial_weight": torch.ones(1, 1)}, "needs a window with down_factor > 1"),
    ],
)
def test_refusals(change, message):
    query, key, value = tensors()
    arguments = {"q": query, "k": key, "v": value, "window": WINDOW, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        local_attention(**arguments)


def test_integers_are_refused():
    query, key, value = tensors(dtype=torch.int64)
    with pytest.raises(ValueError, match="floating point"):
        local_attention(query, key, value, WINDOW)


def test_flex_refuses_gradients_on_a_cpu():
    for index in range(3):
        query, key, value = tensors()
        (query, key, value)[index].requires_grad_()
        with pytest.raises(ValueError, match="has no backward pass on a CPU"):
            local_attention(query, key, value, WINDOW, impl="flex")


def test_flex_refuses_the_log_sum_exp_on_a_cpu():
    with pytest.raises(ValueError, match="cannot return the log-sum-exp on a CPU"):
        local_attention(*tensors(), WINDOW, impl="flex", return_lse=True)


def test_partial_pooling_cells_are_means_at_the_initial_weights():
    window = Window(5, 7, 2, 2, 4)
    tokens = torch.ones(1, window.sequence_length, 1, 4)
    pooled = pool_tokens(tokens, window, None)
    assert pooled.shape == (1, window.pooled_length, 1, 4) == (1, 4, 1, 4)
    torch.testing.assert_close(pooled, torch.ones_like(pooled))
