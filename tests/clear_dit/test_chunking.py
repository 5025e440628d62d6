"""Feed-forward layers in chunks: the same numbers, under whatever wraps the modules."""

import copy

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxControlNetModel, FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from support.quantised import Packed, by_layer
from support.slow import slow

from clear_dit import apply_clear, chunking
from clear_dit.chunking import ChunkedForward, chunk_feed_forward
from clear_dit.generation.models import DEMO
from clear_dit.hooks import Innermost

# Of 5 x 7 image and 3 text tokens.
TOKENS = 38


def double(inputs):
    return {name: tensor.double() for name, tensor in inputs.items()}


@torch.no_grad()
def run(model, inputs, **more):
    return model(**inputs, **more).sample


def assert_same(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def largest_chunk():
    """A function that has a model record the most tokens any feed-forward layer was called with."""

    def watch(model):
        seen = []
        layers = [block.ff for block in model.transformer_blocks]
        layers += [block.proj_mlp for block in model.single_transformer_blocks]
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        return seen

    return watch


def test_random_numbers_of_others_are_left_alone(monkeypatch):
    """As where a thread draws noise while another applies CLEAR for the first time."""
    torch.manual_seed(0)
    expected, drawn = torch.rand(2), []
    torch.manual_seed(0)
    own = chunking._StandIn.forward

    def draw_meanwhile(*args, **options):
        if not drawn:
            drawn.append(torch.rand(1))
        return own(*args, **options)

    monkeypatch.setattr(chunking._StandIn, "forward", draw_meanwhile)
    chunking._check_forwards.__wrapped__()
    assert torch.equal(torch.cat([*drawn, torch.rand(1)]), expected)


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (7, 7), (19, 19), (37, 35), (TOKENS, 38)])
def test_the_same_numbers_in_smaller_chunks(
    tiny_transformer, tiny_inputs, largest_chunk, tokens, most
):
    model, inputs = tiny_transformer().double(), double(tiny_inputs(5, 7, batch=2))
    seen = largest_chunk(model)
    for apply in (lambda: None, lambda: apply_clear(model, radius=2)):
        apply()
        expected = run(model, inputs)
        assert max(seen) == TOKENS
        seen.clear()
        chunk_feed_forward(model, tokens)
        assert_same(run(model, inputs), expected)
        assert max(seen) <= most
        chunk_feed_forward(model, None)
        assert "forward" not in vars(model.transformer_blocks[0])
        assert torch.equal(run(model, inputs), expected)


def test_a_second_call_replaces_the_size_and_a_copy_runs_its_own_blocks(tiny_transformer):
    model = tiny_transformer()
    chunk_feed_forward(model, 7)
    chunk_feed_forward(model, 9)
    forward = model.transformer_blocks[0].forward
    assert forward.tokens == 9
    assert not isinstance(forward.stock, ChunkedForward)
    copied = copy.deepcopy(model).transformer_blocks[0]
    assert copied.forward.block is copied
    assert copied.forward.stock.__self__ is copied


def test_gradients_are_those_of_the_stock_model(tiny_transformer, tiny_inputs):
    inputs = double(tiny_inputs(5, 7, batch=2))
    gradients = []
    for tokens in (None, 9):
        model = tiny_transformer().double()
        model.enable_gradient_checkpointing()
        chunk_feed_forward(model, tokens)
        model(**inputs).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for value, expected in zip(*reversed(gradients), strict=True):
        assert_same(value, expected)


