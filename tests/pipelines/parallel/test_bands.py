"""Bands of rows, what travels between them, and what is refused; no process is started."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from clear_dit import CLEARFluxPipeline, apply_clear
from clear_dit.kernels.cells import levels_needed
from clear_dit.kernels.window import Window
from clear_dit.pipelines.parallel.bands import QUERY_ROWS, Bands, common
from clear_dit.pipelines.parallel.exchange import HaloRows, MergedText, Traffic
from clear_dit.pipelines.parallel.patch_parallel import PatchParallel, _Steps, parallelize
from clear_dit.pipelines.parallel.pooled import CellBands, FarCells


@pytest.mark.parametrize(
    ("rows", "ranks", "reach"), [(17, 4, 1), (16, 7, 9), (64, 2, 7), (5, 5, 0)]
)
def test_bands_partition_the_rows_and_fit_each_other(rows, ranks, reach):
    views = [Bands(rows, ranks, rank, reach) for rank in range(ranks)]
    assert [row for view in views for row in view.own] == list(range(rows))
    sizes = {len(view.own) for view in views}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == views[0].largest
    for view in views:
        above, below = view.halo(view.rank)
        assert [row for _, part in view.receives for row in part] == [*above, *below]
        for other, part in view.receives:
            assert (view.rank, part) in views[other].sends
        assert sum(len(view.receives) for view in views) == sum(len(v.sends) for v in views)
        pieces = [*view.borders, *([view.interior] if view.interior else [])]
        assert sorted(row for piece in pieces for row in piece.queries) == list(view.own)
        for piece in pieces:
            seen = range(max(0, piece.queries[0] - reach), min(rows, piece.queries[-1] + reach + 1))
            assert common(seen, piece.keys) == seen
        if view.interior is not None:
            assert view.interior.keys == view.own


def test_interior_is_made_of_whole_query_tiles():
    middle = Bands(192, 3, 1, 7)
    assert middle.interior is not None
    assert middle.interior.queries == range(64 + QUERY_ROWS, 128 - QUERY_ROWS)
    assert Bands(64, 4, 1, 7).interior is None
    assert Bands(64, 4, 0, 40).interior is None
    assert Bands(64, 1, 0, 40).borders == []


@pytest.fixture
def fake_ranks():
    """A function that starts a group in which this process is one rank and the others are not."""

    def start(rank, world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        return dist.group.WORLD

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 3])
def test_bytes_at_8k_are_at_most_a_sixth_of_ulysses(fake_ranks, rank):
    """FLUX at 8192 px in bfloat16, radius 16, 8 ranks; one head of 24 stands for all."""
    world, side, text, radius, channels = 8, 512, 512, 16, 128
    group, traffic = fake_ranks(rank, world), Traffic(layers=1)
    bands = Bands(side, world, rank, radius - 1)
    tokens = torch.empty(1, len(bands.own) * side, channels, dtype=torch.bfloat16)
    HaloRows(tokens, bands, side, group, traffic).wait()
    merged = MergedText(torch.zeros(1, text, 1, channels), torch.zeros(1, text, 1), group, traffic)
    merged.start_sum()
    merged.wait()
    neighbours = 1 if rank == 0 else 2
    assert traffic.sent["halo"] == neighbours * (radius - 1) * side * channels * 2
    # Ulysses (arXiv 2309.14509): query, key, value and output, each by an all-to-all in which a
    # rank sends all but one part of its share of the sequence.
    ulysses = 4 * (side * side + text) / world * channels * 2 * (world - 1) / world
    print(f"rank {rank}: {traffic.per_layer() / ulysses:.4f} of Ulysses")
    assert traffic.per_layer() <= ulysses / 6


def sent_of_far_keys(group, rank, world, rows):
    """Bytes, one head of 128 channels in bfloat16, radius 2, of an image 8 tokens wide."""
    window = Window(rows, 8, 0, 2, far_levels=levels_needed(rows, 8, 2))
    bands, traffic = Bands(rows, world, rank, window.reach), Traffic()
    cells = [CellBands.of(window, bands, 1 + n) for n in range(window.far_levels)]
    own = torch.zeros(1, len(bands.own) * 8, 1, 128, dtype=torch.bfloat16)
    keys = [(range(window.far_levels + 1), own)]
    key, _ = FarCells(keys, own, None, 1.0, window, bands, cells, group, traffic).wait()
    seen = [window.rows_in_reach(1 + n, bands.own) for n in range(window.far_levels)]
    assert key.shape[1] == sum(len(one) * -(-8 // 2 ** (1 + n)) for n, one in enumerate(seen))
    return traffic.sent["far"]


@pytest.mark.parametrize("world", [4, 8, 16, 32])
def test_far_keys_of_a_tall_image_are_not_gathered(fake_ranks, world):
    """A rank in the middle of 1024 rows sends little, however many there are."""
    rows, rank = 1024, world // 2
    sent = sent_of_far_keys(fake_ranks(rank, world), rank, world, rows)
    cells = sum((rows // 2**level) * max(1, 8 // 2**level) for level in range(1, 10))
    gathered = cells * 2 * 128 * 2 * (world - 1) / world
    print(f"{world} ranks: {sent / gathered:.3f} of an all-gather")
    assert 0 < sent < gathered / 20


def test_steps_are_counted_by_their_timesteps():
    steps = _Steps()
    seen = []
    for timestep in (1.0, 1.0, 0.5, 0.5, 0.2, 0.9, 0.9):
        begins = steps.count(timestep)
        seen.append((begins, steps.step, steps.forward_pass))
    assert seen == [
        (True, 0, 0), (False, 0, 1), (False, 1, 0), (False, 1, 1), (False, 2, 0),
        (True, 0, 0), (False, 0, 1),
    ]  # fmt: skip


def test_more_ranks_than_rows(fake_ranks, tiny_transformer, tiny_inputs):
    with pytest.raises(
        ValueError, match="3 rows of tokens can be shared by at most 3 ranks, got 4"
    ):
        Bands(3, 4, 0, 1)
    fake_ranks(0, 4)
    model = tiny_transformer()
    apply_clear(model, radius=2)
    parallelize(model, init_device_mesh("cpu", (4,), mesh_dim_names=("patch",)))
    with pytest.raises(ValueError, match="at most 3 ranks, got 4"), torch.no_grad():
        model(**tiny_inputs(3, 5))


def test_what_is_refused(fake_ranks, tiny_pipeline, tiny_transformer, tiny_inputs):
    fake_ranks(0, 4)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("patch",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("guidance", "patch"))
    model = tiny_transformer()
    with pytest.raises(ValueError, match="call apply_clear first"):
        parallelize(model, mesh)
    apply_clear(model, radius=2)
    for wrong in (
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("patch", "tensor")),
    ):
        with pytest.raises(ValueError, match="must have the dimension 'patch'"):
            PatchParallel(wrong)
    with pytest.raises(ValueError, match="'guidance' must be 1 or 2, got 4"):
        PatchParallel(init_device_mesh("cpu", (4, 1), mesh_dim_names=("guidance", "patch")))
    with pytest.raises(ValueError, match="stale_halos_after must be an integer of at least 1"):
        PatchParallel(mesh, stale_halos_after=0)
    with pytest.raises(ValueError, match="needs CLEARFluxPipeline"):
        parallelize(model, both)

    # A grid that contradicts the latents.
    patches = parallelize(model, mesh)
    inputs = tiny_inputs(6, 5)
    with pytest.raises(ValueError, match="6 x 5 = 30 image tokens, but hidden_states has 24"):
        model(**inputs | {"hidden_states": inputs["hidden_states"][:, :24]})
    # A layer that would see a part of the image only.
    stock = tiny_transformer().transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_processor(stock)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn has .*FluxAttnProcessor"):
        model(**inputs)
    apply_clear(model, radius=2)
    with pytest.raises(ValueError, match=r"patch parallel has no backward pass; use torch.no_grad"):
        model(**inputs)
    apply_clear(model, radius=2, down_factor=2, pooled_weight="count")
    with pytest.raises(ValueError, match="does not share pooled keys that weigh as their tokens"):
        model(**inputs)
    patches.remove()
    with torch.no_grad():
        assert model(**inputs).sample.shape == (1, 30, 4)

    pipe = tiny_pipeline(CLEARFluxPipeline)
    pipe.enable_patch_parallel(both)

    def generate(**options):
        given = {"height": 24, "width": 40, "num_inference_steps": 1, "max_sequence_length": 6}
        given["generator"] = torch.Generator().manual_seed(0)
        pipe("a red house", **given | {"output_type": "latent"} | options)

    with pytest.raises(ValueError, match="this pipeline has full attention; call apply_clear"):
        generate()
    apply_clear(pipe, radius=2)
    with pytest.raises(ValueError, match="must draw the same noise"):
        generate(generator=None)
    with pytest.raises(ValueError, match="stages_dir does not work with patch parallelism"):
        generate(stages_dir="nowhere")
    with pytest.raises(ValueError, match="guidance ranks need two passes"):
        generate()
    with pytest.raises(ValueError, match="at most 1 ranks, got 2"):
        generate(height=4, width=16)
