import pytest
from support.comfyui import pack as load_pack


@pytest.fixture
def pack(tmp_path):
    """The ComfyUI node pack, beside a stand-in for ComfyUI."""
    with load_pack(tmp_path / "models") as module:
        yield module
