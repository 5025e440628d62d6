"""Pictures painted by one process or by several ranks that share it: what the latter run."""

import functools
import os
from functools import partial
from itertools import pairwise
from unittest import mock

import torch
import torch.distributed as dist
from conftest import make_inputs, make_transformer
from diffusers import FirstBlockCacheConfig
from torch.distributed.device_mesh import init_device_mesh

from clear_dit import CLEARFluxPipeline, apply_clear, remove_clear
from clear_dit.generation.models import DEMO, quiet_libraries
from clear_dit.pipelines.parallel import attention
from clear_dit.pipelines.parallel.exchange import MergedText
from clear_dit.pipelines.parallel.patch_parallel import parallelize
from clear_dit.weights.known import known_weights

STEPS = 4
LIKE_256, LIKE_384, ODD = (16, 16), (24, 16), (17, 13)  # tokens


class AveragedText(MergedText):
    """The paper's approximation: the mean of the ranks' outputs for the text.

    In the paper every rank's text sees the text, too; here the first rank's does.
    """

    def __init__(self, out, lse, group, traffic):
        super().__init__(out, torch.zeros_like(lse), group, traffic)


@torch.no_grad()
def denoise(
    mesh,
    grid=LIKE_256,
    radius=4,
    down_factor=1,
    batch=1,
    impl="tiled",
    prepare=None,
    passes=1,
    stale=None,
    references=0,
    text=5,
    controlled=False,
):
    """Final latents of a tiny random FLUX model after a few Euler steps, and the handle's traffic.

    Args:
        mesh: None for one process.
        prepare: done to the model before.
        passes: forwards of a step; they have other texts.
        stale: `stale_halos_after`.
        references: tokens of a reference image.
        controlled: whether a ControlNet adds to every block.
    """
    model = make_transformer()
    for name, parameter in model.named_parameters():  # attention that matters, and chooses
        if "to_v" in name or "add_v_proj" in name:
            parameter *= 6
        if ".norm_q" in name or ".norm_k" in name or "norm_added" in name:
            parameter *= 2
    if prepare is not None:
        prepare(model)
    apply_clear(model, radius=radius, down_factor=down_factor, impl=impl)
    if down_factor > 1:
        generator = torch.Generator().manual_seed(3)
        for processor in model.attn_processors.values():
            weight = processor.spatial_weight
            weight.copy_(weight * 2 * torch.rand(weight.shape, generator=generator))
    patches = None if mesh is None else parallelize(model, mesh, stale_halos_after=stale)
    given = [make_inputs(*grid, text=text + n, batch=batch, seed=n) for n in range(passes)]
    latents = given[0].pop("hidden_states")
    beside = torch.randn(batch, references, 4, generator=torch.Generator().manual_seed(8))
    ids = torch.zeros(references, 3)
    ids[:, 0], ids[:, 2] = 1, torch.arange(references)
    if controlled:
        generator = torch.Generator().manual_seed(9)
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            given[0][name] = list(torch.randn(2, *latents.shape[:2], 32, generator=generator))
    for one in given:
        one["img_ids"] = torch.cat([one["img_ids"], ids])
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for sigma, next_sigma in pairwise(sigmas.tolist()):
        velocity = 0
        for number, one in enumerate(given):
            one["hidden_states"] = torch.cat([latents, beside], dim=1)
            one["timestep"] = torch.full((batch,), sigma)
            with model.cache_context(str(number)):
                out = model(**one).sample[:, : latents.shape[1]]
            velocity = velocity + (1 - 2.5 * number) * out
        latents = latents + (next_sigma - sigma) * velocity
    if patches is None:
        return latents, None
    patches.remove()
    return latents, patches.traffic


def add_lora(model):
    from peft import LoraConfig

    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "add_k_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def fuse(model):
    model.fuse_qkv_projections()


def cache(threshold):
    return lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=threshold))


# Skips some steps and not others; test_the_cache_acts_in_between says so.
SKIPS_SOME = 0.6

