"""Networks from files: in tiles as if whole, and through spandrel where it is installed."""

import hashlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.command_line import run
from support.packages import need
from torch import nn

from clear_dit.generation.image_output import read_settings
from clear_dit.pipelines.cascade import upscaler as module
from clear_dit.pipelines.cascade.upscaler import Upscaler, load_upscaler


class Convolutions(nn.Module):
    """Enlarges by two; an output pixel sees four pixels around."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 5, padding=2),
            nn.LeakyReLU(),
            nn.Conv2d(4, 12, 5, padding=2),
            nn.PixelShuffle(2),
        )

    def forward(self, image):
        return self.layers(image)


class SeesAll(Convolutions):
    def forward(self, image):
        return super().forward(image) + image.mean()


class Windows(Convolutions):
    """Windows of 24 pixels, each with a mean of its own."""

    def forward(self, image):
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 24, 0, -height % 24), mode="replicate")
        mean = nn.functional.avg_pool2d(padded, 24)
        grown = nn.functional.interpolate(mean, scale_factor=48)
        return super().forward(image) + grown[..., : 2 * height, : 2 * width]


def upscaler(network):
    """With what a descriptor of spandrel has."""

    class Descriptor(SimpleNamespace):
        def __call__(self, image):
            shapes.append(tuple(image.shape[-2:]))
            with torch.inference_mode():
                return network(image)

    shapes = []
    made = Upscaler(Descriptor(scale=2, device=torch.device("cpu")), "network", "digest")
    return made, shapes


@pytest.mark.parametrize("network", [Convolutions, SeesAll, Windows])
@torch.no_grad()
def test_tiles_are_the_whole_at_once(monkeypatch, network):
    monkeypatch.setattr(module, "TILE", 128)
    made, shapes = upscaler(network())
    image = torch.rand(1, 3, 200, 330, generator=torch.Generator().manual_seed(1))
    whole = network()(image)
    tiled = made(image)
    torch.testing.assert_close(tiled, whole, atol=1e-6, rtol=1e-6)
    tiled += 1  # an ordinary tensor, not one of inference mode
    if network is Convolutions:
        assert max(map(max, shapes[-6:])) == 128 + 2 * module.GRID
        assert shapes[-6:].count((200, 330)) == 0
    else:
        assert shapes[-1] == (200, 330)
    tried = len(shapes)
    made(image)
    assert len(shapes) - tried == (6 if network is Convolutions else 1)  # tried out once


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("network.pth", r"must be a .safetensors file \(others, such as .pth, can run code\)"),
        ("none.safetensors", "there is no file"),
        ("large.safetensors", "has 2,000 bytes; at most 1,000 are read"),
        ("small.safetensors", r"needs spandrel: pip install 'clear-dit\[upscale\]'"),
    ],
)
def test_files_are_refused_in_a_line(monkeypatch, tmp_path, name, message):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for file, size in (("network.pth", 10), ("large.safetensors", 2000), ("small.safetensors", 10)):
        (tmp_path / file).write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=f"^upscaler.*{message}"):
        load_upscaler(tmp_path / name)


@pytest.fixture
def spandrel(monkeypatch):
    need("spandrel")
    if find_spec("torchvision") is None:
        # For two architectures that are not tested here.
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name in ("InterpolationMode", "normalize", "rotate"):
            setattr(sys.modules[names[-1]], name, None)
    import spandrel

    return spandrel


def networks():
    """Tiny ones of real architectures, with random weights, and by how much they enlarge."""
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    return {
        "ESRGAN": (ESRGAN(num_filters=4, num_blocks=1, scale=2), 2),
        "RealESRGAN Compact": (Compact(num_feat=4, num_conv=2, upscale=4), 4),
    }


def test_networks_of_real_architectures_are_loaded(spandrel, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "TILE", 64)
    image = torch.rand(1, 3, 70, 140, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "network.safetensors"
    for name, (network, scale) in networks().items():
        save_file(network.state_dict(), path)
        loaded = load_upscaler(path)
        assert loaded._network.architecture.name == name
        assert (loaded.name, loaded.scale) == (path.name, scale)
        assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        with torch.no_grad():
            expected = network.eval()(image).clamp(0, 1)
        assert expected.std() > 1e-3
        torch.testing.assert_close(loaded(image), expected, atol=1e-5, rtol=1e-5)
        assert loaded._reach == module.GRID  # in tiles, that is


def test_the_command_line_takes_a_file(spandrel, tmp_path):
    path, out = tmp_path / "network.safetensors", tmp_path / "out.png"
    network, _ = networks()["ESRGAN"]
    save_file(network.state_dict(), path)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    arguments = ("--image", tmp_path / "red.png", "--strength", "0.0", "--out", out, "--overwrite")
    assert run("generate", "a red house", "--upscaler", path, *arguments) == 0
    settings = read_settings(out)
    assert settings["upscaler"] == path.name
    assert settings["upscaler_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(out) as image:
        by_network = image.tobytes()
    assert run("generate", "a red house", *arguments) == 0
    assert read_settings(out)["upscaler"] is None
    with Image.open(out) as image:
        assert image.tobytes() != by_network


def test_other_weights_are_refused(spandrel, tmp_path):
    path = tmp_path / "network.safetensors"
    from spandrel.architectures.Compact import Compact

    cases = {
        "holds no network that spandrel knows": {"a.weight": torch.zeros(2)},
        "that does not enlarge": Compact(num_feat=4, num_conv=2, upscale=1).state_dict(),
        "Compact that does not enlarge RGB": Compact(
            num_in_ch=1, num_out_ch=1, num_feat=4, num_conv=2, upscale=2
        ).state_dict(),
    }
    for message, weights in cases.items():
        save_file(weights, path)
        with pytest.raises(ValueError, match=message):
            load_upscaler(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="or is truncated"):
        load_upscaler(path)
