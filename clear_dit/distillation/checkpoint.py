"""Checkpoints of a distillation: folders `checkpoint-{step}` that appear whole or not at all.

A checkpoint holds `settings.json` (the step, and what a resumed run must have in common),
`state.safetensors` (trained parameters in float32, the optimizer's and the schedule's state, the
average, the losses) and the adapter as it would be used. Under FSDP, state is gathered whole for
it. DeepSpeed keeps its state in pickles only, so its checkpoints hold the adapter and no state, and
cannot be resumed from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError

from ..demo.checkpoint import load_checkpoint, save_checkpoint
from ..errors import RequestError, first_line
from .files import could_not_write, write_text
from .fingerprint import same_model
from .sharded import gather

SETTINGS, STATE = "settings.json", "state.safetensors"
_PREFIX = "checkpoint-"


class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        losses: of each step: the weighted sum, flow, output, attention.
        seconds: spent on them.
    """

    def __init__(self) -> None:
        self.step = 0
        self.losses: list[list[float]] = []
        self.seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether parameters or optimizer state are spread over the processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal() and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(out: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from; None to begin.

    Args:
        out: the run's folder.
        wanted: "latest" (None if there is none yet), a checkpoint's folder or its name, or None.

    Raises:
        RequestError: no such checkpoint; or none is wanted, but there are some.
    """
    there = checkpoints(out)
    if wanted is None:
        if there:
            raise RequestError(
                f"--out: {out} has {there[-1].name}; go on with --resume-from-checkpoint latest, "
                "or choose another folder."
            )
        return None
    if wanted == "latest":
        return there[-1] if there else None
    for path in (Path(wanted), out / wanted):
        if (path / SETTINGS).is_file():
            return path
    raise RequestError(f"--resume-from-checkpoint: {wanted!r} is no checkpoint (no {SETTINGS}).")


def clean(out: Path) -> None:
    """Remove what a killed run left unfinished."""
    for path in out.glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save(
    accelerator: Accelerator,
    out: Path,
    settings: dict[str, Any],
    limit: int,
    parts: dict[str, Any],
    write_adapter: Any,
) -> Path:
    """Write the checkpoint of a step, then remove the oldest above the limit.

    Args:
        accelerator: all processes call this.
        out: the run's folder.
        settings: what a resumed run must have in common.
        limit: how many to keep.
        parts: what has a state_dict; "progress" among them.
        write_adapter: called with the folder by the main process.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    step = parts["progress"].step
    path = out / f"{_PREFIX}{step}"
    partial = out / f".{path.name}.partial"
    main = accelerator.is_main_process
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        states = None
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            states = {name: gather(part.state_dict(), main) for name, part in parts.items()}
        if main:
            if states is not None:
                holders = {n: SimpleNamespace(state_dict=lambda s=s: s) for n, s in states.items()}
                save_checkpoint(partial / STATE, step, [], **holders)
            write_adapter(partial)
            write_text(partial / SETTINGS, json.dumps(settings | {"step": step}, indent=2) + "\n")
            if path.exists():  # only if the run resumed from an older one
                _remove(path)
            partial.rename(path)
            for old in checkpoints(out)[:-limit]:
                _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise could_not_write(path, error) from error
    accelerator.wait_for_everyone()
    return path


def _remove(path: Path) -> None:
    """Remove a folder so that no part of it keeps the name."""
    hidden = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def check(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run that differs from this one.

    Raises:
        RequestError: which setting differs, and how.
    """
    try:
        found = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        ours = found.pop("fingerprint")
        found.setdefault("far", False)  # as it was before there were far keys
        differing = [
            name for name in settings if name != "fingerprint" and found[name] != settings[name]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path / SETTINGS} is not a checkpoint's: {first_line(error)}.") from (
            error
        )
    if not same_model(ours, settings["fingerprint"]):
        raise RequestError(
            f"--resume-from-checkpoint: {path} is of a run of another model than this one."
        )
    if differing:
        name = differing[0]
        raise RequestError(
            f"--resume-from-checkpoint: {path} is of a run with {name} {found[name]}, now it is "
            f"{settings[name]}."
        )


def load(accelerator: Accelerator, path: Path, parts: dict[str, Any]) -> None:
    """Restore the state of a run.

    Raises:
        RequestError: a file is missing, truncated, or of other parameters.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise RequestError(
            "--resume-from-checkpoint: not under DeepSpeed, whose state is pickled; train under "
            "FSDP to resume (examples/accelerate/fsdp.yaml)."
        )
    try:
        if not (path / STATE).is_file():
            raise FileNotFoundError(f"there is no {STATE}")
        load_checkpoint(path / STATE, **parts)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise RequestError(f"{path} cannot be read: {first_line(error)}.") from error
