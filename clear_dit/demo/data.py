"""Rendered images on disk, in chunks that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clear_dit.demo.captions import Scene, sample_scene
from clear_dit.demo.world import render

CHUNK = 200


def scenes_of_chunk(seed: int, index: int, count: int) -> list[Scene]:
    """The training scenes of chunk `index` of the set `seed`, the same at every call."""
    rng = np.random.default_rng((seed, index))
    return [sample_scene(rng) for _ in range(count)]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write `array` so that a kill leaves no half-written `path`."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    temporary.rename(path)


def _render_chunk(path: Path, seed: int, index: int, count: int, size: int) -> None:
    images = [render(scene, size, size) for scene in scenes_of_chunk(seed, index, count)]
    save_array(path, np.stack(images))


class ImageSet:
    """`count` square training images of `size` px and their scenes, rendered once into `folder`.

    Chunk i lies in images-SIZE/i.npy as uint8 [<= CHUNK, size, size, 3]; its scenes are drawn
    again from (seed, i), so nothing else has to be stored.
    """

    def __init__(self, folder: Path, size: int, count: int, seed: int) -> None:
        self.folder: Path = folder / f"images-{size}"
        self.size = size
        self.count = count
        self.seed = seed
        self.chunks: int = -(-count // CHUNK)

    def chunk_count(self, index: int) -> int:
        return min(CHUNK, self.count - index * CHUNK)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.npy"

    def scenes(self) -> list[Scene]:
        return [
            scene
            for index in range(self.chunks)
            for scene in scenes_of_chunk(self.seed, index, self.chunk_count(index))
        ]

    def build(self, workers: int) -> None:
        """Render the chunks that are missing, with a progress bar."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(self.chunks) if not self.path(index).exists()]
        if workers == 1 or len(missing) <= 1:
            for i in tqdm(missing, desc=f"render {self.size} px", unit="chunk"):
                _render_chunk(self.path(i), self.seed, i, self.chunk_count(i), self.size)
            return
        # "spawn": a forked copy of a process with running threads may hang
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [
                pool.submit(
                    _render_chunk, self.path(i), self.seed, i, self.chunk_count(i), self.size
                )
                for i in missing
            ]
            for job in tqdm(jobs, desc=f"render {self.size} px", unit="chunk"):
                job.result()

    def open_chunks(self) -> Iterator[np.ndarray]:
        """The rendered chunks in order, memory-mapped."""
        for index in range(self.chunks):
            yield np.load(self.path(index), mmap_mode="r")
