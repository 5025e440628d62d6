"""`clear-dit bench plan --train`: memory of a distillation step, against arithmetic."""

import json

import pytest
from support.command_line import run
from support.families.folders import token_pixels
from support.families.pipelines import PIPELINES
from support.slow import slow

from clear_dit.bench.plan_training import plan_training, report

GIB = 2**30


@slow
def test_the_command(capsys):
    arguments = ("--model", "demo", "--height", 256, "--width", 256, "--radius", 4, "--json")
    assert run("bench", "plan", "--train", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Peak memory of a step, of each GPU:" in lines
    assert len(json.loads(lines[-1])["rows"]) == 5


@slow
def test_the_demo_s_rows_are_its_parameters():
    result = plan_training("demo", 256, 256, 4, 2, False, 1)
    rows = {row["what"]: row for row in result["rows"]}
    full, adamw = rows["projections, prodigy"], rows["projections, adamw"]
    trained = 741_120 + 6 * 4
    assert full["parameters"] == trained
    assert full["trained_gib"] * GIB == 4 * trained
    assert full["optimizer_gib"] * GIB == 4 * 4 * trained
    assert adamw["optimizer_gib"] * GIB == 2 * 4 * trained
    shared = rows["projections, prodigy, ZeRO-2 over 4 GPUs"]
    assert shared["optimizer_gib"] == full["optimizer_gib"] / 4
    # The teacher's copies, in bfloat16, are there besides what both roles share.
    lora = rows["LoRA of rank 64, prodigy"]
    assert full["frozen_gib"] * GIB == pytest.approx(lora["frozen_gib"] * GIB, abs=2 * 6 * 4 + 1)
    assert lora["parameters"] == 20 * 2 * 192 * 64
    for row in result["rows"]:
        assert row["fits"]
        assert row["step_gib"] * GIB > 4 * row["parameters"]  # gradients among it
        parts = ("frozen_gib", "trained_gib", "optimizer_gib", "step_gib")
        assert row["total_gib"] == pytest.approx(sum(row[part] for part in parts))


@slow
def test_what_is_learned_of_far_keys_is_trained_too(capsys):
    size = ("--model", "demo", "--height", 256, "--width", 256, "--radius", 4)
    assert run("bench", "plan", "--train", *size, "--far", "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "Distillation with radius 4 tokens, far keys" in lines
    parameters = [row["parameters"] for row in json.loads(last)["rows"]]
    assert parameters == [741_120 + 6 * (40 + 30)] * 3 + [20 * 2 * 192 * 64] * 2


@slow
def test_activations_grow_with_the_batch():
    one, four = (plan_training("demo", 256, 256, 4, 1, False, batch)["rows"][0] for batch in (1, 4))
    assert one["frozen_gib"] == four["frozen_gib"]
    assert one["step_gib"] < four["step_gib"] < 4 * one["step_gib"]
    assert "batch 4" in report(plan_training("demo", 256, 256, 4, 1, False, 4))


@slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_step_of_every_family(name, family_folder):
    side = 8 * token_pixels(name)
    one, two = (
        plan_training(str(family_folder(name)), side, side, 2, 1, True, batch, 12)["rows"]
        for batch in (1, 2)
    )
    for row, more in zip(one, two, strict=True):
        assert row["parameters"] > 0
        assert row["step_gib"] * GIB > 4 * row["parameters"]
        assert more["step_gib"] > row["step_gib"]
        assert (more["frozen_gib"], more["trained_gib"]) == (row["frozen_gib"], row["trained_gib"])


@pytest.mark.parametrize(
    "option", [("--quantize", "int8"), ("--offload", "model"), ("--fit", "24GB")]
)
def test_other_weights(option, capsys):
    assert run("bench", "plan", "--train", *option) == 2
    assert "--train counts weights in bfloat16" in capsys.readouterr().err


@slow
def test_past_the_positions_of_a_model(family_folder, capsys):
    side = 20 * token_pixels("sd3")
    arguments = ("--model", family_folder("sd3"), "--height", side, "--width", side, "--radius", 2)
    assert run("bench", "plan", "--train", *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
