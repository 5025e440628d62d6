"""How much faster two ranks of one thread generate than one rank of one thread.

    python benchmarks/patch_parallel.py --out benchmarks/results/NAME.json

The demo transformer's denoising step (two passes of guidance) on random latents of 2048 x 2048 px,
with CLEAR at its radius. Each number of ranks runs in processes of its own, under gloo, in turn and
several times; a rank's step ends when it has the whole output. First the check: two ranks must
give what one gives. The last line is JSON. Needs as many idle cores as ranks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-5
TOKEN_PIXELS = 16


def inputs(transformer: Any, side: int, text_length: int) -> list[dict[str, torch.Tensor]]:
    """Random inputs of the two passes of a step, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    config = transformer.config
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    common = {
        "hidden_states": torch.randn(1, side * side, config.in_channels, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text_length, 3),
    }

    def text() -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.randn(
                1, text_length, config.joint_attention_dim, generator=generator
            ),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        }

    return [common | text() for _ in range(2)]


def run_rank(rank: int, ranks: int, port: int, options: argparse.Namespace, results: Any) -> None:
    """Time the steps of one rank; the first sends (seconds of each step, output, bytes)."""
    torch.set_num_threads(1)
    from clear_dit import apply_clear
    from clear_dit.generation.models import load_pipeline

    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"), only_transformer=True)
    model = pipe.transformer
    apply_clear(model, radius=options.radius, far=options.far, impl="tiled")
    patches = None
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh

        from clear_dit.pipelines.parallel.patch_parallel import parallelize

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
        patches = parallelize(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("patch",)))
    passes = inputs(model, options.size // TOKEN_PIXELS, options.text_length)

    @torch.no_grad()
    def step() -> torch.Tensor:
        prompt, negative = (model(**given).sample for given in passes)
        return negative + 2.0 * (prompt - negative)

    out = step()  # the first is not timed
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        sent = patches.traffic.per_layer() if patches is not None else 0.0
        results.put((seconds, out.numpy(), sent))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def measure(ranks: int, options: argparse.Namespace) -> tuple[list[float], torch.Tensor, float]:
    """What the first of so many ranks found."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, port, options, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    seconds, out, sent = results.get()
    for process in processes:
        process.join()
    return seconds, torch.from_numpy(out), sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="side of the image, in pixels")
    parser.add_argument("--radius", type=int, default=8, help="in tokens")
    parser.add_argument("--far", action="store_true", help="with far keys")
    parser.add_argument("--text-length", type=int, default=512, help="in tokens")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed in each process")
    parser.add_argument("--rounds", type=int, default=3, help="one rank and several, in turn")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the ranks

    from clear_dit.bench.timing import hardware

    seconds: dict[int, list[float]] = {1: [], options.ranks: []}
    error, sent = 0.0, 0.0
    for _ in range(options.rounds):
        outputs = {}
        for ranks in seconds:
            found, outputs[ranks], sent = measure(ranks, options)
            seconds[ranks] += found
        expected = outputs[1]
        error = max(
            error, float((outputs[options.ranks] - expected).abs().max() / expected.abs().max())
        )
        if error > TOLERANCE:
            raise SystemExit(f"wrong: {options.ranks} ranks differ from one by {error:.2g}")
    median = {ranks: statistics.median(times) for ranks, times in seconds.items()}
    speedup = median[1] / median[options.ranks]
    print(f"{'ranks':>6} {'s / step':>10}   all steps")
    for ranks, times in seconds.items():
        print(f"{ranks:>6} {median[ranks]:>10.3f}   {' '.join(f'{t:.3f}' for t in times)}")
    result = {
        "benchmark": "patch_parallel",
        "size": options.size,
        "radius": options.radius,
        "far": options.far,
        "text_length": options.text_length,
        "passes": 2,
        "seconds_per_step": {str(ranks): value for ranks, value in median.items()},
        "seconds": {str(ranks): times for ranks, times in seconds.items()},
        "ranks": options.ranks,
        "threads_per_rank": 1,
        "speedup": speedup,
        "largest_relative_error": error,
        "bytes_sent_per_layer": sent,
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
