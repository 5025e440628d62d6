"""Checkpoints of a training stage: written whole or not at all, so that a kill loses little."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, step: int, losses: list[float], **parts: Any) -> None:
    """Save the `state_dict` of each of `parts` with the number of steps done and their losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save({"step": step, "losses": losses, **state}, temporary)
    temporary.rename(path)


def load_checkpoint(path: Path, **parts: Any) -> tuple[int, list[float]]:
    """Restore `parts` from `path`: (steps done, losses), or (0, []) without a checkpoint."""
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["losses"]
