"""`quantize`: what it refuses, and what runs on its layers. Importing torchao takes seconds."""

import importlib.util

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model
from support.families.models import run as run_family
from support.models import assert_same, run
from support.slow import slow
from torch import nn

from clear_dit import apply_clear, quantize
from clear_dit.families.precision import linear_layers, linears_of
from clear_dit.pipelines.cascade.stage_attention import can_run_full, full_attention
from clear_dit.weights import quantise
from clear_dit.weights.quantise import ChunkedLinear, check_kind, quantised
from clear_dit.weights.state import originals_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A function that makes the GPU one of a name and a compute capability."""

    def make(name, *capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(quantise, "HAS_TRITON", True)

    return make


@pytest.mark.parametrize(
    ("kind", "name", "capability", "message"),
    [
        ("fp8", "RTX 3090", (8, 6), "capability 8.9, Ada or Hopper .*; RTX 3090 has 8.6. Use int8"),
        ("nvfp4", "H100", (9, 0), "capability 10.0, Blackwell .*; H100 has 9.0. Use fp8."),
        ("int8", "T4", (7, 5), "capability 8.0, Ampere .*; T4 has 7.5. Go without."),
    ],
)
def test_what_a_gpu_lacks(card, kind, name, capability, message):
    card(name, *capability)
    with pytest.raises(ValueError, match=f"quantize: {kind} needs compute {message}"):
        check_kind(kind, CUDA, torch.bfloat16)


def test_what_runs_where(card, monkeypatch):
    check_kind("int8", CPU, torch.float32)
    for kind in ("fp8", "nvfp4"):
        with pytest.raises(ValueError, match=f"{kind} needs an NVIDIA GPU, .* is cpu. Use int8."):
            check_kind(kind, CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="kind must be one of int8, fp8, nvfp4; got 'q4'"):
        check_kind("q4", CPU, torch.float32)
    card("B200", 10, 0)
    for kind in ("int8", "fp8", "nvfp4"):
        check_kind(kind, CUDA, torch.bfloat16)
    check_kind("int8", CUDA, torch.float16)
    with pytest.raises(ValueError, match="fp8 needs weights in bfloat16, got float16"):
        check_kind("fp8", CUDA, torch.float16)
    monkeypatch.setattr(quantise, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="int8 compiles its products with Triton"):
        check_kind("int8", CUDA, torch.bfloat16)
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"int8 needs torchao 0.15 .*clear-dit\[quantize\]"):
        check_kind("int8", CPU, torch.float32)
    assert importlib.util.find_spec("torchao") is not None


def test_chunks_of_rows(monkeypatch):
    monkeypatch.setattr(quantise, "CHUNK_ROWS", 7)
    linear, tokens = nn.Linear(6, 5).double(), torch.randn(2, 3, 5, 6).double()
    linear.requires_grad_(False)
    expected = linear(tokens)
    linear.__class__ = ChunkedLinear
    torch.testing.assert_close(linear(tokens), expected)
    torch.testing.assert_close(linear(tokens[:1, :1]), expected[:1, :1])


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_these_layers(name):
    model, inputs = make_model(name), make_inputs(name, 4, 6)
    layers, plain = linears_of(model), run_family(model, inputs)
    done = quantize(model, "int8")
    narrow = {n for n, layer in linear_layers(model) if type(layer.weight.data) is not torch.Tensor}
    assert narrow == {*layers.narrow, *layers.stored} == {*next(iter(done.layers.values()))}
    assert done.wide == layers.wide
    out = run_family(model, inputs)
    assert not torch.equal(out, plain)
    assert (out - plain).norm() < 0.02 * plain.norm()
    apply_clear(model, radius=2, far=True)
    assert run_family(model, inputs).isfinite().all()


@slow
def test_the_statement_and_what_is_refused(tiny_transformer, tiny_inputs):
    model = tiny_transformer()
    assert quantised(model) is None
    done = quantize(model, "int8")
    assert quantised(model) is done
    told, again = done.statement(), quantize(tiny_transformer(), "int8").statement()
    assert told == again
    assert (told["kind"], told["wide"]["count"]) == ("int8", len(done.wide))
    assert told["layers"][0]["configuration"]["_type"] == "Int8WeightOnlyConfig"
    with pytest.raises(ValueError, match=r"linear is quantised or sharded already \(Int8Tensor"):
        quantize(model, "int8")
    other = tiny_transformer()
    other.enable_group_offload(CPU, offload_type="leaf_level")
    with pytest.raises(ValueError, match="is offloaded; quantise it before"):
        quantize(other, "int8")
    with pytest.raises(ValueError, match="has no values here"):
        quantize(tiny_transformer().to("meta"), "int8", CPU)


@slow
def test_the_originals_of_clear_weights_are_quantised_too(
    tiny_transformer, tiny_inputs, clear_file
):
    model, stock, inputs = tiny_transformer(), tiny_transformer(), tiny_inputs(4, 6)
    quantize(stock, "int8")
    apply_clear(model, radius=2, weights=clear_file())
    quantize(model, "int8")
    tuned, originals = run(model, inputs), originals_of(model)
    full = run(stock, inputs)
    assert can_run_full(model)
    for _ in range(2):
        with full_attention(model):
            assert torch.equal(run(model, inputs), full)
        assert torch.equal(run(model, inputs), tuned)
        with originals.back(model, "a test"):  # a forward with local attention in between
            assert originals.are_back
            assert torch.equal(run(model, inputs), tuned)
    apply_clear(stock, radius=2, far=False)
    assert not torch.equal(tuned, run(stock, inputs))


@slow
def test_loras(tiny_transformer, tiny_inputs):
    from peft import LoraConfig

    def with_lora(model):
        torch.manual_seed(1)
        targets = ["to_q", "proj_out", "norm1.linear"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return model

    inputs, exact = tiny_inputs(4, 6), run(with_lora(tiny_transformer()), tiny_inputs(4, 6))
    before, after, fused = with_lora(tiny_transformer()), tiny_transformer(), tiny_transformer()
    quantize(before, "int8")
    quantize(after, "int8")
    with pytest.warns(UserWarning, match="instantiated without"):
        with_lora(after)
    with_lora(fused).fuse_lora()
    quantize(fused, "int8")
    assert torch.equal(run(before, inputs), run(after, inputs))
    for model in (before, fused):
        torch.testing.assert_close(run(model, inputs), exact, rtol=0.05, atol=0.05)
    for model in (before, after):
        with pytest.raises((NotImplementedError, ValueError)):
            model.fuse_lora()
    with pytest.raises(NotImplementedError):
        fused.unfuse_lora()


@slow
def test_offload_and_compiled_blocks(tiny_transformer, tiny_inputs):
    inputs, plain = tiny_inputs(4, 6), tiny_transformer()
    quantize(plain, "int8")
    apply_clear(plain, radius=2)
    expected = run(plain, inputs)
    model = tiny_transformer()
    quantize(model, "int8")
    apply_clear(model, radius=2)
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(model, inputs), expected)
    plain.compile_repeated_blocks(fullgraph=True, dynamic=True)
    assert_same(run(plain, inputs), expected)
