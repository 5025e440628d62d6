"""Extras: each has its packages on every Python and system, the newest and the lowest of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from clear_dit.doctor import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of who works on this package; CI installs them.
OURS = {"docs", "integrations", "test"}
OFFERED = sorted(PROJECT["optional-dependencies"].keys() - OURS)
PYTHONS = [
    line.rpartition(" ")[2]
    for line in PROJECT["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
]
LINUX = "x86_64-manylinux_2_28"


def resolve(
    python: str, system: str, resolution: str, *more: str, extras: Sequence[str] = OFFERED
) -> list[str]:
    """The names of the packages of extras; none of them is installed, or built."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "uv"), "pip", "compile", "pyproject.toml", *more,
        *(word for extra in extras for word in ("--extra", extra)),
        # Resolving for another Python needs no other; looking for one takes long.
        "--python", sys.executable, "--no-python-downloads", "--python-version", python,
        "--python-platform", system, "--resolution", resolution, "--only-binary", ":all:",
        "--quiet", "--no-header", "--no-annotate",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return [line.partition("==")[0] for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("system", [LINUX, "aarch64-apple-darwin", "windows"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_newest_of_all_extras_go_together(python, system):
    names = resolve(python, system, "highest")
    assert {"torch", "diffusers", "gradio", "prometheus-client", "torchao"} <= set(names)
    assert ("xformers" in names) == (system == LINUX)


@pytest.mark.slow
def test_the_tested_versions_go_together_with_pypis_torch():
    """Which asks for a triton of its own; CI takes one for the CPU."""
    extras = ("test", "integrations", "docs")
    names = resolve("3.11.7", LINUX, "highest", "-c", "constraints.txt", extras=extras)
    assert {"torch", "triton", "cuda-toolkit"} <= set(names), names


@pytest.mark.slow
@pytest.mark.parametrize("python", [PYTHONS[0], PYTHONS[-1]])
def test_so_do_the_lowest(python):
    names = resolve(python, LINUX, "lowest-direct")
    assert {"torch", "diffusers", "gradio", "prometheus-client", "torchao"} <= set(names)


def test_every_dependency_has_a_lower_bound():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (line for group in groups for line in group):
        assert re.match(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement), requirement


def test_the_page_about_installing_names_every_extra():
    page = (ROOT / "docs" / "install.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [
        extra for extra in PROJECT["optional-dependencies"] if extra not in OURS
    ]


def test_doctor_looks_for_what_extras_install():
    for extra, packages in EXTRAS.items():
        named = PROJECT["optional-dependencies"][extra]
        assert set(packages) == {re.split(r"[>\[]", line)[0] for line in named}, extra


def test_pythons_are_those_that_are_supported():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert len(PYTHONS) >= 3
