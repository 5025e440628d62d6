"""Processes that are killed, and processes that share the work."""

import random
import shutil
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from support import distilling
from support.processes import launch, start
from support.slow import slow

from clear_dit.distillation.checkpoint import checkpoints
from clear_dit.distillation.samples import SampleFolder, open_samples, read_index


def kill_after_progress(task, arguments, progress, kills, seed):
    """Kill a task a few times, each at a random moment after it got on; then let it end.

    Yields after each kill; `progress` is a function that says how far the task is.
    """
    generator = random.Random(seed)
    for _ in range(kills):
        before = progress()
        process = start(task, *arguments)
        deadline = time.monotonic() + 120
        while progress() <= before:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.25))
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -9
        yield
    process = start(task, *arguments)
    process.join()
    assert process.exitcode == 0


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@slow
def test_sampling_survives_kill_9(tmp_path):
    distilling.make_samples(tmp_path / "whole", 30)
    out = tmp_path / "killed"
    arguments = (out, 30, {})
    seen = set()
    for _ in kill_after_progress(
        distilling.child_sample, arguments, lambda: len(list(out.glob("samples-*"))), 4, seed=1
    ):
        # After any kill, all that has a name can be read, and nothing is lost.
        found = SampleFolder(out, read_index(out))
        there = {n for n in range(15) if found.path(n).exists()}
        assert seen < there
        found.check(2 * len(there))
        seen = there
    assert visible(out) == visible(tmp_path / "whole")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    one, other = (SampleFolder(f, read_index(f)) for f in (out, tmp_path / "whole"))
    assert one.index == other.index
    one.check(30)
    for shard in range(15):
        assert one.header(shard) == other.header(shard)
    for number in range(30):
        assert torch.allclose(one[number].latents, other[number].latents, atol=1e-4)


@slow
def test_training_survives_kill_9_and_ends_the_same(samples, tmp_path):
    changes = {"max_train_steps": 20, "checkpointing_steps": 2, "optimizer": "adamw"}
    changes |= {"resume_from_checkpoint": "latest"}
    out, whole = tmp_path / "killed", tmp_path / "whole"

    def steps():
        there = checkpoints(out)
        return int(there[-1].name.removeprefix("checkpoint-")) if there else 0

    arguments = (samples, out, changes)
    for _ in kill_after_progress(distilling.child_distill, arguments, steps, 3, seed=2):
        for folder in checkpoints(out):
            assert len(load_file(folder / "state.safetensors")) > 2 * 40
            assert (folder / "settings.json").exists()
    for _ in kill_after_progress(
        distilling.child_distill, (samples, whole, changes), lambda: 0, 0, seed=0
    ):
        raise AssertionError
    assert visible(out) == visible(whole)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-18", "checkpoint-20"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    # Bit for bit, the kills notwithstanding.
    assert (out / "losses.csv").read_text() == (whole / "losses.csv").read_text()
    one, other = (load_file(folder / "clear_local_2.safetensors") for folder in (out, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_ranks(task, arguments, world=2):
    for process in launch(task, world, *arguments):
        process.join(120)
        assert process.exitcode == 0


@slow
def test_two_processes_share_the_samples(samples, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    (out / "samples-00001.safetensors").unlink()
    run_ranks(distilling.child_sample, (out, 10, {}))
    assert visible(out) == visible(samples) | {f"samples-0000{i}.safetensors" for i in (3, 4)}
    found = open_samples(out, "demo", read_index(samples).fingerprint, 0)
    assert [found[n].seed for n in range(10)] == list(range(10))


@slow
@pytest.mark.parametrize("changes", [{}, {"far": True}, {"lora": 2}])
def test_gradients_of_two_processes_are_those_of_one_with_twice_the_batch(
    samples, tmp_path, changes
):
    path = tmp_path / "gradients"
    arguments = (samples, tmp_path / "out", path, {"train_batch_size": 1} | changes)
    run_ranks(distilling.save_gradients, arguments)
    one, losses = distilling.gradients_of_a_step(
        distilling.make_options(samples, tmp_path / "one", train_batch_size=2, **changes)
    )
    both = [torch.load(f"{path}-{rank}", weights_only=True) for rank in range(2)]
    assert both[0][1] == both[1][1] == pytest.approx(losses, rel=1e-5)
    assert any(gradient.abs().max() > 1e-6 for gradient in one.values())
    for name, gradient in one.items():
        scale = gradient.abs().max()
        for gradients, _ in both:
            assert (gradients[name] - gradient).abs().max() <= 1e-4 * scale + 1e-9, name


@slow
def test_two_processes_train_and_save_once(samples, tmp_path):
    out = tmp_path / "out"
    run_ranks(distilling.child_distill, (samples, out, {"train_batch_size": 1}))
    assert visible(out) == {
        *("README.md", "losses.csv", "clear_local_2.safetensors"),
        *("checkpoint-2", "checkpoint-3"),
    }
    assert len(load_file(out / "clear_local_2.safetensors")) == 2 * 8 + 4 * 6


@slow
@pytest.mark.parametrize("window", [{"down_factor": 2}, {"far": True}], ids=["pooled", "far"])
def test_both_roles_work_on_fsdp_s_shards(samples, tmp_path, window):
    path = tmp_path / "fsdp"
    changes = {"optimizer": "adamw", "gradient_checkpointing": True, **window}
    run_ranks(distilling.compare_with_fsdp, (samples, path, changes))
    (whole, sharded), losses = torch.load(f"{path}-0", weights_only=True)
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    assert losses[2] < losses[0]
    for name, expected in whole.items():
        assert (sharded[name] - expected).abs().max() < 3e-5, name


@slow
def test_shards_go_on_from_a_checkpoint_without_pickles(samples, tmp_path):
    path = tmp_path / "fsdp"
    run_ranks(distilling.resume_with_fsdp, (samples, path, {"optimizer": "adamw"}))
    for rank in range(2):
        whole, resumed = torch.load(f"{path}-{rank}", weights_only=True)
        for expected, found in zip(whole, resumed, strict=True):
            assert all(torch.equal(expected[name], found[name]) for name in expected)
    folder = tmp_path / "fsdp-out" / "checkpoint-2"
    assert visible(folder) == {"settings.json", "state.safetensors"}
    # Whole tensors: both moments of every trained parameter are there.
    state = load_file(folder / "state.safetensors")
    weights = {name.removeprefix("trained."): t for name, t in state.items() if "trained." in name}
    moments = [tensor for name, tensor in state.items() if name.endswith("exp_avg_sq")]
    assert Counter(m.shape for m in moments) == Counter(w.shape for w in weights.values())
    assert all(m.abs().max() > 0 for m in moments)
