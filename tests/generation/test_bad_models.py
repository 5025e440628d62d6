"""Models and settings that cannot be used: one line on standard error, and status 2."""

import json
import shutil

import pytest
from diffusers import AutoencoderKL, Flux3DistilledModularPipeline
from support.command_line import run
from support.families.folders import NATIVE, size_options
from support.families.models import make_model
from support.families.pipelines import make_pipeline

from clear_dit import CLEARPipeline, apply_clear, save_clear_weights
from clear_dit.generation.index import MODULAR_INDEX, index_file


@pytest.fixture
def refused(tmp_path, capsys):
    """A function of a folder and options: what `generate` said in its one line."""
    out = tmp_path / "out.png"

    def check(folder, *options):
        command = ("generate", "a red house", "--model", folder, "--steps", 1, "--out", out)
        assert run(*command, *options) == 2
        told = capsys.readouterr().err.rstrip()
        lines = [line for line in told.splitlines() if line.startswith("clear-dit: ")]
        assert "Traceback" not in told
        assert [told.rpartition("\n")[2]] == lines
        assert not out.exists()
        return lines[0]

    return check


@pytest.fixture
def copy_of(family_folder, tmp_path):
    """A function of a family's name: a copy of its folder."""
    return lambda name: shutil.copytree(family_folder(name), tmp_path / name)


def change_index(folder, **changes):
    file = index_file(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_part(folder, name, **changes):
    """Where the index of a modular pipeline says that a part is."""
    library, cls, where = json.loads((folder / MODULAR_INDEX).read_text())[name]
    change_index(folder, **{name: [library, cls, where | changes]})


def test_a_folder_that_is_no_pipeline(refused, tmp_path):
    assert "is not a pipeline in diffusers format (no valid model_index.json)" in refused(tmp_path)


def test_a_transformer_alone(refused, family_folder):
    alone = family_folder("sd3") / "transformer"
    assert "it is one model of it; give the folder around it" in refused(alone)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sd3", "text_encoder_3"),
        ("flux2", "text_encoder"),
        ("z-image", "vae"),
        ("flux3", "text_encoder"),
        ("flux3", "tokenizer"),
    ],
)
def test_a_part_that_is_missing(refused, copy_of, name, part):
    folder = copy_of(name)
    shutil.rmtree(folder / part)
    if name == "flux3":  # else it would be where it was copied from
        change_part(folder, part, pretrained_model_name_or_path=str(folder))
    line = refused(folder)
    assert f"{folder} has no {part} (" in line
    assert f"put it into the folder {part} there" in line


def test_a_pipeline_without_text_encoder(refused, copy_of):
    folder = copy_of("qwen-image")
    change_index(folder, text_encoder=[None, None])
    assert "has no text_encoder, without which a QwenImagePipeline cannot" in refused(folder)


@pytest.mark.parametrize("where", [None, "/nowhere/at/all"])
def test_a_modular_pipeline_without_text_encoder(refused, copy_of, where):
    folder = copy_of("flux3")
    shutil.rmtree(folder / "text_encoder")
    change_part(folder, "text_encoder", pretrained_model_name_or_path=where)
    line = refused(folder)
    assert "has no text_encoder (Qwen3VLForConditionalGeneration), without which a Flux3Mod" in line


def test_a_modular_pipeline_that_says_nothing_of_its_text_encoder(refused, copy_of):
    folder = copy_of("flux3")
    index = json.loads((folder / MODULAR_INDEX).read_text())
    del index["text_encoder"]
    (folder / MODULAR_INDEX).write_text(json.dumps(index))
    assert "has no text_encoder, without which a Flux3ModularPipeline cannot" in refused(folder)


def test_a_modular_pipeline_with_code_of_its_own(refused, copy_of):
    folder = copy_of("flux3")
    (folder / "blocks.py").write_text("raise SystemExit('it was run')")
    config = {"auto_map": {"ModularPipelineBlocks": "blocks.Blocks"}}
    (folder / "modular_config.json").write_text(json.dumps(config))
    assert f"The repository for {folder} contains custom code" in refused(folder)


def test_guidance_of_a_modular_pipeline_without_guider(refused, tmp_path):
    pipe = make_pipeline("flux3", Flux3DistilledModularPipeline)
    pipe.update_components(transformer=make_model("flux3", flow_map=True))
    CLEARPipeline(pipe).save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", *size_options("flux3", 4, 6), "--guidance", 3)
    assert "this pipeline has no guider, and takes no guidance of 3; use 1" in line


def test_a_pipeline_that_is_not_supported(refused, copy_of):
    folder = copy_of("sd3")
    change_index(folder, _class_name="StableDiffusion3Img2ImgPipeline")
    line = refused(folder)
    assert "holds a StableDiffusion3Img2ImgPipeline; of Stable Diffusion 3" in line
    assert "the supported pipelines are StableDiffusion3Pipeline" in line


def test_a_transformer_that_is_not_known(refused, copy_of):
    folder = copy_of("sd3")
    change_index(folder, transformer=["diffusers", "AuraFlowTransformer2DModel"])
    assert "whose transformer is none of FluxTransformer2DModel, " in refused(folder)


def test_an_autoencoder_that_is_not_known(refused, copy_of):
    folder = copy_of("sd3")
    config = folder / "vae" / "config.json"
    changes = {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (weights,) = (folder / "vae").glob("*.safetensors")
    weights.unlink()
    changed = AutoencoderKL.from_config(AutoencoderKL.load_config(config))
    changed.save_pretrained(folder / "vae")
    assert "autoencoder: " in refused(folder)


def test_a_size_past_the_positions(refused, copy_of):
    """Stable Diffusion 3's end after 12 tokens a side; the published ones know any shape."""
    folder = copy_of("sd3")
    change_index(folder, native_size=None)
    line = refused(folder, *size_options("sd3", 6, 13))
    assert "this SD3 model has positions for 12 x 12 tokens, got 6 x 13" in line


def test_sizes_are_in_the_models_tokens(refused, family_folder):
    line = refused(family_folder("cogview4"), "--height", 8 * NATIVE + 4)
    assert "--height must be a multiple of 16 from 16 to 16384 pixels, got 68" in line


def test_weights_of_another_family(refused, family_folder, tmp_path):
    model = make_model("chroma")
    apply_clear(model, radius=3, far=False)
    save_clear_weights(model, tmp_path / "chroma.safetensors")
    line = refused(
        family_folder("sd3"), "--weights", tmp_path / "chroma.safetensors", "--radius", 3
    )
    assert "weights for another model" in line


def test_a_radius_that_is_full_attention_is_said_once(family_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="clear_dit")
    size = size_options("sd3", 4, 6)
    options = ("--steps", 1, "--radius", 6, "--out", tmp_path / "out.png")
    assert run("generate", "a house", "--model", family_folder("sd3"), *size, *options) == 0
    said = [text for text in caplog.messages if "full attention" in text]
    assert said == [
        "--radius 6 covers all of an image of 4 x 6 tokens: it is full attention; take a smaller "
        "one for local attention"
    ]
