"""The command line as a user meets it: what it prints, writes, refuses, and its exit status."""

import json
import re
import shutil
import sys

import png
import pytest
from PIL import Image
from support.command_line import run
from support.slow import slow

import clear_dit.pipelines.cascade.run as cascade_run
from clear_dit import progress
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.models import DEMO

PROMPT = "a pink house in the hills at sunset, a golden sun on the left"


def generate(out, *arguments):
    small = ("--height", 64, "--width", 96, "--steps", 2, "--out", out)
    return run("generate", PROMPT, *small, *arguments)


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_generate_writes_an_image_with_its_settings(tmp_path, capsys):
    out = tmp_path / "image.png"
    assert generate(out, "--radius", 2, "--seed", 7, "--json") == 0
    result = last_json(capsys)
    assert result["out"] == str(out)
    assert (result["height"], result["width"], result["tokens"]) == (64, 96, 24)
    assert result["impl"] == "tiled"
    assert set(result["seconds"]) == {"total", "text", "denoise", "decode"}
    assert 0 < result["seconds"]["denoise"] < result["seconds"]["total"]
    assert result["peak_memory_mb"] > 50
    with Image.open(out) as image:
        assert image.size == (96, 64)
    settings = read_settings(out)
    assert settings["prompt"] == PROMPT
    assert (settings["radius"], settings["seed"], settings["impl"]) == (2, 7, "tiled")
    assert settings["far"] is True
    assert list(tmp_path.iterdir()) == [out]


