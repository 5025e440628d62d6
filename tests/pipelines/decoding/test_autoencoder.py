"""Encoding and decoding in tiles against diffusers' own, which runs the whole at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from support.autoencoders import LIKE_FLUX, make_autoencoder
from support.slow import slow, slow_but

from clear_dit.evaluation.seams import measure_seams
from clear_dit.generation.models import DEMO
from clear_dit.pipelines.decoding.autoencoder import decode, decode_rows, encode
from clear_dit.pipelines.decoding.image_files import to_bytes
from clear_dit.pipelines.decoding.kinds import layers, tiny

# In latent pixels.
SIZES = [*(pytest.param(size, marks=slow) for size in ((12, 12), (17, 9))), (5, 21)]


def make_kl(channels=(8, 8, 16, 16), **config):
    """FLUX's autoencoder with fewer channels and random weights."""
    torch.manual_seed(0)
    small = LIKE_FLUX | {"layers_per_block": 2, "norm_num_groups": 4}
    return make_autoencoder(channels, **small | config)


@pytest.fixture(scope="module")
def kl():
    return make_kl()


@pytest.fixture(scope="module")
def demo():
    return AutoencoderTiny.from_pretrained(DEMO / "vae", use_safetensors=True).eval()


@pytest.fixture(params=["kl", "demo"])
def vae(request):
    return request.getfixturevalue(request.param)


