"""The help of every command: an example of every value, the same under -h, and readable."""

import inspect
import re
import typing

import pytest
from support.slow import slow
from typer.testing import CliRunner

from clear_dit import options
from clear_dit.cli import app
from clear_dit.distillation.options import _CHOICES
from clear_dit.generation.checks import DTYPES
from clear_dit.generation.placing import OFFLOADS
from clear_dit.kernels.choice import IMPLS
from clear_dit.pipelines.cascade.presets import PRESETS
from clear_dit.versions import __version__
from clear_dit.weights.quantise import KINDS


def functions(program, path=()):
    """What every command is called by, and its function."""
    if program.registered_callback is not None:
        yield path, program.registered_callback.callback
    for command in program.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for group in program.registered_groups:
        yield (*path, group.name), lambda: None
        yield from functions(group.typer_instance, (*path, group.name))


def values(function):
    """The parameters of a function that take a value: name, types, help and default."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints[name]) is typing.Annotated:
            kind, info = typing.get_args(hints[name])
            kinds = {kind, *typing.get_args(kind)}
            if bool not in kinds:
                yield name, kinds, info.help or "", parameter.default


COMMANDS = dict(functions(app))
VALUES = {
    " ".join((*path, name)): rest
    for path, function in COMMANDS.items()
    for name, *rest in values(function)
}


def example(text: str) -> str | None:
    """What the help gives as an example."""
    found = re.search(r"such as '?([^\s;:]+)", text)
    return found and found[1].rstrip(".,'")


def choices(text: str) -> list[str]:
    """What the help gives to choose from; words in brackets explain."""
    found = re.search(r"one of ([^.]+)", re.sub(r" \([^)]*\)", "", text))
    return found[1].split(", ") if found else []


def test_the_tree_is_walked():
    assert {("generate",), ("bench", "attention"), ("evaluate", "seams")} <= COMMANDS.keys()
    assert {"generate prompt", "render out", "bench plan fit", "evaluate count"} <= VALUES.keys()
    assert len(VALUES) > 100


@pytest.mark.parametrize("name", VALUES)
def test_every_value_has_an_example(name):
    kinds, text, default = VALUES[name]
    given, several = example(text), choices(text)
    assert given or len(several) > 1, text
    for kind in kinds & {int, float}:
        kind(given)
    if several and isinstance(default, str):
        assert default in several


def test_choices_are_all_there_are():
    expected = {
        "Preset": PRESETS,
        "Dtype": [*DTYPES, "auto"],
        "TrainingDtype": [*DTYPES, "auto"],
        "Quantize": KINDS,
        "Offload": OFFLOADS,
        "Attention": ["clear", "full"],
        "Impl": IMPLS,
    }
    for name, values in expected.items():
        text = typing.get_args(getattr(options, name))[1].help
        assert sorted(choices(text)) == sorted(values), name
    for name, values in _CHOICES.items():
        _, text, _ = VALUES[f"distill {name}"]
        assert sorted(choices(text)) == sorted(values), name


@slow
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_whole_at_any_width(path):
    for columns in (80, 120):
        # The runner takes 80 for every terminal; in a real one two columns stay free.
        shown = CliRunner().invoke(app, [*path, "-h"], terminal_width=columns - 2).output
        assert shown.startswith("Usage:")
        assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE)
        widest = max(map(len, shown.splitlines()))
        assert widest <= columns
        if path == ("generate",):
            assert widest > columns - 12


def test_version():
    found = CliRunner().invoke(app, ["--version"])
    assert (found.exit_code, found.output) == (0, f"clear-dit {__version__}\n")