def test_an_image_that_is_there_stays(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    out = tmp_path / "clear-dit.png"
    out.write_bytes(b"older image")
    small = ("--height", 64, "--width", 96, "--steps", 2, "--radius", 2)
    assert run("generate", PROMPT, *small, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["out"] == "clear-dit-2.png"
    assert "\nclear-dit.png is there already; the image is clear-dit-2.png\n" in said.err
    assert "\ndenoising 2/2, " in said.err
    assert "\r" not in said.err
    assert out.read_bytes() == b"older image"
    assert read_settings(tmp_path / "clear-dit-2.png")["prompt"] == PROMPT
    assert len(list(tmp_path.iterdir())) == 2


class Runner:
    """Takes the place of the work: what it was asked for, and a result."""

    def __init__(self, monkeypatch, out):
        self.result = {"out": str(out), "width": 96, "height": 64, "impl": "tiled"}
        self.result["seconds"] = {"total": 1.0, "denoise": 0.5}
        monkeypatch.setattr("clear_dit.generation.runner.generate", self)
        monkeypatch.setattr("clear_dit.generation.stage_plan.planned", lambda request: "")

    def __call__(self, request, out, **options):
        self.request, self.options = request, options
        return self.result


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_overwrite_is_asked_for(monkeypatch, tmp_path, options):
    runner = Runner(monkeypatch, tmp_path / "image.png")
    assert generate(tmp_path / "image.png", *options) == 0
    assert runner.options["overwrite"] is bool(options)


@pytest.mark.parametrize(
    ("display", "status", "opened"), [(":0", 0, True), (":0", 1, False), ("", 0, False)]
)
def test_open_shows_the_image_or_says_that_nothing_does(
    monkeypatch, tmp_path, capsys, display, status, opened
):
    asked = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("typer.launch", lambda path: asked.append(path) or status)
    out = tmp_path / "image.png"
    Runner(monkeypatch, out)
    assert generate(out, "--open") == 0
    assert asked == ([str(out)] if display else [])
    said = f"--open: there is no viewer here for {out}\n" in capsys.readouterr().err
    assert said is not opened


@slow
def test_no_far_is_the_paper_s_clear(tmp_path, capsys):
    images = []
    for option in ("--far", "--no-far"):
        out = tmp_path / f"{option}.png"
        assert generate(out, "--radius", 2, option, "--json") == 0
        assert last_json(capsys)["far"] is (option == "--far")
        images.append(out.read_bytes())
    assert images[0] != images[1]


@slow
def test_same_seed_same_image_and_radius_past_the_diagonal_is_full(tmp_path):
    images = {}
    for name, options in {
        "wide": ("--radius", 20),
        "again": ("--radius", 20),
        "full": ("--attention", "full"),
        "narrow": ("--radius", 2),
        "other": ("--radius", 20, "--seed", 1),
    }.items():
        assert generate(tmp_path / f"{name}.png", *options) == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            images[name] = list(image.convert("RGB").tobytes())

    def difference(a, b):
        return max(abs(x - y) for x, y in zip(images[a], images[b], strict=True))

    assert difference("wide", "again") == 0
    assert difference("wide", "full") <= 1
    assert difference("narrow", "full") > 1
    assert difference("other", "wide") > 10


@slow
@pytest.mark.parametrize("options", [("--impl", "reference"), ("--impl", "tiled")])
def test_generate_in_bfloat16_and_pooled(tmp_path, capsys, options):
    out = tmp_path / "image.png"
    arguments = ("--radius", 2, "--down-factor", 2, "--dtype", "bfloat16", "--json", *options)
    assert generate(out, *arguments) == 0
    assert last_json(capsys)["impl"] == options[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 100), "--height must be a multiple of 16"),
        (("--width", 0), "--width must be a multiple of 16"),
        (("--height", 1048576), "from 16 to 16384"),
        (("--radius", 0), "--radius must be an integer of at least 1"),
        (("--radius", -2), "--radius must be an integer of at least 1"),
        (("--impl", "fastest"), "impl must be one of auto, triton, flex, tiled, reference"),
        (("--impl", "triton"), "needs a CUDA or ROCm device"),
        (("--down-factor", 5), "down_factor must not exceed the token grid (4 x 6), got 5"),
        (("--far", "--down-factor", 2), "--far and --down-factor 2 exclude each other"),
        (("--far", "--radius", 1), "far keys need a radius of at least 2 tokens, got 1"),
        (("--attention", "half"), "--attention must be clear or full, got 'half'"),
        (("--steps", 0), "--steps must be from 1"),
        (("--guidance", -1), "--guidance must be from 0"),
        (("--seed", -1), "--seed must be from 0"),
        (("--dtype", "int8"), "--dtype must be one of auto, float32, bfloat16, float16"),
        (("--device", "gpu"), "--device gpu: cannot be used"),
        (("--weights", "missing.safetensors"), "missing.safetensors"),
        (("--attention", "full", "--weights", "x"), "--weights are for --attention clear"),
        (("--model", "no/such/model"), "--model must be 'demo' or 'demo-sd3', a folder"),
        (("--model", "missing"), "--model must be 'demo' or 'demo-sd3', a folder"),
        (("--model", "."), "is not a pipeline in diffusers format"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert generate("image.png", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("clear-dit:")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    weights = tmp_path / "other.safetensors"
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(3072, 3072)}, weights)
    assert generate(tmp_path / "image.png", "--weights", weights) == 2
    assert "weights for another model" in capsys.readouterr().err
    assert not (tmp_path / "image.png").exists()


@slow
def test_a_huge_radius_is_full_attention(tmp_path):
    assert generate(tmp_path / "image.png", "--radius", 10**10) == 0


@slow
def test_a_copied_model_without_guidance_embedding_runs_one_pass(tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    out = tmp_path / "image.png"
    assert generate(out, "--model", copy, "--radius", 2) == 0
    assert read_settings(out)["guidance"] == 1.0
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    capsys.readouterr()
    assert generate(out, "--model", copy) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_an_empty_prompt_is_refused(capsys):
    assert run("generate", "   ") == 2
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("image.jpg", "--out must end in .png"),
        ("no/such/folder/image.png", "there is no folder"),
        ("folder.png", "--out is a folder"),
        ("/proc/image.png", "cannot write /proc/image.png"),
        (f"{'long' * 64}.png", "File name too long"),
    ],
)
def test_bad_outputs_are_refused_before_work(monkeypatch, tmp_path, capsys, out, message):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert generate(out) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(monkeypatch, tmp_path, capsys):
    import errno

    def no_space(file, chunks):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(png, "write_chunks", no_space)
    (tmp_path / "image.png").write_bytes(b"older image")
    assert generate(tmp_path / "image.png") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    assert (tmp_path / "image.png").read_bytes() == b"older image"


@slow
def test_an_image_is_enlarged_and_stages_are_kept(monkeypatch, tmp_path, capsys):
    small, out, stages = tmp_path / "small.png", tmp_path / "large.tif", tmp_path / "stages"
    assert generate(small) == 0
    arguments = ("generate", PROMPT, "--image", small, "--steps", 4, "--radius", 2)
    arguments += ("--strength", "0.5", "--stages-dir", stages, "--out", out)
    assert run(*arguments) == 0
    with Image.open(out) as image:
        assert (image.format, image.size) == ("TIFF", (192, 128))  # twice
    settings = read_settings(out)
    assert (settings["image"], settings["strength"]) == (str(small), [0.5])
    assert [path.name for path in stages.glob("*.safetensors")] == ["stage-1-192x128.safetensors"]
    # The finished stage is not generated again, and the image is the same.
    again = tmp_path / "again.tif"
    monkeypatch.setattr(cascade_run, "_repaint", None)
    assert run(*arguments[:-1], again) == 0
    assert again.read_bytes() == out.read_bytes()
    capsys.readouterr()
    assert run(*arguments, "--seed", 5) == 2
    assert "is of another request (another seed)" in capsys.readouterr().err


