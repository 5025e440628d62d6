"""Distillation runs: the same after a pause, whatever the batch is split into; what is refused."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from support import command_line
from support.distilling import gradients_of_a_step, make_samples
from support.slow import slow

from clear_dit import apply_clear
from clear_dit.distillation import checkpoint, files
from clear_dit.distillation.options import DistillOptions
from clear_dit.errors import RequestError
from clear_dit.evaluation.request import weights_settings
from clear_dit.generation.models import DEMO

ADAPTER = "clear_local_2.safetensors"


def adapter(folder, name=ADAPTER):
    return load_file(folder / name)


def losses(folder):
    return (folder / "losses.csv").read_text()


RESUMED = {
    "prodigy-bf16": {"optimizer": "prodigy", "mixed_precision": "bf16"},
    "adamw-ema-cosine": {"optimizer": "adamw", "use_ema": True, "lr_scheduler": "cosine"},
    "lora-accumulated": {"lora": 2, "gradient_accumulation_steps": 2, "train_batch_size": 1},
    "pooled-checkpointed": {"down_factor": 2, "gradient_checkpointing": True},
    "far-adamw-ema": {"far": True, "optimizer": "adamw", "use_ema": True},
}


@slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path, monkeypatch, name):
    changes = RESUMED[name]
    whole = run(out=tmp_path / "whole", max_train_steps=4, **changes)
    assert whole["resumed_from"] == 0
    assert whole["steps"] == 4
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: save(*args) and exit(3))
    with pytest.raises(SystemExit):  # right after the checkpoint of step 2
        run(max_train_steps=4, **changes)
    monkeypatch.undo()
    resumed = run(max_train_steps=4, resume_from_checkpoint="latest", **changes)
    assert resumed["resumed_from"] == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    file = whole["adapter"].rsplit("/", 1)[1]
    one, other = adapter(tmp_path / "run", file), adapter(tmp_path / "whole", file)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = run(max_train_steps=4, resume_from_checkpoint="latest", **changes)
    assert again["resumed_from"] == 4


@slow
def test_accumulation_is_a_larger_batch(options, tmp_path):
    whole, whole_losses = gradients_of_a_step(options(train_batch_size=4))
    parts, part_losses = gradients_of_a_step(
        options(train_batch_size=1, gradient_accumulation_steps=4)
    )
    assert part_losses == pytest.approx(whole_losses, rel=1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, name


def test_the_adapter_is_what_apply_clear_reads(run, tmp_path, samples):
    result = run(down_factor=2, optimizer="adamw", learning_rate=1e-3)
    assert result["adapter"] == str(tmp_path / "run" / "clear_local_2_down_2.safetensors")
    assert result["parameters"] == 741_120 + 6 * 4
    pipe = FluxPipeline.from_pretrained(DEMO, use_safetensors=True)
    apply_clear(pipe, radius=2, down_factor=2, weights=tmp_path / "run")
    before = FluxPipeline.from_pretrained(DEMO, use_safetensors=True).transformer.state_dict()
    changed = {
        name
        for name, value in pipe.transformer.state_dict().items()
        if name in before and not torch.equal(value, before[name])
    }
    weights = adapter(tmp_path / "run", "clear_local_2_down_2.safetensors")
    pooling = {name for name in weights if name.endswith("spatial_weight")}
    assert changed == set(weights) - pooling
    assert all(
        not torch.equal(weights[n], torch.full((1, 1, 1, 2, 1, 2, 1), 0.25)) for n in pooling
    )
    with safe_open(result["adapter"], framework="pt") as file:
        header = file.metadata()
    assert (header["radius"], header["down_factor"], header["base_model"]) == ("2", "2", "demo")


@slow
def test_an_adapter_with_far_keys_is_what_apply_clear_reads(run, tmp_path):
    result = run(far=True, optimizer="adamw", learning_rate=1e-3, use_ema=True, ema_decay=0.5)
    name = "clear_far_2.safetensors"
    assert result["adapter"] == str(tmp_path / "run" / name)
    assert result["parameters"] == 741_120 + 6 * (10 * 4 + 10 * 3)
    with safe_open(result["adapter"], framework="pt") as file:
        header = file.metadata()
    assert (header["radius"], header["down_factor"], header["far"]) == ("2", "1", "true")
    weights = adapter(tmp_path / "run", name)
    for layer in ("transformer_blocks.1", "single_transformer_blocks.3"):
        weight, offset = (
            weights[f"{layer}.attn.processor.far_{kind}"] for kind in ("weight", "offset")
        )
        assert (weight.shape, offset.shape) == ((10, 2, 2), (10, 3))
        # 4 x 6 tokens have cells of level 1 that somebody sees, and none of level 4.
        assert (weight[0] - 0.25).abs().min() > 0
        assert offset[0].abs().min() > 0
        assert offset[3:].abs().max() == 0
    pipe = FluxPipeline.from_pretrained(DEMO, use_safetensors=True)
    (applied,) = apply_clear(pipe, radius=2, weights=tmp_path / "run")
    assert applied.far
    processor = pipe.transformer.transformer_blocks[1].attn.processor
    assert torch.equal(
        processor.far_offset, weights["transformer_blocks.1.attn.processor.far_offset"]
    )
    card = (tmp_path / "run" / "README.md").read_text()
    for part in (
        "radius 2 tokens, with far keys",
        "far keys' pooling weights",
        "far=True, weights=",
    ):
        assert part in card


@slow
def test_a_lora_trains_nothing_of_far_keys(run, tmp_path):
    run(lora=2, far=True)
    state = adapter(tmp_path / "run", "pytorch_lora_weights.safetensors")
    assert len(state) == 2 * (2 * 4 + 4 * 3)
    assert weights_settings(tmp_path / "run" / "pytorch_lora_weights.safetensors") == (2, 1, True)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "down_factor=1, far=True)\npipe.load_lora_weights" in card


def test_far_keys_are_the_default_without_pooled_ones(options):
    assert options(far=None).takes_far
    assert not options(far=None, down_factor=2).takes_far
    assert not options(far=None, radius=1).takes_far


def test_a_lora_loads_into_a_pipeline(run, tmp_path, tiny_inputs):
    run(lora=3, optimizer="adamw", learning_rate=1e-2)
    state = adapter(tmp_path / "run", "pytorch_lora_weights.safetensors")
    assert len(state) == 2 * (2 * 4 + 4 * 3)
    assert all(name.startswith("transformer.") for name in state)
    pipe = FluxPipeline.from_pretrained(DEMO, use_safetensors=True)
    stock = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    apply_clear(pipe, radius=2, far=False)
    pipe.load_lora_weights(tmp_path / "run")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    name = "transformer.transformer_blocks.0.attn.to_q"
    assert torch.equal(layer.lora_A["default_0"].weight, state[f"{name}.lora_A.weight"])
    assert torch.equal(layer.lora_B["default_0"].weight, state[f"{name}.lora_B.weight"])
    assert state[f"{name}.lora_B.weight"].abs().max() > 0
    assert layer.scaling["default_0"] == 1
    assert torch.equal(layer.base_layer.weight, stock["transformer_blocks.0.attn.to_q.weight"])


def test_training_lowers_the_distance_to_the_teacher(prepared):
    weights = {"output_weight": 20.0, "attention_weight": 20.0}  # flow dominates on such samples
    run = prepared(optimizer="adamw", learning_rate=1e-3, **weights)
    held = run.draws.batch(range(1000, 1008))
    with torch.no_grad():
        before = run.losses(held)
        for step in range(10):
            with torch.enable_grad():
                run.step(step)
        after = run.losses(held)
    assert after.output < 0.95 * before.output
    assert after.attention < 0.9 * before.attention
    assert after.total < before.total


def test_checkpoints_card_curves_and_images(run, tmp_path):
    folder = tmp_path / "run"
    run(
        max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2,
        report_to="tensorboard", validation_prompts="demo", validation_steps=5,
    )  # fmt: skip
    assert [path.name for path in checkpoint.checkpoints(folder)] == [
        "checkpoint-4",
        "checkpoint-5",
    ]
    assert {p.name for p in (folder / "checkpoint-5").iterdir()} == {
        *("settings.json", "state.safetensors", ADAPTER)
    }
    assert len(list((folder / "validation").glob("step-000005-*.png"))) == 4
    events = next((folder / "logs").glob("events*")).read_bytes()
    assert b"attention" in events
    assert b"validation" in events
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nbase_model: demo\n")
    for part in (
        "radius 2 tokens",
        "clear-dit distill --model demo",
        "--no-far",
        "741,120",
        "| flow matching |",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 400
    assert len(losses(folder).splitlines()) == 6


def test_prompt_dropout_and_order(prepared):
    run = prepared(prompt_dropout=0.5)
    draws = run.draws
    numbers = [draws.number(d) for d in range(18)]
    assert [sorted(numbers[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert numbers[:6] != numbers[6:12]
    dropped = sum(draws.batch([d]).conditionings[0] is draws.empty for d in range(200))
    assert 70 <= dropped <= 130
    assert prepared().draws.prompt_dropout == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radius": 0}, "--radius must be from 1"),
        ({"down_factor": 5}, "down_factor must not exceed the token grid"),
        ({"far": True, "down_factor": 2}, "--far and --down-factor 2 exclude each other"),
        ({"far": True, "radius": 1}, "far keys need a radius of at least 2"),
        ({"lora": 0}, "--lora must be from 1"),
        ({"max_train_steps": 0}, "--max-train-steps must be from 1"),
        ({"learning_rate": -1.0}, "--learning-rate must be from"),
        ({"learning_rate": float("nan")}, "--learning-rate must be from"),
        ({"prompt_dropout": 1.5}, "--prompt-dropout must be from 0 to 1, got 1.5"),
        ({"optimizer": "sgd"}, "--optimizer must be one of prodigy, adamw; got 'sgd'"),
        ({"lr_scheduler": "steps"}, "--lr-scheduler must be one of constant"),
        ({"mixed_precision": "fp16"}, "--mixed-precision must be one of auto, no, bf16"),
        ({"report_to": "wandb"}, "wandb is not installed: pip install"),
        (
            {"attention_layers": "9"},
            "--attention-layers must be numbers of single_transformer_blocks",
        ),
        ({"max_train_samples": 7}, "--max-train-samples must be from 1 to the 6 samples"),
        ({"impl": "fastest"}, "impl must be one of auto"),
        ({"validation_prompts": "none.txt"}, "there is no such file"),
        ({"model": "no/such/model"}, "--model must be 'demo' or"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "'checkpoint-9' is no checkpoint"),
    ],
)
def test_bad_options(run, tmp_path, changes, message):
    with pytest.raises(RequestError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


@slow
def test_checkpoints_of_other_runs_are_refused(run, tmp_path, samples):
    run(max_train_steps=2)
    latest = {"resume_from_checkpoint": "latest"}
    with pytest.raises(RequestError, match="has checkpoint-2; go on with --resume-from-checkpoint"):
        run()
    for changes, message in (
        ({"radius": 3}, "is of a run with radius 2, now it is 3"),
        ({"down_factor": 2}, "is of a run with down_factor 1, now it is 2"),
        ({"far": True}, "is of a run with far False, now it is True"),
        ({"lora": 2}, "is of a run with lora None, now it is 2"),
        ({"optimizer": "adamw"}, "is of a run with optimizer prodigy, now it is adamw"),
        ({"train_batch_size": 3}, "is of a run with effective_batch 2, now it is 3"),
        ({"seed": 1}, "is of a run with seed 0, now it is 1"),
    ):
        with pytest.raises(RequestError, match=message):
            run(**latest, **changes)
    make_samples(tmp_path / "others", 6, seed=7)
    with pytest.raises(RequestError, match="is of a run with samples"):
        run(**latest, samples=tmp_path / "others")
    settings = tmp_path / "run" / "checkpoint-2" / "settings.json"
    kept = settings.read_text()
    settings.write_text(json.dumps(json.loads(kept) | {"fingerprint": {}}))
    with pytest.raises(RequestError, match="checkpoint-2 is of a run of another model"):
        run(**latest)
    settings.write_text("[]")
    with pytest.raises(RequestError, match=r"settings.json is not a checkpoint's"):
        run(**latest)
    settings.write_text(kept)
    state = settings.with_name("state.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"checkpoint-2 cannot be read"):
        run(**latest)
    state.unlink()
    with pytest.raises(RequestError, match=r"checkpoint-2 cannot be read: there is no state.safe"):
        run(**latest)


def test_samples_of_another_model_are_refused(run, samples, tmp_path):
    copy = shutil.copytree(samples, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["fingerprint"]["architecture"] = "another"
    (copy / "index.json").write_text(json.dumps(index | {"model": "owner/other"}))
    message = "copy holds samples of another model: of 'owner/other', not of 'demo'"
    with pytest.raises(RequestError, match=message):
        run(samples=copy)
    with pytest.raises(RequestError, match=r"is no folder of samples: it has no index.json"):
        run(samples=tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    save = checkpoint.save_checkpoint
    monkeypatch.setattr(
        checkpoint,
        "save_checkpoint",
        lambda path, step, *args, **parts: (full if step == 4 else save)(
            path, step, *args, **parts
        ),
    )
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(No space left on dev"):
        run(max_train_steps=4)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert run(max_train_steps=4, resume_from_checkpoint="latest")["resumed_from"] == 2


def test_a_disk_without_room_is_refused_at_once(run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(RequestError, match=r"GB are needed for .*, and 0.0 GB are free there"):
        run()
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(prepared):
    run = prepared()
    first, *others = run._trained().values()
    first.data[0] = torch.nan
    kept = [p.detach().clone() for p in others]
    with pytest.raises(RequestError, match="the loss is not finite at step 5; a lower --learning-"):
        run.step(4)
    assert all(torch.equal(p, old) for p, old in zip(others, kept, strict=True))


def test_the_command(samples, tmp_path, capsys):
    arguments = ["--samples", str(samples), "--out", str(tmp_path / "run"), "--radius", "2"]
    arguments += ["--max-train-steps", "1", "--report-to", "none", "--cpu", "--json"]
    arguments += ["--train-batch-size", "1", "--gradient-accumulation-steps", "1"]
    assert command_line.run("distill", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 1
    assert result["adapter"].endswith("clear_far_2.safetensors")
    assert set(result["last"]) == {"total", "flow", "output", "attention"}
    assert command_line.run("distill", *arguments) == 2
    assert "has checkpoint-1; go on with" in capsys.readouterr().err


def test_every_option_has_a_flag():
    import inspect

    from clear_dit.distillation import commands

    flags = inspect.signature(commands.distill).parameters
    options = inspect.signature(DistillOptions).parameters
    assert set(flags) - {"as_json"} == set(options)
    for name, option in options.items():
        if option.default is not inspect.Parameter.empty:
            assert flags[name].default == option.default, name
