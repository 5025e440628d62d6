"""An implementation against the definition in float64: output and all gradients.

Tolerance (as meta-pytorch/attention-gym derives it): the error against float64 is at most twice
that of a plain implementation in the same dtype, plus two roundings of the result. Probabilities
are computed as exp(score - lse), in float32 or wider: what rounds off a score is a relative error
of theirs, also where the plain softmax has none (one key).
"""

import torch
from hypothesis import strategies as st

from clear_dit.kernels.window import Window

from .oracle import attention_by_definition, relative_error, repeated

# Wide enough for several tiles that read overlapping keys, and a last one over the border.
WIDE = Window(20, 57, 7, 4, 2)
TEXT_LENGTHS = (0, 1, 7, 64, 512)
HALVES = (torch.float16, torch.bfloat16)


# Two levels whose cells are cut off at both borders, several tiles, and a ring with a hole.
FAR = Window(21, 35, 7, 3, far_levels=4)


@st.composite
def problems(draw, far=False):
    height, width = draw(st.integers(1, 21)), draw(st.integers(1, 21))
    factor = draw(st.sampled_from((1, 2, 4)))
    if factor > min(height, width) or far:
        factor = 1
    weight = draw(st.sampled_from(("one", "count"))) if factor > 1 else "one"
    window = Window(
        height,
        width,
        draw(st.sampled_from(TEXT_LENGTHS)),
        draw(st.integers(2 if far else 1, 32)),
        factor,
        far_levels=draw(st.integers(1, 6)) if far else 0,
        pooled_weight=weight,
    )
    return {
        "window": window,
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from((16, 24, 64, 128))),
        "weighted": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "group": draw(st.sampled_from((1, 3))),
    }


def problem(window, batch=2, heads=2, head_dim=32, weighted=True, seed=0, group=1):
    return dict(
        window=window, batch=batch, heads=heads, head_dim=head_dim, weighted=weighted, seed=seed,
        group=group,
    )  # fmt: skip


def inputs(window, batch, heads, head_dim, weighted, seed, group=1, dtype=torch.float64):
    """Query, key, value, what is learned of pooled keys, and a gradient; `dtype` rounds them once.

    `heads` are the keys', each of which a group of the query's reads. What is learned is
    spatial_weight and, for far keys, far_offset; None each where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    key_heads, heads = heads, heads * group
    shape = (batch, window.sequence_length, heads, head_dim)
    query, key, value, grad = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    key, value = key[:, :, :key_heads], value[:, :, :key_heads]
    weight, offset = None, None
    if weighted and window.far_levels:
        weight = torch.rand(window.far_levels, 2, 2, generator=generator).double() / 2
        offset = torch.randn(window.far_levels, heads, generator=generator).double()
    elif weighted and window.down_factor > 1:
        factor = window.down_factor
        weight = torch.rand(1, 1, 1, factor, 1, factor, 1, generator=generator).double()
        weight = weight * 2 / factor**2
    return [None if x is None else x.to(dtype) for x in (query, key, value, weight, offset, grad)]


def forward_and_gradients(run, query, key, value, weight, offset, grad):
    leaves = [
        None if x is None else x.detach().clone().requires_grad_()
        for x in (query, key, value, weight, offset)
    ]
    out = run(*leaves)
    return out, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)


def by_definition(dtype, gradients, **case):
    """The inputs, exact and plain results, and the largest score of a case."""
    window, scale = case["window"], case["head_dim"] ** -0.5
    rounded = inputs(**case, dtype=dtype)

    def definition(query, key, value, weight, offset):
        return attention_by_definition(query, key, value, window, scale, weight, offset)

    exact_inputs = [None if x is None else x.double() for x in rounded]
    exact, plain = (results(definition, x, gradients) for x in (exact_inputs, rounded))
    query, key = exact_inputs[0], repeated(exact_inputs[1], group=case["group"])
    largest = scale * float(torch.einsum("bqhd,bkhd->bhqk", query, key).abs().max())
    return rounded, exact, plain, largest


def results(run, tensors, gradients):
    """Output and gradients, or the output alone."""
    return forward_and_gradients(run, *tensors) if gradients else [run(*tensors[:5])]


def check(run, case, dtype, gradients=True):
    window = case["window"]
    rounded, exact, plain, largest = by_definition(dtype, gradients, **case)
    ours = results(run, rounded, gradients)
    of_scores = 2 * largest * torch.finfo(torch.float32).eps
    names = ("output", "query", "key", "value", "spatial_weight", "far_offset")
    for name, value, yardstick, truth in zip(names, ours, plain, exact, strict=False):
        assert value.dtype == dtype
        # A gradient that is zero in truth (radius 1 without text) has rounding noise only.
        if truth.norm() < 1e-9:
            assert value.double().norm() < 1e-2
            continue
        error = relative_error(value, truth)
        # The gradient of what is learned is one sum over all tokens, with cancellation.
        roundings = 64 if name in ("spatial_weight", "far_offset") else 2
        bound = (
            2 * relative_error(yardstick, truth) + roundings * torch.finfo(dtype).eps + of_scores
        )
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e} ({window}, {dtype})"
