"""Models inside wrappers are known: torch.compile's, DDP's, FSDP's and PEFT's."""

import pytest
import torch
from conftest import make_components
from diffusers import AutoencoderTiny
from peft import LoraConfig, get_peft_model
from support import sharded_ranks
from support.autoencoders import make_autoencoder
from support.families.models import FAMILIES, blocks_of, make_inputs, make_model, run
from support.models import draw
from support.processes import launch
from support.sharded_ranks import KINDS
from support.slow import slow
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel

from clear_dit import (
    CLEARFluxPipeline,
    CLEARProcessor,
    apply_clear,
    remove_clear,
    save_clear_weights,
)
from clear_dit.chunking import chunk_feed_forward
from clear_dit.pipelines.decoding.autoencoder import decode, encode
from clear_dit.pipelines.identity import pipeline_digest
from clear_dit.wrappers import unwrapped


def compiled(module):
    return torch.compile(module, backend="eager")


def with_lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))


WRAPPERS = {
    "compiled": compiled,
    "data parallel": torch.nn.DataParallel,
    "LoRA": with_lora,
    "compiled LoRA": lambda model: compiled(with_lora(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_model_in_a_wrapper(name, wrap):
    model = make_model(name)
    wrapper = wrap(model)
    assert unwrapped(wrapper) is model
    apply_clear(wrapper, radius=2)
    assert isinstance(model.transformer_blocks[0].attn.processor, CLEARProcessor)
    assert remove_clear(wrapper)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_a_model_in_fsdp(tmp_path):
    model = make_model("flux")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/at", rank=0, world_size=1
    )
    try:
        wrapper = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        assert unwrapped(wrapper) is model
        apply_clear(wrapper, radius=2)
        assert isinstance(model.transformer_blocks[0].attn.processor, CLEARProcessor)
        assert remove_clear(wrapper)
    finally:
        distributed.destroy_process_group()


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compiled_one_by_one(name):
    plain, model, given = make_model(name), make_model(name), make_inputs(name, 4, 6)
    blocks = blocks_of(model)
    blocks[0] = compiled(blocks[0])
    (expected,) = apply_clear(plain, radius=2)
    assert apply_clear(model, radius=2) == (expected,)
    torch.testing.assert_close(run(model, given), run(plain, given))


def tiny_autoencoder():
    sizes = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    return AutoencoderTiny(**sizes, **channels).eval()


def usual_autoencoder():
    return make_autoencoder((4, 4), latent_channels=4, norm_num_groups=2, sample_size=16)


@pytest.mark.parametrize("part", ["all", "encoder and decoder"])
@pytest.mark.parametrize("make", [usual_autoencoder, tiny_autoencoder])
def test_compiled_autoencoder(make, part):
    vae = make()
    pixels = torch.rand(1, 3, 16, 24)
    latents = encode(vae, pixels)
    image = decode(vae, latents)
    if part == "all":
        vae = compiled(vae)
    else:
        vae.encoder, vae.decoder = compiled(vae.encoder), compiled(vae.decoder)
    assert torch.equal(encode(vae, pixels), latents)
    assert torch.equal(decode(vae, latents), image)


def sharded(model):
    """As FSDP's `fully_shard` leaves a model: of a subclass of its own, and so its blocks."""
    for module in (model, *model.transformer_blocks, *model.single_transformer_blocks):
        cls = type(module)
        name = f"FSDP{cls.__name__}"
        module.__class__ = type(name, (cls,), {"__module__": "torch.distributed.fsdp"})


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_becomes_of_a_subclass(when):
    plain, model, given = make_model("flux"), make_model("flux"), make_inputs("flux", 4, 6)
    full = run(plain, given)
    apply_clear(plain, radius=2)
    if when == "before":
        sharded(model)
    apply_clear(model, radius=2)
    chunk_feed_forward(model, 9)
    if when == "after":
        sharded(model)
    torch.testing.assert_close(run(model, given), run(plain, given))
    assert remove_clear(model)
    torch.testing.assert_close(run(model, given), full)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_compiled_pipeline_goes_on_with_the_stages_of_a_plain_one(part):
    pipe = CLEARFluxPipeline(**make_components())
    before = pipeline_digest(pipe)
    setattr(pipe, part, compiled(getattr(pipe, part)))
    assert pipeline_digest(pipe) == before


def on_two_ranks(task, *arguments):
    ranks = launch(task, 2, *arguments)
    for rank in ranks:
        rank.join(120)
    statuses = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert statuses == [0, 0]


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_ranks(kind):
    on_two_ranks(sharded_ranks.attention, kind)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_ranks(kind, tmp_path):
    model, path = make_model("flux", seed=1), tmp_path / "clear.safetensors"
    apply_clear(model, radius=2, far=False)
    save_clear_weights(model, path)
    on_two_ranks(sharded_ranks.weights, kind, path)
    assert len(list(tmp_path.iterdir())) == (3 if kind == "DDP" else 1)


def flatten(module, name):
    """Leaves a part of a parameter, as FSDP does."""
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().flatten()[:3]))