CASES = {
    "16 x 16, radius 2": {"radius": 2},
    "16 x 16, radius 1": {"radius": 1},
    "24 x 16, radius 4": {"grid": LIKE_384},
    "17 x 13, radius 3": {"grid": ODD, "radius": 3},
    "17 x 13, radius over a band": {"grid": ODD, "radius": 11},
    "radius over the diagonal": {"grid": ODD, "radius": 40},
    "60 x 5, interior rows": {"grid": (60, 5), "radius": 3},
    "batch 2": {"batch": 2, "radius": 6},
    "pooled by 2": {"down_factor": 2, "radius": 3},
    "pooled by 4, odd grid, batch 2": {"grid": ODD, "down_factor": 4, "batch": 2},
    "pooled with interior rows": {"grid": (60, 5), "down_factor": 4, "radius": 3},
    "two passes": {"passes": 2, "grid": ODD},
    "LoRA": {"prepare": add_lora},
    "cache, some skipped": {"prepare": cache(SKIPS_SOME), "grid": ODD},
}
# For three ranks only, of which one has two neighbours.
OTHERS = {
    "fused projections": {"prepare": fuse},
    "reference image": {"references": 6, "grid": ODD},
    "ControlNet": {"controlled": True, "grid": ODD},
    "implementation": {"impl": "reference", "grid": ODD},
    "no text": {"text": 0, "grid": ODD},
    "cache, none skipped": {"prepare": cache(0.0)},
    "cache, all skipped": {"prepare": cache(10.0), "references": 6, "passes": 2},
}


@functools.cache
def demo():
    """The demo pipeline, with a first stage of a cascade at 256 px."""
    with quiet_libraries():
        pipe = CLEARFluxPipeline.from_pretrained(DEMO, use_safetensors=True, native_size=256)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(mesh, height=256, width=256, radius=4, adapted=False, stale=None, **options):
    """Final latents of the demo pipeline, two passes of guidance.

    Args:
        adapted: whether with the weights made for the radius.
        stale: `stale_halos_after`.
    """
    pipe = demo()
    remove_clear(pipe)
    apply_clear(pipe, radius=radius, weights=known_weights("demo", radius, 1) if adapted else None)
    if mesh is not None:
        pipe.enable_patch_parallel(mesh, stale)
    try:
        return pipe(
            "a green tower in the desert at night, a white moon on the right",
            negative_prompt="the sea",
            true_cfg_scale=2.0,
            height=height,
            width=width,
            num_inference_steps=4,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            **options,
        ).images
    finally:
        pipe.disable_patch_parallel()


PICTURES = {"256 x 256 px": {}, "384 x 256 px": {"height": 384, "radius": 3}}
# For two and three ranks.
CASCADE = {
    "a cascade to 400 x 272 px": {
        **{"height": 400, "width": 272, "cascade": True, "low_resolution_guidance": 1.0},
        **{"radius": 8, "adapted": True},
    },
}


def cases(world):
    """Arguments of `denoise` that this number of ranks is tried with, by name."""
    return CASES | OTHERS if world == 3 else CASES


def pictures(world):
    """The same, of `paint`."""
    return PICTURES | CASCADE if world < 4 else PICTURES


def make_mesh(patch, guidance=None):
    if guidance is None:
        return init_device_mesh("cpu", (patch,), mesh_dim_names=("patch",))
    return init_device_mesh("cpu", (guidance, patch), mesh_dim_names=("guidance", "patch"))


def averaged(run, mesh):
    """What `run` gives with the paper's approximation."""
    with mock.patch.object(attention, "MergedText", AveragedText):
        return run(mesh)


def all_cases(mesh, world):
    """Latents and traffic of every case, by name."""
    found = {name: denoise(mesh, **case) for name, case in cases(world).items()}
    found["averaged"] = averaged(partial(denoise, **CASES["24 x 16, radius 4"]), mesh)
    found["stale after all steps"] = denoise(mesh, stale=STEPS, **CASES["two passes"])
    found["stale"] = denoise(mesh, stale=2, **CASES["two passes"])
    for name, picture in pictures(world).items():
        found[name] = paint(mesh, **picture), None
    if world == 2:
        found["demo averaged"] = averaged(paint, mesh), None
        found["demo stale"] = paint(mesh, stale=2), None
        found["guidance ranks"] = paint(make_mesh(1, guidance=2)), None
    if world == 4:
        found["guidance ranks"] = paint(make_mesh(2, guidance=2)), None
    return found


def child_rank(rank, world, port, folder):
    """One of several processes under gloo; rank 0 saves what it found, all compare theirs to it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = all_cases(make_mesh(world), world)
    for name, (latents, _) in found.items():
        first = latents.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, latents), f"{name}: rank {rank} has other latents than rank 0"
    sent = {
        name: None if traffic is None else (dict(traffic.sent), traffic.layers)
        for name, (_, traffic) in found.items()
    }
    torch.save(({name: latents for name, (latents, _) in found.items()}, sent), f"{folder}/{rank}")
    dist.destroy_process_group()
