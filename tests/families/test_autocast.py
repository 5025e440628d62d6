"""float32 weights under torch.autocast: what stock computes, but for bfloat16's rounding."""

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, prediction, run
from support.slow import few

from clear_dit import apply_clear
from clear_dit.attention.layout import Layout
from clear_dit.attention.positions import ExtendedPosEmbed
from clear_dit.attention.processor import _autocast

# Of PyTorch's norms, once a process; stock's too.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

# The settings of a disc that is past the diagonal, of which stock attention is the oracle.
PAST = {"local": {"far": False}, "far keys": {"far": True}}


def output(model, inputs, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        return prediction(model, inputs).float()


def gradient(model, inputs):
    output(model, inputs).square().sum().backward()
    values = {name: p for name, p in model.named_parameters() if name.endswith("to_v.weight")}
    return {name: value.grad for name, value in values.items() if value.grad is not None}


def relative(value, other):
    return ((value - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", few(FAMILIES))
@pytest.mark.parametrize("keys", PAST)
def test_as_stock(name, keys):
    stock, model, inputs = make_model(name), make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, radius=16, **PAST[keys])
    assert relative(output(model, inputs), output(stock, inputs)) < 0.02
    expected, found = gradient(stock, inputs), gradient(model, inputs)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert relative(value, expected[key]) < 0.05, key


@pytest.mark.parametrize("name", few(FAMILIES))
def test_float16_rounds_as_stock_and_less_than_bfloat16(name):
    stock, model, inputs = make_model(name), make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, radius=16, far=False)
    with torch.no_grad():
        exact = prediction(stock, inputs)
        error = relative(output(model, inputs, torch.float16), exact)
        assert error < 1.25 * relative(output(stock, inputs, torch.float16), exact)
        assert 4 * error < relative(output(model, inputs), exact)


def test_devices_without_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = _autocast((torch.empty(1, device="meta"),))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", few(FAMILIES))
@pytest.mark.parametrize("down_factor", [1, 2])
def test_local_is_as_without_autocast(name, down_factor):
    model, inputs = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, radius=2, down_factor=down_factor, far=False)
    exact = run(model, inputs)
    assert relative(output(model, inputs), exact) < 0.05


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("factor", [2.0, 5.0])  # from some 3 on with positions between
def test_two_positions_a_token(tiny_transformer, tiny_inputs, far, factor):
    model, inputs = tiny_transformer(), tiny_inputs(8, 8)
    stock = model.pos_embed
    model.pos_embed = ExtendedPosEmbed(stock.theta, stock.axes_dim, "two", (factor, factor), 8)
    apply_clear(model, radius=2, far=far)
    with torch.no_grad():
        found = output(model, inputs)
    assert relative(found, run(model, inputs)) < 0.05


def dtypes(model, inputs):
    """Of what attention layers return."""
    found = []

    def look(layer, given, out):
        found.extend(one.dtype for one in (out if isinstance(out, tuple) else (out,)))

    for layer in (one for one in model.modules() if hasattr(one, "set_processor")):
        layer.register_forward_hook(look)
    output(model, inputs)
    return found


@pytest.mark.parametrize("name", few(FAMILIES))
def test_layers_return_the_dtypes_of_stock(name):
    stock, model, inputs = make_model(name), make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, radius=2)
    assert dtypes(model, inputs) == dtypes(stock, inputs)


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "hunyuan-image"])
def test_padded_text(name):
    stock, model = make_model(name), make_model(name)
    inputs = make_inputs(name, 4, 6, batch=2, padded=True)
    apply_clear(model, radius=16, far=False)
    assert relative(output(model, inputs), output(stock, inputs)) < 0.02


def test_float64_stays(tiny_transformer, tiny_inputs):
    """Autocast leaves float64 alone, as it does everywhere."""
    model = tiny_transformer()
    apply_clear(model, radius=2, far=False)
    query = torch.randn(1, 27, 2, 16, dtype=torch.float64)
    layer = model.transformer_blocks[0].attn.processor
    with torch.autocast("cpu", torch.bfloat16):
        out = layer._local((query,) * 3, Layout(3, 4, 6))
    assert out.dtype == torch.float64
