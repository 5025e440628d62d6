"""A forward of every family by one process, or by several ranks that share the image."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from clear_dit import apply_clear
from clear_dit.pipelines.cascade.two_position_processor import TwoPositionsInFullAttention
from clear_dit.pipelines.parallel.patch_parallel import parallelize
from clear_dit.weights.forward import changed_in_forwards

from .families.models import FAMILIES, make_inputs, make_model, run
from .families.two_positions import EMBEDDERS, give_positions

ROWS, COLUMNS, RADIUS = 7, 5, 2
FACTORS = (0.7, 0.5, 0.3)
# Arguments of `predict` that every family is tried with.
SETTINGS = {
    "far": {"far": True},
    "local": {"far": False, "radius": 3},
    "pooled": {"down_factor": 2},
    "radius over a band": {"far": True, "radius": 6, "proportional_base": 20},
    "interior rows": {"far": True, "rows": 39, "columns": 3},
}


def cases(name):
    """Arguments of `predict` by what they are, for one family."""
    found = {each: {**settings, "batch": 2} for each, settings in SETTINGS.items()}
    if name in EMBEDDERS:
        for far in (False, True):
            found[f"several positions, far={far}"] = {"far": far, "factors": FACTORS}
    family = FAMILIES[name]
    if family.masks_text:
        padded = {"batch": 3, "padded": True}
        found["padded"] = {"far": True, **padded}
        if name in EMBEDDERS:
            found["padded, several positions"] = {"far": True, "factors": FACTORS, **padded}
    if family.takes_references:
        found["references"] = {"far": True, "references": ((2, 3), (5, 1))}
    return found


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
    **inputs,
):
    """What a family's tiny model predicts, whole.

    Args:
        mesh: of the ranks; None for one process.
        factors: of further positions, see `give_positions`.
        inputs: see `make_inputs`.
    """
    model = make_model(name, **LARGER.get(name, {}))
    if factors:
        give_positions(model, name, factors)
    apply_clear(
        model,
        radius=radius,
        far=far,
        down_factor=down_factor,
        proportional_base=proportional_base,
        impl="tiled",
    )
    patches = None if mesh is None else parallelize(model, mesh)
    given = make_inputs(name, rows, columns, **inputs)
    if factors:
        with changed_in_forwards(model, TwoPositionsInFullAttention(radius)):
            found = run(model, given)
    else:
        found = run(model, given)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, f"{name}: hooks are left"
    if patches is not None:
        assert patches.traffic.layers == len(list(layers_of(model)))
        assert patches.traffic.sent["halo"] > 0
        patches.remove()
    return found


def layers_of(model):
    from clear_dit.families.table import attention_layers

    return attention_layers(model)


# Tiny models with positions for an image of 39 rows.
LARGER = {
    "sd3": {"pos_embed_max_size": 40},
    "z-image": {"axes_lens": [256, 40, 16]},
    "cogview4": {"rope_axes_dim": (40, 16)},
}


def predict_all(folder):
    """Every case of every family on the ranks of a test; kept by rank."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("patch",))
    found = {
        (name, what): predict(name, mesh, **case)
        for name in FAMILIES
        for what, case in cases(name).items()
    }
    torch.save(found, folder / os.environ["RANK"])
