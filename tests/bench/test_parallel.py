"""Formulas of what ranks send, against exchanges that are played through and counted."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support import rank_tasks
from support.slow import slow
from typer.testing import CliRunner

from clear_dit.bench.parallel_bytes import FLOAT32, Layer, halo_bytes, ring_bytes, ulysses_bytes
from clear_dit.bench.parallel_plan import ASSUMED, Rates, plan_parallel
from clear_dit.cli import app
from clear_dit.pipelines.parallel.bands import Bands

# FLUX.1-dev at 8192 pixels, with CLEAR's radius 16.
FLUX_8K = Layer(512, 512, 512, 16, 24, 128, 2)


def played_ulysses(tokens, heads, head_dim, ranks):
    """Bytes each rank sends, the tensors cut by tokens and then by heads; they come back whole."""
    whole = torch.randn(4, tokens, heads, head_dim, dtype=torch.float64)
    by_token = whole.chunk(ranks, dim=1)
    sent = [0] * ranks
    by_head = []
    for to in range(ranks):
        parts = [by_token[source].chunk(ranks, dim=2)[to][:3] for source in range(ranks)]
        for source, part in enumerate(parts):
            sent[source] += part.nbytes * (source != to)
        by_head.append(torch.cat(parts, dim=1))
    for to in range(ranks):
        for source, part in enumerate(by_head):
            output = part[0].chunk(ranks, dim=0)[to]
            sent[source] += output.nbytes * (source != to)
    assert torch.equal(torch.cat(by_head, dim=2), whole[:3])
    return sent


def played_ring(tokens, heads, head_dim, ranks):
    """Bytes each rank sends; every rank has then seen all keys and values."""
    whole = torch.randn(2, tokens, heads, head_dim, dtype=torch.float64)
    at = list(whole.chunk(ranks, dim=1))
    seen = [[block] for block in at]
    sent = [0] * ranks
    for _ in range(ranks - 1):
        for rank, block in enumerate(at):
            sent[rank] += block.nbytes
        at = [at[rank - 1] for rank in range(ranks)]
        for blocks, block in zip(seen, at, strict=True):
            blocks.append(block)
    for blocks in seen:
        assert torch.isclose(sum(block.sum() for block in blocks), whole.sum())
    return sent


def played_halo(layer, ranks):
    """Bytes of rows each rank sends so that all queries have the rows they see, one by one."""
    edges = [layer.rows * rank // ranks for rank in range(ranks + 1)]
    owner = [rank for rank in range(ranks) for _ in range(edges[rank], edges[rank + 1])]
    needs = {
        (owner[row], other)
        for row in range(layer.rows)
        for other in range(layer.rows)
        if (row - other) ** 2 < layer.radius**2 and owner[other] != owner[row]
    }
    row_bytes = layer.columns * layer.heads * layer.head_dim * layer.itemsize
    return [sum(owner[row] == rank for _, row in needs) * row_bytes for rank in range(ranks)]


def played_far(layer, ranks):
    """Bytes of cells each rank sends: its part of a row of cells to each who may look at it."""
    edges = [layer.rows * rank // ranks for rank in range(ranks + 1)]
    bands = [range(*edge) for edge in pairwise(edges)]
    sent = [0] * ranks
    # A row of cells may be seen where the row around it may be looked into. The coarsest has none
    # around it; it is the last with a cell beyond the reach of its level.
    levels = [1]
    while (layer.radius * 2 ** levels[-1]) ** 2 <= layer.rows**2 + layer.columns**2:
        levels.append(levels[-1] + 1)
    for level in levels:
        side, around = 2**level, 2 ** (level + 1)
        tops = range(0, layer.rows, side)
        makers = [
            {rank for rank in range(ranks) for row in bands[rank] if row // side == top // side}
            for top in tops
        ]
        itemsize = 4 if any(len(those) > 1 for those in makers) else layer.itemsize
        columns = -(-layer.columns // side)
        by_message = [0] * ranks
        for top, those in zip(tops, makers, strict=True):
            first = top // around * around
            centre = (first + min(first + around, layer.rows) - 1) / 2
            needs = {
                rank
                for rank in range(ranks)
                for row in bands[rank]
                if level == levels[-1] or abs(row - centre) < layer.radius * side
            }
            for rank in those:
                by_message[rank] += len(needs - {rank}) * columns * itemsize
        # Reduce-scatter, then all-gather, where that is less.
        reduced = 2 * (ranks - 1) * len(tops) * columns * itemsize / ranks
        if any(len(those) > 1 for those in makers) and reduced < max(by_message):
            by_message = [reduced] * ranks
        sent = [sum(both) for both in zip(sent, by_message, strict=True)]
    return [2 * each * layer.heads * layer.head_dim for each in sent]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(14, 5, 0, 2, 2, 4, 2, far=True),
        Layer(32, 9, 0, 3, 2, 4, 2, far=True),
        Layer(64, 3, 0, 2, 2, 4, 4, far=True),
        Layer(9, 9, 0, 30, 2, 4, 2, far=True),
    ],
    ids=str,
)
def test_rows_of_cells(layer, ranks):
    reach = min(layer.radius, layer.rows + layer.columns)
    halo = [
        len(rows) * layer.columns * layer.token_bytes
        for rank in range(ranks)
        for rows in [
            [row for _, part in Bands(layer.rows, ranks, rank, reach).sends for row in part]
        ]
    ]
    far = played_far(layer, ranks)
    # A reduction's parts are rounded to bytes.
    assert 0 <= max(map(sum, zip(halo, far, strict=True))) - halo_bytes(layer, ranks) < 7


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ulysses_and_ring(ranks):
    layer = Layer(4, 5, 4, 3, 6, 8, 8)
    assert played_ulysses(24, 6, 8, ranks) == [ulysses_bytes(layer, ranks)] * ranks
    assert played_ring(24, 6, 8, ranks) == [ring_bytes(layer, ranks)] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("radius", [1, 2, 3, 6])
def test_rows_of_the_halo(ranks, radius):
    layer = Layer(14, 5, 0, radius, 2, 4, 2)
    assert halo_bytes(layer, ranks) == max(played_halo(layer, ranks))


def test_the_text_is_merged_by_ring_reductions():
    layer = Layer(14, 5, 6, 1, 2, 4, 2)
    # Reduce-scatter, then all-gather: each rank passes on all parts but one, twice.
    part = 6 * 2 * (1 + 4 + 1) * FLOAT32 // 3
    assert halo_bytes(layer, 3) == 2 * 2 * part


def test_at_8k_a_sixth_of_ulysses_whatever_the_ranks():
    halo = {ranks: halo_bytes(FLUX_8K, ranks) for ranks in (2, 4, 8, 16, 32, 64)}
    ulysses = ulysses_bytes(FLUX_8K, 8)
    assert halo[8] <= ulysses / 6
    assert halo[8] <= ring_bytes(FLUX_8K, 8) / 24
    # Twice 15 rows of 512 tokens and the text; two ranks have one neighbour each.
    assert 94e6 < halo[4] < halo[64] < 108e6
    assert halo[2] < 0.6 * halo[4]
    assert ulysses_bytes(FLUX_8K, 16) is None


def test_far_keys_at_8k_travel_like_the_halo():
    """What grows with the ranks are parts of coarse cells, in float32, which several ranks send."""
    near = replace(FLUX_8K, text_length=0, radius=8)
    far = replace(near, far=True)
    ranks = (4, 8, 16, 64)
    cells = {count: halo_bytes(far, count) - halo_bytes(near, count) for count in ranks}
    assert cells[8] < 2.5 * halo_bytes(near, 8)
    assert max(cells.values()) < 1.6 * cells[4]
    all_cells = sum((512 // 2**level) ** 2 for level in range(1, 8))
    gathered = 2 * all_cells * far.token_bytes
    assert max(cells.values()) < gathered / 6


def test_a_plan_of_the_demo():
    result = plan_parallel("demo", [2048], 8, False, Rates(tflops=0.1, gbps=1, latency=10))
    rows = {(row["way"], row["ranks"]): row for row in result["rows"]}
    alone, two, ring = rows["one rank", 1], rows["halo", 2], rows["ring", 2]
    assert alone["efficiency"] == 1
    assert alone["communication_seconds"] == 0
    # The text is computed on both; half of the rest on each.
    assert alone["compute_seconds"] / 2 < two["compute_seconds"] < 0.6 * alone["compute_seconds"]
    assert two["seconds"] == two["compute_seconds"] + two["communication_seconds"]
    assert two["efficiency"] == pytest.approx(alone["seconds"] / 2 / two["seconds"])
    assert ring["mb_per_layer"] > two["mb_per_layer"]
    assert rows["ulysses", 2]["seconds"] is None  # 3 heads
    # Six layers of five messages one after the other, then half of the image's 64 channels.
    sent = 6 * two["mb_per_layer"] * 1e6 + 128 * 128 * 64 * 2 / 2
    assert two["communication_seconds"] == pytest.approx(sent / 1e9 + 6 * 5 * 10e-6)


@slow
def test_a_measured_step(tmp_path):
    statuses, said = rank_tasks.run_ranks(rank_tasks.bench, 3, tmp_path, tmp_path)
    assert statuses == [0] * 3, said
    found = [json.loads((tmp_path / f"bench-{rank}.json").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2]
    # The one in the middle has two neighbours: two rows of 8 tokens to each, and the text.
    for result, far in zip(found[0], (False, True), strict=True):
        assert result["correct"]
        assert result["max_error"] < 1e-5
        layer = Layer(16, 8, 64, 3, 3, 64, 4, far=far)
        middle = result["rows"][1]["mb_per_layer"] * 1e6
        assert middle == pytest.approx(halo_bytes(layer, 3), rel=0.01)
        assert result["rows"][0]["mb_per_layer"] < result["rows"][1]["mb_per_layer"]
    for row in result["rows"]:
        assert 0 < row["compute_seconds"] < row["seconds"]
        assert 0 < row["communication_seconds"] < row["seconds"]
    assert result["speedup"] == pytest.approx(3 * result["efficiency"])
    assert all(rate > 0 for rate in result["rates"].values())


def test_the_command(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = ["bench", "parallel", "--plan-model", "demo", "--sides", "1024", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table, last = result.output.rstrip().rsplit("\n", 1)
    assert "1024 x 1024 px" in table
    found = json.loads(last)
    assert found["plan"]["rates"]["gbps"] == ASSUMED.gbps
    assert "measured" not in found
