"""CLEAR weights for the tiny transformer."""

import pytest

from clear_dit import apply_clear, save_clear_weights


@pytest.fixture
def clear_file(tiny_transformer, tmp_path):
    """A function that writes a file of radius 2, from a model unlike the one with seed 0."""

    def make(seed=1, **settings):
        model = tiny_transformer(seed=seed)
        apply_clear(model, radius=2, **{"far": False} | settings)
        path = tmp_path / f"{seed}.safetensors"
        save_clear_weights(model, path)
        return path

    return make
