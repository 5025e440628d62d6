"""The demos by name, as `--model` has them."""

import pytest
from support.families.pipelines import make_pipeline

from clear_dit import CLEARFluxPipeline, CLEARPipeline
from clear_dit.files import DEMO_SIZE, DEMOS
from clear_dit.generation.models import find_model, model_path

# Parts that do without.
SMALL = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


@pytest.mark.parametrize("cls", [CLEARFluxPipeline, CLEARPipeline])
def test_the_demo(cls):
    pipe = cls.from_pretrained("demo", **SMALL)
    assert type(pipe) is CLEARFluxPipeline
    assert pipe.native_size == DEMO_SIZE == find_model("demo").native_size
    assert pipe.transformer.config["_name_or_path"].startswith(str(DEMOS["demo"]))
    assert cls.from_pretrained("demo", native_size=256, **SMALL).native_size == 256


def test_the_second_demo():
    parts = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipe = CLEARPipeline.from_pretrained("demo-sd3", **SMALL, **parts)
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert pipe.native_size == DEMO_SIZE
    again = type(pipe).from_pretrained("demo-sd3", **SMALL, **parts)
    assert (type(again), again.native_size) == (type(pipe), DEMO_SIZE)


def test_a_folder_of_that_name_is_a_path(tmp_path, monkeypatch):
    pipe = CLEARPipeline(make_pipeline("flux"), native_size=16)
    pipe.save_config(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    nothing = dict.fromkeys(pipe.components)
    assert model_path("demo") == str(DEMOS["demo"])
    assert CLEARFluxPipeline.from_pretrained("demo", **nothing).native_size == DEMO_SIZE
    assert model_path("./demo") == "./demo"
    for path in ("./demo", tmp_path / "demo"):
        assert CLEARFluxPipeline.from_pretrained(path, **nothing).native_size == 16


def test_a_model_of_another_family_is_refused():
    """Diffusers would put it into the pipeline."""
    with pytest.raises(ValueError, match=r"^CLEARPipeline: CLEARFluxPipeline is not for Stable Di"):
        CLEARFluxPipeline.from_pretrained("demo-sd3", **SMALL)
