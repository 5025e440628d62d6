"""Write `kernels/` as a folder that Hugging Face's `kernels` package loads, and others may.

    python examples/kernel-hub/make.py clear-local-attention

Needs Python alone. Nothing is built, and nothing is uploaded; see docs/kernel-hub.md.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "clear-local-attention"
MODULE = NAME.replace("-", "_")
# Of any device and any version of PyTorch.
VARIANT = "torch-universal"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def make(out: Path, version: int = 0) -> Path:
    """Write the kernel's repository, the whole of it or nothing.

    Args:
        out: a folder that is not there yet, or is empty.
        version: of the interface, as the hub counts; 0 stands for one that may still change.

    Returns:
        The folder of the package, within `out`.

    Raises:
        ValueError: `out` is a file or holds something, or `version` is negative.
        OSError: it cannot be written.
    """
    if version < 0:
        raise ValueError(f"--version must be 0 or more, got {version}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"the folder must be new or empty, got {out}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        made = Path(work) / "made"
        _write_package(made / "build" / VARIANT, version)
        shutil.copyfile(ROOT / "LICENSE", made / "LICENSE")
        card = (HERE / "CARD.md").read_text().replace("VERSION", str(version))
        (made / "README.md").write_text(card)
        if out.exists():
            out.rmdir()
        made.rename(out)
    return out / "build" / VARIANT


def _write_package(folder: Path, version: int) -> None:
    """Its modules, which import each other by relative names, and what the loader asks of them."""
    kernels = ROOT / "kernels"
    sources = {path.relative_to(kernels).as_posix(): path for path in kernels.rglob("*.py")}
    sources["__init__.py"] = HERE / "package.py"
    sources[f"{MODULE}/__init__.py"] = HERE / "package_within.py"
    for name, path in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    metadata = json.dumps(_metadata(folder, sorted(sources), version), indent=2)
    (folder / "metadata.json").write_text(metadata + "\n")


def _metadata(folder: Path, files: list[str], version: int) -> dict[str, Any]:
    digests = {name: hashlib.sha256((folder / name).read_bytes()) for name in files}
    # Of other contents another name, for the module and for its operators: see namespace.py.
    whole = hashlib.sha256(repr([(name, digests[name].hexdigest()) for name in files]).encode())
    return {
        "name": NAME,
        "id": f"_{MODULE}_{whole.hexdigest()[:12]}",
        "version": version,
        "license": "apache-2.0",
        "python-depends": [],
        # One must be named; of a universal variant the loader compares none.
        "backend": {"type": "cpu"},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digests[name].digest()).decode() for name in files},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write kernels/ as a kernel for Hugging Face's hub"
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--version", type=int, default=0, help="of the interface; 0: may change")
    options = parser.parse_args()
    try:
        made = make(options.out, options.version)
    except (ValueError, OSError) as error:
        print(f"kernel hub: {error}", file=sys.stderr)
        return 2
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
