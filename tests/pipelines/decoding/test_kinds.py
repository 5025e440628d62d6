"""Autoencoders of every kind in tiles against what the stock pipelines make of them at once."""

import copy
import itertools

import diffusers
import pytest
import torch
from diffusers import Flux2Pipeline
from support.autoencoders import TINY, make_kind
from support.slow import slow_but

from clear_dit.bench import published
from clear_dit.pipelines.decoding.autoencoder import decode, encode
from clear_dit.pipelines.decoding.group_norm import SharedGroupNorm, measure
from clear_dit.pipelines.decoding.kinds import layers
from clear_dit.pipelines.decoding.segments import (
    check_autoencoder,
    decoder_stages,
    encoder_stages,
    latent_channels,
    latent_step,
    pixel_channels,
    side_factor,
)
from clear_dit.pipelines.decoding.tiles import (
    Box,
    Segment,
    needed_boxes,
    output_box,
    run_tile,
    side_before,
    whole,
)
from clear_dit.process_group import RankGroup

KINDS = list(TINY)
# Rounding in float32 of values around 1, by a network of some twenty layers.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def vae(request):
    return make_kind(request.param)


def of_kinds(*quick):
    """Every kind; of those left out here a quick test says the same."""
    return pytest.mark.parametrize("vae", slow_but(KINDS, *quick), indirect=True)


def make_latents(vae, height=12, width=10):
    """Noisier to the right: no two tiles have the same statistics."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, latent_channels(vae), height, width, generator=generator)
    return noise * torch.linspace(0.2, 1, width)


def statistics(vae):
    """Mean and deviation by channel, as the pipelines read them; of FLUX.2's patches."""
    if hasattr(vae, "bn"):
        mean = vae.bn.running_mean
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    else:
        mean, deviation = map(torch.tensor, (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)


def raw_of(vae, latents):
    """What the stock pipelines give to `vae.decode`."""
    if hasattr(vae, "bn"):
        mean, deviation = statistics(vae)
        patches = Flux2Pipeline._patchify_latents(latents)
        return Flux2Pipeline._unpatchify_latents(patches * deviation + mean)
    if vae.config.get("latents_mean") is not None:
        mean, deviation = statistics(vae)
        return latents * deviation + mean
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)


