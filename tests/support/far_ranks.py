"""Attention with far keys of an image that ranks share, on random tokens: what one rank does."""

import os
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from clear_dit.attention.layout import Layout
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.two_positions import Scaled, two_position_attention
from clear_dit.kernels.window import Window
from clear_dit.pipelines.parallel.attention import SharedImage
from clear_dit.pipelines.parallel.exchange import Traffic

BATCH, HEADS, HEAD_DIM, CHANNELS = 2, 2, 8, 12


class Case(NamedTuple):
    rows: int
    columns: int
    radius: int
    text: int = 5
    levels: int = 10
    learned: bool = False
    positions: int = 1
    references: int = 0
    keeps_halos: bool = False
    group: int = 1  # query heads that read the same key head


CASES = {
    "odd": Case(23, 9, 3),
    "learned": Case(23, 9, 3, learned=True),
    "two positions": Case(67, 5, 2, positions=2),
    "two positions, learned, no text": Case(21, 7, 2, text=0, learned=True, positions=2),
    "positions between": Case(65, 5, 2, learned=True, positions=4),
    "positions between, wide radius": Case(21, 7, 11, positions=3),
    "coarse cells span all ranks": Case(5, 4, 2, learned=True),
    "interior rows": Case(75, 5, 2, keeps_halos=True),
    "past the diagonal": Case(13, 6, 40),
    "one level": Case(17, 8, 2, levels=1, learned=True),
    "reference image": Case(19, 6, 2, references=3),
    "grouped heads": Case(23, 9, 3, learned=True, group=3),
    "grouped heads, two positions, no text": Case(21, 7, 2, text=0, positions=2, group=2),
}


class Tokens:
    """A layer of random projections, whose keys a table multiplies as a rotary one turns them."""

    def __init__(self, case):
        generator = torch.Generator().manual_seed(0)
        layout = Layout(case.text, case.rows, case.columns, case.references)
        self.layout, self.first = layout, case.text + case.references
        self.hidden = torch.randn(BATCH, layout.sequence_length, CHANNELS, generator=generator)
        width = HEADS * HEAD_DIM
        query, key, value = torch.randn(3, CHANNELS, width, generator=generator) / 2
        more = torch.randn(CHANNELS, width * (case.group - 1), generator=generator) / 2
        self.projections = torch.cat([query, more], dim=1), key, value
        tables = 2 * case.positions
        self.rotary = tuple(
            1 + torch.rand(tables, layout.sequence_length, HEAD_DIM, generator=generator)
        )
        self.learned = {"spatial_weight": None, "far_offset": None}
        if case.learned:
            self.learned["spatial_weight"] = torch.rand(case.levels, 2, 2, generator=generator)
            self.learned["far_offset"] = torch.randn(
                case.levels, HEADS * case.group, generator=generator
            )

    def project(self, hidden, which):
        return (hidden @ self.projections[which]).unflatten(-1, (-1, HEAD_DIM))

    def key_value(self, hidden, rotary):
        return self.project(hidden, 1) * rotary[0][:, None], self.project(hidden, 2)

    def by_position(self):
        """The table in local attention's order, position by position."""
        tables = [self.layout.to_local(table[None])[0] for table in self.rotary]
        return list(zip(tables[::2], tables[1::2], strict=True))

    def tensors(self, hidden, by_position, layout):
        """Query, key and value in local attention's order, and the scaled ones."""
        hidden = layout.to_local(hidden)
        near, *further = by_position
        key, value = self.key_value(hidden, near)
        query = self.project(hidden, 0)
        scaled = None
        if further:
            # The query is turned against the key, as rotary embedding does it.
            *between, far = (
                (query / table[0][:, None], self.key_value(hidden, table)[0]) for table in further
            )
            scaled = Scaled(lambda: far, [lambda each=each: each for each in between])
        return (query / near[0][:, None], key, value), scaled


@torch.no_grad()
def whole(case):
    """(batch, text + references + image, heads, head_dim), by one process."""
    tokens = Tokens(case)
    tensors, scaled = tokens.tensors(tokens.hidden, tokens.by_position(), tokens.layout)
    window = Window(case.rows, case.columns, tokens.first, case.radius, far_levels=case.levels)
    if scaled is None:
        return local_attention(*tensors, window, impl="reference", **tokens.learned)
    return two_position_attention(
        tensors[:2], scaled, tensors[2], window, impl="reference", **tokens.learned
    )


@torch.no_grad()
def shared(case, group):
    """The same of this rank's rows, the bytes it counted by kind, and those that went out."""
    tokens, traffic = Tokens(case), Traffic()
    share = SharedImage(
        tokens.layout, case.radius, 1, case.levels, group, traffic, keeps_halos=case.keeps_halos
    )
    text = case.text
    hidden = torch.cat([tokens.hidden[:, :text], share.own_part(tokens.hidden[:, text:])], dim=1)
    by_position, of_halo = share.tables(tokens.rotary[0], tokens.by_position)
    tensors, scaled = tokens.tensors(hidden, by_position, share.layout)
    exchange = mock.Mock(side_effect=dist.batch_isend_irecv)
    reduce = mock.Mock(side_effect=dist.all_reduce)
    gather = mock.Mock(side_effect=dist.all_gather)
    with (
        mock.patch.object(dist, "batch_isend_irecv", exchange),
        mock.patch.object(dist, "all_reduce", reduce),
        mock.patch.object(dist, "all_gather", gather),
    ):
        halo = share.send("layer", share.layout.to_local(hidden))
        out = share.attend(
            tensors,
            scaled,
            lambda: tokens.key_value(halo.wait(), of_halo),
            scale=HEAD_DIM**-0.5,
            impl="reference",
            **tokens.learned,
        )
    operations = [each for call in exchange.call_args_list for each in call.args[0]]
    given = sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
    ranks = group.size()
    for call in reduce.call_args_list:  # as rings send them
        given += 2 * (ranks - 1) * call.args[0].nbytes // ranks
    given += sum((ranks - 1) * call.args[1].nbytes for call in gather.call_args_list)
    return out, dict(traffic.sent), given


def attend_all(folder):
    """Every case on the ranks of a test; kept by rank."""
    dist.init_process_group("gloo")
    found = {name: shared(case, dist.group.WORLD) for name, case in CASES.items()}
    torch.save(found, folder / os.environ["RANK"])
