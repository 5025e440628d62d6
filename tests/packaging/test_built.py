"""The wheel and the source archive: what is in them, and that they are what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sysconfig.get_path("scripts"))
MOST_BYTES = 40 * 2**20  # the index takes 100 MiB
# Of folders that hold no modules.
DATA = ("app/static/*", "kernels/tiled/native/*.cpp", "kernels/tiled/native/*.h", "py.typed")
MODELS = ("demo", "demo-adapters", "demo-sd3")
PICTURES = (".png", ".jpg")

pytestmark = pytest.mark.slow


class Built(NamedTuple):
    sdist: Path
    of_sdist: Path
    of_tree: Path


def run(*command: object, **options) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """A source archive and the wheel made of it, as released; and the wheel of the tree."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    left = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "site", "runs"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left)
    then = {**os.environ, "SOURCE_DATE_EPOCH": "1750000000"}
    for out, kinds in (("released", ()), ("direct", ("--wheel",))):
        command = (sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir")
        run(*command, folder / out, tree, env=then)
        shutil.rmtree(tree / "build", ignore_errors=True)
    (sdist,) = (folder / "released").glob("*.tar.gz")
    (of_sdist,) = (folder / "released").glob("*.whl")
    (of_tree,) = (folder / "direct").glob("*.whl")
    return Built(sdist, of_sdist, of_tree)


def modules() -> set[str]:
    found = {
        str(Path("clear_dit", name, path.relative_to(ROOT / folder)))
        for name, folder in (("", "clear_dit"), ("kernels", "kernels"), ("pipelines", "pipelines"))
        for path in (ROOT / folder).glob("**/*.py")
    }
    assert len(found) > 200
    return found


def data() -> set[str]:
    package = {path for pattern in DATA for path in (ROOT / "clear_dit").glob(pattern)}
    models = {
        path
        for name in MODELS
        for path in (ROOT / "clear_dit" / "assets" / name).glob("**/*")
        if path.is_file() and path.suffix not in PICTURES
    }
    assert len(package) > 30
    assert len(models) > 40
    return {str(path.relative_to(ROOT)) for path in package | models}


def test_the_wheel_has_what_runs_and_nothing_else(built):
    with zipfile.ZipFile(built.of_sdist) as wheel:
        names = set(wheel.namelist())
    package = {name for name in names if name.startswith("clear_dit/")}
    assert package == modules() | data()
    about = {name.partition("/")[2] for name in names - package}
    assert about == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE",
        "licenses/clear_dit/app/static/openseadragon-LICENSE.txt",
    }  # fmt: skip
    assert built.of_sdist.stat().st_size < MOST_BYTES


def test_the_source_archive_has_what_builds_and_nothing_else(built):
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
        prefix = f"{members[0].name}/"
        names = {member.name.removeprefix(prefix) for member in members if member.isfile()}
    # The folders that are links in the repository are plain files here.
    assert all(member.isfile() or member.isdir() for member in members)
    assert {name for name in names if name.startswith("clear_dit/")} == modules() | data()
    assert {name for name in names if "/" not in name} == {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md",
        "SECURITY.md", "pyproject.toml", "setup.cfg",
    }  # fmt: skip
    assert built.sdist.stat().st_size < MOST_BYTES


def test_the_archive_and_the_tree_give_the_same_wheel_bit_for_bit(built):
    assert built.of_sdist.read_bytes() == built.of_tree.read_bytes()


def test_what_the_index_would_refuse(built):
    out = run(PROGRAMS / "twine", "check", "--strict", *built)
    assert out.count("PASSED") == len(built)


def test_what_makes_a_wheel_install_wrongly(built):
    # Without the repository's settings it names the duplicates: so it does look.
    looked = [PROGRAMS / "check-wheel-contents", built.of_sdist]
    alone = subprocess.run(looked, cwd=built.of_sdist.parent, capture_output=True, text=True)
    assert {word for word in alone.stdout.split() if word.startswith("W0")} == {"W002:"}
    assert "OK" in run(*looked, cwd=ROOT)


def test_metadata(built):
    with zipfile.ZipFile(built.of_sdist) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_every_public_name_has_a_type(built, tmp_path):
    """As an editor sees the installed package; types of other packages are theirs."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    with zipfile.ZipFile(built.of_sdist) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    path = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["pyright", "--verifytypes", "clear_dit", "--ignoreexternal", "--outputjson"]
    command[0] = str(PROGRAMS / command[0])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    assert found["packageRootDirectory"] == str(site / "clear_dit")
    unknown = [
        f"{symbol['name']}: {problem['message']}"
        for symbol in found["symbols"]
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
        for problem in symbol["diagnostics"]
    ]
    assert unknown == []
    assert found["completenessScore"] == 1
    assert found["exportedSymbolCounts"]["withKnownType"] > 4000
