"""Networks that are not there are named; those that are here see what they should."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from clear_dit.demo.probe import held_out_scenes
from clear_dit.demo.world import render
from clear_dit.evaluation import networks
from clear_dit.evaluation.networks import (
    InceptionNetwork,
    LpipsNetwork,
    ProbeNetwork,
    TransformersNetwork,
    make_networks,
)
from clear_dit.generation.models import DEMO

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 40, 64), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    text = {**SIZES, **HEADS, "vocab_size": 8, "eos_token_id": 7, "max_position_embeddings": 8}
    config = CLIPConfig(
        text_config=text,
        vision_config={**SIZES, **HEADS, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    words = {word: i for i, word in enumerate(["<pad>", "a", "red", "house", "x", "y", "z", "<e>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<e>",
        unk_token="x",
        model_max_length=8,
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("nothing_cached")
def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    found = make_networks(str(tmp_path), 64, 64)
    for name in ("clip", "dino"):
        repository = found[name].repository
        assert found[name].missing().endswith(f"get it with `hf download {repository}`")
    assert "no probe/ folder" in found["probe"].missing()
    for name in ("inception", "lpips"):
        assert 'pip install "torchmetrics[image]"' in found[name].missing()
    monkeypatch.setattr(networks, "_cannot_import", lambda module: None)
    for name, file in (("inception", "weights-inception-2015"), ("lpips", "alexnet-owt")):
        assert "torch.hub.load_state_dict_from_url('https://" in found[name].missing()
        assert file in found[name].missing()


def test_sizes_that_a_network_cannot_take():
    assert "32 px or more" in LpipsNetwork(16).missing()
    assert "square" in ProbeNetwork(str(DEMO), square=False).missing()
    assert ProbeNetwork(str(DEMO), square=True).missing() is None


def test_a_torchvision_that_breaks_is_a_reason(monkeypatch):
    def broken(module):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(networks.importlib, "import_module", broken)
    assert "torch-fidelity cannot be imported" in InceptionNetwork().missing()
    assert "(operator torchvision::nms does not exist)" in LpipsNetwork(64).missing()


def test_the_probe_reads_images_and_its_features_are_near_one():
    network = ProbeNetwork(str(DEMO), square=True)
    network.load(torch.device("cpu"))
    scenes = held_out_scenes(16)
    rendered = torch.from_numpy(np.stack([render(scene, 96, 96) for scene in scenes]))
    found = network.features(rendered.permute(0, 3, 1, 2), [""] * 16)
    assert found["features"].shape == (16, 128)
    assert 0.5 < found["features"].square().mean() < 2
    assert (found["seen"] == torch.tensor([scene.labels for scene in scenes])).float().mean() > 0.97


def test_clip_is_transformers_own(clip_folder, images):
    network = TransformersNetwork(str(clip_folder))
    assert network.missing() is None
    network.load(torch.device("cpu"))
    prompts = ["a red house", "a", "red red red"]
    found = network.features(images, prompts)
    tokens = network.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = network.processor(list(images.numpy()), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = network.model(pixel_values=pixels, **tokens)
    for name, expected in (("features", output.image_embeds), ("text", output.text_embeds)):
        assert found[name].shape == (3, 12)
        normalised = torch.nn.functional.normalize(found[name], dim=-1)
        assert torch.allclose(normalised, expected, atol=1e-5)


def test_dino_is_the_class_token(tmp_path, images):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, **HEADS, image_size=32, patch_size=16)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    network = TransformersNetwork(str(tmp_path))
    network.load(torch.device("cpu"))
    found = network.features(images, [""] * 3)
    pixels = network.processor(list(images), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(found["features"], expected, atol=1e-5)