def latents_of(vae, raw):
    """What the stock pipelines make of an encoded image."""
    if hasattr(vae, "bn"):
        mean, deviation = statistics(vae)
        patches = Flux2Pipeline._patchify_latents(raw)
        return Flux2Pipeline._unpatchify_latents((patches - mean) / deviation)
    if vae.config.get("latents_mean") is not None:
        mean, deviation = statistics(vae)
        return (raw - mean) / deviation
    return (raw - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def of_videos(vae):
    return "QwenImage" in type(vae).__name__


@torch.no_grad()
def decode_at_once(vae, latents):
    raw = raw_of(vae, latents)
    raw = raw.to(vae.dtype)
    return vae.decode(raw[:, :, None]).sample[:, :, 0] if of_videos(vae) else vae.decode(raw).sample


@torch.no_grad()
def encode_at_once(vae, pixels):
    if of_videos(vae):
        raw = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    else:
        raw = vae.encode(pixels).latent_dist.mode()
    return latents_of(vae, raw)


def make_pixels(vae, height, width):
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(1, pixel_channels(vae), height, width, generator=generator)
    return noise * torch.linspace(0.2, 2, width) - 1


@of_kinds(*KINDS)
def test_one_tile_is_what_the_pipelines_make(vae):
    compare(vae, None)


@of_kinds("flux2", "qwen", "qwen21", "hunyuan")
def test_tiles_are_the_whole(vae):
    compare(vae, 24)


def compare(vae, tile):
    latents, pixels = make_latents(vae), make_pixels(vae, 48, 40)
    expected = decode_at_once(vae, latents)
    assert expected.shape == (1, pixel_channels(vae), 48, 40)
    assert expected.abs().lt(1).float().mean() > 0.5  # not just what was clamped
    torch.testing.assert_close(decode(vae, latents, tile_pixels=tile), expected, **CLOSE)
    expected = encode_at_once(vae, pixels)
    torch.testing.assert_close(encode(vae, pixels, tile_pixels=tile), expected, **CLOSE)


@of_kinds(*KINDS)
def test_no_layer_looks_further_than_it_says(vae, monkeypatch):
    monkeypatch.setattr(layers, "WHOLE_ATTENTION", 0)
    monkeypatch.setattr(layers, "ATTENTION_RADIUS", 3)
    for stages, image in (
        (decoder_stages(vae, 20, 20), make_latents(vae, 20, 20)),
        (encoder_stages(vae, 20, 20), make_pixels(vae, 80, 80)),
    ):
        for segment in itertools.chain(*stages):
            layer = [Segment(lambda x: x), segment]
            with torch.no_grad():
                out = segment.run(image)
                moments = measure(layer, image, 80, RankGroup(None))
                for first in range(4, 8):  # odd and even corners
                    box = Box(first, first + 3, 10 - first, 13 - first)
                    with SharedGroupNorm(moments):
                        tile = run_tile(layer, image, box)
                    off = (tile - box.of(out)).abs().max()
                    assert off < 1e-5 * out.abs().max()
            image = out


@of_kinds(*KINDS)
def test_attention_over_a_disc(vae, monkeypatch):
    """Past the diagonal it is attention over all."""
    monkeypatch.setattr(layers, "WHOLE_ATTENTION", 12 * 10)
    hidden = make_latents(vae), make_pixels(vae, 48, 40)
    whole_image = through_all(vae, *hidden)
    monkeypatch.setattr(layers, "WHOLE_ATTENTION", 12 * 10 - 1)
    for radius, same in ((16, True), (3, "Attention" not in str(vae))):
        monkeypatch.setattr(layers, "ATTENTION_RADIUS", radius)
        for disc, everywhere in zip(through_all(vae, *hidden), whole_image, strict=True):
            assert torch.allclose(disc, everywhere, **CLOSE) == same


@torch.no_grad()
def through_all(vae, latents, pixels):
    for segment in itertools.chain(*decoder_stages(vae, 12, 10)):
        latents = segment.run(latents)
    for segment in itertools.chain(*encoder_stages(vae, 12, 10)):
        pixels = segment.run(pixels)
    return latents, pixels


@of_kinds("flux2", "qwen", "hunyuan")
def test_its_own_tiling_and_slicing_do_not_matter(vae):
    latents, pixels = make_latents(vae), make_pixels(vae, 48, 40)
    expected = decode(vae, latents), encode(vae, pixels)
    other = copy.deepcopy(vae)
    other.enable_tiling()
    other.enable_slicing()
    other.tile_sample_min_size = other.tile_sample_min_height = other.tile_sample_min_width = 16
    other.tile_latent_min_size = 4
    assert torch.equal(decode(other, latents), expected[0])
    assert torch.equal(encode(other, pixels), expected[1])


@of_kinds()
def test_bfloat16(vae):
    """No further from float32 than the stock pipelines' own."""
    latents = make_latents(vae)
    pixels = make_pixels(vae, 48, 40).clamp(-1, 1)
    exact = decode_at_once(vae, latents), encode_at_once(vae, pixels)
    half = copy.deepcopy(vae).bfloat16()
    found = decode(half, latents, tile_pixels=24), encode(half, pixels, tile_pixels=24)
    stock = decode_at_once(half, latents.bfloat16()), encode_at_once(half, pixels.bfloat16())
    for truth, ours, theirs in zip(exact, found, stock, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).square().mean() < 2 * (theirs - truth).square().mean()


@of_kinds()
def test_group_offload(vae):
    latents, pixels = make_latents(vae), make_pixels(vae, 48, 40)
    expected = decode(vae, latents, tile_pixels=24), encode(vae, pixels, tile_pixels=24)
    for kind in ({"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}):
        other = copy.deepcopy(vae)
        options = {"offload_type": "block_level", **kind}
        other.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
        assert torch.equal(decode(other, latents, tile_pixels=24), expected[0])
        assert torch.equal(encode(other, pixels, tile_pixels=24), expected[1])


def test_alpha():
    """Decoded where the autoencoder makes it; an image without it is opaque."""
    vae = make_kind("qwen21")
    assert pixel_channels(vae) == 4
    pixels = make_pixels(vae, 24, 32)
    opaque = pixels.clone()
    opaque[:, 3] = 1
    assert torch.equal(encode(vae, pixels[:, :3]), encode(vae, opaque))
    assert not torch.equal(encode(vae, pixels), encode(vae, opaque))
    with pytest.raises(
        ValueError, match=r"pixels must be \(1, 3 or 4, height, width\), got \(1, 2,"
    ):
        encode(vae, pixels[:, :2])
    with pytest.raises(ValueError, match=r"pixels must be \(1, 3, height, width\), got \(1, 4,"):
        encode(make_kind("qwen"), pixels)


# The numbers of each and their sources are in `published`. Qwen-Image 2.1's are the defaults of
# its class. Factor, step, channels of latents and of pixels.
PUBLISHED = {
    "flux, sd3, z-image": (published.FLUX_AUTOENCODER, (8, 1, 16, 3)),
    "flux2, flux3": (published.FLUX2_AUTOENCODER, (8, 2, 32, 3)),
    "qwen-image, krea2": (published.QWEN_IMAGE_AUTOENCODER, (8, 1, 16, 3)),
    "qwen-image-2.1": ({"_class_name": "AutoencoderKLQwenImage21"}, (16, 1, 64, 4)),
    "hunyuanimage-2.1": (
        published.HUNYUAN_IMAGE_AUTOENCODER | {"scaling_factor": 0.75289},
        (32, 1, 64, 3),
    ),
    "cogview4": (published.COGVIEW4_AUTOENCODER, (8, 1, 16, 3)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_at_4096_pixels(name):
    """A tile within the image, not computed but for its shape."""
    config, expected = PUBLISHED[name]
    config = dict(config)
    cls = getattr(diffusers, config.pop("_class_name"))
    with torch.device("meta"):
        vae = cls(**config).eval()
    found = side_factor(vae), latent_step(vae), latent_channels(vae), pixel_channels(vae)
    assert found == expected
    factor, _, channels, colours = expected
    check_autoencoder(vae)
    small = 4096 // factor
    image = through(decoder_stages(vae, small, small), (channels, small, small), 1024)
    assert image.shape == (1, colours, 4096, 4096)
    latents = through(encoder_stages(vae, small, small), (3, 4096, 4096), 1024 // factor)
    assert latents.shape == (1, channels, small, small)


def through(stages, shape, tile):
    """The whole output by its shape, of which one tile runs in each stage."""
    image = torch.empty(1, *shape, device="meta")
    for index, stage in enumerate(stages):
        rest = [segment for later in stages[index + 1 :] for segment in later]
        side = side_before(rest, tile)
        part = Box(side, 2 * side, side, 2 * side)
        with torch.no_grad():
            made = run_tile(stage, image, part)
        assert made.shape[2:] == (side, side)
        # What lies between stages is as small as latents are.
        out = output_box(stage, whole(image))
        image = made.new_empty(*made.shape[:2], out.bottom, out.right)
    return image


def test_a_tile_of_4096_pixels_needs_a_part():
    """With attention over a disc no tile needs all of the image, see `sees_everything`."""
    vae = make_kind("flux2")
    [first, _] = decoder_stages(vae, 1024, 1024)
    latents = Box(0, 1024, 0, 1024)
    assert needed_boxes(first, latents, Box(0, 256, 256, 512))[0].bottom < 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), "must be diffusers' AutoencoderKL, .*Image, got Linear"),
        (
            lambda: diffusers.AutoencoderKLWan(base_dim=4, z_dim=4),
            "or AutoencoderKLHunyuanImage, got AutoencoderKLWan",
        ),
        (
            lambda: change(make_kind("hunyuan"), scaling_factor=None),
            "this AutoencoderKLHunyuanImage has no scaling_factor; put",
        ),
        (
            lambda: change(make_kind("qwen21"), patch_size=2),
            "AutoencoderKLQwenImage21 with patch_size=2 cannot be run in tiles",
        ),
        (
            lambda: put(make_kind("hunyuan"), "decoder.up_blocks", 1, torch.nn.Tanh()),
            "a Tanh cannot be run in tiles",
        ),
        (
            lambda: put(make_kind("qwen"), "encoder.down_blocks", 1, torch.nn.Tanh()),
            "a Tanh cannot be run in tiles",
        ),
    ],
)
def test_what_is_not_known_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_autoencoder(make())


def change(vae, **config):
    vae.register_to_config(**config)
    return vae


def put(vae, where, index, layer):
    vae.get_submodule(where)[index] = layer
    return vae


def test_flux2_has_patches_of_two():
    vae = make_kind("flux2")
    assert (side_factor(vae), latent_step(vae)) == (4, 2)
    with pytest.raises(ValueError, match=r"decode: .* multiples of 2 latent pixels, got 5 x 4"):
        decode(vae, torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"encode: .* multiples of 8 pixels, got 20 x 16"):
        encode(vae, torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="positive multiple of 8, got 12"):
        decode(vae, torch.zeros(1, 3, 4, 4), tile_pixels=12)
