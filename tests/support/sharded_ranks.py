"""What two ranks do with a model that PyTorch shards or replicates (see `launch`)."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from clear_dit import apply_clear, load_clear_weights, remove_clear, save_clear_weights
from clear_dit.chunking import chunk_feed_forward

from .families.models import make_inputs, make_model, run

SHARDED = r"quantised or sharded \(.*\); do this on the plain model"


def by_fully_shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_fsdp(model):
    kinds = {type(model.transformer_blocks[0]), type(model.single_transformer_blocks[0])}
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy(kinds),
    )


def by_flat_fsdp(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


KINDS = {
    "fully_shard": by_fully_shard,
    "FSDP": by_fsdp,
    "flat FSDP": by_flat_fsdp,
    "DDP": DistributedDataParallel,
}


def same(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-6)


def attention(kind):
    """CLEAR before and after the model is wrapped, and gone again, is that of a plain model."""
    dist.init_process_group("gloo")
    given = make_inputs("flux", 4, 6)
    full = run(make_model("flux"), given)
    for settings in ({"far": False}, {"down_factor": 2}, {"far": True}):
        plain = make_model("flux")
        apply_clear(plain, radius=2, **settings)
        expected = run(plain, given)
        for first in ("apply", "wrap"):
            model = make_model("flux")
            if first == "apply":
                apply_clear(model, radius=2, **settings)
            wrapper = KINDS[kind](model)
            if first == "wrap":
                apply_clear(wrapper, radius=3, **settings)
                apply_clear(wrapper, radius=2, **settings)
            same(run(wrapper, given), expected)
            if kind != "DDP" and first == "apply" and "down_factor" in settings:
                with pytest.raises(ValueError, match="spatial_weight of the layers is sharded "):
                    apply_clear(wrapper, radius=3, down_factor=2)
                same(run(wrapper, given), expected)
            chunk_feed_forward(model, 5)
            same(run(wrapper, given), expected)
            assert remove_clear(wrapper)
            same(run(wrapper, given), full)


def weights(kind, path):
    """CLEAR weights are loaded before a model is sharded, or not at all."""
    dist.init_process_group("gloo")
    given = make_inputs("flux", 4, 6)
    model, plain = make_model("flux"), make_model("flux")
    for each in (model, plain):
        apply_clear(each, radius=2, far=False, weights=path)
    wrapper, mine = KINDS[kind](model), path.with_name(f"{dist.get_rank()}.safetensors")
    same(run(wrapper, given), run(plain, given))
    if kind == "DDP":
        save_clear_weights(wrapper, mine)
        assert remove_clear(wrapper)
        same(run(wrapper, given), run(make_model("flux"), given))
        return
    with pytest.raises(ValueError, match=f"save_clear_weights: .*{SHARDED}"):
        save_clear_weights(wrapper, mine)
    with pytest.raises(ValueError, match=f"load_clear_weights: .*{SHARDED}"):
        load_clear_weights(wrapper, path)
    with pytest.raises(ValueError, match=f"remove_clear: .*{SHARDED}"):
        remove_clear(wrapper)
    same(run(wrapper, given), run(plain, given))
