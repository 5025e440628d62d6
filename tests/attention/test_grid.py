"""The grid is found exactly, or refused."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_dit.attention.grid import Layout, layout_from_ids, layout_from_rotary

SIDES = st.integers(1, 40)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def ids_of(rows, columns, dtype=torch.float32):
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return ids.reshape(-1, 3).to(dtype)


def rotary_of(ids, text=0, axes=(4, 6, 6), theta=10000):
    return FluxPosEmbed(theta, axes)(torch.cat([torch.zeros(text, 3).to(ids.dtype), ids]))


def as_found(text, rows, columns):
    """A single line of tokens counts as a row, whichever way it runs."""
    return Layout(text, 1, rows * columns) if columns == 1 else Layout(text, rows, columns)


@settings(max_examples=60, deadline=None)
@given(rows=SIDES, columns=SIDES, text=st.integers(0, 20), dtype=DTYPES)
def test_found_in_ids_and_in_rotary_tables(rows, columns, text, dtype):
    ids = ids_of(rows, columns, dtype)
    expected = as_found(text, rows, columns)
    assert layout_from_ids(torch.zeros(text, 3, dtype=dtype), ids) == expected
    assert layout_from_rotary(*rotary_of(ids, text), text) == expected


@pytest.mark.parametrize(("rows", "columns"), [(3, 512), (512, 3), (300, 270), (1, 700), (700, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ids_that_bfloat16_merged(rows, columns, dtype):
    ids = ids_of(rows, columns, dtype)
    assert layout_from_ids(torch.zeros(7, 3), ids) == as_found(7, rows, columns)
    assert layout_from_rotary(*rotary_of(ids, 7), 7) == as_found(7, rows, columns)


@pytest.mark.parametrize(("axes", "theta"), [((16, 56, 56), 10000), ((16, 56, 56), 100000)])
def test_flux_rotary_tables_with_and_without_ntk(axes, theta):
    rotary = rotary_of(ids_of(64, 48), 512, axes, theta)
    assert layout_from_rotary(*rotary, 512) == Layout(512, 64, 48)


def test_interpolated_positions():
    ids = ids_of(20, 30) * torch.tensor([1, 0.5, 0.37])
    assert layout_from_ids(torch.zeros(2, 3), ids) == Layout(2, 20, 30)
    assert layout_from_rotary(*rotary_of(ids, 2), 2) == Layout(2, 20, 30)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 30), columns=st.integers(2, 30), text=st.integers(0, 20))
def test_text_length_is_inferred(rows, columns, text):
    ids = ids_of(rows, columns)
    assert layout_from_rotary(*rotary_of(ids, text)) == Layout(text, rows, columns)
    away = ids + torch.tensor([0.0, 1.0, 1.0])  # the first token no longer looks like text
    if text:
        assert layout_from_rotary(*rotary_of(away, text)) == Layout(text, rows, columns)


@pytest.mark.parametrize(("rows", "columns", "text"), [(1, 1, 4), (1, 9, 4), (9, 1, 4)])
def test_ambiguous_text_length_is_refused(rows, columns, text):
    with pytest.raises(ValueError, match="cannot tell text from image"):
        layout_from_rotary(*rotary_of(ids_of(rows, columns), text))


def shuffled(ids):
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def second(ids):
    return torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])


NOT_ONE_RASTER = {
    "shuffled": shuffled,
    "rows shuffled": lambda ids: shuffled(ids.reshape(6, 5, 3)).reshape(-1, 3),
    "columns shuffled": lambda ids: (
        shuffled(ids.reshape(6, 5, 3).mT.mT.transpose(0, 1)).transpose(0, 1).reshape(-1, 3)
    ),
    "its group again behind a reference": lambda ids: torch.cat([second(ids), ids]),
    "no raster before a reference": lambda ids: torch.cat([shuffled(ids), second(ids)[30:]]),
    "a second image with the same ids": lambda ids: torch.cat([ids, ids]),
    "a token short": lambda ids: ids[:-1],
    "the first token missing": lambda ids: ids[1:],
    "starts within a row": lambda ids: ids[3:-2],
    "all the same": torch.zeros_like,
    "every other row": lambda ids: torch.cat([ids[:10], ids[15:]]),
    "no tokens": lambda ids: ids[:0],
}


@pytest.mark.parametrize("name", NOT_ONE_RASTER)
def test_anything_else_is_refused(name):
    ids = NOT_ONE_RASTER[name](ids_of(6, 5))
    if len(ids):
        with pytest.raises(ValueError, match="CLEAR: "):
            layout_from_ids(torch.zeros(2, 3), ids)
    with pytest.raises(ValueError, match="CLEAR: "):
        layout_from_rotary(*rotary_of(ids, 2), 2)
    if name != "the first token missing":  # where a text token can stand in for it
        with pytest.raises(ValueError, match="CLEAR: "):
            layout_from_rotary(*rotary_of(ids, 2))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 20),
    columns=st.integers(1, 20),
    text=st.integers(1, 9),
    references=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
)
def test_reference_images(rows, columns, text, references):
    ids = [ids_of(rows, columns)]
    for group, size in enumerate(references, start=1):
        ids.append(ids_of(*size) + torch.tensor([group, 0, 0]))
    number = sum(len(each) for each in ids[1:])
    ids = torch.cat(ids)
    expected = as_found(text, rows, columns)._replace(reference_length=number)
    assert layout_from_ids(torch.zeros(text, 3), ids) == expected
    if expected.rows > 1:
        assert layout_from_rotary(*rotary_of(ids, text), text) == expected
        assert layout_from_rotary(*rotary_of(ids, text)) == expected


def test_references_that_could_be_further_rows():
    """The same table, if the first axis is the row and there are no groups."""
    ids = torch.cat([ids_of(1, 5), ids_of(1, 5) + torch.tensor([1.0, 0.0, 0.0])])
    assert layout_from_ids(torch.zeros(2, 3), ids) == Layout(2, 1, 5, 5)
    with pytest.raises(ValueError, match=r"cannot tell 5 tokens of reference.* Use apply_clear"):
        layout_from_rotary(*rotary_of(ids, 2), 2)


def test_ids_with_a_batch_dimension():
    assert layout_from_ids(torch.zeros(2, 4, 3), ids_of(3, 5).expand(2, -1, -1)) == Layout(4, 3, 5)
