"""Sampling: the stock model's own images, whatever the batch; folders that are refused."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.distilling import make_samples
from support.slow import slow

from clear_dit.demo.captions import Scene, parse
from clear_dit.distillation import files
from clear_dit.distillation.cpu_attention import PerHeadAttention
from clear_dit.distillation.fingerprint import same_model
from clear_dit.distillation.precision import autocast
from clear_dit.distillation.sample import make_request
from clear_dit.distillation.samples import SampleFolder, open_samples, read_index
from clear_dit.errors import RequestError
from clear_dit.generation.dtypes import resolve_dtype
from clear_dit.generation.models import load_pipeline
from clear_dit.pipelines.cascade.resolution import Resolution


def opened(folder):
    return SampleFolder(folder, read_index(folder))


def test_a_sample_is_what_the_pipeline_generates(samples):
    found = opened(samples)
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    for number in (0, 5):
        each = found[number]
        latents = pipe(
            each.prompt,
            negative_prompt="",
            true_cfg_scale=2.0,
            height=64,
            width=96,
            num_inference_steps=2,
            max_sequence_length=64,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
            resolution=lambda height, width: Resolution(),  # training has the model's positions
        ).images[0]
        assert each.seed == number
        assert torch.allclose(each.latents, latents, atol=1e-4)
        words, pooled, _ = pipe.encode_prompt(each.prompt, None, max_sequence_length=64)
        given = each.conditioning
        assert torch.allclose(given["encoder_hidden_states"], words, atol=1e-5)
        assert torch.allclose(given["pooled_projections"], pooled, atol=1e-5)


def test_batch_and_shards_do_not_matter(samples, tmp_path):
    make_samples(tmp_path / "other", batch=3, shard_size=4)
    one, other = opened(samples), opened(tmp_path / "other")
    for number in range(6):
        assert one[number].prompt == other[number].prompt
        assert one[number].seed == other[number].seed
        assert torch.allclose(one[number].latents, other[number].latents, atol=1e-4)


def test_demo_prompts_leave_the_held_out_combinations_alone(samples):
    found = opened(samples)
    prompts = [found[number].prompt for number in range(6)]
    assert len(set(prompts)) == 6
    assert not any(Scene(**parse(prompt)).held_out for prompt in prompts)


def test_prompts_from_files_repeat_and_are_stored_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a blue house"}\n{"prompt": "a pink tree"}\n')
    result = make_samples(tmp_path / "out", 5, path, shard_size=5)
    assert (result["made"], result["missing"]) == (5, 0)
    found = opened(tmp_path / "out")
    assert [found[n].prompt for n in range(5)] == ["a blue house", "a pink tree"] * 2 + [
        "a blue house"
    ]
    name = "encoder_hidden_states"
    tensors = load_file(found.path(0))
    kept = [key for key in tensors if key.endswith(name)]
    assert kept == [f"conditioning.0.{name}", f"conditioning.1.{name}"]
    words = [found[number].conditioning[name] for number in range(5)]
    assert words[0].shape == (1, 64, 128)
    assert torch.equal(words[0], words[4])
    assert not torch.equal(words[0], words[1])


def test_a_folder_grows_and_a_finished_one_is_left_alone(samples, tmp_path):
    out = shutil.copytree(samples, tmp_path / "copy")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("samples-*")}
    assert make_samples(out)["made"] == 0
    assert make_samples(out, 9)["made"] == 3
    assert read_index(out).count == 9
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("samples-*")}
    assert {name: after[name] for name in before} == before
    assert len(after) == 5
    make_samples(out, 10)  # the last shard was short
    assert len(opened(out).header(4)["numbers"]) == 2


def test_dtype_and_images(tmp_path):
    out = tmp_path / "out"
    make_samples(out, 2, dtype="bfloat16", images=True)
    found = opened(out)
    given = found[1].conditioning
    assert found[1].latents.dtype == given["encoder_hidden_states"].dtype == torch.bfloat16
    assert given["img_ids"].dtype == torch.float32  # which bfloat16 would round
    with Image.open(out / "images" / "000001.png") as image:
        assert image.size == (96, 64)
        assert json.loads(image.info["clear_dit"])["seed"] == 1
    (out / "images" / "000000.png").unlink()
    make_samples(out, 2, dtype="bfloat16", images=True)
    assert len(list((out / "images").iterdir())) == 2
    with safe_open(found.path(0), framework="pt") as file:
        assert set(file.metadata()) == {
            *("format", "digest", "numbers", "seeds", "prompts", "conditioning")
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, "was begun with width 96, now it is 64"),
        ({"seed": 1}, "was begun with seed 0, now it is 1"),
        ({"steps": 3}, "was begun with steps 2, now it is 3"),
        ({"dtype": "bfloat16"}, "was begun with dtype float32"),
        ({"count": 4}, "was begun with count 6, which is more than 4"),
        ({"count": 0}, "--count must be from 1"),
        ({"count": 10**9}, "--count must be from 1 to 10000000"),
        ({"steps": 0}, "--steps must be from 1 to 1000, got 0"),
        ({"guidance": -1.0}, "--guidance must be from 0"),
        ({"batch": 0}, "--batch must be from 1"),
        ({"height": 65}, "--height must be a multiple of 16"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"device": "gpu"}, "--device gpu: cannot be used"),
        ({"prompts": "none.txt"}, "there is no such file"),
    ],
)
def test_bad_requests(samples, changes, message):
    with pytest.raises(RequestError, match=message):
        make_samples(samples, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no prompt in it"),
        ("a\x07b", "the control character U+0007"),
        ("word " * 10_000, "may have"),
    ],
)
def test_bad_prompts_stop_the_command_before_it_writes(text, message, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(text)
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--count", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run("sample", *arguments) == 2
    captured = capsys.readouterr().err
    assert "prompts.txt" in captured
    assert message in captured
    assert "Traceback" not in captured
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_json(tmp_path, capsys):
    arguments = ["--prompts", "demo", "--count", "1", "--height", "32", "--width", "32"]
    arguments += ["--steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run("sample", *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["made"], result["missing"]) == (1, 0)
    assert run("sample", *arguments) == 0
    assert "0 of 1 samples made now" in capsys.readouterr().out


def test_out_is_checked(samples, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file"):
        make_samples(tmp_path / "file")
    with pytest.raises(RequestError, match="there is no folder"):
        make_samples(tmp_path / "a" / "b")
    with pytest.raises(RequestError, match=r"has files in it but no index.json"):
        make_samples(tmp_path)
    copy = shutil.copytree(samples, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["fingerprint"]["magnitudes"][0] *= 1.1
    index["model"] = "other"
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="has samples of another model: of 'other', not of"):
        make_samples(copy)
    (copy / "index.json").write_text('{"format": "clear-dit samples 1", "count": 6}')
    message = r"copy holds 'clear-dit samples 1', and this version .* run `clear-dit sample` again"
    with pytest.raises(RequestError, match=message):
        make_samples(copy)
    (copy / "index.json").write_text("{}")
    with pytest.raises(RequestError, match=r"index.json is not an index of samples"):
        make_samples(copy)


def broken(samples, tmp_path, change):
    """A copy of the folder with the tensors and the header of shard 1 changed."""
    copy = shutil.copytree(samples, tmp_path / "copy")
    path = copy / "samples-00001.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, header)
    return copy


def test_broken_shards_are_refused_by_name(samples, tmp_path):
    fingerprint = read_index(samples).fingerprint

    def refused(folder, message):
        with pytest.raises(RequestError, match=f"samples-00001.safetensors {message}"):
            open_samples(folder, "demo", fingerprint, 0)
        shutil.rmtree(folder)

    refused(
        broken(samples, tmp_path, lambda t, h: t["latents"].fill_(torch.nan)),
        "has latents that are not finite; delete it",
    )
    refused(
        broken(samples, tmp_path, lambda t, h: h.update(digest="0")), "holds samples of another"
    )
    refused(broken(samples, tmp_path, lambda t, h: h.update(numbers="[0, 1]")), "is not a shard")
    refused(broken(samples, tmp_path, lambda t, h: h.pop("seeds")), "is not a shard of samples")
    refused(broken(samples, tmp_path, lambda t, h: t.pop("text")), "is not a shard of samples")
    words = "conditioning.1.encoder_hidden_states"
    refused(broken(samples, tmp_path, lambda t, h: t.pop(words)), "is not a shard of samples")
    for text in ("[{}, {}]", "[[], []"):
        refused(
            broken(samples, tmp_path, lambda t, h, text=text: h.update(conditioning=text)),
            "is not a shard of samples",
        )
    copy = shutil.copytree(samples, tmp_path / "copy")
    path = copy / "samples-00001.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(RequestError, match=r"samples-00001.safetensors is truncated or not"):
            make_samples(copy)
        with pytest.raises(RequestError, match=r"samples-00001.safetensors is truncated or not"):
            open_samples(copy, "demo", fingerprint, 0)
    path.unlink()
    open_samples(copy, "demo", fingerprint, 2)
    refused(copy, "is missing or unfinished; finish `clear-dit sample`")


def test_embeddings_that_are_not_finite(samples, tmp_path):
    name = "encoder_hidden_states"
    copy = broken(samples, tmp_path, lambda t, h: t[f"conditioning.0.{name}"].fill_(torch.inf))
    found = open_samples(copy, "demo", read_index(samples).fingerprint, 0)
    with pytest.raises(RequestError, match=r"samples-00001.safetensors has text embeddings that"):
        found[2]
    with safe_open(copy / "empty.safetensors", framework="pt") as file:
        header = file.metadata()
    tensors = load_file(copy / "empty.safetensors")
    del tensors[f"conditioning.{name}"]
    for kept in (header, {}):
        save_file(tensors, copy / "empty.safetensors", kept)
        with pytest.raises(RequestError, match=r"empty.safetensors does not hold text embeddings"):
            found.empty()


@slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = files.save_file
    written = []

    def full(tensors, path, header):
        if "latents" in tensors and written:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save(tensors, path, header)

    monkeypatch.setattr(files, "save_file", full)
    written.clear()
    with pytest.raises(OSError, match=r"samples-00000.safetensors could not be written \(No space"):
        make_samples(out, 4)
    assert {path.name for path in out.iterdir()} == {"index.json", "empty.safetensors"}
    monkeypatch.undo()
    assert make_samples(out, 4)["made"] == 4


def test_a_disk_without_room_is_refused_at_once(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    with pytest.raises(RequestError, match=r"about 0.0 GB are needed for .*, and 0.0 GB are free"):
        make_samples(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "clear_dit.distillation.sample.denoise",
        lambda *args, **kwargs: torch.full((1, 24, 64), torch.nan),
    )
    with pytest.raises(RequestError, match="demo in float32 gives latents that are not finite"):
        make_samples(tmp_path / "out", 1)
    assert not list((tmp_path / "out").glob("samples-*"))


def test_fingerprints():
    one = {"architecture": "a", "magnitudes": [1.0, 2.0]}
    assert same_model(one, {"architecture": "a", "magnitudes": [1.0001, 2.0]})
    for other in (None, {}, one | {"architecture": "b"}, one | {"magnitudes": [1.0]}):
        assert not same_model(one, other)


def test_defaults_are_the_model_s():
    request = make_request("demo", "demo", 3, device="cpu", height=None)
    assert (request.height, request.steps, request.guidance) == (512, 20, 2.0)
    assert request.dtype == resolve_dtype("auto", torch.device("cpu"), training=True)


@pytest.mark.parametrize("text", [1, 5])
def test_attention_by_heads_is_the_stock_one(text, tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(6, 9, text=text, batch=2)
    device = torch.device("cpu")
    with torch.no_grad():
        exact = model(**inputs, return_dict=False)[0]
        with autocast(torch.bfloat16, device):
            stock = model(**inputs, return_dict=False)[0]
            model.set_attn_processor(PerHeadAttention())
            heads = model(**inputs, return_dict=False)[0]
    error = (heads - exact).square().mean() / exact.square().mean()
    assert error.sqrt() < 2 * ((stock - exact).square().mean() / exact.square().mean()).sqrt()
