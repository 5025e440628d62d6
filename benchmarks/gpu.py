"""Everything this project claims about one GPU, in nine minutes at most.

    PYTHONPATH=. python benchmarks/gpu.py --out DIR

Parts, in the order in which they are worth the time; `--parts a,b` takes some of them:

production  one attention layer of FLUX.1-dev (24 heads x 128, 512 text tokens, bfloat16) at 8192
            px, r=8/16/32, and with far keys r=4/8, by the tables' default entry: the layer, and
            kernel by kernel; then a copy, a bfloat16 product, reading L2, clocks and versions
sweep       the same with every entry of the tables for this device, Gluon's last, in a process of
            their own: if one hangs or crashes, the others are not tried. Then once more with the
            fastest that is right, which all later parts run with
counters    Nsight Compute's (PyTorch's profiler where it may not read them) of two kernels, r=8
checks      every kernel in bfloat16, float16 and float32 on awkward shapes; the kernels' own checks
layers      1K to 8K: full attention by cuDNN and FlashAttention, FlexAttention on raster-order
            tokens, on tokens in tiles and by FlashAttention's kernels, NATTEN and xFormers where
            they are installed; replayed from a graph; gradients and backward; QK-norm and rotation
blocks      a double and a single block, full attention against CLEAR, and the step of the whole
            model that follows (19 double, 38 single); alone needs diffusers

Whatever is timed was right first, against float64 on a sample of queries of that very problem: text
and image rows apart, relative to their size, and the log-sum-exp. Times are by CUDA events,
medians, with the host running ahead. FLOPs of a useful rate are those the method needs,
`Window.attention_flops`: 4 per attended pair and channel, softmax not counted.

A part runs in processes of its own: one that is killed, crashes or finds something wrong loses no
other rows. What it finds goes to DIR/PART.jsonl as it comes, and what failed is named there with
its reason; DIR/summary.json, written after each part, has the headline numbers beside their
targets, and is the last line printed. `--resume DIR` does what is missing, failed, wrong or was
skipped there, what failed last, and nothing else: a second command for what the first had no time
for. Where the machine is a new one, copy the results to it first, and the cache. `--seconds`
is the time for all parts: what one leaves goes to those after it. The exit status is 0 if all was
right and all was done, 1 if not, 2 without a CUDA device.

`--interpret` goes through the same code on a CPU in Triton's interpreter, with tiny problems: a
test of this program and no measurement. (Triton 3.6's interpreter needs numpy before 2.4.)

Where the kernels' compilation should cost no time on the device, make a cache beforehand, with the
device's own versions of Python and Triton, and carry it (gpu_precompile.py says what is in it):

    PYTHONPATH=. python3.12 benchmarks/gpu_precompile.py --cache .triton-cache
    PYTHONPATH=. python3 benchmarks/gpu.py --out DIR --cache .triton-cache

`compiled` in the summary tells how many kernels of `production` it lacked: with a cache, none.

Without `--cache` the same is compiled beside the parts, without the GPU. PyTorch with Triton
is enough for all parts but `blocks`, which needs these wheels (pure Python, 7 MB), transformers
and accelerate; httpx and idna are for a huggingface_hub that lacks them. Import it first, which
takes seconds to tell what is missing:

    python3 -m pip download --no-deps --only-binary=:all: -d .whl diffusers==0.42.1 \\
        importlib_metadata==10.2.0 lazy-importer==0.1.0 zipp==4.1.2 httpx idna
    python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 -c "from diffusers import FluxTransformer2DModel"
    PYTHONPATH=.:/tmp/site python3 benchmarks/gpu.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from playbook.cache import COMPILER, relocate
from playbook.part_file import PartFile
from playbook.parts import PARTS, SECONDS
from playbook.summary import summary
from playbook.supervise import process, run_part, worker_arguments

PRECOMPILE = Path(__file__).with_name("gpu_precompile.py")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check, then measure, on one GPU.")
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--out", type=Path, help="folder for the results")
    folder.add_argument("--resume", type=Path, help="folder of results to complete")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all parts")
    parser.add_argument("--cache", type=Path, help="Triton's cache, made by gpu_precompile.py")
    parser.add_argument("--interpret", action="store_true", help="test this program on a CPU")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    results = options.out or options.resume
    if options.out and any(PartFile(results, name).path.exists() for name in PARTS):
        parser.error(f"--out: {results} has results; complete them with --resume")
    if options.cache is not None and not options.cache.is_dir():
        parser.error(f"--cache: there is no folder {options.cache}")
    if options.resume and not results.is_dir():
        parser.error(f"--resume: there is no folder {results}")
    if not options.interpret and not _has_device():
        print("gpu.py: needs a CUDA device (--interpret tests it without one)", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    os.environ |= _environment(options.interpret, options.cache)
    # Stopped from outside, the processes of the part that runs end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return run(results, names, options.seconds, options.interpret, ahead=options.cache is None)


def run(folder: Path, names: list[str], seconds: float, interpret: bool, ahead: bool) -> int:
    """Do what is missing of the named parts, in their order; the exit status.

    ahead: compile the kernels meanwhile.
    """
    deadline = time.monotonic() + seconds
    for name in names:
        PartFile(folder, name).keep_done()
    left = [name for name in PARTS if name in names and not _done(folder, name)]
    with ExitStack() as background:
        if ahead and not interpret and left:
            background.enter_context(process([str(PRECOMPILE)]))
        for at, name in enumerate(left):
            part, now = PARTS[name], time.monotonic()
            share = part.seconds / sum(PARTS[other].seconds for other in left[at:])
            with ExitStack() as beside:
                if part.ahead in left[at:]:
                    ahead_of = worker_arguments(part.ahead, folder, interpret)
                    beside.enter_context(process([*ahead_of, "--ahead"]))
                run_part(name, part, folder, interpret, now + share * (deadline - now))
            print(f"{name}: {time.monotonic() - now:.1f} s", flush=True)
            _write(folder)
    result = _write(folder)
    print(json.dumps(result))
    return 0 if all(PartFile(folder, name).read().all_is_right for name in names) else 1


def _done(folder: Path, name: str) -> bool:
    record = PartFile(folder, name).read()
    return bool(record.labels) and record.done == set(record.labels)


def _write(folder: Path) -> dict[str, object]:
    """DIR/summary.json, whole or not at all."""
    result = summary(folder)
    path = folder / "summary.json"
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)
    return result


def _environment(interpret: bool, cache: Path | None) -> dict[str, str]:
    """Of all processes."""
    chosen = {
        # A graph here is one kernel: more compilers in many processes only crowd the machine.
        "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"),
        # These checks are the playbook's own: what it times is what it names, or fails.
        "CLEAR_DIT_SELF_CHECK": "0",
        **COMPILER,
        "PYTHONUNBUFFERED": "1",
    }
    if cache is not None:
        relocate(cache)
        chosen["TRITON_CACHE_DIR"] = str(cache.resolve())
    if interpret:
        # Both are read when PyTorch and Triton are imported.
        chosen |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return chosen


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
