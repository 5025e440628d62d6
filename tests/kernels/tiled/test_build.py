"""Compiling on first use: with a cache, without one, without a compiler, with a broken one."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.compiled import needs_compiler

from clear_dit import doctor
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.tiled import bands
from clear_dit.kernels.tiled.native import build, forward
from clear_dit.kernels.window import Window

SOURCE = '#include <cstdint>\nextern "C" const int32_t number = NUMBER;\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clear-dit"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "number.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def forgetful():
    """What is known of compiled kernels is forgotten, before and after."""
    for remembered in (forward._library, bands._announce):
        remembered.cache_clear()
    yield
    for remembered in (forward._library, bands._announce):
        remembered.cache_clear()


def number(source, definition="NUMBER=7"):
    return build.ctypes.c_int32.in_dll(build.load(source, [definition]), "number").value


@needs_compiler
def test_compiled_once(cache, source, monkeypatch):
    assert number(source) == 7
    [library] = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", None)
    assert number(source) == 7
    assert library.stat().st_mtime_ns == written


@needs_compiler
def test_another_library_for_other_source_headers_definitions_and_flags(cache, source, monkeypatch):
    assert (number(source), number(source, "NUMBER=8")) == (7, 8)
    source.write_text(SOURCE.replace("= NUMBER", "= -NUMBER"))
    assert number(source) == -7
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    assert number(source) == -7
    (source.parent / "another.h").write_text("")
    assert number(source) == -7
    assert len(list(cache.iterdir())) == 5


@needs_compiler
def test_processes_that_compile_at_once(cache, source):
    """The module stands alone, which keeps these processes small."""
    program = (
        "import runpy, sys; from pathlib import Path\n"
        f"load = runpy.run_path({build.__file__!r})['load']\n"
        f"load(Path({str(source)!r}), ['NUMBER=7'])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert len(list(cache.iterdir())) == 1
    assert number(source) == 7


@needs_compiler
def test_threads_that_compile_at_once(cache, source):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(number, [source] * 4)) == [7] * 4
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_a_damaged_library_is_compiled_anew(cache, source, monkeypatch):
    number(source)
    other = cache.parent.rename(cache.parent.with_name("other"))  # what is loaded is looked at once
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    [library] = (other / cache.name).iterdir()
    library.write_text("not a library")
    assert number(source) == 7
    assert len(library.read_bytes()) > 1000


@needs_compiler
@pytest.mark.parametrize("what", ["no folder", "others may write"])
def test_without_a_cache_folder(what, cache, source, tmp_path):
    if what == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o770)
    assert number(source) == 7
    assert what == "no folder" or not list(cache.iterdir())


def broken_compiler(folder: Path) -> Path:
    """Knows its macros, and compiles nothing."""
    path = folder / "compiler"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "x: error: no" >&2\nexit 1\n'
    )
    path.chmod(0o700)
    return path


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (
            "surely-none -x",
            "needs a C++ compiler, and $CXX is 'surely-none -x', which is not found",
        ),
        ('g++ -D"x', "and $CXX is 'g++ -D\"x' (No closing quotation)"),
        ("false", "could not be compiled: /"),
        ("broken", "/compiler says: x: error: no"),
        ("true", "could not be compiled: [Errno 2] No such file"),
    ],
)
def test_without_a_working_compiler(
    forgetful, cache, tmp_path, monkeypatch, caplog, compiler, reason
):
    """The same result by PyTorch's operators; said once, and no warning."""
    window = Window(12, 9, 5, 4, 2)
    query, key, value = torch.randn(3, 1, window.sequence_length, 2, 24)
    expected = local_attention(query, key, value, window, impl="reference")
    monkeypatch.setenv("CXX", str(broken_compiler(tmp_path)) if compiler == "broken" else compiler)
    with caplog.at_level(logging.INFO, logger="clear_dit"):
        for _ in range(2):
            out = local_attention(query, key, value, window, impl="tiled")
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("tiled attention runs on PyTorch's operators; the comp")
    assert reason in record.getMessage()
    told = doctor.report(doctor.examine())
    assert "tiled runs on PyTorch's operators, slower: its kernel " in told
    assert reason in told


@needs_compiler
def test_the_compiled_kernel_is_announced(forgetful, caplog):
    query = torch.randn(1, 4, 1, 24)
    with caplog.at_level(logging.INFO, logger="clear_dit"):
        for _ in range(2):
            local_attention(query, query, query, Window(2, 2, 0, 1), impl="tiled")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["tiled attention runs on the kernel compiled for this CPU"]
    assert "tiled runs on a kernel compiled here" in doctor.report(doctor.examine())
