"""Encoding and decoding pictures of any size by tiles that leave no trace.

Tiles are computed with all the surroundings they depend on (`tiles.py`) and share the statistics of
the whole picture (`group_norm.py`), so that they fit without blending: the result is that of the
autoencoder run at once, but for rounding. One thing is an approximation, of pictures with more
pixels than 1024 x 1024: an AutoencoderKL's attention, quadratic in the pixels, looks a fixed
distance around (`autoencoder_segments.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .autoencoder_segments import decoder_stages, encoder_stages, side_factor
from .group_norm import SharedGroupNorm, measure
from .offloading import loaded
from .tiles import Box, Segment, output_box, run_tile, side_before, tile_rows, whole

# FLUX's decoder takes about 4 GB for a tile of 1024 x 1024 pixels in float32.
TILE_PIXELS = 1024


@torch.no_grad()
def encode(vae: Any, pixels: torch.Tensor, *, tile_pixels: int | None = None) -> torch.Tensor:
    """A picture's latents as the transformer takes them: shifted and scaled, not packed.

    Args:
        vae: diffusers' AutoencoderKL (the mode of its distribution is taken) or AutoencoderTiny.
        pixels: (1, 3, height, width) in [-1, 1]; sides that are multiples of the autoencoder's
            factor, which is 8 for FLUX.
        tile_pixels: side of a tile, in pixels, a multiple of the factor; default: one tile for as
            many pixels as 1024 x 1024 has, else tiles of 1024.

    Returns:
        (1, channels, height / factor, width / factor) in the autoencoder's dtype, on the device of
        `pixels`.

    Raises:
        ValueError: another autoencoder, shape or tile, or pixels that are not finite.
        FloatingPointError: the autoencoder's output is not finite.
    """
    factor = side_factor(vae)
    _check_picture("encode", "pixels", pixels, 3)
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"encode: height and width must be multiples of {factor} pixels, got {height} x "
            f"{width}."
        )
    tile = _tile_side("encode", tile_pixels, factor, height, width) // factor
    stages = encoder_stages(vae, height // factor, width // factor)
    with loaded(vae) as device:
        return _last_tiles(stages, pixels, tile, device, vae.dtype).together()


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, *, tile_pixels: int | None = None) -> torch.Tensor:
    """The whole picture of `decode_rows`, (1, 3, factor * height, factor * width)."""
    stages, tile = _plan_decoding(vae, latents, tile_pixels)
    with loaded(vae) as device:
        return _last_tiles(stages, latents, tile, device, vae.dtype).together()


def decode_rows(
    vae: Any, latents: torch.Tensor, *, tile_pixels: int | None = None
) -> Iterator[torch.Tensor]:
    """A picture from latents, strip by strip, in memory that hardly grows with the picture.

    Args:
        vae: diffusers' AutoencoderKL or AutoencoderTiny.
        latents: (1, channels, height, width) as the transformer gives them: shifted and scaled,
            unpacked.
        tile_pixels: side of a tile, in pixels, a multiple of the autoencoder's factor (8 for
            FLUX); default: one tile for as many pixels as 1024 x 1024 has, else tiles of 1024.

    Returns:
        Strips (3, rows, factor * width) from top to bottom, in [-1, 1] but for overshoot (not
        clamped), in the autoencoder's dtype, on the device of `latents`. An AutoencoderKL first
        goes over the picture for its statistics, which takes about ten times as long as the rest.

    Raises:
        ValueError: another autoencoder, shape or tile, or latents that are not finite; at once.
        FloatingPointError: the autoencoder's output is not finite, on the way.
    """
    return _decode_rows(vae, latents, *_plan_decoding(vae, latents, tile_pixels))


@torch.no_grad()
def _decode_rows(
    vae: Any, latents: torch.Tensor, stages: Sequence[Sequence[Segment]], tile: int
) -> Iterator[torch.Tensor]:
    with loaded(vae) as device:
        yield from _last_tiles(stages, latents, tile, device, vae.dtype).strips()


def _plan_decoding(
    vae: Any, latents: torch.Tensor, tile_pixels: int | None
) -> tuple[list[list[Segment]], int]:
    factor = side_factor(vae)
    _check_picture("decode", "latents", latents, vae.config.latent_channels)
    height, width = latents.shape[-2:]
    tile = _tile_side("decode", tile_pixels, factor, factor * height, factor * width)
    return decoder_stages(vae, height, width), tile


def _last_tiles(
    stages: Sequence[Sequence[Segment]],
    picture: torch.Tensor,
    tile: int,
    device: torch.device,
    dtype: torch.dtype,
) -> _Tiles:
    """The last of some networks in a row; what those before it make is held whole.

    Arguments are those of `_Tiles`; the tile is in pixels of the last output.
    """
    for index, segments in enumerate(stages[:-1]):
        after = [segment for stage in stages[index + 1 :] for segment in stage]
        side = side_before(after, tile)
        picture = _Tiles(segments, picture, side, device, dtype).together()
    return _Tiles(stages[-1], picture, tile, device, dtype)


class _Tiles:
    """What a network makes of a picture, computed tile by tile on a device.

    Args:
        segments: the network.
        picture: its input, (1, channels, height, width), on any device.
        tile: side of a tile, in output pixels.
        device, dtype: of the network.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        picture: torch.Tensor,
        tile: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._segments = [Segment(lambda x: x.to(device, dtype)), *segments]
        self._picture = picture
        self._rows = list(tile_rows(output_box(segments, whole(picture)), tile))
        self._alone = len(self._rows) == len(self._rows[0]) == 1
        self._moments = [] if self._alone else measure(self._segments, picture, tile)

    def strips(self) -> Iterator[torch.Tensor]:
        """(channels, rows, width) of one row of tiles after the other, where the picture is."""
        return (self._filled(row) for row in self._rows)

    def together(self) -> torch.Tensor:
        """The whole output, (1, channels, height, width), where the picture is."""
        return self._filled([box for row in self._rows for box in row])[None]

    def _filled(self, boxes: Sequence[Box]) -> torch.Tensor:
        """The rectangle that some tiles fill, from its first to its last, in raster order."""
        first, last = boxes[0], boxes[-1]
        part = Box(first.top, last.bottom, first.left, last.right)
        out: torch.Tensor | None = None
        for box in boxes:
            tile = self._tile(box)
            if out is None:
                shape = (len(tile), part.bottom - part.top, part.right - part.left)
                out = tile.new_empty(shape, device=self._picture.device)
            box.within(part).of(out).copy_(tile)
        assert out is not None
        return out

    def _tile(self, box: Box) -> torch.Tensor:
        if self._alone:
            tile = run_tile(self._segments, self._picture, box)[0]
        else:
            with SharedGroupNorm(self._moments):
                tile = run_tile(self._segments, self._picture, box)[0]
        _check_output(tile)
        return tile


def _check_output(tile: torch.Tensor) -> None:
    if not tile.isfinite().all():
        raise FloatingPointError(
            "the autoencoder's output is NaN or infinite; use float32 or bfloat16."
        )


def _check_picture(who: str, what: str, picture: torch.Tensor, channels: int) -> None:
    shape = tuple(picture.shape)
    if len(shape) != 4 or shape[:2] != (1, channels) or 0 in shape:
        raise ValueError(f"{who}: {what} must be (1, {channels}, height, width), got {shape}.")
    if not picture.isfinite().all():
        raise ValueError(f"{who}: {what} are not finite (NaN or infinity in them).")


def _tile_side(who: str, tile_pixels: int | None, factor: int, height: int, width: int) -> int:
    """Side of a tile; one that holds the whole picture where that is small."""
    if tile_pixels is None:
        return max(height, width) if height * width <= TILE_PIXELS**2 else TILE_PIXELS
    if tile_pixels < factor or tile_pixels % factor:
        raise ValueError(
            f"{who}: tile_pixels must be a positive multiple of {factor}, got {tile_pixels}."
        )
    return tile_pixels
