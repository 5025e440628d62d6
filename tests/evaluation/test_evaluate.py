"""The command as a user meets it: rows, files, refusals, and going on after a kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.slow import slow

from clear_dit.evaluation import run, variants
from clear_dit.files import TEMPORARY_PREFIX, own_folder
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.models import DEMO
from clear_dit.kernels.window import Window

SMALL = ("--height", 64, "--width", 64, "--steps", 2, "--guidance", 1.5)


def report_of(out):
    return json.loads((out / "report.json").read_text())


def images_of(out):
    return sorted(out.glob("images/*/[0-9]*.png"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, evaluate, weights):
    """A whole evaluation of the teacher, untuned r=2 and r=3, and weights for r=2."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert evaluate(out, "--batch", 1, "--radius", 3, "--no-far", "--weights", weights) == 0
    return out


@slow
def test_rows_are_teacher_untuned_and_distilled(finished, weights):
    report = report_of(finished)
    rows = [(row["kind"], row["radius"], row["down_factor"]) for row in report["rows"]]
    assert rows == [
        ("teacher", None, 1),
        ("untuned", 3, 1),
        ("untuned", 2, 1),
        ("distilled", 2, 1),
    ]
    assert [row["weights"] for row in report["rows"]] == [None, None, None, str(weights)]
    assert [row["impl"] for row in report["rows"]] == ["full", "tiled", "tiled", "tiled"]
    teacher, wide, narrow, tuned = report["rows"]
    assert teacher["psnr"] is None
    assert teacher["attributes"] is not None
    for name in ("psnr", "ssim", "fid_demo", "kid_demo", "output_mse", "attributes"):
        assert isinstance(wide[name], float)
    assert wide["output_mse"] < narrow["output_mse"] != tuned["output_mse"]
    assert wide["psnr"] > narrow["psnr"]
    ratios = report["distilled_against_untuned"]["CLEAR r=2, distilled"]
    assert ratios["psnr"] == pytest.approx(tuned["psnr"] / narrow["psnr"], abs=1e-4)


@slow
def test_far_keys_beside_local_attention_in_one_table(tmp_path, evaluate, weights, far_weights):
    out = tmp_path / "out"
    more = ("--weights", weights, "--weights", far_weights, "--metrics", "psnr,output_mse")
    assert evaluate(out, "--radius", 3, *more, count=2) == 0
    report = report_of(out)
    _, wide, local, local_tuned, far, far_tuned = report["rows"]
    assert [row["label"] for row in report["rows"][1:]] == [
        *("CLEAR r=3 far, untuned", "CLEAR r=2, untuned", "CLEAR r=2, distilled"),
        *("CLEAR r=2 far, untuned", "CLEAR r=2 far, distilled"),
    ]
    assert [row["far"] for row in report["rows"]] == [False, True, False, False, True, True]
    # Nearer to full attention, by the keys that the FLOPs count too.
    assert wide["output_mse"] < far["output_mse"] < local["output_mse"]
    pairs = Window(4, 4, 64, 2, far_levels=10).attended_pairs()
    assert far["gflop_per_layer"] == pytest.approx(4 * pairs * 3 * 64 / 1e9, abs=1e-6)
    assert far["gflop_per_layer"] > local["gflop_per_layer"]
    # What was learned of far keys counts: the projections alone are as in the local weights.
    assert far_tuned["output_mse"] not in (far["output_mse"], local_tuned["output_mse"])
    assert far["folder"] == "r2-far"
    settings = read_settings(out / "images" / far_tuned["folder"] / "00000.png")
    assert (settings["radius"], settings["far"]) == (2, True)
    assert "| CLEAR r=2 far, distilled |" in (out / "report.md").read_text()


def test_flops_are_the_windows(finished):
    teacher, wide, *_ = report_of(finished)["rows"]
    window = Window(4, 4, 64, 3)
    assert wide["gflop_per_layer"] == pytest.approx(window.attention_flops(3, 64) / 1e9, abs=1e-6)
    assert teacher["gflop_per_layer"] == pytest.approx(4 * 80**2 * 192 / 1e9, abs=1e-6)


