"""What a pipeline's `__call__` shows: the stock pipeline's arguments, as they are, and ours."""

import inspect
from collections.abc import Callable

import diffusers
import pytest
from support.families.pipelines import make_pipeline

from clear_dit import CLEARFluxPipeline, CLEARPipeline
from clear_dit.families.table import all_families
from clear_dit.pipelines.pipeline import BY_SCHEDULER, _made

OURS = {
    "image",
    "enlarge",
    "preset",
    "strength",
    "stage_steps",
    "cascade",
    "low_resolution_guidance",
    "upscaler",
    "stages_dir",
    "resolution",
    "texts",
}
STOCK = {
    name: getattr(diffusers, name)
    for family in all_families()
    for name in family.recipe.pipelines
    if issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)
}


def shown(callable_: Callable) -> dict:
    """Kinds and defaults of its parameters by name, in their order, without self."""
    parameters = dict(inspect.signature(callable_).parameters)
    parameters.pop("self", None)
    return {
        name: (one.kind, tuple(one.default) if isinstance(one.default, list) else one.default)
        for name, one in parameters.items()
    }


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_arguments_come_first_and_then_ours(name):
    stock = shown(STOCK[name].__call__)
    found = shown(_made(STOCK[name], ()).__call__)
    keyword = inspect.Parameter.KEYWORD_ONLY
    for side in ("height", "width"):  # None is the native size
        assert stock.pop(side)[0] is found[side][0]
        assert found.pop(side)[1] is None
    assert list(found.items())[: len(stock)] == list(stock.items())
    added = {one: found[one] for one in list(found)[len(stock) :]}
    assert added.keys() == (OURS | BY_SCHEDULER.keys()) - stock.keys()
    assert {kind for kind, _ in added.values()} == {keyword}
    assert added["preset"] == (keyword, "auto")


def test_those_of_flux_1_are_written_down():
    """Where an editor reads them, which runs nothing."""
    written = CLEARFluxPipeline.__call__.__code__
    assert {"prompt", "height", "num_inference_steps", *OURS} <= set(written.co_varnames)
    assert not hasattr(CLEARFluxPipeline.__call__, "__signature__")
    assert "CLEARFluxPipeline" in _made(diffusers.FluxPipeline, ()).__name__


@pytest.mark.parametrize("name", ["flux", "sd3", "flux3"])
def test_on_a_pipeline(name):
    pipe = CLEARPipeline(make_pipeline(name), native_size=16)
    assert inspect.signature(pipe) == inspect.signature(pipe.__call__)
    found = shown(pipe)
    expected = {"prompt", "height", "width", "num_inference_steps", "generator", *OURS}
    assert expected <= found.keys()
    assert not {"args", "kwargs", "self"} & found.keys()
    assert "Generate an image of any size" in inspect.getdoc(pipe.__call__)
