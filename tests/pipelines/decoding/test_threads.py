"""Threads that share an autoencoder: what one brings or measures does not reach another."""

from contextlib import ExitStack

import pytest
import torch
from support.autoencoders import make_autoencoder
from support.threads import Middle

from clear_dit.pipelines.decoding import offloading
from clear_dit.pipelines.decoding.autoencoder import decode, encode
from clear_dit.pipelines.decoding.offloading import loaded


@pytest.fixture
def vae():
    return make_autoencoder((4, 4), latent_channels=1, norm_num_groups=2, shift_factor=0.0)


def latents_of(seed, rows=12, columns=8):
    return torch.randn(1, 1, rows, columns, generator=torch.Generator().manual_seed(seed))


def test_tiles_have_the_statistics_of_their_own_image(vae):
    works = [
        lambda: decode(vae, latents_of(0), tile_pixels=8),
        lambda: decode(vae, 3 + latents_of(1, 8, 20), tile_pixels=4),
    ]
    expected = [work() for work in works]
    middle = Middle()
    vae.decoder.up_blocks[0].resnets[0].conv2.register_forward_pre_hook(middle.reached)
    for image, right in zip(middle.run(*works), expected, strict=True):
        assert torch.equal(image, right)


def test_one_encodes_and_another_decodes_whole(vae):
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    works = [lambda: encode(vae, pixels, tile_pixels=8), lambda: decode(vae, latents_of(0))]
    expected = [work() for work in works]
    middle = Middle()
    vae.encoder.down_blocks[0].resnets[0].conv2.register_forward_pre_hook(middle.reached)
    for image, right in zip(middle.run(*works), expected, strict=True):
        assert torch.equal(image, right)


@pytest.fixture
def away(monkeypatch, vae):
    """An autoencoder whose weights are elsewhere: float64 stands for the device it runs on."""
    monkeypatch.setattr(offloading, "_execution_device", lambda vae: torch.float64)
    monkeypatch.setattr(offloading, "_is_away", lambda tensor, device: tensor.dtype != device)
    return vae


def dtypes(vae):
    return {parameter.dtype for parameter in vae.parameters()}


def test_the_last_user_takes_offloaded_weights_away(away):
    with ExitStack() as first, ExitStack() as second:
        for user in (first, second):
            user.enter_context(loaded(away))
        first.close()
        assert dtypes(away) == {torch.float64}
        second.close()
        assert dtypes(away) == {torch.float32}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_after_an_error_offloaded_weights_are_away(away, error):
    with pytest.raises(type(error)), loaded(away):
        raise error
    assert dtypes(away) == {torch.float32}
    with loaded(away):
        assert dtypes(away) == {torch.float64}
