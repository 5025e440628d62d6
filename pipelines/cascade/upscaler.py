"""Networks that enlarge images, from a file: what `upscaler=` of a pipeline takes."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from clear_dit.errors import first_line

from ..decoding.tiles import Segment, run_tile, tile_rows, whole

# More is none of the networks that enlarge; those known have up to 170 MB.
MAX_BYTES = 2**30
# An image with a longer side is enlarged by tiles of this side, in its own pixels.
TILE = 512
# Corners of tiles and their surroundings are multiples of it, as the windows of attention are.
GRID = 64
# Of the strip that a network is tried on; it must see less far than a quarter of it.
_STRIP = 16 * GRID
_EVERYTHING = 2**31  # a reach beyond all images
# A quarter of a level of 8 bits, in [0, 1].
_SAME = 1 / 1020

_WHO = "upscaler"


class Upscaler:
    """A network from a file, which enlarges images of any size in bounded memory.

    Large images go through it by tiles with all the surroundings they depend on, so that they fit
    without blending; how far it sees is tried out. One that sees the whole image, or whose result
    depends on where a tile begins, gets the whole image.

    Args:
        network: a descriptor of `spandrel`.
        name, digest: of its file; SHA-256.

    Attributes:
        name, digest: as given.
        scale: by how much it enlarges.
    """

    def __init__(self, network: Any, name: str, digest: str) -> None:
        self.name = name
        self.digest = digest
        self.scale: int = network.scale
        self._network = network
        self._reach: int | None = None  # in pixels; not known yet

    @torch.no_grad()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 3, height, width), float32 in [0, 1], `scale` times as large, where it is."""
        everything = whole(image)
        if max(everything.bottom, everything.right) <= TILE:
            return self._run(image)
        if self._reach is None:
            self._reach = self._find_reach()
        if self._reach == _EVERYTHING:
            return self._run(image)
        network = [Segment(self._run, self._reach, up=self.scale)]
        everything = everything.scaled(self.scale, 1)
        out = image.new_empty(1, 3, everything.bottom, everything.right)
        for row in tile_rows(everything, TILE * self.scale):
            for tile in row:
                tile.of(out).copy_(run_tile(network, image, tile))
        return out

    def _run(self, image: torch.Tensor) -> torch.Tensor:
        # Cloned: it comes from inference mode, outside of which it could not be changed.
        larger: torch.Tensor = self._network(image.to(self._network.device)).clone()
        return larger.to(image.device)

    def _find_reach(self) -> int:
        """How far a pixel of the output sees, a multiple of `GRID`."""
        return max(self._reach_across(turned) for turned in (False, True))

    def _reach_across(self, turned: bool) -> int:
        """To the left and right; up and down where the strip is turned."""

        def run(strip: torch.Tensor) -> torch.Tensor:
            """By column: (rows, columns)."""
            larger = self._run(strip.mT if turned else strip)
            return (larger.mT if turned else larger).flatten(0, 2)

        strip = torch.rand(1, 3, GRID, _STRIP, generator=torch.Generator().manual_seed(0))
        middle = _STRIP // 2
        marked = strip.clone()
        marked[..., middle : middle + GRID] = torch.nan  # so that all that sees it becomes NaN
        seen = run(marked).isnan().any(0).nonzero().flatten() // self.scale
        if not len(seen):
            return _EVERYTHING
        reach = max(middle - int(seen.min()), int(seen.max()) + 1 - middle - GRID)
        reach = -(-reach // GRID) * GRID
        if reach > _STRIP // 4:
            return _EVERYTHING
        first = middle - reach
        alone = run(strip[..., first : middle + GRID + reach])[:, reach * self.scale :]
        within = run(strip)[:, middle * self.scale :]
        columns = GRID * self.scale
        same = (alone[:, :columns] - within[:, :columns]).abs().max() <= _SAME
        return reach if same else _EVERYTHING


def load_upscaler(path: str | Path, device: torch.device | str = "cpu") -> Upscaler:
    """A network that enlarges images, loaded through `spandrel`, which knows its architecture.

    Args:
        path: its weights, a .safetensors file; no other kind, as those can run code.
        device: where it runs.

    Raises:
        ValueError: another kind of file, none or too large a one, no weights of a network known to
            `spandrel` that enlarges RGB images; or `spandrel` does not import.
    """
    path = Path(path)
    check_upscaler_file(path)
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{_WHO}: spandrel does not import ({first_line(error)}); its torchvision "
            "must be made for the torch that is installed."
        ) from error
    try:
        network = spandrel.ModelLoader(device).load_from_file(path)
    except (SafetensorError, spandrel.UnsupportedModelError) as error:
        raise ValueError(
            f"{_WHO}: {path} holds no network that spandrel knows, or is truncated."
        ) from error
    except (RuntimeError, KeyError, AssertionError) as error:
        raise ValueError(f"{_WHO}: {path} cannot be loaded: {first_line(error)}") from error
    enlarges = isinstance(network, spandrel.ImageModelDescriptor) and network.scale > 1
    if not enlarges or (network.input_channels, network.output_channels) != (3, 3):
        raise ValueError(
            f"{_WHO}: {path} holds a {network.architecture.name} that does not enlarge RGB images."
        )
    return Upscaler(network.float().eval(), path.name, file_digest(path))


def check_upscaler_file(path: Path) -> None:
    """Refuse what `load_upscaler` would, as far as it can be told without reading the file.

    Raises:
        ValueError: see `load_upscaler`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{_WHO} must be a .safetensors file (others, such as .pth, can run code), got {path}."
        )
    if not path.is_file():
        raise ValueError(f"{_WHO}: there is no file {path}.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{_WHO}: {path} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read."
        )
    if find_spec("spandrel") is None:
        raise ValueError(f"{_WHO}: a file needs spandrel: pip install 'clear-dit[upscale]'.")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
