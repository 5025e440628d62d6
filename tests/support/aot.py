"""Ahead-of-time compilation of Triton kernels for GPUs that are not there.

Triton decides when it is imported whether it interprets, so the compiler gets a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def compile_ahead(cases: list[dict]) -> list[dict]:
    """Compile kernels in one new process; what does not compile is reported, not raised.

    Args:
        cases: dictionaries of `kernel` ("module:function"), `target` (of TARGETS), `signature`
            (argument to "*bf16", "i32", "i64", "fp32" or "constexpr", in order), `constexprs`
            (argument to value), `options` (num_warps, num_stages). Pointers and integers are taken
            for multiples of 16.

    Returns:
        For each case `error` (None, or the message) and, in bytes or counts, `shared`, `registers`
        and `spilled` (stack bytes on NVIDIA, spilled registers on AMD).
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [environment.get("PYTHONPATH"), str(root)])
    )
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compile_one(
    kernel: str, target: str, signature: dict, constexprs: dict, options: dict | None = None
) -> dict:
    """One case of `compile_ahead`, in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split(":")
    source = ASTSource(
        getattr(import_module(module), name),
        signature=signature,
        constexprs={(list(signature).index(key),): value for key, value in constexprs.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(signature.values())
            if kind[0] in "*i"
        },
    )
    try:
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options or {})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    if target.startswith("gfx"):
        registers, spilled = (
            int(re.search(rf"\.vgpr_{what}:\s*(\d+)", compiled.asm["amdgcn"])[1])
            for what in ("count", "spill_count")
        )
    else:
        registers, spilled = nvidia_usage(compiled.asm["cubin"])
    return {
        "error": None,
        "shared": compiled.metadata.shared,
        "registers": registers,
        "spilled": spilled,
    }


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, as the wheel's own cuobjdump tells them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert match, told
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    print(json.dumps([compile_one(**case) for case in json.load(sys.stdin)]))
