"""Models inside wrappers are known: torch.compile's, DDP's, FSDP's and PEFT's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.autoencoders import make_autoencoder
from support.families.models import FAMILIES, make_inputs, make_model, run

from clear_dit import CLEARProcessor, apply_clear, remove_clear
from clear_dit.pipelines.decoding.autoencoder import decode, encode
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


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compiled_one_by_one(name):
    plain, model, given = make_model(name), make_model(name), make_inputs(name, 4, 6)
    stack = "layers" if name == "z-image" else "transformer_blocks"
    blocks = getattr(model, stack)
    blocks[0] = compiled(blocks[0])
    (expected,) = apply_clear(plain, radius=2)
    assert apply_clear(model, radius=2) == (expected,)
    torch.testing.assert_close(run(model, given), run(plain, given))


@pytest.mark.parametrize("part", ["all", "encoder and decoder"])
def test_compiled_autoencoder(part):
    vae = make_autoencoder((4, 4), latent_channels=4, norm_num_groups=2, sample_size=16)
    pixels = torch.rand(1, 3, 16, 24)
    latents = encode(vae, pixels)
    image = decode(vae, latents)
    if part == "all":
        vae = compiled(vae)
    else:
        vae.encoder, vae.decoder = compiled(vae.encoder), compiled(vae.decoder)
    assert torch.equal(encode(vae, pixels), latents)
    assert torch.equal(decode(vae, latents), image)