def make_latents(height, width, channels=16):
    """Smooth to the left, noisy to the right: no two tiles have the same statistics."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.randn(1, channels, height, width, generator=generator)
    return smooth + noise * torch.linspace(0, 1, width)


@torch.no_grad()
def decode_at_once(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample


@torch.no_grad()
def encode_at_once(vae, pixels):
    found = vae.encode(pixels)
    raw = found.latents if isinstance(vae, AutoencoderTiny) else found.latent_dist.mode()
    return (raw - vae.config.shift_factor) * vae.config.scaling_factor


def psnr(a, b):
    return float(10 * torch.log10(4 / (a - b).double().square().mean().clamp_min(1e-20)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", slow_but([None, 40, 64], None, 40))
def test_tiles_are_the_whole(vae, size, tile):
    latents = make_latents(*size)
    whole = decode_at_once(vae, latents)
    torch.testing.assert_close(decode(vae, latents, tile_pixels=tile), whole, rtol=1e-4, atol=1e-4)
    pixels = whole.clamp(-1, 1)
    torch.testing.assert_close(
        encode(vae, pixels, tile_pixels=tile), encode_at_once(vae, pixels), rtol=1e-4, atol=1e-4
    )


@slow
@pytest.mark.parametrize("name", ["kl", "demo"])
def test_an_image_of_1024_pixels_in_tiles(name, demo):
    vae = demo if name == "demo" else make_kl((4, 4, 8, 8), norm_num_groups=2, layers_per_block=1)
    latents = make_latents(128, 128)
    whole, tiled = decode_at_once(vae, latents), decode(vae, latents, tile_pixels=512)
    assert psnr(whole, tiled) > 90
    grey = [to_bytes(image[0]).permute(1, 2, 0).numpy() for image in (whole, tiled)]
    expected, found = (measure_seams(image, [512], [512]).ratio for image in grey)
    assert found == pytest.approx(expected, rel=0.005)


def test_convolutions_on_a_cpu_get_channels_last(vae):
    """Else they copy all they take and give, which was a quarter of the time."""
    given = []
    convolutions = [layer for layer in vae.modules() if isinstance(layer, torch.nn.Conv2d)]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0].stride(1)))
        for layer in convolutions
    ]
    try:
        encode(vae, decode(vae, make_latents(9, 12), tile_pixels=40), tile_pixels=40)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(given) > len(convolutions)
    assert set(given) == {1}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"padding_mode": "reflect"}, {"dilation": 2, "padding": 2}]
)
def test_an_enlargement_with_its_convolution(bias, changes):
    """One transposed convolution where it is the same; what is not plain stays two layers."""
    torch.manual_seed(0)
    upsample, relu = torch.nn.Upsample(scale_factor=2), torch.nn.ReLU()
    conv = torch.nn.Conv2d(6, 4, 3, **{"padding": 1, "bias": bias} | changes)
    segments = list(tiny.decoder_layers([relu, upsample, conv, upsample, relu]))
    assert len(segments) == (5 if changes else 4)
    image = torch.randn(1, 6, 5, 7)
    with torch.no_grad():
        found = image
        for segment in segments:
            found = segment.run(found)
        expected = relu(upsample(conv(upsample(relu(image)))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_enlargement_in_float64():
    upsample, conv = torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(3, 3, 3, padding=1).double()
    (segment,) = tiny.decoder_layers([upsample, conv])
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(segment.run(image), conv(upsample(image)), rtol=1e-12, atol=1e-13)


def test_an_enlargement_whose_weights_are_stored_in_other_types():
    """As layerwise casting has them: the layers run as they are, which the casting hooks need."""
    upsample, conv = torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(3, 3, 3, padding=1)
    (segment,) = tiny.decoder_layers([upsample, conv])
    conv.to(torch.bfloat16)
    conv.register_forward_pre_hook(lambda layer, _: layer.float() and None)
    assert segment.run(torch.randn(1, 3, 4, 4)).dtype == torch.float32


def test_statistics_of_each_tile_alone_would_show(kl):
    latents = make_latents(16, 32)
    whole = decode_at_once(kl, latents)
    halves = torch.cat([decode_at_once(kl, half) for half in latents.chunk(2, dim=3)], dim=3)
    assert psnr(whole, halves) < 30
    assert psnr(whole, decode(kl, latents, tile_pixels=128)) > 90


def test_other_layers_of_an_autoencoder_kl():
    vae = make_kl(
        (8, 16),
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=False,
        shift_factor=None,
    )
    latents = make_latents(21, 14)
    with torch.no_grad():
        whole = vae.decode(latents / 0.3611).sample
        raw = vae.encode(whole).latent_dist.mode()
    torch.testing.assert_close(decode(vae, latents, tile_pixels=16), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        encode(vae, whole, tile_pixels=16), raw * 0.3611, rtol=1e-4, atol=1e-4
    )


@slow
def test_attention_of_a_large_image_is_local_and_knows_no_tiles(kl, monkeypatch):
    monkeypatch.setattr(layers, "WHOLE_ATTENTION", 100)
    monkeypatch.setattr(layers, "ATTENTION_RADIUS", 6)
    latents = make_latents(24, 20)
    one, many = (decode(kl, latents, tile_pixels=tile) for tile in (192, 64))
    assert psnr(one, many) > 90
    assert 30 < psnr(decode_at_once(kl, latents), many) < 90


@slow
def test_bfloat16(kl, demo):
    for vae in (make_kl().bfloat16(), AutoencoderTiny.from_pretrained(DEMO / "vae").bfloat16()):
        exact = kl if isinstance(vae, AutoencoderKL) else demo
        latents = make_latents(16, 24)
        truth = decode_at_once(exact, latents)
        tiled = decode(vae, latents, tile_pixels=64)
        assert tiled.dtype == torch.bfloat16
        stock = decode_at_once(vae, latents.bfloat16())
        assert psnr(truth, tiled.float()) > psnr(truth, stock.float()) - 1
        pixels = truth.clamp(-1, 1)
        assert encode(vae, pixels, tile_pixels=64).dtype == torch.bfloat16


@slow
def test_strips_come_top_to_bottom_and_the_autoencoder_stays_as_it_was(kl):
    latents = make_latents(20, 12)
    before = {name: vars(module).copy() for name, module in kl.named_modules()}
    strips = list(decode_rows(kl, latents, tile_pixels=64))
    assert [strip.shape for strip in strips] == [(3, 64, 96), (3, 64, 96), (3, 32, 96)]
    assert torch.equal(torch.cat(strips, dim=1)[None], decode(kl, latents, tile_pixels=64))
    next(decode_rows(kl, latents, tile_pixels=64))  # dropped half-way
    assert {name: vars(module).keys() for name, module in kl.named_modules()} == {
        name: kept.keys() for name, kept in before.items()
    }
    norm = F.group_norm(torch.ones(1, 4, 2, 2), 2)
    assert torch.equal(norm, torch.zeros(1, 4, 2, 2))


@slow
def test_group_offload(kl):
    latents = make_latents(9, 10)
    expected = decode(kl, latents, tile_pixels=40)
    for kind in ({"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}):
        vae = make_kl()
        options = {"offload_type": "block_level", **kind}
        vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
        assert torch.equal(decode(vae, latents, tile_pixels=40), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"latents must be \(1, 16, height, width\), got \(16, 4, 4\)"),
        (lambda x: x[:, :4], r"must be \(1, 16, height, width\), got \(1, 4, 4, 4\)"),
        (lambda x: x.repeat(2, 1, 1, 1), r"must be \(1, 16"),
        (lambda x: x[..., :0], r"must be \(1, 16"),
        (lambda x: x * np.nan, "latents are not finite"),
    ],
)
def test_bad_latents_are_refused_at_once(kl, change, message):
    with pytest.raises(ValueError, match=message):
        decode_rows(kl, change(torch.zeros(1, 16, 4, 4)))


def test_bad_sizes_and_autoencoders_are_refused(kl):
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 20 x 16"):
        encode(kl, torch.zeros(1, 3, 20, 16))
    for tile in (0, -8, 100):
        with pytest.raises(ValueError, match=f"tile_pixels must be a positive.* got {tile}"):
            decode(kl, torch.zeros(1, 16, 4, 4), tile_pixels=tile)
    with pytest.raises(
        ValueError, match=r"AutoencoderTiny, .* or AutoencoderKLHunyuanImage, got Linear"
    ):
        decode(torch.nn.Linear(1, 1), torch.zeros(1, 16, 4, 4))
    other = make_kl(up_block_types=("AttnUpDecoderBlock2D",) * 4)
    with pytest.raises(ValueError, match="AttnUpDecoderBlock2D in place of a UpDecoderBlock2D"):
        decode(other, torch.zeros(1, 16, 4, 4))
