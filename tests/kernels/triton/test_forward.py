"""Triton's CLEAR attention in its interpreter, against the definition: output and gradients."""

from itertools import product

import pytest
import torch
from support.agreement import HALVES, check, forward_and_gradients, inputs, problem
from support.slow import slow, slow_but
from support.triton_mode import interpreted

from clear_dit.kernels.choice import why_not
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.reference import reference_attention
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton import launch, ops, tables
from clear_dit.kernels.triton.geometry import Tiling, visits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NO_BIAS = torch.empty(0, 1)


def run(window):
    def attention(query, key, value, weight, offset=None):
        scale = query.shape[-1] ** -0.5
        options = {"scale": scale, "spatial_weight": weight, "far_offset": offset}
        return ops.triton_attention(query, key, value, window, **options)[0]

    return attention


# A key tile that every query of a tile sees whole, and others.
INNER = Window(16, 17, 3, 14)
SEVERAL_INNER = Window(33, 26, 3, 16)
CASES = {
    "partial tiles": problem(Window(13, 18, 7, 4), heads=1),
    "pooled": problem(Window(13, 18, 5, 4, 4), batch=1),
    "pooled, two blocks": problem(Window(18, 19, 1, 3, 2), batch=1, heads=1),
    "no text": problem(Window(9, 17, 0, 5), batch=1),
    "itself and the text": problem(Window(10, 9, 1, 1), batch=1),
    "past the diagonal": problem(Window(12, 17, 64, 40), batch=1, heads=1),
    "less than a tile": problem(Window(3, 5, 70, 3)),
    "one token": problem(Window(1, 1, 0, 1), heads=1),
    "inner tiles": problem(INNER, batch=1, heads=1, head_dim=16),
    "several inner tiles": problem(SEVERAL_INNER, batch=1, heads=1, head_dim=16),
    "odd head_dim": problem(Window(9, 10, 7, 4), batch=1, heads=3, head_dim=24),
    "wide heads": problem(Window(9, 10, 7, 4), batch=1, heads=1, head_dim=128),
    "batch of three": problem(Window(9, 10, 2, 4, 2), batch=3, heads=1, head_dim=16),
    "grouped heads": problem(Window(6, 10, 7, 3, 2), batch=1, heads=2, head_dim=16, group=2),
    "grouped heads without text": problem(Window(5, 9, 0, 3), heads=1, head_dim=16, group=3),
}


# The quick ones of all dtypes together go every way through the kernels.
# The largest case takes the interpreter a minute, in any dtype.
HALF = slow_but(
    [
        (name, dtype)
        for name, dtype in product(CASES, HALVES)
        if (name, dtype) != ("several inner tiles", torch.float16)
    ],
    *product(("one token",), HALVES),
)
FLOAT32 = [name for name in CASES if name != "several inner tiles"]


@pytest.fixture
def hopper_tiles(monkeypatch):
    """float32's own tiles are so small that the interpreter takes minutes: one case below."""
    monkeypatch.setattr(ops, "table_key", lambda *kind: ("sm_90", 128, 2))


@pytest.mark.parametrize("entry", [tables.FORWARD["sm_80"][0], tables.FORWARD["sm_90"][0]])
@pytest.mark.parametrize(("window", "most"), [(INNER, 1), (SEVERAL_INNER, 2)])
def test_inner_has_tiles_that_need_no_mask(entry, window, most):
    lists = visits(window.height, window.width, window.radius, entry.tiling, torch.device("cpu"))
    begin, border, end = lists.ranges.unbind(-1)
    assert (border - begin).max() == most
    assert (end > border).any()


@pytest.mark.parametrize(("name", "dtype"), HALF, ids=str)
def test_half_precision_is_the_definition(name, dtype):
    check(run(CASES[name]["window"]), CASES[name], dtype)


@slow
@pytest.mark.usefixtures("hopper_tiles")
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_is_the_definition_with_hopper_tiles(name):
    check(run(CASES[name]["window"]), CASES[name], torch.float32)


def test_float32_is_the_definition():
    window = Window(5, 9, 7, 4, 2)
    check(run(window), problem(window, batch=1, heads=1, head_dim=16), torch.float32)


@slow
@pytest.mark.parametrize("tiles", ["hopper_tiles", "own tiles"])
def test_log_sum_exp_and_strides(tiles, request):
    if tiles == "hopper_tiles":
        request.getfixturevalue(tiles)
    window = Window(11, 19, 6, 4, 2)
    query, key, value, weight, *_ = inputs(**problem(window), dtype=torch.float32)
    # Heads before tokens in memory, a batch that is a slice, channels that are not contiguous.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, key])[::2].contiguous()[:2]
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    options = {"scale": 0.3, "spatial_weight": weight, "return_lse": True}
    out, lse = ops.triton_attention(query, key, value, window, **options)
    exact = (x.double() for x in (query, key, value))
    exact_out, exact_lse = reference_attention(*exact, window, **options)
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def every_forward_config():
    entries = dict.fromkeys(entry for table in tables.FORWARD.values() for entry in table)
    entries |= dict.fromkeys(tables.WIDE_FORWARD + tables.FLOAT32_FORWARD)
    return [*entries, tables.ForwardConfig(Tiling(4, 16, 16, 2), 32, 4, 2)]