@slow
def test_a_dry_run_prints_the_plan_and_loads_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("clear_dit.generation.models.load_pipeline", None)
    out = tmp_path / "image.png"
    size = ("--height", 8192, "--width", 8192, "--stage-steps", "6,3,2", "--out", out)
    assert run("generate", PROMPT, *size, "--dry-run", "--json") == 0
    *table, last = capsys.readouterr().out.splitlines()
    plan = json.loads(last)
    sizes = [(stage["width"], stage["steps"], stage["passes"]) for stage in plan["stages"]]
    assert sizes == [(512, 20, 2), (1024, 6, 2), (2896, 3, 1), (8192, 2, 1)]
    assert table[-2].split()[:5] == ["8192x8192", "0.62", "2", "1", "clear"]
    # Of the last stage, as `bench plan` counts.
    assert plan["stages"][-1]["flops"] == pytest.approx(2 * 1.7895e12, rel=1e-3)
    assert plan["flops"] == sum(stage["flops"] for stage in plan["stages"])
    assert not out.exists()


@slow
def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    photo, out = tmp_path / "photo.jpg", tmp_path / "out.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (96, 64)).save(photo, exif=exif)
    arguments = ("--image", photo, "--steps", 1, "--radius", 2, "--out", out)
    assert run("generate", PROMPT, *arguments) == 0
    with Image.open(out) as image:
        assert image.size == (128, 192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "half"), "--strength must be numbers with commas between, got 'half'"),
        (("--strength", "1.5"), "--strength must be from 0 to 1, got 1.5"),
        (("--strength", "nan"), "--strength must be from 0 to 1, got nan"),
        (("--low-resolution-guidance", "-1"), "--low-resolution-guidance must be from 0 to 1"),
        (("--image", "none.png"), "none.png cannot be read (No such file or directory)"),
        (("--image", "text.png"), "text.png is not an image"),
        (("--image", "alpha.png"), "has an alpha channel (mode RGBA)"),
        (("--image", "deep.png"), "has more than 8 bits a channel (mode I;16)"),
        (("--image", "cut.png"), "cut.png is damaged or cut off"),
        (("--image", "dot.png"), "must have at least 64 pixels a side, got 1x1"),
        (("--image", "bomb.png"), "bomb.png has 20000 x 1 pixels; at most 16384 a side are read"),
        (("--image", "wide.png"), "another aspect ratio; ask for 64x64, or crop the image"),
        (("--strength", "0.5,0.5"), "has 2 values, but 0 stages enlarge an image"),
        (("--upscaler", "alpha.png"), "--upscaler must be a .safetensors file"),
        (("--stage-steps", "two"), "--stage-steps must be numbers with commas between, got 'two'"),
        (("--stage-steps", "1.5"), "--stage-steps must be an integer from 0 to 1000"),
        (("--stage-steps", "3,3"), "has 2 values, but 0 stages enlarge an image"),
        (("--preset", "sharpen"), "--preset must be one of auto, repaint, refine; got 'sharpen'"),
    ],
)
def test_bad_requests_of_the_cascade(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    for name, mode, size in (
        ("alpha", "RGBA", (96, 64)),
        ("deep", "I;16", (96, 64)),
        ("dot", "RGB", (1, 1)),
        ("bomb", "1", (20000, 1)),
        ("wide", "RGB", (64, 64)),
    ):
        Image.new(mode, size).save(f"{name}.png")
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    sizes = () if options[1] == "dot.png" else ("--height", 64, "--width", 96)
    assert run("generate", PROMPT, *sizes, "--out", "out.png", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("clear-dit: ")
    assert not (tmp_path / "out.png").exists()


def test_ctrl_c_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade_run, "_denoise", interrupt)
    assert generate(tmp_path / "out.png", "--stages-dir", tmp_path / "stages") == 130
    assert capsys.readouterr().err.endswith("clear-dit: interrupted; the same command goes on.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_a_long_prompt_is_cut_with_a_warning(tmp_path, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        words = "a blue house in the hills at sunset " * 12 + "with a violet balloon"
        arguments = ("--height", 32, "--width", 32, "--steps", 1, "--out", tmp_path / "p.png")
        assert run("generate", words, *arguments) == 0
    finally:
        logging.disable_propagation()
    cut = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert cut
    assert all("violet balloon" in message for message in cut)


def test_doctor(capsys):
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert re.search(r"triton +cannot run: it needs a CUDA or ROCm device", text)
    assert "auto runs tiled" in text
    assert run("doctor", "--json") == 0
    found = last_json(capsys)
    assert found["impls"]["cpu"]["tiled"] is None
    assert found["auto"]["cpu"] == "tiled"
    assert found["demo"] is DEMO.is_dir()


def test_help_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for command in ("generate", "doctor", "bench"):
        assert command in text


def test_bench_attention(capsys):
    arguments = ("--height", 256, "--width", 320, "--radius", 4, "--heads", 2, "--head-dim", 32)
    more = ("--text-length", 9, "--impls", "tiled,sdpa,reference", "--repeats", 1, "--json")
    assert run("bench", "attention", *arguments, *more) == 0
    result = last_json(capsys)
    assert result["correct"] is True
    assert [row["impl"] for row in result["rows"]] == ["tiled", "sdpa", "reference"]
    for row in result["rows"]:
        assert row["ms"] > 0
        assert row["useful_tflops"] > 0
        assert max(row["text_error"], row["image_error"]) < 1e-5
        assert row["impl"] == "sdpa" or row["lse_error"] < 1e-5
    tiled, dense, _ = (row["executed_over_exact"] for row in result["rows"])
    assert 1 < tiled < dense


def test_bench_attention_times_nothing_that_is_wrong(monkeypatch, capsys):
    from clear_dit.bench import attention

    right = attention.local_attention

    def wrong(*inputs, return_lse=False, **options):
        out, lse = right(*inputs, return_lse=True, **options)
        return (out, lse) if return_lse else out * 1.01

    monkeypatch.setattr(attention, "local_attention", wrong)
    arguments = ("--height", 128, "--width", 128, "--impls", "tiled,sdpa", "--repeats", 1)
    assert run("bench", "attention", *arguments, "--json") == 1
    out = capsys.readouterr().out
    wrong_rows = r"text rows 1\.\de-02, image rows 1\.\de-02, log-sum-exp \d\.\de-\d+"
    assert re.search(rf"^tiled: WRONG, errors: {wrong_rows}; not timed$", out, re.MULTILINE)
    result = json.loads(out.splitlines()[-1])
    assert result["correct"] is False
    assert result["rows"][0]["ms"] is None
    assert result["rows"][1]["ms"] > 0


@pytest.mark.parametrize("far", [(), ("--far",)])
def test_bench_growth(capsys, far):
    arguments = ("--sizes", "128,2048", "--heads", 1, "--head-dim", 16, "--text-length", 4)
    assert run("bench", "growth", *arguments, *far, "--repeats", 1, "--json") == 0
    result = last_json(capsys)
    assert result["far"] is bool(far)
    assert [row["width"] for row in result["rows"]] == [128, 2048]
    assert result["correct"] is True
    assert result["exponent"] > 0


def test_bench_growth_says_what_is_wrong(monkeypatch, capsys):
    from clear_dit.bench import growth

    right = growth.local_attention
    monkeypatch.setattr(growth, "local_attention", lambda *a, **k: 1.01 * right(*a, **k))
    arguments = ("--sizes", "128,256", "--heads", 1, "--head-dim", 16, "--text-length", 4)
    assert run("bench", "growth", *arguments, "--repeats", 1) == 1
    out = capsys.readouterr().out
    assert re.match(r"WRONG results, errors at 128 px: text rows 1.*; 256 px: text rows 1", out)


@slow
@pytest.mark.parametrize("far", [(), ("--far",)])
def test_bench_denoise(capsys, far):
    arguments = ("--height", 256, "--width", 256, "--radius", 3, "--repeats", 1, "--json")
    assert run("bench", "denoise", *arguments, *far) == 0
    result = last_json(capsys)
    assert result["far"] is bool(far)
    assert [row["attention"] for row in result["rows"]] == ["full", "clear"]
    assert 1 < result["flops_allow"] < 2
    assert result["correct"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "--impls", "tiled,magic"), "of sdpa, auto, triton, flex, tiled"),
        (("growth", "--impl", "triton"), "needs a CUDA or ROCm device"),
        (("denoise", "--impl", "fastest"), "impl must be one of auto, triton, flex"),
        (("denoise", "--model", "."), "is not a pipeline in diffusers format"),
        (("attention", "--impls", "triton"), "needs a CUDA or ROCm device"),
        (("attention", "--height", "100"), "--height must be a multiple of 16"),
        (("attention", "--radius", "0"), "radius must be at least 1"),
        (("attention", "--dtype", "int8"), "--dtype must be one of"),
        (("denoise", "--radius", "1", "--far"), "far keys need a radius of at least 2 tokens"),
        (("growth", "--sizes", "1024"), "two or more growing sizes"),
        (("growth", "--sizes", "big"), "--sizes must be pixels"),
    ],
)
def test_bad_bench_requests(capsys, arguments, message):
    assert run("bench", *arguments) == 2
    assert message in capsys.readouterr().err
