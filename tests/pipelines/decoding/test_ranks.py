"""Tiles of the autoencoder shared out over gloo ranks: what comes out is one process's."""

import pytest
import torch
from support import rank_tasks
from support.slow import slow

from clear_dit.pipelines.decoding.autoencoder import decode, encode


def make_latents(height, width):
    """Smooth to the left, noisy to the right: no two tiles have the same statistics."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, height, width, generator=generator)
    return noise * torch.linspace(0, 1, width)


# Rows of more and of fewer tiles than ranks, the last ones smaller; a single tile.
CASES = [
    ("demo", make_latents(10, 14), 48),
    ("demo", make_latents(6, 6), None),
    ("kl", make_latents(21, 14), 16),
    ("kl", make_latents(20, 6), 16),
]


@pytest.fixture(scope="module")
def alone():
    found = []
    for kind, latents, tile in CASES:
        vae = rank_tasks.autoencoder_of(kind)
        image = decode(vae, latents, tile_pixels=tile)
        found.append((image, encode(vae, image, tile_pixels=tile)))
    return found


@slow  # parallel/test_patch_parallel.py has a quick one
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(alone, world, tmp_path):
    statuses, said = rank_tasks.run_ranks(rank_tasks.code, world, tmp_path, CASES, tmp_path)
    assert statuses == [0] * world, said
    for rank in range(world):
        coded = torch.load(tmp_path / f"coded-{rank}.pt", weights_only=True)
        for (strips, image, latents), (expected, encoded) in zip(coded, alone, strict=True):
            torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(latents, encoded, rtol=1e-5, atol=1e-5)
            # The first rank writes; the others are given nothing to write.
            if rank == 0:
                assert torch.equal(torch.cat(strips, dim=1)[None], image)
            else:
                assert strips == []
