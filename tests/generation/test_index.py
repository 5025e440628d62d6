"""Indexes of modular pipelines: where they say their parts are."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from support.command_line import run
from support.families.folders import NATIVE, size_options

from clear_dit.bench.configurations import find_configuration
from clear_dit.errors import RequestError
from clear_dit.generation.index import INDEX, MODULAR_INDEX, read_index
from clear_dit.generation.models import find_model
from clear_dit.render.identity import model_digest

LENT = "text_encoder"
UPSAMPLER = {
    "prompt_upsampler": "Qwen3_5ForConditionalGeneration",
    "prompt_upsampler_processor": "AutoProcessor",
}


@pytest.fixture
def divided(family_folder, tmp_path):
    """Two folders: FLUX.3 without its text encoder; and that."""
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(family_folder("flux3"), model)
    shutil.move(model / LENT, other / "qwen")
    return model, other


def lead_to(model, source, **more):
    """Change where the index says the text encoder is."""
    index = json.loads((model / MODULAR_INDEX).read_text())
    where = {"pretrained_model_name_or_path": str(source), "subfolder": "qwen", **more}
    index[LENT] = [None, None, index[LENT][2] | where]  # as of a part that was not loaded
    (model / MODULAR_INDEX).write_text(json.dumps(index))


def test_a_part_in_another_folder(divided, tmp_path):
    model, other = divided
    lead_to(model, other)
    part = read_index(str(model)).parts[LENT]
    assert part[:3] == ("Qwen3VLForConditionalGeneration", str(other), "qwen")
    command = ("generate", "a red house", "--model", model, "--steps", 1, "--radius", 3)
    size = size_options("flux3", 4, 6)
    assert run(*command, *size, "--out", tmp_path / "image.png") == 0


@pytest.mark.parametrize("where", [None, "nowhere/at/all"])
def test_a_prompt_upsampler(family_folder, tmp_path, capsys, where):
    """One that is nowhere was not loaded when the pipeline was saved, and prompts are as given."""
    model, out = shutil.copytree(family_folder("flux3"), tmp_path / "model"), tmp_path / "image.png"
    index = json.loads((model / MODULAR_INDEX).read_text())
    place = {"pretrained_model_name_or_path": where, "subfolder": "", "revision": None}
    for name, cls in UPSAMPLER.items():
        hint = {"type_hint": ["transformers", cls], "variant": None}
        index[name] = [None, None, place | hint]
    (model / MODULAR_INDEX).write_text(json.dumps(index))
    command = ("generate", "a red house", "--model", model, "--steps", 1, "--radius", 3)
    size = size_options("flux3", 4, 6)
    assert run(*command, *size, "--out", out) == (0 if where is None else 2)
    refused = "has no prompt_upsampler (Qwen3_5ForConditionalGeneration), without which a"
    assert (refused in capsys.readouterr().err) == (where is not None)


def test_images_depend_on_parts_elsewhere(divided):
    model, other = divided
    lead_to(model, other)
    before = model_digest(str(model))
    assert model_digest(str(model)) == before
    (other / "qwen" / "config.json").write_text("{}")
    assert model_digest(str(model)) != before


def test_what_was_copied_is_read_from_the_copy(family_folder, tmp_path):
    copied = shutil.copytree(family_folder("flux3"), tmp_path / "copy")
    parts = read_index(str(copied)).parts
    assert parts.keys() == {"text_encoder", "tokenizer", "transformer", "vae"}
    assert {part.source for part in parts.values()} == {str(copied)}


def test_in_repositories(divided, family_folder, tmp_path, monkeypatch):
    """Configurations alone are fetched, each from where the index says, at its revision."""
    model, other = divided
    for part in ("tokenizer", "transformer", "vae"):
        index = json.loads((model / MODULAR_INDEX).read_text())
        index[part][2]["pretrained_model_name_or_path"] = "owner/model"
        (model / MODULAR_INDEX).write_text(json.dumps(index))
    lead_to(model, "owner/other", revision="v1")
    folders, fetched = {"owner/model": model, "owner/other": other}, set()

    def fetch(repository, name, subfolder=None, revision=None):
        if name == INDEX:
            raise LocalEntryNotFoundError(name)
        fetched.add((repository, subfolder, name, revision))
        return folders[repository] / (subfolder or "") / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found, whole = find_configuration("owner/model"), family_folder("flux3")
    assert found == find_configuration(str(whole))
    assert find_model("owner/model").native_size == NATIVE * find_model(str(whole)).token_pixels
    assert fetched == {
        ("owner/model", None, MODULAR_INDEX, None),
        ("owner/model", "transformer", "config.json", None),
        ("owner/model", "vae", "config.json", None),
        ("owner/model", "tokenizer", "tokenizer_config.json", None),
        ("owner/other", "qwen", "config.json", "v1"),
    }


def test_a_repository_without_index(monkeypatch):
    def fetch(repository, name, subfolder=None, revision=None):
        raise LocalEntryNotFoundError(f"404 for {name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(RequestError, match=r"owner/none: model_index.json cannot be fetched .*404"):
        find_model("owner/none")
