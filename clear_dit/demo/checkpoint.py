"""Checkpoints of a training stage: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_checkpoint(path: Path, step: int, losses: list[float], **parts: Any) -> None:
    """Save the `state_dict` of each of `parts` with the number of steps done and their losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    values = {name: _take_tensors(part.state_dict(), name, tensors) for name, part in parts.items()}
    header = {"step": str(step), "losses": json.dumps(losses), "values": json.dumps(values)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata=header)
    temporary.rename(path)


def load_checkpoint(path: Path, **parts: Any) -> tuple[int, list[float]]:
    """Restore `parts` from `path`: (steps done, losses), or (0, []) without a checkpoint."""
    if not path.exists():
        return 0, []
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    values = json.loads(header["values"])
    for name, part in parts.items():
        part.load_state_dict(_put_tensors(values[name], tensors))
    return int(header["step"]), json.loads(header["losses"])


def _take_tensors(value: Any, key: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Nested state as JSON: each tensor goes to `tensors`, and its key stands in its place.

    A dict becomes a list of pairs, since an optimizer's keys are numbers.
    """
    if isinstance(value, torch.Tensor):
        tensors[key] = value.detach().clone().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[k, _take_tensors(v, f"{key}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_take_tensors(v, f"{key}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _put_tensors(v, tensors) for k, v in value["dict"]}
    if isinstance(value, list):
        return [_put_tensors(v, tensors) for v in value]
    return value
