"""Small sampling and distillation runs of the demo: 4 x 6 tokens, in this process or another."""

import os
from pathlib import Path

# Named here so that processes forked from one that imported this have them.
import prodigyopt  # noqa: F401
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler  # noqa: F401
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel  # noqa: F401

import clear_dit.pipelines.flux  # noqa: F401
from clear_dit.distillation import checkpoint
from clear_dit.distillation.options import DistillOptions
from clear_dit.distillation.sample import make_request, sample
from clear_dit.distillation.samples import read_index
from clear_dit.distillation.setup import make_optimizer
from clear_dit.distillation.sharded import ShardedAverage, ShardedOptimizer
from clear_dit.distillation.student import whole_tensors
from clear_dit.distillation.train import Run, _Parameters, distill

# In float32, whatever the processor is good at.
SMALL = {"height": 64, "width": 96, "steps": 2, "shard_size": 2, "batch": 2, "device": "cpu"}
SMALL |= {"dtype": "float32"}


def make_samples(out, count=6, prompts="demo", **changes):
    """`sample` of a few images."""
    request = make_request("demo", str(prompts), count, **(SMALL | changes))
    return sample(request, Path(out), progress=False)


def make_options(samples, out, **changes):
    """Options of a run of three steps, of the paper's CLEAR."""
    settings = {
        "model": "demo",
        "samples": Path(samples),
        "out": Path(out),
        "radius": 2,
        "far": False,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "report_to": "none",
        "mixed_precision": "no",
        "cpu": True,
    }
    return DistillOptions(**(settings | changes))


def make_run(options):
    """A `Run` that is ready to step."""
    run = Run(options, read_index(options.samples), only_transformer=True)
    run.prepare(None)
    return run


def gradients_of_a_step(options):
    """The gradients that the first step gives to the optimizer, by name, and its losses."""
    run = make_run(options)
    found = {}

    def keep(*_):
        found.update({name: p.grad.clone() for name, p in run._trained().items()})

    run.optimizer.optimizer.register_step_pre_hook(keep)
    return found, run.step(0)


# What other processes run: they are forked from a server that has imported all this.


def child_sample(out, count, changes):
    torch.set_num_threads(1)
    make_samples(out, count, **changes)


def child_distill(samples, out, changes):
    torch.set_num_threads(1)
    distill(make_options(samples, out, **changes), progress=False)


def save_gradients(samples, out, path, changes):
    torch.set_num_threads(1)
    gradients, losses = gradients_of_a_step(make_options(samples, out, **changes))
    torch.save((gradients, losses), f"{path}-{os.environ.get('RANK', 'one')}")


def compare_with_fsdp(samples, path, changes):
    """Train three steps whole, and with FSDP 2 over all processes; saves how far they differ."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    options = make_options(samples, f"{path}-out", **changes)
    weights, losses = [], []
    for sharded in (False, True):
        run = Run(options, read_index(options.samples), only_transformer=True)
        run.wrapped = run.model
        batch = run.draws.batch(range(2))
        if sharded:
            for stack in (run.model.transformer_blocks, run.model.single_transformer_blocks):
                for block in stack:
                    fully_shard(block)
            fully_shard(run.model)
            rank = torch.distributed.get_rank()
            batch = type(batch)(*(each[rank : rank + 1] for each in batch))
        optimizer = make_optimizer(options, list(run._trained().values()), run.accelerator)
        for _ in range(3):
            total = run.losses(batch).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = total.detach().clone()
            torch.distributed.all_reduce(mean)
            losses.append(mean.item() / torch.distributed.get_world_size())
        weights.append(whole_tensors(run._trained()))
    torch.save((weights, losses), f"{path}-{os.environ['RANK']}")


def resume_with_fsdp(samples, path, changes):
    """Train three steps with FSDP 2, and two and one with a checkpoint between; saves the ends."""
    from diffusers.training_utils import EMAModel
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    options = make_options(samples, f"{path}-out", **changes)
    options.out.mkdir(exist_ok=True)
    ends = []
    for pieces in ((range(3),), (range(2), range(2, 3))):
        found = None
        for steps in pieces:
            run = Run(options, read_index(options.samples), only_transformer=True)
            run.wrapped = run.model
            for block in run.model.single_transformer_blocks:
                fully_shard(block)
            fully_shard(run.model)
            trained = run._trained()
            optimizer = make_optimizer(options, list(trained.values()), run.accelerator)
            average = EMAModel(trained.values(), decay=0.5)
            parts = {
                "progress": run.progress,
                "trained": _Parameters(trained),
                "optimizer": ShardedOptimizer(optimizer, list(trained.values())),
                "average": ShardedAverage(average),
            }
            if found is not None:
                checkpoint.load(run.accelerator, found, parts)
            for step in steps:
                run.losses(run.draws.batch(range(step, step + 2))).total.backward()
                optimizer.step()
                optimizer.zero_grad()
                average.step(trained.values())
                run.progress.step = step + 1
            found = checkpoint.save(
                run.accelerator, options.out, run.settings, 9, parts, lambda folder: None
            )
        averaged = dict(zip(trained, average.shadow_params, strict=True))
        ends.append((whole_tensors(trained), whole_tensors(averaged)))
    torch.save(ends, f"{path}-{os.environ['RANK']}")
