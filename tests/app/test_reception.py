"""What is read of an image that comes back."""

from PIL import Image

from clear_dit.app.reception import settings_of
from clear_dit.app.settings import Settings
from clear_dit.generation.image_output import save_png


def test_settings_that_stand_in_an_image_are_an_entrys(tmp_path):
    server, path = Settings(models=("demo",), out=tmp_path), tmp_path / "image.png"
    told = {"prompt": "a house", "seed": 3, "far": None, "negative_prompt": None}
    image = Image.new("RGB", (8, 8))
    with_lora = {"lora": "ink.safetensors", "lora_scale": 0.5, "strength": [0.3]}
    save_png(image, path, told | with_lora | {"model": "/other", "image": "a.png", "impl": "tiled"})
    expected = told | {"negative_prompt": ""}
    own = {"lora": "ink", "lora_scale": 0.5, "strength": 0.3}
    assert settings_of(path, server) == expected | own
    save_png(image, path, told | {"lora": None, "strength": None, "prompt": "a house"})
    assert settings_of(path, server) == expected | {"lora": "", "strength": None}
    for others in ({}, {"prompt": 5}, {"seed": 3}):
        save_png(image, path, others)
        assert settings_of(path, server) is None
