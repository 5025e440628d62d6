"""The images of one variant on disk: each whole or absent, and used only if it is the one wanted.

An image carries the settings it was generated with. Whatever stopped a run, the next one finds out
from the files alone what remains to be done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..errors import first_line
from ..files import whole_file
from ..generation.image_input import open_image
from ..generation.image_output import save_png
from ..pipelines.decoding.image_files import METADATA_KEY

# What can be wrong with an image or latents that something else wrote or cut.
BROKEN = (OSError, ValueError, SyntaxError, KeyError, SafetensorError)
_LATENTS = "latents"
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class ImageSet:
    """Images 00000.png, ... in a folder, and what each has to be.

    Attributes:
        folder: of the variant.
        wanted: the settings of each image, as JSON would give them back.
        size: height and width, in pixels.
        keep_latents: of so many first images the final latents are kept beside them.
    """

    folder: Path
    wanted: Sequence[Mapping[str, Any]]
    size: tuple[int, int]
    keep_latents: int = 0

    def path(self, index: int) -> Path:
        """Of an image."""
        return self.folder / f"{index:05d}.png"

    def missing(self) -> list[int]:
        """The images still to be generated: absent, unreadable, or made with other settings."""
        return [index for index in range(len(self.wanted)) if not self._is_done(index)]

    def _is_done(self, index: int) -> bool:
        try:
            with open_image(self.path(index)) as image:
                found = json.loads(image.info[METADATA_KEY])
                if (image.height, image.width) != self.size or image.mode != "RGB":
                    return False
                image.load()
            if index < self.keep_latents:
                self.latents(index)
        except BROKEN:
            return False
        return all(found.get(name) == value for name, value in self.wanted[index].items())

    def save(
        self, index: int, image: Image.Image, latents: torch.Tensor, record: Mapping[str, Any]
    ) -> None:
        """Write an image, its latents before it, its settings in it.

        Args:
            index: which image.
            image: of `size`.
            latents: written only of the images whose latents are kept.
            record: more for the reader, such as the version; not compared.

        Raises:
            OSError: it cannot be written; nothing is left under its name.
        """
        path = self.path(index)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if index < self.keep_latents:
                with whole_file(path.with_suffix(".safetensors")) as file:
                    file.write(save({_LATENTS: latents.cpu().contiguous()}))
            save_png(image, path, {**self.wanted[index], **record})
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise OSError(f"{path} could not be written ({reason}).") from error

    def latents(self, index: int) -> torch.Tensor:
        """The final latents of an image, as the denoising loop holds them."""
        return load_file(self.path(index).with_suffix(".safetensors"))[_LATENTS]

    def read(self, index: int) -> torch.Tensor:
        """An image as uint8 (3, height, width)."""
        with open_image(self.path(index)) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def batches(self, batch: int) -> Iterator[torch.Tensor]:
        """The images in order, uint8 (<= batch, 3, height, width)."""
        for first in range(0, len(self.wanted), batch):
            indices = range(first, min(first + batch, len(self.wanted)))
            yield torch.stack([self.read(index) for index in indices])


def fingerprint(pipe: Any) -> str:
    """A name for what a pipeline computes: its configurations and a sample of every tensor.

    Reads the first and last values of each parameter and buffer, in float32: training changes
    them, and the whole of a large model would take longer to read than to run.

    Returns:
        Hexadecimal, the same for the same weights wherever they come from.
    """
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        config = getattr(component, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        public = {k: v for k, v in config.items() if k[0] != "_" and k != "transformers_version"}
        if hasattr(component, "get_vocab"):
            public = {"vocabulary": sorted(component.get_vocab().items())}
        digest.update(json.dumps([name, public], sort_keys=True, default=str).encode())
        if isinstance(component, nn.Module):
            for key, tensor in component.state_dict().items():
                flat = tensor.detach().flatten()
                ends = torch.cat([flat[:_SAMPLED_VALUES], flat[-_SAMPLED_VALUES:]])
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(ends.float().cpu().numpy().tobytes())
    return digest.hexdigest()