def test_parts_of_weights(tmp_path):
    model, path = make_model("flux"), tmp_path / "clear.safetensors"
    apply_clear(model, radius=2)
    flatten(model.transformer_blocks[1].attn.to_k, "weight")
    message = r"blocks\.1\.attn\.to_k\.weight is quantised or sharded \(.* of shape \(3,\)\)"
    with pytest.raises(ValueError, match=f"save_clear_weights: .*{message}"):
        save_clear_weights(model, path)
    assert not path.exists()


def test_parts_of_what_is_learned():
    model = make_model("flux")
    apply_clear(model, radius=2, down_factor=2)
    flatten(model.transformer_blocks[1].attn.processor, "spatial_weight")
    before = model.attn_processors
    with pytest.raises(ValueError, match=r"spatial_weight of the layers is sharded \(.*\(3,\)\)"):
        apply_clear(model, radius=3, down_factor=2)
    assert model.attn_processors == before


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


# What of a pipeline is put into a wrapper. It takes a while to trace a cascade.
IN_A_PIPELINE = {
    "LoRA": ("transformer", with_lora),  # that is zero
    "compiled VAE": ("vae", compiled),
}
SLOW_IN_A_PIPELINE = {
    "compiled": ("transformer", compiled),
    "compiled in place": ("transformer", compiled_in_place),
    "compiled LoRA": ("transformer", lambda model: compiled(with_lora(model))),
    "compiled CLIP": ("text_encoder", compiled),
    "compiled T5": ("text_encoder_2", compiled),
}


@pytest.mark.parametrize(
    ("part", "wrap"),
    [
        *(pytest.param(*each, id=name) for name, each in IN_A_PIPELINE.items()),
        *(pytest.param(*each, id=name, marks=slow) for name, each in SLOW_IN_A_PIPELINE.items()),
    ],
)
def test_pipelines(part, wrap):
    pipe, plain = (CLEARFluxPipeline(**make_components(), native_size=32) for _ in range(2))
    setattr(pipe, part, wrap(getattr(pipe, part)))
    for each in (pipe, plain):
        apply_clear(each, radius=2, far=False)
    # 8 bits a channel: rounding may show as one of 255 steps.
    expected = torch.tensor(draw(plain, height=64, width=64))
    received = torch.tensor(draw(pipe, height=64, width=64))
    torch.testing.assert_close(received, expected, rtol=0, atol=1.5 / 255)
    assert remove_clear(pipe)


def test_pipelines_cannot_run_data_parallel():
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    pipe.transformer = torch.nn.DataParallel(pipe.transformer)
    apply_clear(pipe, radius=2)
    with pytest.raises(ValueError, match=r"pipe.transformer is DataParallel, .* the model inside"):
        draw(pipe)
