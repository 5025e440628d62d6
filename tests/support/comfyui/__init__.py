"""A stand-in for what the node pack in `examples/comfyui` touches of ComfyUI, for its tests.

ComfyUI is not a package and its code is under the GPL, so none of it is here: these modules keep to
its contract (names, arguments, orders, what is copied) and do no more.
"""

import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from . import io, patcher

PACK = Path(__file__).parents[3] / "examples" / "comfyui"


def _modules(models: Path) -> dict[str, ModuleType]:
    made = {
        name: ModuleType(name)
        for name in ("comfy", "comfy.patcher_extension", "comfy_api", "comfy_api.latest")
    }
    made["comfy.patcher_extension"].WrappersMP = patcher.WrappersMP
    made["comfy_api.latest"].io = io
    made["comfy_api.latest"].ComfyExtension = io.ComfyExtension
    made["folder_paths"] = _folder_paths(models)
    return made


def _folder_paths(models: Path) -> ModuleType:
    module = ModuleType("folder_paths")
    folders: dict[str, list[str]] = {}
    module.models_dir = str(models)

    def add_model_folder_path(name: str, path: str) -> None:
        folders.setdefault(name, []).append(path)

    def get_filename_list(name: str) -> list[str]:
        return sorted(file.name for path in folders[name] for file in Path(path).glob("*"))

    def get_full_path_or_raise(name: str, file: str) -> str:
        for path in folders[name]:
            if (Path(path) / file).is_file():
                return str(Path(path) / file)
        raise FileNotFoundError(f"{name}: no file {file}")

    for function in (add_model_folder_path, get_filename_list, get_full_path_or_raise):
        setattr(module, function.__name__, function)
    return module


@contextmanager
def pack(models: Path):
    """The node pack as ComfyUI imports it: its folder, by path, as a package of any name.

    Args:
        models: ComfyUI's folder of models.
    """
    before = dict(sys.modules)
    sys.modules.update(_modules(models))
    name = "comfyui_clear_under_test"
    spec = spec_from_file_location(
        name, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for added in [n for n in sys.modules if n == name or n.startswith((f"{name}.", "comfy"))]:
            del sys.modules[added]
        sys.modules.pop("folder_paths", None)
        sys.modules.update({n: m for n, m in before.items() if n not in sys.modules})
