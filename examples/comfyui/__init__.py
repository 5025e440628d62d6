"""CLEAR for ComfyUI: attention in time linear in the pixels, and weights tuned for it.

Copy this folder into ComfyUI's `custom_nodes`; `requirements.txt` says what it needs.
"""

from comfy_api.latest import ComfyExtension, io

from .node_attention import ClearAttention
from .node_weights import ClearWeights


class ClearExtension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ClearAttention, ClearWeights]


async def comfy_entrypoint() -> ClearExtension:
    """What ComfyUI looks for."""
    return ClearExtension()
