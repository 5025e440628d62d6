"""What an image depends on, as one digest: by it a job is known again in any line of any file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..generation.index import read_index
from ..generation.models import model_path
from ..generation.request import GenerateRequest

# Where and with what help an image is generated, not which image it is.
_ELSEWHERE = ("device", "offload", "stages_dir")
# What a setting was before there was one: images of then are known again.
_BEFORE = {"far": False, "preset": "auto", "lora_scale": 1.0}
_BEFORE |= dict.fromkeys(("schedule", "stage_steps", "upscaler", "quantize"))
_BEFORE |= dict.fromkeys(("negative_prompt", "lora"))
_MODEL_FILES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
# Of a large file: its beginning, which in safetensors names all tensors, and samples of the rest.
_WHOLE, _SAMPLES, _SAMPLE = 2**20, 64, 4096


def identity(
    request: GenerateRequest, model: str, weights: str, image: str, upscaler: str, lora: str
) -> str:
    """A digest of a request, of 32 characters.

    Args:
        request: what to generate; with far keys or without, not None.
        model, weights, image, upscaler, lora: digests of what its settings of these names stand
            for.
    """
    content = {name: value for name, value in asdict(request).items() if name not in _ELSEWHERE}
    content["far"] = bool(request.far)
    if request.schedule is not None:
        content["schedule"] = request.schedule.digest
    content |= {"model": model, "weights": weights, "image": image}
    if request.upscaler is not None:
        content["upscaler"] = upscaler
    if request.lora is not None:
        content["lora"] = lora
    for name, before in _BEFORE.items():
        if content[name] == before:
            del content[name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def model_digest(model: str) -> str:
    """Of the files of a local model, and of parts elsewhere; a hub repository is known by its name.

    Raises:
        RequestError: see `model_path`.
        OSError: a file cannot be read.
    """
    folder = Path(model_path(model))
    if not folder.is_dir():
        return model
    elsewhere = [
        Path(part.source) / part.folder
        for part in read_index(str(folder)).parts.values()
        if part.source is not None and Path(part.source) != folder and Path(part.source).is_dir()
    ]
    found = [_folder_digest(each) for each in (folder, *elsewhere)]
    return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def _folder_digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.suffix in _MODEL_FILES and p.is_file())
    return files_digest(files, folder)


def files_digest(files: Iterable[Path], folder: Path | None = None) -> str:
    """A digest of files: of all in the small ones, of size, beginning and samples in large ones.

    Args:
        files: what to read.
        folder: names below it count; None for contents alone.

    Raises:
        OSError: a file cannot be read.
    """
    sha = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        name = path.relative_to(folder).as_posix() if folder is not None else ""
        sha.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            sha.update(file.read(_WHOLE))
            if size > _WHOLE:
                for index in range(1, _SAMPLES + 1):
                    file.seek(max((size - _SAMPLE) * index // _SAMPLES, 0))
                    sha.update(file.read(_SAMPLE))
    return sha.hexdigest()
