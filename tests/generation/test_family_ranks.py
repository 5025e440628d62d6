"""`--parallel patch` with a tiny pipeline of every family: two ranks write one process's image."""

import numpy as np
import pytest
from PIL import Image
from support import rank_tasks
from support.families.folders import token_pixels
from support.rank_tasks import run_ranks
from support.slow import slow

from clear_dit.generation.request import make_request
from clear_dit.generation.runner import generate


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@slow
@pytest.mark.parametrize(
    "names",
    [
        ("flux2", "sd3", "qwen-image"),
        ("chroma", "z-image", "hunyuan-image", "cogview4"),
        ("flux", "krea2", "flux3", "qwen-image-2.1"),
    ],
)
def test_a_cascade_by_two_ranks(names, family_folder, tmp_path):
    requests = {
        name: {
            "prompt": "a red house",
            "model": str(family_folder(name)),
            "height": 12 * token_pixels(name),
            "width": 16 * token_pixels(name),
            "radius": 2,
            "steps": 2,
            "device": "cpu",
        }
        for name in names
    }
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    for name, settings in requests.items():
        generate(make_request(**settings), tmp_path / "one" / f"{name}.png", progress=False)
    statuses, said = run_ranks(rank_tasks.generate_all, 2, tmp_path, requests, tmp_path / "two")
    assert statuses == [0, 0], said
    for name in names:
        one, two = (pixels(tmp_path / folder / f"{name}.png") for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1, name
        assert one.std() > 1, name
