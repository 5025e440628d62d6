"""What `import clear_dit` promises: the names, the version gate, no network, no clash of names."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from support.slow import slow

import clear_dit
from clear_dit import compat

ROOT = Path(__file__).parents[2]
DOCUMENTED = [
    "CLEARFluxPipeline",
    "CLEARPipeline",
    "CLEARProcessor",
    "Window",
    "apply_clear",
    "load_clear_weights",
    "local_attention",
    "quantize",
    "remove_clear",
    "save_clear_weights",
]


def python(code, cwd=ROOT):
    """What a fresh interpreter prints; its own folder comes first on its path."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_public_names():
    assert sorted(clear_dit.__all__) == DOCUMENTED
    assert all(getattr(clear_dit, name).__name__ == name for name in DOCUMENTED)
    assert set(DOCUMENTED) < set(dir(clear_dit))
    with pytest.raises(AttributeError, match="module 'clear_dit' has no attribute 'apply_claer'"):
        clear_dit.apply_claer  # noqa: B018


def test_version_is_pyproject_s():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert clear_dit.__version__ == project["version"]
    bounds = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"]
    )
    assert {name: bounds[name] for name in compat.MINIMUM} == compat.MINIMUM


@slow
def test_import_is_light_and_needs_no_network():
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import clear_dit
print("torch" in sys.modules, "diffusers" in sys.modules)
from clear_dit import *
print(CLEARFluxPipeline.__name__, Window(2, 2, 0, 1).sequence_length)
"""
    assert python(code).splitlines() == ["False False", "CLEARFluxPipeline 4"]


@slow
def test_kernels_know_nothing_of_diffusers():
    code = "import sys, clear_dit.kernels.attention; print('diffusers' in sys.modules)"
    assert python(code) == "False"


def test_the_checkout_s_folders_shadow_nobody_s_package(tmp_path):
    """Hugging Face publishes a package named kernels; ours must never be found in its place."""
    for name in ("kernels", "pipelines"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        # Behind the checkout, as what is installed; it may be installed, too.
        code = f"import sys; sys.path.insert(1, {str(tmp_path)!r})"
        code += f"\nimport {name}; print({name}.__file__)"
        assert python(code) == str(package / "__init__.py")
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("0.39.0.dev0", (0, 39, 0)),
        ("2.9.0a0+git123", (2, 9, 0)),
        ("none", ()),
    ],
)
def test_release_numbers(version, numbers):
    assert compat.release(version) == numbers


def versions(monkeypatch, **changes):
    def version(name):
        found = changes.get(name, real(name))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    real = metadata.version
    monkeypatch.setattr(compat.metadata, "version", version)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"diffusers": "0.9.0"}, "diffusers {needed} or newer, found 0.9.0; run: pip install"),
        ({"torch": None}, "torch {needed} or newer, found none; run: pip install"),
        ({"torch": "2.0.1+cu118"}, "torch {needed} or newer, found 2.0.1+cu118; run: pip install"),
    ],
)
def test_old_or_missing_libraries_are_refused_in_one_line(monkeypatch, changes, found):
    versions(monkeypatch, **changes)
    needed = compat.MINIMUM[next(iter(changes))]
    with pytest.raises(ImportError) as error:
        compat.check_versions()
    message = str(error.value)
    assert message.startswith("clear_dit needs " + found.format(needed=needed))
    assert "\n" not in message


@slow
def test_without_diffusers_the_kernels_are_there_and_the_plugin_says_so(monkeypatch):
    versions(monkeypatch, diffusers=None)
    compat.check_versions()
    monkeypatch.delitem(clear_dit.__dict__, "apply_clear", raising=False)
    for missing in (
        lambda: compat.names_from("diffusers.models.embeddings", "apply_rotary_emb"),
        lambda: clear_dit.apply_clear,
    ):
        with pytest.raises(ImportError, match=r"clear_dit needs diffusers .*, found none; run: p"):
            missing()
    alone = "import sys; sys.modules['diffusers'] = None; import clear_dit.bench.attention"
    printed = python(f"{alone}; print(clear_dit.local_attention.__name__)")
    assert printed == "local_attention"


@pytest.mark.parametrize("version", ["1.0", "0.99.0.dev0"])
def test_new_versions_pass(monkeypatch, version):
    versions(monkeypatch, diffusers=version)
    compat.check_versions()


@pytest.mark.parametrize(
    "names", [("diffusers.models.embeddings", "gone"), ("diffusers.no_such_module", "gone")]
)
def test_names_that_diffusers_no_longer_has(names):
    with pytest.raises(ImportError) as error:
        compat.names_from(*names)
    message = str(error.value)
    assert message.startswith(f"clear_dit does not know diffusers {metadata.version('diffusers')}")
    assert "constraints.txt" in message
    assert "\n" not in message