def test_lora_fused_projections_and_quantised_layers(tiny_transformer, tiny_inputs):
    inputs = double(tiny_inputs(5, 7))
    model = tiny_transformer()
    by_layer(Packed)(model.single_transformer_blocks)
    targets = ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.0.proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model = model.double()
    for block in model.transformer_blocks:
        block.attn.fuse_projections()
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    chunk_feed_forward(model, 8)
    assert_same(run(model, inputs), expected)
    model.disable_adapters()
    assert not torch.allclose(run(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_controlnets(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer().double(), double(tiny_inputs(5, 7))
    controlnet = FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ).double()
    for layer in (*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        torch.nn.init.normal_(layer.weight)

    @torch.no_grad()
    def controlled():
        blocks, single_blocks = controlnet(
            controlnet_cond=inputs["hidden_states"], **inputs, return_dict=False
        )
        residuals = {
            "controlnet_block_samples": blocks,
            "controlnet_single_block_samples": single_blocks,
        }
        return run(model, inputs, **residuals)

    expected = controlled()
    assert not torch.allclose(run(model, inputs), expected)
    for each in (model, controlnet):
        chunk_feed_forward(each, 9)
    assert_same(controlled(), expected)


@torch.no_grad()
def test_float16_is_clipped_as_in_the_stock_blocks(tiny_transformer):
    model = tiny_transformer(num_layers=1, num_single_layers=1).half()
    double_block, single_block = model.transformer_blocks[0], model.single_transformer_blocks[0]
    for norm in (double_block.norm1, double_block.norm1_context, single_block.norm):
        norm.linear.bias.fill_(1.0)  # gates
    for layer in (double_block.ff_context.net[2], single_block.proj_out):
        layer.weight.zero_()
        layer.bias.fill_(1e4)
    image, text = torch.full((1, 9, 32), 6e4).half(), torch.full((1, 3, 32), 6e4).half()
    for block in (double_block, single_block):
        expected = block(image, text, torch.zeros(1, 32).half())
        assert (expected[0] == 65504).all()
        chunk_feed_forward(block, 4)
        value = block(image, text, torch.zeros(1, 32).half())
        assert torch.equal(value[0], expected[0])
        assert torch.equal(value[1], expected[1])


def group_offload(kind):
    """Weights on the disk; what is left of them in memory is NaN where the fixture says so."""

    def apply(model, folder):
        device = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(
            model, device, offload_type=kind, offload_to_disk_path=str(folder), **blocks
        )

    return apply


WRAPPERS = {
    "group offload by block": group_offload("block_level"),
    "group offload by layer": group_offload("leaf_level"),
    # Weights are on the meta device until their layer runs.
    "sequential offload": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "model offload": lambda model, _: accelerate.cpu_offload_with_hook(model, "cpu"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("chunked_first", [True, False])
def test_offloading(
    tiny_transformer,
    tiny_inputs,
    largest_chunk,
    tmp_path,
    poisoned_memory,
    monkeypatch,
    wrapper,
    chunked_first,
):
    model, inputs = tiny_transformer().double(), double(tiny_inputs(5, 7))
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    seen = largest_chunk(model)
    for step in (True, False) if chunked_first else (False, True):
        if step:
            chunk_feed_forward(model, 9)
        else:
            WRAPPERS[wrapper](model, tmp_path)

    brought = []
    onload = ModuleGroup.onload_
    monkeypatch.setattr(
        ModuleGroup, "onload_", lambda group: (brought.append(id(group)), onload(group))[1]
    )
    put = accelerate.hooks.set_module_tensor_to_device

    def count(module, name, device, **options):
        if str(device) == "cpu":
            brought.append((id(module), name))
        return put(module, name, device, **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", count)
    for _ in range(2):
        assert_same(run(model, inputs), expected)
        assert len(brought) == len(set(brought))  # no weight twice in a forward pass
        assert bool(brought) == (wrapper != "model offload")
        brought.clear()
    # accelerate and diffusers bring weights before a layer's own hooks see the chunk.
    assert max(seen) <= 9


def test_the_demo_with_weights_on_the_disk(tiny_inputs, tmp_path, poisoned_memory):
    model = FluxTransformer2DModel.from_pretrained(DEMO, subfolder="transformer").eval()
    generator = torch.Generator().manual_seed(0)
    ids = tiny_inputs(16, 24)["img_ids"]
    inputs = {
        "hidden_states": torch.randn(1, 16 * 24, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 64, 128, generator=generator),
        "pooled_projections": torch.randn(1, 128, generator=generator),
        "timestep": torch.full((1,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(64, 3),
    }
    apply_clear(model, radius=4)
    expected = run(model, inputs)
    chunk_feed_forward(model, 100)
    WRAPPERS["group offload by layer"](model, tmp_path)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_size_set_before_stays(tiny_transformer):
    model = tiny_transformer()
    chunk_feed_forward(model, 13)
    apply_clear(model, radius=2)
    assert Innermost(model.transformer_blocks[0]).forward.tokens == 13


@slow
def test_compiled_blocks_are_not_chunked(tiny_transformer, tiny_inputs):
    model = tiny_transformer(num_layers=1, num_single_layers=1)
    inputs = tiny_inputs(5, 7)
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    chunk_feed_forward(model, 13)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        Innermost(block).forward.chunked = None  # cannot be called
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=2e-6)


def test_first_block_cache(tiny_transformer, tiny_inputs, largest_chunk):
    model, inputs = tiny_transformer().double(), double(tiny_inputs(5, 7))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        expected = run(model, inputs)
    seen = largest_chunk(model)
    chunk_feed_forward(model, 9)
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert_same(run(model, inputs), expected)
    assert 0 < max(seen) <= 9
    # Removed below the hooks, which stay.
    chunk_feed_forward(model, None)
    place = Innermost(model.transformer_blocks[1])
    assert not isinstance(place.forward, ChunkedForward)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "9"])
def test_bad_sizes(tiny_transformer, tokens):
    with pytest.raises(ValueError, match=f"integer of at least 1, got {tokens!r}"):
        chunk_feed_forward(tiny_transformer(), tokens)


def test_other_models_are_refused(tiny_transformer, monkeypatch):
    with pytest.raises(ValueError, match="FluxSingleTransformerBlock; got Linear"):
        chunk_feed_forward(torch.nn.Linear(2, 2))
    chunking._check_forwards.cache_clear()
    kind = chunking.FluxSingleTransformerBlock
    known = chunking.FORWARDS[kind]

    def changed(block, text, image, *rest):
        return known(block, text, image + 1, *rest)

    monkeypatch.setitem(chunking.FORWARDS, kind, changed)
    with pytest.raises(ImportError, match="FluxSingleTransformerBlock computes something new"):
        chunk_feed_forward(tiny_transformer())
