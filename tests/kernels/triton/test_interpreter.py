"""bfloat16 in Triton's interpreter (support/interpreter_bfloat16.py), against PyTorch's."""

import pytest
import torch
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BITS = torch.arange(-(2**15), 2**15, dtype=torch.int16)
ALL = BITS.view(torch.bfloat16)


@triton.jit
def cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def compute(x, y, wide, out, N: tl.constexpr):
    """Rows of what the arithmetic of two numbers gives."""
    at = tl.arange(0, N)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(wide + at)
    tl.store(out + at, a + b)
    tl.store(out + N + at, a * b)
    tl.store(out + 2 * N + at, a * c)
    tl.store(out + 3 * N + at, tl.where(a < b, a, -b))
    tl.store(out + 4 * N + at, tl.maximum(a, b))
    tl.store(out + 5 * N + at, tl.fma(a, b, a))


@triton.jit
def reduce_rows(x, out_max, out_sum, M: tl.constexpr, N: tl.constexpr):
    tile = tl.trans(tl.reshape(tl.load(x + tl.arange(0, M * N)), [M, N]))
    tl.store(out_max + tl.arange(0, M), tl.max(tile, 0))
    tl.store(out_sum + tl.arange(0, M), tl.sum(tile, 0))


@triton.jit
def multiply(x, y, start, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.load(start + at)
    acc = tl.dot(tl.load(x + at), tl.trans(tl.load(y + at)), acc, input_precision="ieee")
    tl.store(out + at, acc)


@triton.jit
def double_tile(x, out, N: tl.constexpr):
    tile = x.load([1, 0])
    out.store([0, 0], tile + tile)


def casted(x, dtype):
    out = torch.empty(len(x), dtype=dtype)
    cast[(1,)](x, out, N=len(x))
    return out


def assert_same_numbers(found, expected):
    """Bit for bit, the sign of zeros too; a NaN for any NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    integers = {2: torch.int16, 4: torch.int32}[found.element_size()]
    real = ~expected.isnan()
    assert torch.equal(found[real].view(integers), expected[real].view(integers))


@pytest.mark.filterwarnings("ignore:overflow")
def test_every_number_up():
    assert_same_numbers(casted(ALL, torch.float32), ALL.float())
    assert_same_numbers(casted(ALL, torch.float16), ALL.half())


@pytest.mark.parametrize("below", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_to_the_nearest_down_and_to_the_even_of_two(below):
    """Every number, infinity, NaN and subnormal there is, and what lies between it and the next."""
    x = ((BITS.int() << 16) + below).view(torch.float32)
    assert_same_numbers(casted(x, torch.bfloat16), x.bfloat16())


def test_from_float16_and_integers():
    half = BITS.view(torch.float16)
    assert_same_numbers(casted(half, torch.bfloat16), half.bfloat16())
    assert_same_numbers(casted(BITS.int(), torch.bfloat16), BITS.bfloat16())


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_arithmetic_is_rounded_once():
    a, b, wide = random(256), random(256, seed=1), random(256, dtype=torch.float32, seed=2)
    out = torch.empty(6, 256)
    compute[(1,)](a, b, wide, out, N=256)
    total, product, wide_product, chosen, largest, fused = out
    assert torch.equal(total, (a + b).float())
    assert torch.equal(product, (a * b).float())
    assert torch.equal(wide_product, a.float() * wide)
    assert torch.equal(chosen, torch.where(a < b, a, -b).float())
    assert torch.equal(largest, torch.maximum(a, b).float())
    assert torch.equal(fused, torch.addcmul(a.double(), a.double(), b.double()).bfloat16().float())


def test_reductions():
    x = random(16, 32)
    largest, total = torch.empty(16), torch.empty(16)
    reduce_rows[(1,)](x, largest, total, M=16, N=32)
    assert torch.equal(largest, x.float().amax(1))
    torch.testing.assert_close(total, x.float().sum(1), rtol=2**-8, atol=1e-5)


def test_products_are_summed_in_float32():
    x, y, start = random(32, 32), random(32, 32, seed=1), random(32, 32, dtype=torch.float32)
    out = torch.empty(32, 32)
    multiply[(1,)](x, y, start, out, N=32)
    exact = start.double() + x.double() @ y.double().T
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5)


def test_descriptors_load_zeros_beyond_the_border_and_store():
    x, out = random(4, 16), torch.zeros(4, 16, dtype=torch.bfloat16)
    double_tile[(1,)](*(TensorDescriptor.from_tensor(each, [4, 16]) for each in (x, out)), N=16)
    assert torch.equal(out, torch.cat([2 * x[1:], torch.zeros(1, 16, dtype=x.dtype)]))
