"""What the ranks of a test do, in processes of their own (see `run_ranks`)."""

import itertools
import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny

from clear_dit import apply_clear
from clear_dit.bench.parallel import measure
from clear_dit.generation.models import DEMO, load_pipeline
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import generate
from clear_dit.pipelines.decoding import autoencoder
from clear_dit.pipelines.decoding.autoencoder import decode, decode_rows, encode
from clear_dit.pipelines.parallel.agreement import agree
from clear_dit.pipelines.parallel.exchange import HaloRows
from clear_dit.pipelines.parallel.progress import Progress
from clear_dit.pipelines.parallel.start import start_ranks
from clear_dit.process_group import RankGroup
from clear_dit.weights.known import known_weights

from .autoencoders import LIKE_FLUX, make_autoencoder
from .families import pipelines as _pipelines  # noqa: F401 - whose classes folders name
from .processes import launch

IMAGE = {
    "prompt": "a red circle",
    "height": 256,
    "width": 256,
    "radius": 4,
    "weights": "none",
    "steps": 3,
    "seed": 3,
    "device": "cpu",
}


def run_ranks(task, world, folder, *arguments, stays=None):
    """Run `task(ranks, *arguments)` on some gloo ranks; their statuses and what they said.

    A rank that has not ended after 120 s, or the one that `stays`, is killed; its status is None.
    """
    processes = launch(_rank, world, folder, task, arguments)
    deadline = time.monotonic() + 120
    for rank, process in enumerate(processes):
        if rank != stays:
            process.join(max(0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses, [(folder / f"rank-{rank}.txt").read_text() for rank in range(world)]


def _rank(folder, task, arguments):
    sys.stdout = sys.stderr = (folder / f"rank-{os.environ['RANK']}.txt").open("w")
    with start_ranks("cpu", silence_limit=8, hang_limit=5) as ranks:
        task(ranks, *arguments)
    print("finished")


def fail(ranks, how, who):
    """Exchange something a few times; then one rank fails in one of several ways."""
    progress = ranks.watch.progress = Progress("step 3 of 20")
    tensor = torch.ones(3)
    for step in range(24):
        time.sleep(0.05)
        if step == 22 and ranks.rank == who:
            match how:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hanging":
                    time.sleep(1000)
                case "out of memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        progress.waiting = True
        dist.all_reduce(tensor)
        progress.waiting = False
        progress.count += 1


def disagree(ranks):
    """Different adapters, and another version on one rank."""
    facts = {"seed": "7", "torch": "2.13", "model": f"digest of adapter {ranks.rank % 2}"}
    if ranks.rank == 2:
        facts["torch"] = "2.12"
    agree(ranks.process_group, facts)


def generate_image(ranks, out, dies):
    """Generate a small image by tiles of 64 pixels; rank 1 may die in a step or in decoding."""
    autoencoder.TILE_PIXELS = 64
    if ranks.rank == 1 and dies is not None:
        where, name, after = {
            "step": (HaloRows, "wait", 20),
            "decoding": (RankGroup, "send", 2),
        }[dies]
        original, calls = getattr(where, name), itertools.count()

        def last_call(*arguments):
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(where, name, last_call)
    generate(make_request(**IMAGE), out, progress=False, ranks=ranks)


def generate_all(ranks, requests, folder):
    """Generate images into a folder; requests: settings by name, see `make_request`."""
    for name, settings in requests.items():
        generate(make_request(**settings), folder / f"{name}.png", progress=False, ranks=ranks)


def generate_with_other_adapters(ranks):
    """What the second rank has was tuned for the window; it has another seed, too."""
    pipe = load_pipeline("demo", torch.float32, ranks.device)
    weights = known_weights("demo", 4, 1, far=False) if ranks.rank else None
    apply_clear(pipe, radius=4, weights=weights, far=False)
    pipe.enable_patch_parallel(ranks.mesh)
    generator = torch.Generator().manual_seed(ranks.rank)
    pipe("a red circle", height=128, width=128, generator=generator)


def bench(ranks, folder):
    """Measure a small step, without and with far keys; what is found on each rank."""
    found = [
        measure("demo", 256, 128, 3, far, "tiled", torch.float32, ranks, 2) for far in (False, True)
    ]
    (folder / f"bench-{ranks.rank}.json").write_text(json.dumps(found))


def autoencoder_of(kind):
    """The demo's own, or FLUX's with fewer channels and random weights."""
    if kind == "demo":
        return AutoencoderTiny.from_pretrained(DEMO / "vae", use_safetensors=True).eval()
    torch.manual_seed(0)
    return make_autoencoder((8, 16), layers_per_block=1, norm_num_groups=4, **LIKE_FLUX)


def code(ranks, cases, folder):
    """Decode and encode, the tiles shared by all ranks, and keep what came out.

    cases: (kind, latents, tile_pixels) each.
    """
    group = dist.group.WORLD
    found = []
    for kind, latents, tile in cases:
        vae = autoencoder_of(kind)
        strips = list(decode_rows(vae, latents, tile_pixels=tile, group=group))
        image = decode(vae, latents, tile_pixels=tile, group=group)
        found.append((strips, image, encode(vae, image, tile_pixels=tile, group=group)))
    torch.save(found, folder / f"coded-{ranks.rank}.pt")
