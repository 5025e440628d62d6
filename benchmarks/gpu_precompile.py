"""Compile what gpu.py launches on an H200 into a cache of Triton, without a GPU.

    PYTHONPATH=. python3.12 benchmarks/gpu_precompile.py --cache .triton-cache

The cache is found on the device if Python, Triton and the kernels are those that made it: for
PyTorch 2.11 Python 3.12 and triton 3.6.0, in an environment of their own. It is to be carried along
(git ignores `.triton-cache`) and given to gpu.py as `--cache`. By default it holds what
`production`, `sweep`, `counters` and `layers` launch (one to two minutes of one core, 6 MB); with
`--checks` those of `checks` too, which compile themselves in 12 processes on the device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from playbook.cache import COMPILER, prune

# Of an H200.
ARCHITECTURE, MULTIPROCESSORS = "sm_90", 132


@contextmanager
def answering_as(architecture: str, multiprocessors: int) -> Iterator[None]:
    """The kernels' modules take tensors on a CPU for a device's, and ask nothing of a driver."""
    from clear_dit.kernels.triton import device, norm_rope

    programs = device.PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    answers = {"architecture": architecture, "programs": programs}
    rooms = [name for name in sys.modules if name.startswith("clear_dit.kernels.triton.")]
    rooms.append("playbook.checks")
    with ExitStack() as stack:
        for name, answer in answers.items():
            for room in rooms:
                if hasattr(sys.modules[room], name):
                    answers_so = mock.patch.object(
                        sys.modules[room], name, lambda device, answer=answer: answer
                    )
                    stack.enter_context(answers_so)
        stack.enter_context(mock.patch.object(norm_rope, "_check"))  # that it is a device's
        yield


def compile_layers() -> None:
    """Every size and radius, entry by entry; and the backward pass."""
    import torch
    from playbook.pin import pinned
    from playbook.setting import FULL

    from clear_dit.bench.attention import small_window
    from clear_dit.kernels.triton import tables
    from clear_dit.kernels.triton.launch import table_key
    from clear_dit.kernels.triton.norm_rope import norm_rope
    from clear_dit.kernels.triton.ops import triton_attention
    from clear_dit.kernels.triton.pooling import pool_cells

    setting = FULL(folder=Path(), device=torch.device("cpu"))
    key = table_key(setting.device, setting.dtype, setting.head_dim)
    problems = [(size, radius, False) for size in setting.sizes[::-1] for radius in setting.radii]
    problems += [(setting.sizes[-1], radius, True) for radius in setting.far_radii]
    learned = torch.empty(0, 2, 2)
    for size, radius, far in problems:
        window = setting.window(size, radius, far)
        side = window.height
        shape = (1, window.sequence_length, setting.heads, setting.head_dim)
        # Their numbers are never read: pages that nobody touches take no memory.
        tokens = [torch.empty(shape, dtype=setting.dtype, requires_grad=not far) for _ in range(3)]
        options = {"scale": setting.head_dim**-0.5}
        if far:
            cells = (1, window.pooled_length, *shape[2:])
            options["pooled"] = [torch.empty(cells, dtype=setting.dtype) for _ in range(2)]
            image = (x[:, window.text_length :] for x in tokens[1:])
            pool_cells(*image, learned, side, side, window.far_levels, options["scale"])
        for entry in tables.forward_configs(*key, far=far):
            with pinned(entry.name):
                out, _ = triton_attention(*tokens, window, **options)
        if (radius, far) == (setting.radii[0], False):
            table = torch.empty(window.sequence_length, setting.head_dim)
            weight = torch.empty(setting.head_dim, dtype=setting.dtype)
            text, image = (x.detach() for x in tokens[0].split([window.text_length, side**2], 1))
            norm_rope(image, text, weight, weight, table, table, 1e-6)
        if not far:
            torch.autograd.grad(out, tokens, torch.empty_like(out))
    # The grid on which gradients are checked.
    window = small_window(setting.window(setting.sizes[-1], setting.radii[0]))
    shape = (1, window.sequence_length, 2, setting.head_dim)
    tokens = [torch.empty(shape, dtype=setting.dtype, requires_grad=True) for _ in range(3)]
    for entry in tables.forward_configs(*key):
        with pinned(entry.name):
            out, _ = triton_attention(*tokens, window, scale=setting.head_dim**-0.5)
    torch.autograd.grad(out, tokens, torch.empty_like(out))


def compile_checks() -> None:
    """What the checks launch, kind by kind."""
    import torch
    from playbook.check_kinds import launch_only
    from playbook.checks import checks, waiting_checks

    device = torch.device("cpu")
    for group in (*checks(device, tiny=False), *waiting_checks(device)):
        for check in group:
            launch_only(check, device)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile for sm_90 without a GPU.")
    parser.add_argument("--cache", type=Path, help="folder for it; Triton's own by default")
    parser.add_argument("--checks", action="store_true", help="what the checks launch, too")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"CLEAR_DIT_SELF_CHECK": "0", **COMPILER}
    if options.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    import playbook.checks  # noqa: F401 - with all that is to answer

    from clear_dit.kernels.triton.compile import compile_only

    begin = time.monotonic()
    with answering_as(ARCHITECTURE, MULTIPROCESSORS), compile_only(ARCHITECTURE) as kernels:
        compile_layers()
        if options.checks:
            compile_checks()
    size = prune(options.cache) if options.cache is not None else 0
    print(
        f"gpu_precompile.py: {len(set(kernels))} kernels, {size / 1e6:.1f} MB, "
        f"{time.monotonic() - begin:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
