"""Finished stages on the disk, so that a cascade that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from clear_dit.files import own_folder, whole_file

from .stages import Stage

FORMAT = "clear-dit stage"
PATTERN = "stage-*.safetensors"


class StageFiles:
    """The stages of one request in a folder, a file for each: `stage-1-512x512.safetensors`.

    A file holds "latents", (batch, tokens, channels), packed as diffusers does, in the dtype the
    stage had; its metadata says in JSON what determines them. It appears whole or not at all.

    Args:
        folder: of this request only.
        stages: the plan.
        request: what else determines the latents: names people know, to JSON or digests.
    """

    def __init__(self, folder: Path, stages: tuple[Stage, ...], request: Mapping[str, Any]) -> None:
        self.folder = folder
        self.files: list[Path] = [
            folder / f"stage-{number}-{stage.name}.safetensors"
            for number, stage in enumerate(stages, 1)
        ]
        plan = [repr(stage) for stage in stages]
        self.request: Any = json.loads(json.dumps({"stages": plan, **request}))

    @contextmanager
    def opened(self) -> Iterator[StageFiles]:
        """The folder, made where there is none, with other processes kept out.

        Raises:
            ValueError: it cannot be written in, another process is at work in it, it holds stages
                of another request, or a file that cannot be read.
        """
        with own_folder(self.folder, "CLEARPipeline: stages_dir"):
            for path in sorted(self.folder.glob(PATTERN)):
                self._refuse_foreign(path)
            yield self

    def last_finished(self) -> tuple[int, torch.Tensor] | None:
        """Index and latents (on the CPU) of the last stage that was finished."""
        for index in range(len(self.files) - 1, -1, -1):
            if self.files[index].is_file():
                with safe_open(self.files[index], framework="pt") as file:
                    return index, file.get_tensor("latents")
        return None

    def save(self, index: int, latents: torch.Tensor) -> None:
        """Keep a finished stage.

        Raises:
            OSError: the disk is full or the folder is gone; nothing is left behind.
        """
        header = {"format": FORMAT, "request": json.dumps(self.request)}
        with whole_file(self.files[index]) as file:
            file.write(save({"latents": latents.cpu().contiguous()}, header))

    def _refuse_foreign(self, path: Path) -> None:
        who = f"CLEARPipeline: stages_dir: {path}"
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
            saved = json.loads(header["request"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{who} is not a finished stage of this program; remove it or name another folder."
            ) from error
        different = [name for name in self.request if saved.get(name) != self.request[name]]
        if different:
            raise ValueError(
                f"{who} is of another request (another {', '.join(different)}); name another "
                "folder, or remove it to start anew."
            )


def digest(value: Any) -> str:
    """A short SHA-256 of nested lists and dicts of tensors, arrays, images and plain values.

    Raises:
        TypeError: something else is in it.
    """
    sha = hashlib.sha256()
    _update(sha, value)
    return sha.hexdigest()[:16]


def _update(sha: Any, value: Any) -> None:
    sha.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray):
        sha.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        sha.update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            _update(sha, (key, value[key]))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(sha, item)
    elif value is None or isinstance(value, (str, int, float)):
        sha.update(repr(value).encode() + b"\0")
    else:
        raise TypeError(f"cannot tell whether a {type(value).__name__} is the same as another")
