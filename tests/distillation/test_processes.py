"""Processes that are killed, and processes that share the work."""

import multiprocessing
import os
import random
import shutil
import socket
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support import distilling

from clear_dit.distillation.checkpoint import checkpoints
from clear_dit.distillation.samples import SampleFolder, open_samples, read_index

# Children are forked from a server that imported everything once: starting one takes no seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["support.distilling"])


@pytest.fixture(autouse=True)
def server_finds_modules(monkeypatch):
    """The server's own `sys.path` is not this one, in Python 3.11."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def kill_until_done(task, arguments, seed, most_kills=12):
    """Run a task, killed after random times that grow, until it ends by itself; the kills."""
    generator = random.Random(seed)
    for kills in range(most_kills + 1):
        process = PROCESSES.Process(target=task, args=arguments)
        process.start()
        if kills < most_kills:
            process.join(generator.uniform(0.3, 0.9) * (1 + 0.25 * kills))
        else:
            process.join()
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()  # SIGKILL
        process.join()
    raise AssertionError("never done")


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_sampling_survives_kill_9(tmp_path):
    distilling.make_samples(tmp_path / "whole", 20)
    out = tmp_path / "killed"
    kills = kill_until_done(distilling.child_sample, (out, 20, {}), seed=1)
    assert kills >= 2
    assert visible(out) == visible(tmp_path / "whole")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    one, other = (SampleFolder(f, read_index(f)) for f in (out, tmp_path / "whole"))
    assert one.index == other.index
    one.check(20)
    for shard in range(10):
        assert one.header(shard) == other.header(shard)
    for number in range(20):
        assert torch.allclose(one[number].latents, other[number].latents, atol=1e-4)


def test_after_any_kill_what_is_there_can_be_read(tmp_path):
    out = tmp_path / "out"
    generator = random.Random(3)
    seen = set()
    for _ in range(3):
        process = PROCESSES.Process(target=distilling.child_sample, args=(out, 400, {}))
        process.start()
        deadline = time.monotonic() + 60
        while len(visible(out) if out.exists() else ()) <= len(seen) + 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.join()
        found = SampleFolder(out, read_index(out))
        there = {n for n in range(200) if found.path(n).exists()}
        assert seen < there
        found.check(2 * len(there))
        seen = there


def test_training_survives_kill_9_and_ends_the_same(samples, tmp_path):
    changes = {"max_train_steps": 14, "checkpointing_steps": 2, "optimizer": "adamw"}
    changes |= {"resume_from_checkpoint": "latest"}
    process = PROCESSES.Process(
        target=distilling.child_distill, args=(samples, tmp_path / "whole", changes)
    )
    process.start()
    out = tmp_path / "killed"
    process.join()
    kills = kill_until_done(distilling.child_distill, (samples, out, changes), seed=2)
    assert kills >= 2
    assert visible(out) == visible(tmp_path / "whole")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-12", "checkpoint-14"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    # Bit for bit, the kills notwithstanding.
    one, other = ((f / "losses.csv").read_text() for f in (out, tmp_path / "whole"))
    assert one == other
    one, other = (load_file(f / "clear_local_2.safetensors") for f in (out, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_ranks(task, arguments, world=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(target=distilling.child_rank, args=(rank, world, port, task, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def test_two_processes_share_the_samples(samples, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    (out / "samples-00001.safetensors").unlink()
    run_ranks(distilling.child_sample, (out, 10, {}))
    assert visible(out) == visible(samples) | {f"samples-0000{i}.safetensors" for i in (3, 4)}
    found = open_samples(out, "demo", read_index(samples).fingerprint, 0)
    assert [found[n].seed for n in range(10)] == list(range(10))


@pytest.mark.parametrize("lora", [None, 2])
def test_gradients_of_two_processes_are_those_of_one_with_twice_the_batch(samples, tmp_path, lora):
    path = tmp_path / "gradients"
    arguments = (samples, tmp_path / "out", path, {"train_batch_size": 1, "lora": lora})
    run_ranks(distilling.save_gradients, arguments)
    one, losses = distilling.gradients_of_a_step(
        distilling.make_options(samples, tmp_path / "one", train_batch_size=2, lora=lora)
    )
    both = [torch.load(f"{path}-{rank}", weights_only=True) for rank in range(2)]
    assert both[0][1] == both[1][1] == pytest.approx(losses, rel=1e-5)
    assert any(gradient.abs().max() > 1e-6 for gradient in one.values())
    for name, gradient in one.items():
        scale = gradient.abs().max()
        for gradients, _ in both:
            assert (gradients[name] - gradient).abs().max() <= 1e-4 * scale + 1e-9, name


def test_two_processes_train_and_save_once(samples, tmp_path):
    out = tmp_path / "out"
    run_ranks(distilling.child_distill, (samples, out, {"train_batch_size": 1}))
    assert visible(out) == {
        *("README.md", "losses.csv", "clear_local_2.safetensors"),
        *("checkpoint-2", "checkpoint-3"),
    }
    assert len(load_file(out / "clear_local_2.safetensors")) == 2 * 8 + 4 * 6
