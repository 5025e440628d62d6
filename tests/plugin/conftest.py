"""CLEAR weights for the tiny transformer."""

import pytest
from conftest import make_transformer

from clear_dit import apply_clear, save_clear_weights


@pytest.fixture
def clear_weights(tiny_transformer, tmp_path):
    """A file of radius 2, from a model unlike the one with seed 0."""
    model = tiny_transformer(seed=1, guidance_embeds=True)
    apply_clear(model, radius=2, far=False)
    path = tmp_path / "clear_local_2.safetensors"
    save_clear_weights(model, path, base_model="black-forest-labs/FLUX.1-dev")
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """CLEAR weights of radius 2, of another model than `make_transformer()`."""
    path = tmp_path_factory.mktemp("weights") / "clear_local_2.safetensors"
    model = make_transformer(seed=1)
    apply_clear(model, radius=2, far=False)
    save_clear_weights(model, path)
    return path
