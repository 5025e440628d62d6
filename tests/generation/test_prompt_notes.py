"""What is said of a prompt, against what text encoders of tiny pipelines see of it."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.command_line import run
from support.families.folders import NATIVE, token_pixels
from support.families.pipelines import PIPELINES, WORDS
from support.slow import slow_but

from clear_dit.demo.captions import vocabulary
from clear_dit.generation import stage_plan
from clear_dit.generation.conditioning import record
from clear_dit.generation.models import DEMOS, find_model, load_pipeline
from clear_dit.generation.prompt_notes import PromptReader
from clear_dit.generation.stage_plan import described

# The others read all there is, or have prompts rewritten; FLUX.3's 8192 tokens take a minute.
WHOLE = ("qwen-image-2.1", "longcat-image", "ernie-image")
CUTTING = [name for name in PIPELINES if name not in (*WHOLE, "flux3")]
CAPTION = "a blue house in the hills at night, a golden moon on the left"


def of_words(count):
    return " ".join(WORDS[index % len(WORDS)] for index in range(count))


def short_templates(pipe, name):
    """Templates of as many tokens as their pipelines say, of the words there are."""
    if name in ("qwen-image", "hunyuan-image"):
        pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a small {}", 3
    elif name == "krea2":
        pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "a small ", 3


def same(first, second):
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("family", slow_but(CUTTING, "flux", "sd3", "z-image"))
@torch.no_grad()
def test_what_is_left_out_changes_nothing_and_the_word_before_it_does(family, family_folder):
    folder = str(family_folder(family))
    pipe = load_pipeline(folder, torch.float32, torch.device("cpu"))
    short_templates(pipe, family)
    side = NATIVE * token_pixels(family)

    def seen(prompt):
        found = record(pipe, [prompt], height=side, width=side, guidance=1.0)
        return [found[name] for name in sorted(found)]

    reader = PromptReader(folder)
    limit = pipe.recipe.prompts(described(find_model(folder))).tokens
    prompt = of_words(limit + 20)
    unread = reader.left_out(prompt)
    assert 20 <= len(unread.split()) < limit + 20
    read = prompt.removesuffix(unread).strip()
    assert reader.left_out(read) == ""
    assert same(seen(prompt), seen(read))
    assert not same(seen(read), seen(read.rsplit(" ", 1)[0]))
    (note,) = reader.notes(prompt)
    assert note.startswith(
        "The prompt is longer than the model reads; this end of it is left out: "
    )
    assert unread[:200] in note
    assert len(note) < 300


@pytest.mark.parametrize("model", DEMOS)
def test_a_demo_says_which_words_it_does_not_know(model):
    reader = PromptReader(model)
    assert reader.notes(CAPTION) == []
    assert reader.notes("A Blue HOUSE, the dragon's: a Zebra & a dragon!") == [
        "The demo does not know these words, and leaves them out: dragon, zebra."
    ]
    many = " ".join(f"word{index}" for index in range(20))
    assert reader.notes(many)[0].endswith("word10, word11 and 8 more.")
    assert reader.known_words() == [word for word in vocabulary() if word != ","]


def test_other_models_know_words_of_their_own(family_folder):
    reader = PromptReader(str(family_folder("flux")))
    assert reader.known_words() is None
    assert reader.notes("a zebra") == []


def test_a_word_of_which_a_part_is_read_is_left_out_and_text_without_blanks_is_cut():
    reader = PromptReader("demo")
    words = "sea " * 62
    assert reader.left_out(f"{words}moon-house") == "moon-house"
    assert reader.left_out("a," * 100) == ("a," * 100)[63:]


@pytest.mark.parametrize("family", slow_but(WHOLE, "qwen-image-2.1"))
def test_of_a_model_that_reads_all_nothing_is_said(family, family_folder):
    assert PromptReader(str(family_folder(family))).notes(of_words(2000)) == []


def test_without_a_tokenizer_nothing_is_said(family_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family_folder("flux"), folder)
    reader = PromptReader(str(folder))
    shutil.rmtree(folder / "tokenizer_2")
    assert reader.notes(of_words(30)) == []
    shutil.copytree(family_folder("flux") / "tokenizer_2", folder / "tokenizer_2")
    assert len(reader.notes(of_words(30))) == 1  # as when it has been fetched meanwhile


def test_threads_that_ask_at_once_are_told_the_same():
    reader = PromptReader("demo")
    prompts = [f"{'sea ' * count}zebra{count}" for count in range(50, 90)]
    expected = [PromptReader("demo").notes(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.notes, prompts)) == expected


def test_generate_warns_before_it_works(monkeypatch, caplog, capsys, tmp_path):
    monkeypatch.setattr(stage_plan, "planned", lambda request: "the plan")
    with caplog.at_level(logging.WARNING):
        assert run("generate", "a blue zebra", "--dry-run", "--out", tmp_path / "a.png") == 0
    assert caplog.messages == ["The demo does not know these words, and leaves them out: zebra."]