def test_what_cannot_be_computed_is_named_in_both_reports(finished):
    left_out = report_of(finished)["left_out"]
    assert set(left_out) >= {"ms_ssim"}
    table = (finished / "report.md").read_text()
    assert "- MS-SSIM: needs images of more than 160 px a side." in table
    for name in left_out:
        assert name not in report_of(finished)["metrics"]
    assert "| full attention | - |" in table
    assert "| CLEAR r=2, distilled |" in table


def test_values_are_those_of_the_images(finished):
    teacher, wide = (
        [
            np.array(Image.open(path)) / 255
            for path in sorted((finished / "images" / f).glob("*.png"))
        ]
        for f in ("full", "r3")
    )
    expected = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(teacher, wide, strict=True)]
    assert report_of(finished)["rows"][1]["psnr"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_files_are_whole_and_say_what_they_are(finished, weights):
    assert len(images_of(finished)) == 12
    settings = [read_settings(path) for path in sorted((finished / "images/r3").glob("*.png"))]
    assert [one["seed"] for one in settings] == [0, 1, 2]
    assert {(one["radius"], one["down_factor"], one["steps"]) for one in settings} == {(3, 1, 2)}
    assert len({one["prompt"] for one in settings}) == 3
    latents = load_file(finished / "images" / "full" / "00002.safetensors")["latents"]
    assert latents.shape == (16, 64)
    with Image.open(finished / "contact-sheet.png") as sheet:
        assert sheet.width > 4 * 256
        assert sheet.height > 3 * 256
    assert not list(finished.rglob(f"{TEMPORARY_PREFIX}*"))
    modes = {oct(path.stat().st_mode & 0o777) for path in finished.rglob("*.*") if path.is_file()}
    assert modes <= {"0o644"}


def test_a_second_run_generates_nothing_and_finds_the_same(finished, evaluate, weights, capsys):
    before = report_of(finished)
    arguments = ("--radius", 3, "--no-far", "--weights", weights, "--batch", 2, "--json")
    assert evaluate(finished, *arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generated"] == 0
    after = report_of(finished)
    for row, again in zip(before["rows"], after["rows"], strict=True):
        assert again == pytest.approx(row) if row["psnr"] is None else again["psnr"] == row["psnr"]


def last_generated(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])["generated"]


@slow
def test_images_are_used_again_only_if_all_settings_match(tmp_path, evaluate, capsys):
    arguments = ("--radius", 2, "--metrics", "psnr", "--json")
    assert evaluate(tmp_path, *arguments, count=2) == 0
    assert last_generated(capsys) == 4
    assert evaluate(tmp_path, *arguments) == 0
    assert last_generated(capsys) == 2  # one more of each
    assert evaluate(tmp_path, *arguments, "--seed", 1) == 0
    assert last_generated(capsys) == 6
    assert evaluate(tmp_path, *arguments, "--seed", 1, "--steps", 1) == 0
    assert last_generated(capsys) == 6
    (tmp_path / "images" / "r2-far" / "00001.png").write_bytes(
        (tmp_path / "images" / "r2-far" / "00001.png").read_bytes()[:900]
    )
    (tmp_path / "images" / "full" / "00000.safetensors").write_bytes(b"cut")
    (tmp_path / "images" / "full" / "00002.png").unlink()
    assert evaluate(tmp_path, *arguments, "--seed", 1, "--steps", 1) == 0
    assert last_generated(capsys) == 3


@slow
def test_another_model_of_the_same_name_is_generated_again(tmp_path, evaluate, capsys):
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    arguments = ("--model", model, "--radius", 2, "--metrics", "psnr", "--json")
    assert evaluate(tmp_path / "out", *arguments, count=1) == 0
    assert last_generated(capsys) == 2
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["single_transformer_blocks.3.attn.to_q.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert evaluate(tmp_path / "out", *arguments, count=1) == 0
    assert last_generated(capsys) == 2


@slow
@pytest.mark.parametrize(("room", "times"), [(4096, 1), (0, 2)])
def test_text_is_encoded_once(tmp_path, evaluate, monkeypatch, room, times):
    encoded, real = [], FluxPipeline.encode_prompt

    def counting(self, prompt, *args, **kwargs):
        if prompt is not None:  # and not embeddings, which pass through
            encoded.append(tuple(prompt))
        return real(self, prompt, *args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "encode_prompt", counting)
    monkeypatch.setattr(variants, "TEXT_CACHE_MB", room)
    assert evaluate(tmp_path, "--radius", 2, "--metrics", "psnr,output_mse") == 0
    # A batch of three and the empty one for the images, and one by one for the predictions.
    assert sorted(map(len, set(encoded))) == [1, 1, 1, 3, 3]
    assert set(Counter(encoded).values()) == {times}


@slow
def test_prompts_from_a_file(tmp_path, evaluate):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na pink tower at night\nsome image\n")
    arguments = ("--prompts", prompts, "--radius", 9, "--metrics", "attributes,psnr")
    assert evaluate(tmp_path / "out", *arguments, count=2) == 0
    report = report_of(tmp_path / "out")
    assert report["settings"]["prompts"] == str(prompts)
    # A radius over the diagonal is full attention, up to rounding.
    assert report["rows"][1]["psnr"] == "inf" or report["rows"][1]["psnr"] > 40
    assert "Infinity" not in (tmp_path / "out" / "report.json").read_text()


@slow
def test_a_lora_is_weights_too(tmp_path, evaluate, lora):
    arguments = ("--weights", lora, "--radius", 2, "--metrics", "psnr,output_mse")
    assert evaluate(tmp_path, *arguments, count=1) == 0
    untuned, tuned = report_of(tmp_path)["rows"][1:]
    assert tuned["kind"] == "distilled"
    assert tuned["psnr"] != untuned["psnr"]
    assert tuned["output_mse"] != untuned["output_mse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", 0), "--count must be from 1"),
        (("--metrics", "psnr,beauty"), "--metrics: unknown 'beauty'; choose auto, or of fid, kid"),
        (("--metrics", ""), "--metrics: unknown ''"),
        (("--metrics", "ms_ssim"), "--metrics ms_ssim: needs images of more than 160 px"),
        (("--metrics", "fid_demo", "--count", 1), "fid_demo: needs 2 images or more"),
        (("--metrics", "attributes", "--width", 128), "the demo's probe reads square images"),
        (("--batch", 0), "--batch must be from 1 to 256"),
        (("--steps", 0), "--steps must be from 1"),
        (("--height", 100), "--height must be a multiple of 16"),
        (("--radius", 0), "--radius must be an integer of at least 1"),
        (("--radius", 2, "--down-factor", 5), "down_factor must not exceed the token grid"),
        (("--radius", 2, "--far", "--down-factor", 2), "--far and --down-factor 2 exclude each"),
        (("--seed", 2**63 - 1), "the last image's seed must be below 2^63"),
        (("--model", "missing"), "--model must be 'demo' or 'demo-sd3', a folder"),
        (("--prompts", "missing.txt"), "missing.txt: there is no such file"),
        (("--prompts", "empty.txt"), "empty.txt: there is no prompt in it"),
        (("--prompts", "bell.txt"), "bell.txt, line 1: the prompt has the control character"),
        (("--prompts", "long.txt"), "long.txt, line 1: a prompt may have 20000 characters"),
        (("--prompts", "two.txt"), "--count is 3, but two.txt has 2 prompts"),
        (("--weights", "missing.safetensors"), "'missing.safetensors' is not a file"),
        (("--weights", "missing.safetensors", "--radius", 2), "missing.safetensors"),
        (("--weights", "two.txt"), "two.txt is not a safetensors file"),
        (("--weights", "silent.safetensors"), "does not say its radius"),
        (("--weights", "silent.safetensors", "--radius", 2), "weights for another model"),
        (("--weights", "lora.safetensors", "--radius", 2), "lora.safetensors: cannot be used"),
        (("--weights", "clear_local_4.safetensors"), "weights for another model"),
        (("--out", "two.txt"), "--out: cannot write in the folder two.txt"),
        (("--out", "/proc/out"), "--out: cannot write in the folder /proc/out"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(
    monkeypatch, tmp_path, capsys, evaluate, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bell.txt").write_text("a\x07b\n")
    (tmp_path / "long.txt").write_text("word " * 10_000)
    (tmp_path / "two.txt").write_text("a house\na tree\n")
    wrong = "transformer.transformer_blocks.0.attn.to_q.lora_"
    save_file(
        {f"{wrong}A.weight": torch.zeros(2, 9), f"{wrong}B.weight": torch.zeros(9, 2)},
        tmp_path / "lora.safetensors",
    )
    for name in ("silent", "clear_local_4"):
        tensors = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(3072, 8)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert evaluate("out", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("clear-dit:")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_file_and_leaves_it_unwritten(
    monkeypatch, tmp_path, capsys, evaluate
):
    def no_space(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    assert evaluate(tmp_path / "out", "--radius", 2, "--metrics", "psnr") == 1
    assert "00000.png could not be written (No space left on device)" in capsys.readouterr().err
    assert not images_of(tmp_path / "out")
    assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))


def test_one_process_at_a_time(tmp_path, evaluate, capsys):
    with own_folder(tmp_path):
        assert evaluate(tmp_path, "--radius", 2, "--metrics", "psnr") == 2
    assert "another process is at work" in capsys.readouterr().err


@slow
@pytest.mark.parametrize("survivors", [1, 7])
def test_killed_and_resumed_nothing_is_lost_and_nothing_twice(
    tmp_path, finished, evaluate, weights, survivors, capsys
):
    out = tmp_path / "out"
    more = ("--radius", 3, "--no-far", "--weights", weights, "--batch", 1, "--json")
    arguments = (*SMALL, "--count", 3, "--out", out, *more)
    command = [sys.executable, "-m", "clear_dit", "evaluate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while len(images_of(out)) < survivors and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in images_of(out)}
    for path in kept:
        with Image.open(path) as image:
            image.load()
    (out / "images" / "full" / f"{TEMPORARY_PREFIX}left.png").write_bytes(b"half")
    assert evaluate(out, *more) == 0
    assert last_generated(capsys) == 12 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    for path in images_of(out):
        with Image.open(path) as one, Image.open(finished / path.relative_to(out)) as other:
            assert np.abs(np.array(one, int) - np.array(other, int)).max() <= 1
    rows, whole = report_of(out)["rows"], report_of(finished)["rows"]
    for row, expected in zip(rows[1:], whole[1:], strict=True):
        assert row["psnr"] == pytest.approx(expected["psnr"], rel=1e-2)


@slow
def test_the_kept_prediction_error_answers_its_own_question_only(tmp_path, evaluate, monkeypatch):
    calls, real = [], run.output_error.predict_all

    def counting(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(run.output_error, "predict_all", counting)
    arguments = ("--radius", 2, "--metrics", "output_mse")
    assert evaluate(tmp_path, *arguments) == 0
    assert len(calls) == 2
    assert evaluate(tmp_path, *arguments) == 0
    assert len(calls) == 2
    assert evaluate(tmp_path, *arguments, count=2) == 0
    assert len(calls) == 4
    (tmp_path / "images" / "r2-far" / "output_mse.json").write_text("{")
    assert evaluate(tmp_path, *arguments, count=2) == 0
    assert len(calls) == 6
