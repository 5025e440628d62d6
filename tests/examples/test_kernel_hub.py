"""The folder that examples/kernel-hub/make.py writes is a kernel to Hugging Face's `kernels`."""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.packages import need
from support.triton_mode import interpreted

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

need("kernels")

# Hugging Face's own.
from kernels._rust import Digest, DigestAlgorithm  # noqa: E402, TID251

from kernels import Metadata, get_local_kernel  # noqa: E402, TID251

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "kernel-hub" / "make.py"
WINDOWS = {
    "near": {"height": 6, "width": 7, "text_length": 3, "radius": 3},
    "far": {"height": 6, "width": 7, "text_length": 3, "radius": 2, "far_levels": 2},
    "pooled": {"height": 6, "width": 7, "text_length": 3, "radius": 3, "down_factor": 3},
}
# Which CI has: as in tests/kernels/triton.
needs_triton = pytest.mark.skipif(not interpreted, reason="needs Triton and its interpreter")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("kernel_hub", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    made = tmp_path_factory.mktemp("hub") / "clear-local-attention"
    example.make(made)
    return made


@pytest.fixture(scope="module")
def kernel(folder):
    return get_local_kernel(folder)


def inputs(window, gradients=False):
    """Query, key and value; fewer heads of the latter."""
    generator = torch.Generator().manual_seed(1)
    made = (
        torch.randn(2, Window(**window).sequence_length, heads, 16, generator=generator)
        for heads in (4, 2, 2)
    )
    return [each.requires_grad_(gradients) for each in made]


ALONE = "import sys; sys.modules['clear_dit'] = None"


def python(code, *arguments, **environment):
    """What a process prints that cannot import clear_dit, and has no checkout on its path."""
    # Only where Hugging Face's own package is.
    path = {"PYTHONPATH": str(Path(inspect.getfile(get_local_kernel)).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{ALONE}\n{code}", *map(str, arguments)],
        cwd=Path(sys.prefix),
        env=os.environ | path | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPUTE = """
import torch
from pathlib import Path
from kernels import get_local_kernel
clear = get_local_kernel(Path(sys.argv[1]))
for path in sys.argv[2:]:
    window, tokens = torch.load(path)
    out = clear.local_attention(*tokens, clear.Window(**window))
    torch.save(out, path)
print([name for name, module in sys.modules.items() if name.startswith("clear_dit") and module])
"""


def test_without_clear_dit_it_computes_what_ours_does(folder, tmp_path):
    for name, window in WINDOWS.items():
        torch.save((window, inputs(window)), tmp_path / name)
    assert python(COMPUTE, folder, *(tmp_path / name for name in WINDOWS)).strip() == "[]"
    for name, window in WINDOWS.items():
        ours = local_attention(*inputs(window), Window(**window), impl="reference")
        torch.testing.assert_close(torch.load(tmp_path / name), ours)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_beside_clear_dit_it_does_too_forward_and_backward(kernel, name, impl):
    window, found = WINDOWS[name], []
    for package in (kernel.local_attention, kernel.Window), (local_attention, Window):
        attend, window_of = package
        tokens = inputs(window, gradients=True)
        out = attend(*tokens, window_of(**window), impl=impl)
        found.append((out, *torch.autograd.grad(out.square().sum(), tokens)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)  # ours may pool by a compiled kernel


def test_operators_are_under_the_name_that_the_metadata_say(kernel, folder):
    metadata = json.loads((folder / "build/torch-universal/metadata.json").read_text())
    window = WINDOWS["far"]
    for name, attend, window_of in (
        (metadata["id"], kernel.local_attention, kernel.Window),
        ("clear_dit", local_attention, Window),
    ):
        tokens = inputs(window, gradients=True)
        out = attend(*tokens, window_of(**window), impl="tiled")
        assert out.grad_fn.name() == f"GeneratedBackwardFor_{name}_tiled_attention_defaultBackward"


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_it_compiles_whole(kernel, window):
    run = torch.compile(
        lambda *tokens: kernel.local_attention(*tokens, kernel.Window(**window)),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    ours = local_attention(*inputs(window), Window(**window), impl="reference")
    torch.testing.assert_close(run(*inputs(window)), ours)


def test_another_version_is_loaded_beside_it(example, kernel, tmp_path, monkeypatch):
    changed = tmp_path / "source"
    (changed / "kernels").mkdir(parents=True)
    for path in (ROOT / "kernels").rglob("*.py"):
        target = changed / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (changed / "LICENSE").write_text("")
    with (changed / "kernels" / "merge.py").open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(example, "ROOT", changed)
    example.make(tmp_path / "other", 1)
    other = get_local_kernel(tmp_path / "other")
    assert other.__name__ != kernel.__name__
    assert other.local_attention is not kernel.local_attention
    window = WINDOWS["far"]
    torch.testing.assert_close(
        *(each.local_attention(*inputs(window), each.Window(**window)) for each in (kernel, other))
    )


@needs_triton
@pytest.mark.parametrize("name", WINDOWS)
def test_its_triton_kernels_agree(kernel, name):
    triton = importlib.import_module(f"{kernel.__name__}.triton.ops").triton_attention
    window = WINDOWS[name]
    tokens, truth = (inputs(window, gradients=True) for _ in range(2))
    out, _ = triton(*tokens, kernel.Window(**window), scale=0.25)
    wanted = local_attention(*truth, Window(**window), impl="reference")
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), tokens),
        torch.autograd.grad(wanted.square().sum(), truth),
        atol=1e-4, rtol=1e-3,
    )  # fmt: skip


@needs_triton
def test_a_process_that_looks_at_a_kernel_finds_the_package(kernel):
    trust = importlib.import_module(f"{kernel.__name__}.triton.trust")
    told = trust._ask(["cuda:0", "float16", 16, "forward", 1, "gluon"])
    # It got as far as the device, which is not there.
    assert "CUDA" in told["wrong"] or "NVIDIA" in told["wrong"], told


def test_the_cards_code_runs_by_get_kernel(folder, kernel):
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "get_kernel(" in code
    said = python(
        f"{code}\nprint(clear.__name__, *out.shape)",
        LOCAL_KERNELS=f"OWNER/clear-local-attention={folder}",
    )
    assert said.split() == [kernel.__name__, "1", "4608", "24", "128"]


WITHIN = """
import importlib.util
spec = importlib.util.spec_from_file_location("clear_local_attention", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.__all__, module.local_attention.__module__)
"""


def test_older_loaders_find_the_same_in_the_folder_within(folder, kernel):
    within = folder / "build/torch-universal/clear_local_attention/__init__.py"
    said = python(WITHIN, within).split()
    assert said == ["Window", "local_attention", f"{kernel.__name__}.attention"]


def test_what_lies_in_the_folder(example, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "README.md", "build"]
    package = folder / "build" / "torch-universal"
    assert [path.name for path in package.parent.iterdir()] == [package.name]
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.suffix for path in files} == {".py", ".json"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n- kernel\n")


def test_its_metadata_tell_the_files_digests(example, tmp_path):
    package = example.make(tmp_path / "made", 3)
    metadata = Metadata.read_from_file(package / "metadata.json")
    assert (metadata.version, metadata.name.python_name) == (3, "clear_local_attention")
    assert (metadata.license, metadata.python_depends) == ("apache-2.0", [])
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, package))


