"""A forward of every family by one process, or by several ranks that share the image."""

import os
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch.distributed.device_mesh import init_device_mesh

from clear_dit import apply_clear
from clear_dit.families.table import attention_layers
from clear_dit.pipelines.cascade.two_position_processor import TwoPositionsInFullAttention
from clear_dit.pipelines.parallel.patch_parallel import parallelize
from clear_dit.weights.forward import changed_in_forwards

from .families.models import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    Z_IMAGE_LONGER,
    Z_IMAGE_MULTIPLE,
    make_inputs,
    make_model,
    padded_to,
    run,
    sized,
)
from .families.two_positions import EMBEDDERS, give_positions
from .ip_adapter import make_sd3_ip_adapter

ROWS, COLUMNS, RADIUS = 7, 5, 2
FACTORS = (0.7, 0.5, 0.3)  # of the angles of further positions
# Arguments of `predict` that every family is tried with, in a batch of two.
SETTINGS = {
    "far": {"far": True},
    "local": {"far": False, "radius": 3},
    "pooled": {"down_factor": 2},
    "radius over a band": {"far": True, "radius": 6, "proportional_base": 20},
    "interior rows": {"far": True, "rows": 39, "columns": 3},
}
# Changes of the model with positions for an image of 39 rows.
LARGER = {
    "sd3": {"pos_embed_max_size": 40},
    "z-image": {"axes_lens": [256, 40, 16]},
    "cogview4": {"rope_axes_dim": (40, 16)},
}


def fuse(model):
    model.fuse_qkv_projections()


def skip_blocks(model):
    """Of the second forward on, by a cache that compares the first block's output."""
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def load_ip_adapter(model):
    model._load_ip_adapter_weights(make_sd3_ip_adapter(len(model.attn_processors)))


def keep_keys():
    """Keys of Qwen-Image 2.1's prefix, of a first forward for the next ones: `more` of each."""
    cache = QwenImage21KVCache(2)
    return lambda number: {
        "kv_cache": cache,
        "kv_cache_mode": "cached" if number else "extract",
    }


def controls(tokens, *names, as_dict=False):
    """What a ControlNet adds to some blocks: arguments of a forward by name."""
    generator = torch.Generator().manual_seed(9)
    width = HEADS * HEAD_DIM
    samples = list(torch.randn(2, 1, tokens, width, generator=generator))
    return {name: dict(enumerate(samples)) if as_dict else samples for name in names}


IMAGE = ROWS * COLUMNS
UNIFIED = padded_to(Z_IMAGE_MULTIPLE, IMAGE) + padded_to(Z_IMAGE_MULTIPLE, 5 + Z_IMAGE_LONGER)
OF_FLUX = ("controlnet_block_samples", "controlnet_single_block_samples")
CONTROLS = {
    "chroma": controls(IMAGE, *OF_FLUX),
    "qwen-image": controls(IMAGE, OF_FLUX[0]),
    "sd3": controls(IMAGE, "block_controlnet_hidden_states"),
    "z-image": controls(UNIFIED, OF_FLUX[0], as_dict=True),
}
IMAGE_PROMPT = {"ip_adapter_image_embeds": torch.ones(1, 3, 6)}
# What families have of their own.
OTHERS = {
    "flux2": {"fused": {"prepare": fuse}},
    "sd3": {
        "fused": {"prepare": fuse},
        "IP-adapter": {
            "prepare": load_ip_adapter,
            "more": {"joint_attention_kwargs": IMAGE_PROMPT},
        },
    },
    "qwen-image": {
        "two modulations": {"config": {"zero_cond_t": True}, "references": ((2, 3),)},
        "cache": {"prepare": skip_blocks, "forwards": 2},
    },
    "hunyuan-image": {"cache": {"prepare": skip_blocks, "forwards": 2}},
    "cogview4": {"cache": {"prepare": skip_blocks, "forwards": 2}},
    "qwen-image-2.1": {
        "kept keys": {"keep": keep_keys, "forwards": 2},
        "kept keys, padded": {"keep": keep_keys, "forwards": 2, "batch": 3, "padded": True},
        "kept keys, several positions": {"keep": keep_keys, "forwards": 2, "factors": FACTORS},
        "kept keys, pooled": {"keep": keep_keys, "forwards": 2, "down_factor": 2},
    },
}


def cases(name):
    """Arguments of `predict` by what they are, for one family."""
    found = {what: {**settings, "batch": 2} for what, settings in SETTINGS.items()}
    if name in EMBEDDERS:
        for far in (False, True):
            found[f"several positions, far={far}"] = {"far": far, "factors": FACTORS}
    family = FAMILIES[name]
    if family.masks_text:
        padded = {"batch": 3, "padded": True}
        found["padded"] = {"far": True, **padded}
        found["padded, several positions"] = {"far": True, "factors": FACTORS, **padded}
    if family.takes_references:
        found["references"] = {"far": True, "references": ((2, 3), (5, 1))}
    if name in CONTROLS:
        found["ControlNet"] = {"far": True, "more": CONTROLS[name]}
    return found | OTHERS.get(name, {})


@torch.no_grad()
def predict(
    name,
    mesh=None,
    rows=ROWS,
    columns=COLUMNS,
    radius=RADIUS,
    far=None,
    down_factor=1,
    proportional_base=None,
    factors=(),
    prepare=None,
    forwards=1,
    config=None,
    more=None,
    keep=None,
    **inputs,
):
    """What a family's tiny model predicts, whole.

    Args:
        mesh: of the ranks; None for one process.
        factors: of further positions, see `give_positions`.
        prepare: done to the model before.
        forwards: how many, of which the last counts.
        config: changes to the model's.
        more: arguments of the forward besides.
        keep: makes a function of the forward's number that gives such as well.
        inputs: see `make_inputs`.
    """
    rows, columns = sized(name, rows, columns)
    model = make_model(name, **LARGER.get(name, {}) | (config or {}))
    if factors:
        give_positions(model, name, factors)
    if prepare is not None:
        prepare(model)
    apply_clear(
        model,
        radius=radius,
        far=far,
        down_factor=down_factor,
        proportional_base=proportional_base,
        impl="tiled",
    )
    patches = None if mesh is None else parallelize(model, mesh)
    found, hooks = None, hooks_of(model)
    kept = keep() if keep is not None else lambda number: {}
    for seed in range(forwards):
        given = make_inputs(name, rows, columns, seed=seed, **inputs) | (more or {}) | kept(seed)
        given = {key: dict(x) if isinstance(x, dict) else x for key, x in given.items()}
        with in_forwards(model, radius, bool(factors)):
            found = run(model, given)
    assert hooks_of(model) == hooks, f"{name}: hooks are left"
    if patches is not None:
        # A second forward goes by what a cache has kept.
        assert forwards > 1 or patches.traffic.layers == len(attention_layers(model))
        assert patches.traffic.sent["halo"] > 0
        patches.remove()
    return found


def hooks_of(model):
    modules = list(model.modules())
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]


@contextmanager
def in_forwards(model, radius, several):
    """Within it forwards are passes of one kind for caches, and maybe understand positions."""
    with ExitStack() as stack:
        if hasattr(model, "cache_context"):
            stack.enter_context(model.cache_context("pass"))
        if several:
            stack.enter_context(changed_in_forwards(model, TwoPositionsInFullAttention(radius)))
        yield


def predict_all(folder, name):
    """Every case of a family on the ranks of a test; kept by rank."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("patch",))
    found = {what: predict(name, mesh, **case) for what, case in cases(name).items()}
    torch.save(found, folder / os.environ["RANK"])
