"""Imports run in one direction: between the rooms of the tree, inside them, and without a circle.

Read off the syntax tree, so that imports inside functions and for type checkers count too. (Tools
for this pass over `clear_dit/kernels` and `clear_dit/pipelines`, which are links.)
"""

import ast
import sys
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "clear_dit"
# A room imports from those before it. A line of several has no imports among them.
ROOMS = (
    "compat errors log_levels malloc memory process_group progress tables versions wrappers",
    "access files hooks kernels options",
    "attention chunking",
    "families vllm_omni",
    "weights",
    "plugin",
    "counting",
    "pipelines",
    "generation",
    "demo render",
    "calibration distillation evaluation",
    "bench",
    "__init__ app doctor",
    "cli",
)
INSIDE = {
    "kernels": (
        "cells groups merge namespace numbers",
        "full",
        "window",
        "pooling",
        "opaque reference flex",
        "tiled triton",
        "choice",
        "dense",
        "reference_images",
        "attention",
        "two_positions",
    ),
    "pipelines": (
        "decoding",
        "cascade",
        "parallel",
        "checks",
        "text_encoders memory_need identity",
        "text modular",
        "pipeline",
        "flux_text",
        "flux",
    ),
}
# Folders of folders that are rooms of their own.
FOLDERS_INSIDE = ("pipelines",)
MOST_ROOMS = 14

Imports = dict[str, set[str]]


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its name behind "clear_dit."."""
    found = {}
    for path in Path(ROOT).glob("**/*.py"):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    for link in ("kernels", "pipelines"):
        for path in (ROOT / link).resolve().glob("**/*.py"):
            within = path.relative_to((ROOT / link).resolve()).with_suffix("")
            found[".".join((link, *within.parts))] = path
    found.pop("__main__")  # the door: it has the command line's two lines
    return {name: ast.parse(path.read_text()) for name, path in found.items()}


@cache
def imports() -> Imports:
    """Which modules each module imports; a package is its `__init__`."""
    return {name: set(_imported(name, tree)) for name, tree in sources().items()}


def _imported(name: str, tree: ast.Module) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["clear_dit", *name.split(".")][: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for top, *parts in targets:
            if top == "clear_dit":
                # Of what is imported from a module only the module counts.
                candidates = (parts, parts[:-1])
                names = (".".join(part) for part in candidates)
                known = (
                    other for one in names for other in (one, f"{one}.__init__".lstrip("."))
                    if other in sources()
                )  # fmt: skip
                target = next(known, None)
                assert target is not None, f"{name} imports {'.'.join(parts)}, which is not there"
                yield target


def room_of(module: str, depth: int = 0) -> str:
    return module.split(".")[depth]


def wrong_way(found: Imports, order: tuple[str, ...], within: str | None = None) -> list[str]:
    """The imports against an order of rooms, each "importer -> imported"."""
    rank = {room: number for number, line in enumerate(order) for room in line.split()}
    depth = 0 if within is None else 1
    wrong = []
    for module, targets in found.items():
        for target in targets:
            if within is not None and {room_of(module), room_of(target)} != {within}:
                continue
            rooms = room_of(module, depth), room_of(target, depth)
            if rooms[0] == rooms[1]:
                continue
            if rank[rooms[0]] <= rank[rooms[1]]:
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def longest_chain(found: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports; fails on a circle, and names it."""
    longest: dict[str, list[str]] = {}
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name not in longest:
            assert name not in path, " -> ".join([*path[path.index(name) :], name])
            path.append(name)
            below = max((visit(other) for other in sorted(found[name])), key=len, default=[])
            path.pop()
            longest[name] = [name, *below]
        return longest[name]

    return max(map(visit, sorted(found)), key=len)


def folder_of(module: str) -> str:
    """Its room, and the folder inside where there are some."""
    room, *inside = module.split(".")
    return f"{room}.{inside[0]}" if room in FOLDERS_INSIDE and len(inside) > 1 else room


def folders(found: Imports) -> dict[str, set[str]]:
    between: dict[str, set[str]] = {folder_of(module): set() for module in found}
    for module, targets in found.items():
        between[folder_of(module)] |= set(map(folder_of, targets)) - {folder_of(module)}
    return between


def test_rooms_import_in_one_direction():
    assert wrong_way(imports(), ROOMS) == []


@pytest.mark.parametrize("room", INSIDE)
def test_so_do_the_rooms_inside(room):
    assert wrong_way(imports(), INSIDE[room], room) == []


def test_kernels_know_torch_numpy_and_triton_only():
    allowed = {*sys.stdlib_module_names, "numpy", "torch", "triton"}
    for name, tree in sources().items():
        if room_of(name) == "kernels":
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.split(".")[0] in allowed, name


def test_no_module_imports_itself_by_way_of_others():
    longest_chain(imports())


def test_the_longest_chain_of_rooms():
    chain = longest_chain(folders(imports()))
    assert len(chain) <= MOST_ROOMS, " -> ".join(chain)


def test_one_import_the_wrong_way_is_seen():
    for line, above in pairwise(ROOMS):
        room, other = line.split()[0], above.split()[-1]
        lower, upper = (
            next(module for module in imports() if room_of(module) == one) for one in (room, other)
        )
        changed = imports() | {lower: imports()[lower] | {upper}}
        assert wrong_way(changed, ROOMS) == [f"{lower} -> {upper}"]
    circle = imports() | {"kernels.window": {"kernels.attention"}}
    with pytest.raises(AssertionError, match=r"kernels.window -> kernels.attention -> "):
        longest_chain(circle)
