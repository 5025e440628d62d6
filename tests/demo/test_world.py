import numpy as np
import pytest

from clear_dit.demo.captions import ATTRIBUTES, Scene, caption, parse, sample_scene
from clear_dit.demo.world import BODY_RGB, OBJECT_RGB, render

PLAIN = Scene("day", "hills", "sun", "crimson", "left", "house", "blue", seed=4)


def test_render_is_deterministic_and_depends_on_the_seed():
    first, again = render(PLAIN, 64, 64), render(PLAIN, 64, 64)
    other = render(Scene(**{**PLAIN.__dict__, "seed": 5}), 64, 64)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (37, 120), (130, 48), (256, 256)])
def test_render_any_size(height, width):
    for land in ATTRIBUTES["land"]:
        for sky in ATTRIBUTES["sky"]:
            image = render(
                Scene(sky, land, "moon", "white", "right", "tree", "pink"), height, width
            )
            assert image.shape == (height, width, 3)
            assert image.dtype == np.uint8
            assert image.std() > 10


def test_sizes_agree():
    large, small = render(PLAIN, 256, 256).astype(float), render(PLAIN, 128, 128).astype(float)
    halved = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 3


@pytest.mark.parametrize("colour", ATTRIBUTES["body_colour"])
@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_sun_is_where_and_what_it_should_be(colour, place):
    scene = Scene("night", "sea", "sun", colour, place, "balloon", "green", seed=1)
    sky = render(scene, 96, 96)[:40].astype(float)
    near = np.abs(sky - np.array(BODY_RGB[colour])).sum(2) < 120
    column = np.nonzero(near)[1].mean() / 96
    assert near.sum() > 150
    assert ATTRIBUTES["place"][int(column * 3)] == place


@pytest.mark.parametrize("colour", ATTRIBUTES["object_colour"])
@pytest.mark.parametrize("kind", ATTRIBUTES["object"])
def test_object_shows_its_colour(kind, colour):
    image = render(Scene("day", "desert", "moon", "white", "left", kind, colour), 96, 96)
    pixels = image[50:90, 25:71].reshape(-1, 3).astype(float)
    hue = np.array(OBJECT_RGB[colour], float)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True) + 1
    assert (pixels @ (hue / np.linalg.norm(hue)) > 0.97).sum() > 100


def test_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels a side; got 8x64"):
        render(PLAIN, 8, 64)


def test_unknown_value_lists_the_choices():
    with pytest.raises(ValueError, match="must be one of day, sunset, night; got 'noon'"):
        Scene("noon", "sea", "sun", "white", "left", "tree", "pink")


def test_captions_round_trip():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = sample_scene(rng)
        attributes = {name: getattr(scene, name) for name in ATTRIBUTES}
        assert parse(caption(scene, rng)) == attributes
        named = parse(caption(scene, rng, partial=True))
        assert named
        assert named.items() <= attributes.items()


def test_held_out_combinations_never_occur_in_training():
    rng = np.random.default_rng(0)
    training = [sample_scene(rng) for _ in range(300)]
    evaluation = [sample_scene(rng, held_out=True) for _ in range(100)]
    assert not any(scene.held_out for scene in training)
    assert all(scene.held_out for scene in evaluation)
    assert not {s.labels for s in training} & {s.labels for s in evaluation}