BAD = {
    "length": (lambda q, k, v: (q[:, 1:], k[:, 1:], v[:, 1:]), {}),
    "value": (lambda q, k, v: (q, k, v[:, :-1]), {}),
    "impl": (lambda q, k, v: (q, k, v), {"impl": "fast"}),
    "scale": (lambda q, k, v: (q, k, v), {"scale": "large"}),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_in_the_same_words(kernel, bad):
    change, options = BAD[bad]
    window, said = WINDOWS["near"], []
    for attend, window_of in (kernel.local_attention, kernel.Window), (local_attention, Window):
        with pytest.raises(ValueError, match="local_attention: ") as caught:
            attend(*change(*inputs(window)), window_of(**window), **options)
        assert caught.type is ValueError
        said.append(str(caught.value))
    assert said[0] == said[1]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-S", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_the_script_needs_python_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    code, said, complaint = run(tmp_path / "empty")
    assert (code, said, complaint) == (0, str(tmp_path / "empty/build/torch-universal"), "")


def test_the_script_refuses_what_is_there_and_leaves_it(tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    for out in (full, file):
        told = f"kernel hub: the folder must be new or empty, got {out}."
        assert run(out) == (2, "", told)
    told = "kernel hub: --version must be 0 or more, got -1."
    assert run(tmp_path / "new", "--version", "-1") == (2, "", told)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine"]


def test_nothing_half_written_stays(example, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example, "_metadata", full_disk)
    with pytest.raises(OSError, match="No space left"):
        example.make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
