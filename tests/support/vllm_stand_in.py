"""vLLM-Omni's own modules without vLLM, whose wheels are for GPUs.

Of vLLM there is a stand-in: the few things that attention layers and transformers compute with, for
one process on a CPU; everything else is an empty class. vLLM-Omni's package is entered past its
`__init__`, which patches vLLM. Its platform is its interface, as that of a CUDA device.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

NAMES = ("vllm", "vllm_omni")
# Packages entered past their `__init__`, which patches vLLM or imports whole pipelines.
PACKAGES = (
    *("vllm_omni", "vllm_omni.platforms"),
    *(f"vllm_omni.diffusion.models.{each}" for each in ("flux", "flux2", "flux2_klein")),
    "vllm_omni.diffusion.models.qwen_image",
)


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Anything(metaclass=_Anything):
    """Whatever is imported and not used; its members are their names."""

    def __init__(self, *args, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] != "vllm" or "flash_attn" in name:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        for name, value in STAND_INS.get(module.__name__, {}).items():
            setattr(module, name, value)


class Linear(nn.Linear):
    """Of one rank: `vllm.model_executor.layers.linear`'s, all but the one of query, key, value."""

    def __init__(self, input_size, output_size, bias=True, *, return_bias=True, **others):
        super().__init__(input_size, output_size, bias)
        self.return_bias = return_bias

    def forward(self, x):
        return (super().forward(x), None) if self.return_bias else super().forward(x)


class QKVLinear(Linear):
    def __init__(
        self, hidden_size, head_size, total_num_heads, total_num_kv_heads=None, bias=True, **others
    ):
        heads, key_heads = total_num_heads, total_num_kv_heads or total_num_heads
        super().__init__(hidden_size, head_size * (heads + 2 * key_heads), bias)
        self.num_heads, self.num_kv_heads = heads, key_heads


class MergedLinear(Linear):
    def __init__(self, input_size, output_sizes, bias=True, **others):
        super().__init__(input_size, sum(output_sizes), bias, **others)


class RMSNorm(nn.RMSNorm):
    def __init__(self, hidden_size, eps=1e-6, **others):
        super().__init__(hidden_size, eps)


class _Platforms(enum.Enum):
    UNSPECIFIED = "unspecified"


def _resolve(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _same(function):
    return function


class _Logger(logging.LoggerAdapter):
    warning_once = info_once = debug_once = lambda self, *args: self.debug(*args)


STAND_INS = {
    "vllm.logger": {"init_logger": lambda name: _Logger(logging.getLogger(name), {})},
    "vllm.envs": {"VLLM_PLUGINS": None},
    "vllm.plugins": {"load_general_plugins": lambda: None},
    "vllm.utils.import_utils": {"resolve_obj_by_qualname": _resolve},
    "vllm.platforms.interface": {"PlatformEnum": _Platforms},
    "vllm.config.utils": {"config": lambda cls: cls},
    "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": []},
    "vllm.triton_utils": {"HAS_TRITON": False, "triton": types.SimpleNamespace(jit=_same)},
    "vllm.utils.torch_utils": {"direct_register_custom_op": lambda *args, **others: None},
    "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: 1},
    "vllm.model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
    "vllm.model_executor.layers.linear": {
        "ColumnParallelLinear": Linear,
        "ReplicatedLinear": Linear,
        "RowParallelLinear": Linear,
        "MergedColumnParallelLinear": MergedLinear,
        "QKVParallelLinear": QKVLinear,
    },
}


@contextmanager
def vllm_omni():
    """vLLM-Omni's modules can be imported, until the end; then nobody knows of them."""
    finder, (root,) = _Finder(), find_spec("vllm_omni").submodule_search_locations
    sys.meta_path.insert(0, finder)
    try:
        for name in PACKAGES:
            package = types.ModuleType(name)
            package.__path__ = [root + name.removeprefix("vllm_omni").replace(".", "/")]
            sys.modules[name] = package
        _set_platform()
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
            del sys.modules[name]


def _set_platform():
    interface = importlib.import_module("vllm_omni.platforms.interface")
    registry = importlib.import_module("vllm_omni.diffusion.attention.backends.registry")

    class Platform(interface.OmniPlatform):
        _omni_enum = interface.OmniPlatformEnum.CUDA
        device_name = device_type = "cuda"

        @classmethod
        def get_diffusion_attn_backend_cls(
            cls, selected_backend, head_size, allow_trtllm_default=False
        ):
            name = (selected_backend or "TORCH_SDPA").upper()
            cls.validate_diffusion_attn_backend(name)
            return registry.DiffusionAttentionBackendEnum[name].get_path()

        @classmethod
        def get_device_count(cls):
            return 0

    sys.modules["vllm_omni.platforms"].current_omni_platform = Platform()
    torch.manual_seed(0)
