"""`--lora`: an image depends on its request alone, whichever LoRA another had."""

import hashlib
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.loras import save_lora
from support.slow import slow

from clear_dit.errors import RequestError
from clear_dit.generation import lora as lora_module
from clear_dit.generation import runner as runner_module
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.models import DEMO, quiet_libraries
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner
from clear_dit.generation.sharing import check_shared

PROMPT = "a blue house by the sea"
SMALL = {"height": 64, "width": 96, "steps": 1, "radius": 4, "device": "cpu"}


def request(**settings):
    return make_request(PROMPT, **SMALL | settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRAs, one of more layers and ranks than the other."""
    folder = tmp_path_factory.mktemp("loras")
    second = save_lora(folder / "second.safetensors", 1, 3, ("to_k", "to_v"))
    return str(save_lora(folder / "first.safetensors")), str(second)


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner.of(request())


def pixels(runner, out, **settings):
    runner.generate(request(**settings), out)
    with Image.open(out) as image:
        return np.array(image).astype(int)


def parameters(runner):
    return {name: x.clone() for name, x in runner.pipe.transformer.state_dict().items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_with_it_and_without(files, runner, tmp_path):
    out = tmp_path / "image.png"
    plain = pixels(runner, out, weights="none")
    assert "lora_sha256" not in read_settings(out)
    own = parameters(runner)
    with_it = pixels(runner, out, weights="none", lora=files[0])
    with open(files[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert read_settings(out)["lora_sha256"] == digest
    assert (plain != with_it).mean() > 0.3
    np.testing.assert_array_equal(plain, pixels(runner, out, weights="none"))
    assert_same(own, parameters(runner))


@slow
def test_with_another_and_as_strongly_as_asked(files, runner, tmp_path):
    out, first, second = tmp_path / "image.png", *files
    plain = pixels(runner, out, weights="none")
    with_first = pixels(runner, out, weights="none", lora=first)
    with_second = pixels(runner, out, weights="none", lora=second)
    assert (with_first != with_second).mean() > 0.3
    weaker = pixels(runner, out, weights="none", lora=first, lora_scale=0.25)
    assert 0 < np.abs(weaker - plain).mean() < np.abs(with_first - plain).mean()
    np.testing.assert_array_equal(with_first, pixels(runner, out, weights="none", lora=first))


@slow
@torch.no_grad()
def test_the_image_is_the_stock_pipelines(files, runner, tmp_path):
    with quiet_libraries():
        pipe = diffusers.FluxPipeline.from_pretrained(DEMO)
        pipe.load_lora_weights(files[0], adapter_name="one")
        pipe.set_adapters("one", 0.7)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        PROMPT,
        negative_prompt="",
        true_cfg_scale=2.0,
        height=128,
        width=128,
        num_inference_steps=1,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    settings = {"attention": "full", "height": 128, "width": 128, "lora_scale": 0.7}
    found = pixels(runner, tmp_path / "a.png", lora=files[0], **settings)
    assert np.abs(found - np.array(stock).astype(int)).max() <= 1


@slow
def test_text_encoders_take_theirs_by_either_name(runner, tmp_path):
    layer, new, old = "encoder.layers.0.self_attn.q_proj", tmp_path / "new", tmp_path / "old"
    torch.manual_seed(0)
    matrices = {"A": torch.randn(2, 128), "B": torch.randn(128, 2)}
    for folder, prefix in ((new, "text_encoder"), (old, "text_encoder.text_model")):
        folder.mkdir()
        state = {f"{prefix}.{layer}.lora_{x}.weight": value for x, value in matrices.items()}
        save_file(state, folder / "lora.safetensors")
    out, own = tmp_path / "image.png", runner.pipe.text_encoder.state_dict()
    plain = pixels(runner, out)
    images = [pixels(runner, out, lora=str(folder / "lora.safetensors")) for folder in (new, old)]
    np.testing.assert_array_equal(*images)
    assert (images[0] != plain).mean() > 0.01
    np.testing.assert_array_equal(plain, pixels(runner, out))
    assert_same(own, runner.pipe.text_encoder.state_dict())


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao")
@pytest.mark.filterwarnings("ignore::FutureWarning:torchao")
@pytest.mark.filterwarnings("ignore:.*instantiated without")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_every_image_is_as_if_it_were_the_only_one(files, quantize, tmp_path):
    """With CLEAR weights, their far keys, without either, with full attention, and cascades."""
    first, second = files
    requests = [
        {"weights": "auto", "lora": first},
        {"weights": "auto"},
        {"weights": "auto", "lora": second, "lora_scale": -0.5},
        {"weights": "auto", "far": True, "lora": first},
        {"attention": "full", "lora": first},
        {"attention": "full"},
        {"weights": "none", "far": True, "lora": first},
        {"weights": "auto", "lora": first, "lora_scale": 2.0},
        {"weights": "auto", "height": 768, "width": 768, "lora": first},
        {"weights": "auto", "height": 768, "width": 768},
        {"weights": "auto", "lora": first},
    ]
    shared = PipelineRunner.of(request(quantize=quantize))
    for settings in requests:
        settings |= {"quantize": quantize}
        alone = PipelineRunner.of(request(quantize=quantize))
        expected = pixels(alone, tmp_path / "alone.png", **settings)
        found = pixels(shared, tmp_path / "shared.png", **settings)
        np.testing.assert_array_equal(expected, found, err_msg=str(settings))


@slow
def test_after_a_failure_the_model_is_its_own(files, runner, tmp_path, monkeypatch):
    out, lora = tmp_path / "image.png", {"weights": "none", "lora": files[0]}
    plain, expected = pixels(runner, out, weights="none"), pixels(runner, out, **lora)
    assert_plain = np.testing.assert_array_equal

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while it is generated
        patch.setattr(runner_module, "denoise", fail)
        with pytest.raises(KeyboardInterrupt):
            runner.generate(request(**lora), out)
    assert_plain(plain, pixels(runner, out, weights="none"))
    own, put = parameters(runner), LoraModel._create_and_replace
    left = iter(range(5))

    def put_some(*args, **kwargs):
        if next(left, None) is None:
            fail()
        put(*args, **kwargs)

    # Before it is loaded, when some layers have it, and just after.
    places = [(type(runner.pipe), "load_lora_weights", fail)]
    places += [(LoraModel, "_create_and_replace", put_some)]
    places += [(type(runner.pipe), "set_adapters", fail)]
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(*place)
            with pytest.raises(KeyboardInterrupt):
                runner.generate(request(**lora), out)
        assert_plain(plain, pixels(runner, out, weights="none"))
        assert_same(own, parameters(runner))
    assert_plain(expected, pixels(runner, out, **lora))


def test_one_that_does_not_fit_leaves_the_model_untouched(files, runner, tmp_path):
    out = tmp_path / "image.png"
    pixels(runner, out)
    out.unlink()
    own = parameters(runner)
    state = load_file(files[0])
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    wrong = {
        "here has no layer transformer.transformer_blocks.99.attn.to_q.": {
            key.replace(".0.", ".99."): state[key]
        },
        f"is for another model: {key} is (2, 5), and the layer here is": {
            **state,
            key: torch.zeros(2, 5),
        },
        "which is no LoRA's; only LoRAs are loaded": {"transformer.norm_out.x": state[key]},
        "": {"nothing": torch.zeros(2)},
    }
    for told, content in wrong.items():
        save_file(content, tmp_path / "wrong.safetensors")
        with pytest.raises(RequestError, match=r"^--lora wrong\.safetensors: ") as refused:
            runner.generate(request(lora=str(tmp_path / "wrong.safetensors")), out)
        assert told in str(refused.value)
        assert "\n" not in str(refused.value)
        assert_same(own, parameters(runner))
    assert not out.exists()


@slow
def test_a_file_that_changed_is_loaded_again(files, runner, tmp_path):
    path, out = tmp_path / "lora.safetensors", tmp_path / "image.png"
    images = []
    for file in files:
        shutil.copy(file, path)
        images.append(pixels(runner, out, weights="none", lora=str(path)))
    assert (images[0] != images[1]).mean() > 0.3
    gone = request(lora=str(path))
    path.unlink()
    with pytest.raises(RequestError, match=r"--lora: .*lora.safetensors cannot be read \(No such"):
        runner.generate(gone, out)


def test_what_is_refused(files, family_folder, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    refused = {
        "--lora must be a .safetensors file, got ": {"lora": f"{tmp_path}/a.bin"},
        "--lora: there is no file nowhere.safetensors": {"lora": "nowhere.safetensors"},
        "is not a safetensors file, or truncated": {"lora": f"{tmp_path}/a.safetensors"},
        "--lora-scale 0.5 is of a --lora; name one": {"lora_scale": 0.5},
        "--lora-scale must be from -4 to 4, got 5": {"lora": files[0], "lora_scale": 5},
        "leave --offload out": {"lora": files[0], "offload": "model"},
    }
    for told, settings in refused.items():
        with pytest.raises(RequestError, match=re.escape(told)):
            request(**settings)
    distilled = tmp_path / "distilled.safetensors"
    save_file(load_file(files[0]), distilled, {"radius": "4", "down_factor": "1", "far": "true"})
    made = {"lora": str(distilled), "radius": 4, "far": True, "weights": "none"}
    assert request(**made).lora == str(distilled)
    told = "--radius 4 --down-factor 1 --far --weights none; say so, or take another"
    for other in ({"radius": 5}, {"far": False}, {"weights": "auto"}, {"attention": "full"}):
        with pytest.raises(RequestError, match=told):
            request(**made | other)
    save_file({"a.dora_scale": torch.zeros(1)}, tmp_path / "dora.safetensors")
    with pytest.raises(RequestError, match="is a DoRA, of which diffusers would load a part"):
        request(lora=str(tmp_path / "dora.safetensors"))
    monkeypatch.setattr("clear_dit.pipelines.parallel.agreement.agree", lambda *_: None)
    monkeypatch.setattr("clear_dit.pipelines.parallel.bands.Bands", lambda *_: None)
    with pytest.raises(RequestError, match="ranks share no LoRA; leave --lora out"):
        check_shared(request(lora=files[0]), _Ranks())
    folder = str(family_folder("longcat-image"))
    with pytest.raises(RequestError, match="--lora: diffusers loads none for LongCat-Image"):
        make_request(PROMPT, folder, lora=files[0], device="cpu")
    monkeypatch.setattr(lora_module, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"--lora needs peft; run: pip install 'clear-dit\[lora"):
        request(lora=files[0])


@slow
def test_generate_takes_one(files, tmp_path, capsys):
    out = tmp_path / "a.png"
    size = ("--height", 64, "--width", 64, "--steps", 1, "--out", out)
    command = ("generate", PROMPT, *size, "--lora", files[0], "--lora-scale", 0.5)
    assert run(*command, "--device", "cpu") == 0
    settings = read_settings(out)
    assert (settings["lora"], settings["lora_scale"]) == ("first.safetensors", 0.5)


class _Ranks:
    """What `check_shared` reads of ranks."""

    process_group = None

    class mesh:  # noqa: N801
        size = staticmethod(lambda dim: 2)
