import torch

from clear_dit.kernels.merge import merge


def softmax_parts(scores, value):
    return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)


def test_merging_two_halves_is_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 12, generator=generator) * 20
    value = torch.randn(3, 12, 4, generator=generator)
    out, lse = softmax_parts(scores, value)
    merged, merged_lse = merge(
        *softmax_parts(scores[..., :7], value[:, :7]),
        *softmax_parts(scores[..., 7:], value[:, 7:]),
    )
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)


def test_an_empty_set_changes_nothing_on_either_side():
    out, lse = torch.randn(2, 4), torch.tensor([3.0, -900.0])
    nothing, empty = torch.zeros(2, 4), torch.full((2,), float("-inf"))
    for merged, merged_lse in (merge(out, lse, nothing, empty), merge(nothing, empty, out, lse)):
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)


def test_dtype_is_kept():
    out, lse = torch.randn(2, 4).bfloat16(), torch.randn(2)
    merged, merged_lse = merge(out, lse, out, lse)
    assert (merged.dtype, merged_lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(merged, out)
