"""Encoding and decoding images of any size by tiles that leave no trace.

Tiles are computed with all the surroundings they depend on (`tiles.py`) and share the statistics of
the whole image (`group_norm.py`), so that they fit without blending: the result is that of the
autoencoder run at once, but for rounding. Several processes can share them out, which changes
nothing: bit for bit the same comes out. One thing is an approximation, of images with more
latents than 128 x 128: the autoencoder's attention, quadratic in them, looks a fixed distance
around (`kinds/layers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

from clear_dit.kernels.numbers import as_integer
from clear_dit.process_group import RankGroup

from .group_norm import SharedGroupNorm, measure
from .offloading import loaded
from .segments import (
    decoder_stages,
    encoder_stages,
    latent_channels,
    latent_step,
    pixel_channels,
    side_factor,
)
from .tiles import (
    Box,
    Segment,
    output_box,
    run_tile,
    sees_everything,
    side_before,
    tile_rows,
    whole,
)

# FLUX's decoder takes about 4 GB for a tile of 1024 x 1024 pixels in float32, CogView4's and
# Qwen-Image 2.1's 8 GB, the others' less than FLUX's.
TILE_PIXELS = 1024


@torch.no_grad()
def encode(
    vae: Any,
    pixels: torch.Tensor,
    *,
    tile_pixels: int | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """An image's latents as the transformer takes them: shifted and scaled, not packed.

    Args:
        vae: an autoencoder of `segments.KINDS`, whatever its own tiling and slicing are set to;
            the mode of its distribution is taken.
        pixels: (1, 3, height, width) in [-1, 1], or with alpha as a fourth channel for an
            autoencoder that has it (without, all is opaque); sides that are multiples of the
            autoencoder's factor (8 for FLUX.1), or of twice that for FLUX.2.
        tile_pixels: side of a tile, in pixels, a multiple likewise; default: one tile for as
            many pixels as 1024 x 1024 has, else tiles of 1024.
        group: the ranks that share out the tiles; each is given all pixels and gets all latents.

    Returns:
        (1, channels, height / factor, width / factor) in the autoencoder's dtype, on the device of
        `pixels`.

    Raises:
        ValueError: another autoencoder, shape or tile, or pixels that are not finite.
        FloatingPointError: the autoencoder's output is not finite.
    """
    factor = side_factor(vae)
    step = factor * latent_step(vae)
    _check_image("encode", "pixels", pixels, sorted({3, pixel_channels(vae)}))
    height, width = pixels.shape[-2:]
    if height % step or width % step:
        raise ValueError(
            f"encode: height and width must be multiples of {step} pixels, got {height} x {width}."
        )
    tile = _tile_side("encode", tile_pixels, step, height, width) // factor
    stages = encoder_stages(vae, height // factor, width // factor)
    with loaded(vae) as device:
        return _last_tiles(stages, pixels, tile, device, vae.dtype, RankGroup(group)).together()


@torch.no_grad()
def decode(
    vae: Any,
    latents: torch.Tensor,
    *,
    tile_pixels: int | None = None,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """The image of `decode_rows`, (1, 3 or 4, factor * height, factor * width), on all ranks."""
    stages, tile = _plan_decoding(vae, latents, tile_pixels)
    with loaded(vae) as device:
        return _last_tiles(stages, latents, tile, device, vae.dtype, RankGroup(group)).together()


def decode_rows(
    vae: Any,
    latents: torch.Tensor,
    *,
    tile_pixels: int | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[torch.Tensor]:
    """An image from latents, strip by strip, in memory that hardly grows with the image.

    Args:
        vae: an autoencoder of `segments.KINDS`, whatever its own tiling and slicing are set to.
        latents: (1, channels, height, width) as the transformer gives them: shifted and scaled,
            unpacked. Of FLUX.2 both sides are even.
        tile_pixels: side of a tile, in pixels, a multiple of the autoencoder's factor (8 for
            FLUX.1), or of twice that for FLUX.2; default: one tile for as many pixels as
            1024 x 1024 has, else tiles of 1024.
        group: the ranks that share out the tiles; each is given all latents. All must iterate: the
            first one gets the strips, the others nothing.

    Returns:
        Strips (3, rows, factor * width) from top to bottom, in [-1, 1] but for overshoot (clamped
        only where the autoencoder itself does), in the autoencoder's dtype, on the device of
        `latents`. They have alpha as a fourth channel where the autoencoder makes it. One with
        group norms (all but Qwen-Image's and AutoencoderTiny) first goes over the image for its
        statistics, which takes about ten times as long as the rest.

    Raises:
        ValueError: another autoencoder, shape or tile, or latents that are not finite; at once.
        FloatingPointError: the autoencoder's output is not finite, on the way.
    """
    return _decode_rows(vae, latents, *_plan_decoding(vae, latents, tile_pixels), RankGroup(group))


@torch.no_grad()
def _decode_rows(
    vae: Any,
    latents: torch.Tensor,
    stages: Sequence[Sequence[Segment]],
    tile: int,
    process_group: RankGroup,
) -> Iterator[torch.Tensor]:
    with loaded(vae) as device:
        yield from _last_tiles(stages, latents, tile, device, vae.dtype, process_group).strips()


def _plan_decoding(
    vae: Any, latents: torch.Tensor, tile_pixels: int | None
) -> tuple[list[list[Segment]], int]:
    factor, step = side_factor(vae), latent_step(vae)
    _check_image("decode", "latents", latents, [latent_channels(vae)])
    height, width = latents.shape[-2:]
    if height % step or width % step:
        raise ValueError(
            f"decode: height and width must be multiples of {step} latent pixels, got {height} x "
            f"{width}."
        )
    tile = _tile_side("decode", tile_pixels, factor * step, factor * height, factor * width)
    return decoder_stages(vae, height, width), tile


def _last_tiles(
    stages: Sequence[Sequence[Segment]],
    image: torch.Tensor,
    tile: int,
    device: torch.device,
    dtype: torch.dtype,
    process_group: RankGroup,
) -> _Tiles:
    """The last of some networks in a row; what those before it make is held whole.

    Arguments are those of `_Tiles`; the tile is in pixels of the last output.
    """
    for index, segments in enumerate(stages[:-1]):
        after = [segment for stage in stages[index + 1 :] for segment in stage]
        side = side_before(after, tile)
        image = _Tiles(segments, image, side, device, dtype, process_group).together()
    return _Tiles(stages[-1], image, tile, device, dtype, process_group)


class _Tiles:
    """What a network makes of an image, computed tile by tile on a device.

    Args:
        segments: the network.
        image: its input, (1, channels, height, width), on any device.
        tile: side of a tile, in output pixels; there is one tile where each would need all of
            the image.
        device, dtype: of the network.
        process_group: the ranks that share out the tiles.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        image: torch.Tensor,
        tile: int,
        device: torch.device,
        dtype: torch.dtype,
        process_group: RankGroup,
    ) -> None:
        # Channels last: convolutions on a CPU otherwise copy all they take and give.
        layout = torch.channels_last if device.type == "cpu" else torch.preserve_format
        first = Segment(lambda x: x.to(device, dtype, memory_format=layout))
        self._segments = [first, *segments]
        self._image = image
        self._device, self._dtype, self._process_group = device, dtype, process_group
        everything = output_box(segments, whole(image))
        if sees_everything(segments, whole(image)):
            tile = max(everything.bottom, everything.right)
        self._rows = list(tile_rows(everything, tile))
        self._boxes = [box for row in self._rows for box in row]
        self._owner = {box: process_group.owner(index) for index, box in enumerate(self._boxes)}
        alone = len(self._boxes) == 1
        self._moments = [] if alone else measure(self._segments, image, tile, process_group)

    def strips(self) -> Iterator[torch.Tensor]:
        """(channels, rows, width) of one row of tiles after the other, where the image is.

        On the first rank; the others compute and send their tiles.
        """
        if self._process_group.rank == 0:
            channels = 0
            for row in self._rows:
                strip = self._filled(row, self._to_first(row, channels))
                channels = len(strip)
                yield strip
            return
        sent: Work | None = None
        for box in self._process_group.share(self._boxes):
            tile = self._tile(box).contiguous()
            if sent is not None:
                sent.wait()
            sent = self._process_group.send(tile, 0)
        if sent is not None:
            sent.wait()

    def _to_first(self, boxes: Sequence[Box], channels: int) -> Iterator[torch.Tensor]:
        """Tiles on the first rank, one after the other; `channels` unless the first is its own."""
        for box in boxes:
            if self._owner[box] == 0:
                tile = self._tile(box)
            else:
                tile = self._empty(channels, box)
                self._process_group.receive(tile, self._owner[box])
            channels = len(tile)
            yield tile

    def together(self) -> torch.Tensor:
        """The whole output, (1, channels, height, width), where the image is, on every rank."""
        own = map(self._tile, self._process_group.share(self._boxes))
        tiles = (
            own
            if self._process_group.size == 1
            else self._to_all([tile.contiguous() for tile in own])
        )
        return self._filled(self._boxes, tiles)[None]

    def _to_all(self, own: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        channels = max(self._process_group.gather(len(own[0]) if own else 0))
        waiting = iter(own)
        for box, owner in self._owner.items():
            mine = owner == self._process_group.rank
            tile = next(waiting) if mine else self._empty(channels, box)
            self._process_group.broadcast(tile, owner)
            yield tile

    def _empty(self, channels: int, box: Box) -> torch.Tensor:
        shape = (channels, box.bottom - box.top, box.right - box.left)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _filled(self, boxes: Sequence[Box], tiles: Iterable[torch.Tensor]) -> torch.Tensor:
        """The rectangle that some tiles fill, from its first to its last, in raster order."""
        first, last = boxes[0], boxes[-1]
        part = Box(first.top, last.bottom, first.left, last.right)
        out: torch.Tensor | None = None
        for box, tile in zip(boxes, tiles, strict=True):
            if out is None:
                shape = (len(tile), part.bottom - part.top, part.right - part.left)
                out = tile.new_empty(shape, device=self._image.device)
            box.within(part).of(out).copy_(tile)
        assert out is not None
        return out

    def _tile(self, box: Box) -> torch.Tensor:
        with SharedGroupNorm(self._moments) if len(self._boxes) > 1 else nullcontext():
            tile = run_tile(self._segments, self._image, box)[0]
        _check_output(tile)
        return tile


def _check_output(tile: torch.Tensor) -> None:
    if not tile.isfinite().all():
        raise FloatingPointError(
            "the autoencoder's output is NaN or infinite; use float32 or bfloat16."
        )


def _check_image(who: str, what: str, image: torch.Tensor, channels: Sequence[int]) -> None:
    shape = tuple(image.shape)
    if len(shape) != 4 or shape[0] != 1 or shape[1] not in channels or 0 in shape:
        allowed = " or ".join(map(str, channels))
        raise ValueError(f"{who}: {what} must be (1, {allowed}, height, width), got {shape}.")
    if not image.isfinite().all():
        raise ValueError(f"{who}: {what} are not finite (NaN or infinity in them).")


def _tile_side(who: str, tile_pixels: int | None, factor: int, height: int, width: int) -> int:
    """Side of a tile; one that holds the whole image where that is small."""
    if tile_pixels is None:
        return max(height, width) if height * width <= TILE_PIXELS**2 else TILE_PIXELS
    side = as_integer(tile_pixels)
    if side is None or side < factor or side % factor:
        raise ValueError(
            f"{who}: tile_pixels must be a positive multiple of {factor}, got {tile_pixels}."
        )
    return side