@slow
@pytest.mark.parametrize(
    "config",
    every_forward_config(),
    ids=lambda config: config.name,
)
def test_every_tile_shape_and_way_to_load(config):
    window = Window(11, 19, 33, 6)
    query, key, value, *_ = inputs(**problem(window, batch=2, heads=1), dtype=torch.float32)
    out = torch.full_like(query, float("nan"))
    lse = torch.full(query.shape[:3], float("nan"))
    pooled = query[:, :0]
    launch.image_attention(
        query, key, value, pooled, pooled, NO_BIAS, out, lse, Geometry.of(window, 0.2), config
    )  # fmt: skip
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), window, scale=0.2, return_lse=True
    )
    torch.testing.assert_close(out[:, 33:].double(), exact[:, 33:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, 33:].double(), exact_lse[:, 33:], rtol=1e-5, atol=1e-5)
    assert out[:, :33].isnan().all()


@pytest.mark.parametrize(
    ("programs", "descriptor", "head_dim"),
    # Tokens of 18 numbers start at no multiple of 16 bytes: pointers do it.
    [(1, False, 32), (5, False, 32), (1000, False, 32), (5, True, 24), (5, True, 18)],
)
def test_text_is_the_same_for_any_number_of_splits(programs, descriptor, head_dim):
    window = Window(7, 40, 9, 4)
    case = problem(window, heads=1, head_dim=head_dim)
    query, key, value, *_ = inputs(**case, dtype=torch.float32)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    config = tables.RunConfig(16, 32, 4, 1, descriptor)
    launch.text_attention(query, key, value, out, lse, 9, 0.2, config, programs)
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), window, scale=0.2, return_lse=True
    )
    torch.testing.assert_close(out[:, :9].double(), exact[:, :9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, :9].double(), exact_lse[:, :9], rtol=1e-5, atol=1e-5)
    assert out[:, 9:].isnan().all()


SCALED = {
    "pooled": Window(5, 9, 6, 3, 2, pooled_weight="count"),
    "far": Window(7, 18, 5, 2, far_levels=3),
    "no text": Window(9, 17, 0, 5),
}


@slow
@pytest.mark.usefixtures("hopper_tiles")
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("name", SCALED)
def test_scale_of_any_sign_or_zero(name, scale):
    """Output, gradients and log-sum-exp; what is added to pooled and far keys is not scaled."""
    window = SCALED[name]
    tensors = inputs(**problem(window, batch=1, head_dim=16), dtype=torch.float32)

    def run(attention, query, key, value, weight, offset):
        return attention(
            query, key, value, window, scale=scale, spatial_weight=weight, far_offset=offset
        )

    results = []
    for attention, dtype in ((ops.triton_attention, None), (reference_attention, torch.float64)):
        values = [None if x is None else x.to(dtype) for x in tensors]
        grads = forward_and_gradients(lambda *x, of=attention: run(of, *x)[0], *values)
        results.append([*grads, run(attention, *values[:5])[1]])
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_of_any_sign_or_zero_by_descriptor(scale):
    window = Window(9, 10, 70, 4)
    query, key, value, *_ = inputs(**problem(window, batch=1, heads=1), dtype=torch.float32)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    pooled, geometry = query[:, :0], Geometry.of(window, scale)
    launch.image_attention(
        query, key, value, pooled, pooled, NO_BIAS, out, lse, geometry, tables.FORWARD["sm_90"][0]
    )
    exact = (x.double() for x in (query, key, value))
    exact, exact_lse = reference_attention(*exact, window, scale=scale, return_lse=True)
    torch.testing.assert_close(out[:, 70:].double(), exact[:, 70:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, 70:].double(), exact_lse[:, 70:], rtol=1e-5, atol=1e-5)


@slow
def test_large_scores_stay_finite():
    window = Window(9, 9, 3, 3)
    query, key, value, *_ = inputs(**problem(window, batch=1), dtype=torch.float32)
    out, lse = ops.triton_attention(query * 1e4, key * 1e4, value, window, scale=1.0)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("architecture", tables.SHARED_MEMORY)
def test_tables_serve_every_head_and_dtype(architecture):
    for channels in (16, 32, 64, 128, 256):
        for element_size in (2, 4):
            assert tables.forward_configs(architecture, channels, element_size)
            assert tables.text_config(architecture, channels, element_size)
            assert tables.backward_config(architecture, channels, element_size)
            far = tables.forward_configs(architecture, channels, element_size, far=True)
            assert len({entry.tiling for entry in far}) == len(far) > 0
            assert not any(isinstance(entry, tables.GluonConfig) for entry in far)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.zeros(1, 1, 1, 16), "needs a CUDA or ROCm device, got a query on 'cpu'"),
        (torch.zeros(1, 1, 1, 16, dtype=torch.float64), "needs a CUDA"),
    ],
)
def test_refusals_without_a_gpu(query, reason):
    assert reason in why_not("triton", query)
