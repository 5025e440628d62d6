"""Ranks that share an image generate what one process generates: gloo on the CPU, float32."""

import pytest
import torch
from support import patches
from support.patches import CASES, IMAGES, LARGER, OTHERS, denoise, generate
from support.processes import launch
from support.slow import slow

WORLDS = (2, 3, 4, 7)  # ranks


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A function of the number of ranks: latents by case, and every rank's traffic by case."""
    found = {}

    def run(world):
        if world not in found:
            folder = tmp_path_factory.mktemp(f"ranks-{world}")
            children = launch(patches.share, world, folder)
            for child in children:
                child.join()
            assert [child.exitcode for child in children] == [0] * world
            loaded = [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]
            found[world] = loaded[0][0], [traffic for _, traffic in loaded]
        return found[world]

    return run


@pytest.fixture(scope="module")
def alone():
    """A function of a case's name: latents of one process, computed once."""
    found = {}

    def latents(name):
        if name not in found:
            images, cases = IMAGES | LARGER, CASES | OTHERS
            if name in cases:
                found[name] = denoise(None, **cases[name])[0]
            else:
                found[name] = generate(None, **images[name])
        return found[name]

    return latents


def difference(value, expected):
    """Largest difference over the largest value."""
    return float((value - expected).abs().max() / expected.abs().max())


@slow
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_generate_what_one_process_generates(world, shared, alone):
    latents, _ = shared(world)
    names = [*patches.cases(world), *patches.images(world)]
    errors = {name: difference(latents[name], alone(name)) for name in names}
    assert max(errors.values()) <= 1e-5, errors


@slow
@pytest.mark.parametrize("world", [2, 4])
def test_guidance_ranks_compute_one_pass_each(world, shared, alone):
    latents, _ = shared(world)
    assert difference(latents["guidance ranks"], alone("256 x 256 px")) <= 1e-5
    if world == 2:
        cached = alone("256 x 256 px, MagCache")
        assert difference(cached, alone("256 x 256 px")) > 1e-3
        assert difference(latents["guidance ranks, MagCache"], cached) <= 1e-5


def test_radius_and_cases_matter(alone):
    """Otherwise the comparison above would say little."""
    assert difference(alone("16 x 16, radius 2"), alone("16 x 16, radius 1")) > 1e-3
    assert difference(alone("17 x 13, radius 3"), alone("17 x 13, radius over a band")) > 1e-3


def test_the_cache_acts_in_between(alone):
    some = alone("cache, some skipped")
    nothing_skipped = denoise(None, grid=patches.ODD)[0]
    everything = denoise(None, grid=patches.ODD, prepare=patches.cache(10.0))[0]
    assert difference(some, nothing_skipped) > 1e-3
    assert difference(some, everything) > 1e-3


@pytest.mark.parametrize("name", patches.CACHED)
def test_caches_that_go_by_steps_act(name, alone):
    case = {key: value for key, value in CASES[name].items() if key != "prepare"}
    assert difference(alone(name), denoise(None, **case)[0]) > 1e-3


@slow
@pytest.mark.parametrize("world", WORLDS)
def test_averaging_the_text_as_the_paper_does_is_no_substitute(world, shared, alone):
    latents, _ = shared(world)
    pairs = [("24 x 16, radius 4", "averaged")]
    if world == 2:
        pairs.append(("256 x 256 px", "demo averaged"))
    for name, average in pairs:
        ours = difference(latents[name], alone(name))
        theirs = difference(latents[average], alone(name))
        print(f"{name}, {world} ranks: ours {ours:.2g}, averaged {theirs:.2g}")
        assert theirs > 100 * max(ours, 1e-7)


@slow
@pytest.mark.parametrize("world", WORLDS)
def test_stale_halos_are_an_approximation(world, shared, alone):
    latents, _ = shared(world)
    assert difference(latents["stale after all steps"], alone("two passes")) <= 1e-5
    pairs = [("two passes", "stale"), ("far keys, odd grid", "far keys, stale")]
    if world == 2:
        pairs.append(("256 x 256 px", "demo stale"))
    for name, stale in pairs:
        exact = alone(name)
        error = float((latents[stale] - exact).norm() / exact.norm())
        print(f"{name}, {world} ranks, 2 of 4 steps with stale halos: relative error {error:.2g}")
        assert 1e-4 < error < 0.5


def halo_bytes(radius, columns, channels=32, sides=2):
    """Of the rows sent to neighbours, float32."""
    return sides * (radius - 1) * columns * channels * 4


@slow
def test_bytes_depend_on_the_radius_and_not_on_the_ranks(shared):
    inner = {}
    for world in (3, 4):
        _, traffic = shared(world)
        for name in ("16 x 16, radius 2", "24 x 16, radius 4", "60 x 5, interior rows"):
            sent, layers = traffic[1][name]
            assert layers == 4 * patches.STEPS
            inner.setdefault(name, set()).add(sent["halo"] / layers)
    assert inner == {
        "16 x 16, radius 2": {halo_bytes(2, 16)},
        "24 x 16, radius 4": {halo_bytes(4, 16)},
        "60 x 5, interior rows": {halo_bytes(3, 5)},
    }
    # The first and the last rank have one neighbour.
    _, traffic = shared(4)
    for rank in (0, 3):
        sent, layers = traffic[rank]["24 x 16, radius 4"]
        assert sent["halo"] / layers == halo_bytes(4, 16, sides=1)


@slow
@pytest.mark.parametrize("world", WORLDS)
def test_merging_the_text_sends_at_most_twice_its_output(world, shared):
    """In float32, whatever the number of ranks."""
    _, traffic = shared(world)
    for each in traffic:
        sent, layers = each["16 x 16, radius 2"]
        text = 5 * 2 * (16 + 1 + 1) * 4  # tokens, heads, channels with sum and maximum
        assert sent["text"] / layers <= 2 * text
