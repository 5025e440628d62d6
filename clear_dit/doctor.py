"""What can run on this machine, and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch

from .errors import first_line
from .generation.dtypes import AUTO, cpu_has_bfloat16, resolve_dtype
from .generation.models import DEMO
from .kernels.choice import IMPLS, preference, run_chosen, why_not
from .kernels.reference import reference_attention
from .kernels.tiled.native.build import BuildError, compiler
from .kernels.tiled.native.forward import why_not_compiled
from .kernels.window import Window
from .tables import table
from .versions import __version__

EXTRAS: dict[str, tuple[str, ...]] = {
    "app": ("gradio", "prometheus-client"),
    "serve": ("fastapi", "uvicorn", "python-multipart", "prometheus-client"),
    "lora": ("peft",),
    "training": ("peft", "prodigyopt", "tensorboard"),
    "metrics": ("torchmetrics",),
    "gpu": ("triton", "xformers"),
}

# What `check` computes by every implementation, in tokens: sides and text end within tiles.
WINDOWS = {
    "forward": Window(13, 18, 7, 4),
    "pooled": Window(13, 18, 7, 4, 4),
    "far": Window(13, 18, 7, 2, far_levels=3),
}
# Channels and dtypes that models have, of Triton's kernels; and of the other implementations.
HEAD_DIMS = (64, 128)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Largest relative error.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examine() -> dict[str, Any]:
    """Versions, devices, implementations and extras, as plain values for printing or JSON.

    `impls` maps a device and an implementation to None if it can run there, else to the reason;
    `compiled_tiled` is that of the compiled kernel, which `tiled` can do without on a CPU;
    `dtypes` maps a device to what "auto" is there, for images and in training.
    """
    devices = _devices()
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
            device: next(name for name, reason in reasons.items() if reason is None)
            for device, reasons in impls.items()
        },
        "dtypes": {
            device: {
                use: resolve_dtype(AUTO, torch.device(device), training=use == "training")
                for use in ("images", "training")
            }
            for device in devices
        },
        "demo": (DEMO / "model_index.json").is_file(),
        "extras": {
            extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()
        },
    }


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def check() -> Iterator[dict[str, Any]]:
    """Every implementation that can run here on small problems, compared with float64.

    Yields:
        rows with device, kernel (an implementation's, or one of Triton's and its entry), dtype,
        head_dim, the largest error, seconds (compilation included) and what is wrong; None if
        nothing is.
    """
    for name in _devices():
        device = torch.device(name)
        for impl in preference(device.type):
            if impl == "reference" or why_not(impl, torch.empty(1, 1, 1, 64, device=device)):
                continue
            yield from _triton_rows(device) if impl == "triton" else _rows(impl, device)


def _triton_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    from .kernels.triton.trust import look_at_all

    for dtype, head_dim in itertools.product(TRITON_DTYPES, HEAD_DIMS):
        try:
            for found in look_at_all(device, dtype, head_dim):
                name = f"triton {found.kernel.name} {found.entry}"
                error = max(found.errors.values(), default=None)
                yield _row(device, name, dtype, head_dim, error, found.seconds, found.wrong)
        except torch.OutOfMemoryError as error:
            wrong = f"had no room: {first_line(error)}"
            yield _row(device, "triton", dtype, head_dim, None, 0.0, wrong)
        except RuntimeError as error:  # the device is lost: nothing runs on it any more
            wrong = f"ended with {first_line(error)} {' '.join(getattr(error, '__notes__', ()))}"
            yield _row(device, "triton", dtype, head_dim, None, 0.0, wrong)
            return


def _rows(impl: str, device: torch.device) -> Iterator[dict[str, Any]]:
    dtype, head_dim = DTYPES[device.type], HEAD_DIMS[0]
    scale = head_dim**-0.5
    for name, window in WINDOWS.items():
        generator, begin = torch.Generator().manual_seed(0), time.perf_counter()
        shape = (3, 1, window.sequence_length, 2, head_dim)
        query, key, value = torch.randn(shape, generator=generator).to(device, dtype)
        wide = query.double(), key.double(), value.double()
        error, wrong = None, None
        try:
            out, _ = run_chosen(impl, query, key, value, window, scale=scale)
            exact, _ = reference_attention(*wide, window, scale=scale)
            error = float((out.double() - exact).norm() / exact.norm())
            if not error <= TOLERANCE[dtype]:  # NaN too
                wrong = f"is wrong: relative error {error:.1e} (at most {TOLERANCE[dtype]:.0e})"
        except Exception as failed:
            wrong = f"failed with {type(failed).__name__}: {first_line(failed)}"
        seconds = time.perf_counter() - begin
        yield _row(device, f"{impl} {name}", dtype, head_dim, error, seconds, wrong)


def _row(
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    error: float | None,
    seconds: float,
    wrong: str | None,
) -> dict[str, Any]:
    return {
        "device": str(device),
        "kernel": kernel,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "error": None if error is None or not math.isfinite(error) else error,
        "seconds": seconds,
        "wrong": wrong,
    }


def report_checks(rows: list[dict[str, Any]]) -> str:
    """`check` as text for a terminal."""
    shown = [
        {name: value for name, value in row.items() if name != "wrong"}
        | {"verdict": _verdict(row["wrong"])}
        for row in rows
    ]
    wrong = [f"{row['device']}, {row['kernel']}: it {row['wrong']}" for row in rows if row["wrong"]]
    return "\n".join([table(shown), *wrong])


def _verdict(wrong: str | None) -> str:
    if wrong is None:
        return "right"
    return "not tried" if wrong.startswith("could not be tried") else "WRONG"


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
    for device, impls in found["impls"].items():
        lines.append(f"{device} ({found['devices'][device]}): auto runs {found['auto'][device]}")
        lines += [
            f"  {name:<10} {'can run' if reason is None else 'cannot run: it ' + reason}"
            for name, reason in impls.items()
        ]
        if device == "cpu":
            reason = found["compiled_tiled"]
            how = (
                f"PyTorch's operators, slower: its kernel {reason}"
                if reason
                else "a kernel compiled here"
            )
            lines.append(f"  tiled runs on {how}")
        lines.append(f"  --dtype auto is {_dtypes_text(device, **found['dtypes'][device])}")
    lines += ["", "extras (pip install 'clear-dit[EXTRA]'):"]
    for extra, packages in found["extras"].items():
        parts = [f"{name} {version or 'missing'}" for name, version in packages.items()]
        lines.append(f"  {extra:<10} {', '.join(parts)}")
    return "\n".join(lines)


def _dtypes_text(device: str, images: str, training: str) -> str:
    """What "auto" is on a device, and why."""
    if device == "cpu" and not cpu_has_bfloat16():
        return f"{images}, the fast one here: this CPU has no bfloat16 units"
    if device == "cpu":
        return (
            f"{images} for images, as on every CPU, and {training} in training, the fast one here: "
            "this CPU has bfloat16 units"
        )
    return images if images == "bfloat16" else f"{images}: it has no bfloat16 units"
