"""Decoding's memory hardly grows with the image: bytes of all tensors alive at once."""

import itertools

import torch
from diffusers import AutoencoderTiny
from support.autoencoders import LIKE_FLUX, make_autoencoder
from support.live_memory import LiveMemory
from support.slow import slow
from torch._subclasses.fake_tensor import FakeTensorMode

from clear_dit.pipelines.decoding import autoencoder
from clear_dit.pipelines.decoding.autoencoder import decode_rows
from clear_dit.pipelines.decoding.group_norm import Moments
from clear_dit.pipelines.decoding.image_files import save_rows


def test_streamed_into_a_file(tmp_path):
    vae = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        num_decoder_blocks=(1, 1, 1, 0),
    )
    peaks = {}
    for side in (512, 1024):
        latents = torch.randn(1, 16, side // 8, side // 8)
        path = tmp_path / f"{side}.png"
        with LiveMemory() as memory:
            strips = decode_rows(vae, latents, tile_pixels=256)
            save_rows(strips, path, height=side, width=side, settings={})
        peaks[side] = memory.peak
    assert 1e6 < peaks[512] < peaks[1024] < 1.3 * peaks[512]


@slow
def test_of_flux_at_4096_pixels_against_2048(monkeypatch):
    """FLUX's own autoencoder, its operations not computed but for their sizes."""

    def statistics(segments, image, tile, process_group):  # measuring takes no more than decoding
        count = sum(segment.norms for segment in segments)
        return [Moments(1, torch.zeros(32), torch.ones(32))] * count

    monkeypatch.setattr(autoencoder, "measure", statistics)
    for check in ("_check_image", "_check_output"):  # which read values
        monkeypatch.setattr(autoencoder, check, lambda *_: None)
    peaks = {}
    with FakeTensorMode():
        vae = make_autoencoder((128, 256, 512, 512), layers_per_block=2, **LIKE_FLUX)
        for side in (2048, 4096):
            latents = torch.empty(1, 16, side // 8, side // 8)
            with LiveMemory() as memory:
                # The second row of tiles has surroundings on all sides.
                list(itertools.islice(decode_rows(vae, latents), 2))
            peaks[side] = memory.peak
    assert 2e9 < peaks[2048] < peaks[4096] < 1.3 * peaks[2048]
