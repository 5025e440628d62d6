"""A runner that several threads ask, or whose work is interrupted; what loading leaves behind."""

import threading

import diffusers.utils.logging
import pytest
import transformers.utils.logging
from support.slow import slow
from support.threads import PATIENCE, Middle, pixels_of

from clear_dit.generation import runner as runner_module
from clear_dit.generation.models import quiet_libraries
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner, Stopped

SMALL = {"height": 64, "width": 96, "steps": 1, "radius": 2, "weights": "none", "device": "cpu"}
KINDS = {
    "local": {"radius": 4, "weights": "auto"},
    "full": {"attention": "full"},
    "far": {"far": True},
    "large": {"height": 96, "width": 64, "steps": 2},
}


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner("demo", "float32", "cpu")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, runner):
    """Of each kind of request, generated one after the other."""
    folder = tmp_path_factory.mktemp("expected")
    return {kind: generate(runner, folder, kind) for kind in KINDS}


def generate(runner, folder, kind, **options):
    runner.generate(make_request("a red house", **SMALL | KINDS[kind]), folder / "a.png", **options)
    return pixels_of(folder / "a.png")


@slow
@pytest.mark.parametrize(
    ("first", "second"), [("local", "full"), ("full", "local"), ("far", "large"), ("large", "far")]
)
def test_two_threads_ask_at_once(runner, expected, tmp_path, first, second):
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    middle = Middle()
    handle = runner.pipe.transformer.transformer_blocks[1].register_forward_pre_hook(middle.reached)
    found = middle.run(
        lambda: generate(runner, folders[0], first), lambda: generate(runner, folders[1], second)
    )
    handle.remove()
    for kind, image in zip((first, second), found, strict=True):
        assert image == expected[kind]


def test_one_stops_and_the_other_does_not(runner, expected, tmp_path):
    middle = Middle()

    def stop():
        middle.reached()
        return True

    def stopped():
        with pytest.raises(Stopped):
            generate(runner, tmp_path, "large", should_stop=stop)

    assert middle.run(stopped, lambda: generate(runner, tmp_path, "local"))[1] == expected["local"]


@slow
@pytest.mark.parametrize("name", ["apply_clear", "remove_clear"])
@pytest.mark.parametrize("done", [True, False])
def test_after_an_interrupted_switch(monkeypatch, runner, expected, tmp_path, name, done):
    """At its begin, or at its end."""
    before, after = ("full", "local") if name == "apply_clear" else ("local", "full")
    generate(runner, tmp_path, before)
    own = getattr(runner_module, name)

    def interrupted(*args, **options):
        if done:
            own(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(runner, tmp_path, after)
    assert generate(runner, tmp_path, before) == expected[before]
    assert generate(runner, tmp_path, after) == expected[after]


@pytest.mark.parametrize("shown", [True, False])
def test_libraries_say_what_they_said_before(shown):
    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
    try:
        for library in libraries:
            library.set_verbosity_info()
            library.enable_progress_bar() if shown else library.disable_progress_bar()
        wanted = [(library.get_verbosity(), shown) for library in libraries]
        middle, first_is_done = Middle(), threading.Event()

        def first():
            with quiet_libraries():
                middle.reached()
            first_is_done.set()

        def second():
            with quiet_libraries():
                middle.over.set()
                first_is_done.wait(PATIENCE)

        middle.run(first, second)
        found = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
        assert found == wanted
    finally:
        for library, (level, shows) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar() if shows else library.disable_progress_bar()
