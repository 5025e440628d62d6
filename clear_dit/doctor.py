"""What can run on this machine, and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from .generation.models import DEMO
from .kernels.choice import IMPLS, preference, why_not
from .kernels.tiled.native.build import BuildError, compiler
from .kernels.tiled.native.forward import why_not_compiled
from .versions import __version__

EXTRAS = {
    "app": ("gradio",),
    "training": ("peft", "prodigyopt", "tensorboard"),
    "metrics": ("torchmetrics",),
    "gpu": ("triton", "xformers"),
}


def examine() -> dict[str, Any]:
    """Versions, devices, implementations and extras, as plain values for printing or JSON.

    `impls` maps a device and an implementation to None if it can run there, else to the reason;
    `compiled_tiled` is that of the compiled kernel, which `tiled` can do without on a CPU.
    """
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    impls = {}
    for device in devices:
        query = torch.empty(1, 1, 1, 64, device=device)
        kind = torch.device(device).type
        impls[device] = {name: why_not(name, query) for name in preference(kind)}
        assert set(impls[device]) == set(IMPLS) - {"auto"}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "packages": {
            name: _version(name)
            for name in ("torch", "diffusers", "transformers", "accelerate", "safetensors")
        },
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": {
            device: torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
            for device in devices
        },
        "compiler": _compiler(),
        "impls": impls,
        # For the demo's heads; compiled here and now if it never was.
        "compiled_tiled": why_not_compiled(torch.empty(1, 1, 1, 64), 1, 1),
        "auto": {
            device: next(name for name, reason in table.items() if reason is None)
            for device, table in impls.items()
        },
        "demo": (DEMO / "model_index.json").is_file(),
        "extras": {
            extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    try:
        return " ".join(compiler())
    except BuildError:
        return None


def report(found: dict[str, Any]) -> str:
    """`examine` as text for a terminal."""
    lines = [
        f"clear-dit {found['version']}, Python {found['python']}, "
        + ", ".join(f"{name} {version}" for name, version in found["packages"].items()),
        f"{found['cpus']} CPUs, {found['threads']} threads in use; "
        f"C++ compiler: {found['compiler'] or 'none'}",
        f"demo pipeline: {'here' if found['demo'] else 'missing'}",
        "",
    ]
    for device, table in found["impls"].items():
        lines.append(f"{device} ({found['devices'][device]}): auto runs {found['auto'][device]}")
        lines += [
            f"  {name:<10} {'can run' if reason is None else 'cannot run: it ' + reason}"
            for name, reason in table.items()
        ]
        if device == "cpu":
            reason = found["compiled_tiled"]
            how = (
                f"PyTorch's operators, slower: its kernel {reason}"
                if reason
                else "a kernel compiled here"
            )
            lines.append(f"  tiled runs on {how}")
    lines += ["", "extras (pip install 'clear-dit[EXTRA]'):"]
    for extra, packages in found["extras"].items():
        parts = [f"{name} {version or 'missing'}" for name, version in packages.items()]
        lines.append(f"  {extra:<10} {', '.join(parts)}")
    return "\n".join(lines)
