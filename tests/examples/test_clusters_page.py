"""The page on clusters: its commands are the program's, and what they name is there."""

import importlib.util
import re

import pytest
from support.program_options import arguments_of, parse, shell_commands
from support.ray_cluster import ROOT

PAGE = ROOT / "docs" / "clusters.md"
IMAGES = ("clear-dit:cpu", "clear-dit:cuda")


def commands():
    """What the page's shell blocks run, as words."""
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        yield from shell_commands(block)


def started(words):
    """The command in a container, or what a script starts."""
    if words[:2] == ["docker", "run"]:
        (at,) = (n for n, word in enumerate(words) if word in IMAGES)
        return words[at + 1 :] if "--entrypoint" in words else ["clear-dit", *words[at + 1 :]]
    if words[0] == "sbatch":
        program = {"render": "render", "patch": "generate"}[words[1].split("/")[-1][:-7]]
        return ["clear-dit", program, *words[2:]]
    return words


def test_commands_are_the_programs():
    found = [arguments_of(started(words)) for words in commands()]
    names = [parse(arguments)[0] for arguments in found if arguments]
    assert sorted(names) == ["app", "generate", "generate", "generate", "render", "render"]


def test_the_ray_command_is_the_examples(capsys):
    path = ROOT / "examples" / "ray" / "render.py"
    spec = importlib.util.spec_from_file_location("ray_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ((_, name, *arguments),) = (words for words in commands() if words[0] == "python")
    assert ROOT / name == path
    assert (example.parse(arguments).actors, example.parse(arguments).gpus) == (8, 1)
    with pytest.raises(SystemExit):
        example.parse([*arguments, "--workers", "8"])


def test_what_the_page_names_is_there():
    named = set(re.findall(r"examples/[\w/.-]*\w", PAGE.read_text()))
    assert len(named) > 5
    assert all((ROOT / each).exists() for each in named)
    builds = [words for words in commands() if words[:2] == ["docker", "build"]]
    for words in builds:
        assert words[words.index("-t") + 1] in IMAGES
        text = (ROOT / words[words.index("-f") + 1]).read_text()
        assert f" AS {words[words.index('--target') + 1]}\n" in text
    assert len(builds) == 2
