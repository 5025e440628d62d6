import numpy as np
import pytest
import torch
from support.slow import slow

from clear_dit.demo.captions import TEMPLATES, caption, sample_scene
from clear_dit.demo.checkpoint import load_checkpoint
from clear_dit.demo.text import MAX_LENGTH, TextEncoders, build_tokenizer, train_text
from clear_dit.demo.transformer import TEXT_LENGTH

TEXT = "a blue house in the hills at night, a golden moon on the left"


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    return TextEncoders().eval().requires_grad_(False)


def test_tokenizer_knows_the_grammar_and_survives_other_words():
    tokenizer = build_tokenizer(begin=True)
    assert tokenizer.model_max_length == MAX_LENGTH
    assert tokenizer.decode(tokenizer(TEXT).input_ids).startswith("<s> a blue house")
    assert tokenizer.unk_token_id not in tokenizer(TEXT).input_ids
    assert tokenizer("A Blue zeppelin").input_ids.count(tokenizer.unk_token_id) == 1


def test_every_caption_leaves_room_for_padding():
    tokenizer, rng = build_tokenizer(begin=False), np.random.default_rng(0)
    texts = [caption(sample_scene(rng), rng) for _ in range(60 * len(TEMPLATES))]
    assert max(len(tokenizer(text).input_ids) for text in texts) < TEXT_LENGTH


def test_length_of_padding_does_not_matter(encoders):
    pooled, short, real = encoders([TEXT, ""], 32)
    pooled_long, long, _ = encoders([TEXT, ""], 512)
    assert torch.equal(pooled, pooled_long)
    for row in range(2):
        words = int(real[row].sum())
        # Training shrinks the rest to 1e-3; new weights have larger scores against the markers.
        assert (short[row, :words] - long[row, :words]).abs().max() < 0.05
        assert (long[row, words:] - short[0, -1]).abs().max() < 1e-3


def test_pooling_takes_the_end_of_the_text(encoders):
    alone = encoders([TEXT], 32)[0]
    beside_longer = encoders([TEXT, "an image of " + TEXT], 32)[0][:1]
    assert (alone - beside_longer).abs().max() < 1e-5
    assert (alone - encoders([TEXT.replace("left", "right")], 32)[0]).abs().max() > 1e-3


@slow
def test_training_resumes(tmp_path):
    path = tmp_path / "text.safetensors"
    train_text(path, steps=1, batch=4)
    first = path.stat().st_mtime_ns
    train_text(path, steps=2, batch=4)
    assert load_checkpoint(path)[0] == 2
    second = path.stat().st_mtime_ns
    assert second > first
    train_text(path, steps=2, batch=4)
    assert path.stat().st_mtime_ns == second
