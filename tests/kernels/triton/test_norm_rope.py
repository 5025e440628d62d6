"""Fused QK-norm and RoPE: the kernels against float64, the op, the compiler, the processor."""

import logging
import subprocess
import sys
from itertools import product

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from support.agreement import HALVES
from support.oracle import relative_error
from support.slow import slow, slow_but
from support.triton_mode import interpreted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clear_dit import apply_clear
from clear_dit.attention import norm_rope as fused

if not interpreted:
    pytest.skip("Triton's interpreter is needed", allow_module_level=True)

from clear_dit.kernels.triton import norm_rope as module
from clear_dit.kernels.triton.norm_rope import norm_rope, norm_rope_backward

NAMES = ("tokens", "text", "weight", "text_weight")


@pytest.fixture(autouse=True)
def poisoned():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """The processor takes a CPU for a GPU; returns the calls of the op."""
    calls = []
    original = module.norm_rope
    monkeypatch.setattr(fused, "FUSED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(module, "norm_rope", lambda *args: calls.append(args) or original(*args))
    fused._announce.cache_clear()
    return calls


def tables(length, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angles = 100 * torch.rand(length, head_dim // 2, generator=generator)
    return [f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin)]


def strided(tensor, layout):
    """The same values (batch, tokens, heads, head_dim) in other places."""
    if layout == "fused projection":  # one of three, side by side
        return torch.stack([tensor, tensor + 1, tensor - 1], dim=2)[:, :, 0]
    if layout == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels apart":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "tokens reversed in memory":
        return tensor.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    assert layout == "contiguous"
    return tensor


LAYOUTS = (
    "contiguous",
    "fused projection",
    "heads first",
    "channels apart",
    "tokens reversed in memory",
)


def arguments(
    text=5,
    image=7,
    batch=2,
    heads=3,
    head_dim=32,
    weighted=(True, True),
    rope=True,
    dtype=torch.float32,
    layout="contiguous",
    seed=0,
):
    """Arguments of the op, and a gradient of its result; `text` may be None."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    streams = [
        None if n is None else strided(3 * random(batch, n, heads, head_dim), layout)
        for n in (image, text)
    ]
    weights = [1 + random(head_dim) / 2 if has else None for has in weighted]
    if text is None:
        weights[1] = None
    length = image + (text or 0)
    cos, sin = tables(length, head_dim) if rope else (None, None)
    for tensor in (*streams, *weights):
        if tensor is not None:
            tensor.requires_grad_()
    grad = strided(random(batch, length, heads, head_dim), layout)
    return (*streams, *weights, cos, sin, 1e-6), grad


def in_float64(tensors):
    return [x.detach().double().requires_grad_() if torch.is_tensor(x) else x for x in tensors]


def by_definition(tokens, text, weight, text_weight, cos, sin, eps):
    """The oracle, in the dtype of its arguments: float64."""

    def normed(x, weight):
        x = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return x if weight is None else x * weight

    x = normed(tokens, weight)
    if text is not None:
        x = torch.cat([normed(text, text_weight), x], dim=1)
    if cos is None:
        return x
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def stock(tokens, text, weight, text_weight, cos, sin, eps):
    """What diffusers computes, step by step."""

    def normed(x, weight):
        norm = RMSNorm(x.shape[-1], eps, elementwise_affine=weight is not None)
        if weight is not None:
            norm.weight = None
            norm.__dict__["weight"] = weight
            del norm._parameters["weight"]
        return norm(x)

    x = normed(tokens, weight)
    if text is not None:
        x = torch.cat([normed(text, text_weight), x], dim=1)
    return x if cos is None else apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def with_gradients(function, args, grad):
    """The result and the gradients of what is there, by name."""
    out = function(*args)
    present = {n: x for n, x in zip(NAMES, args[:4], strict=True) if x is not None}
    grads = torch.autograd.grad(out, list(present.values()), grad.to(out.dtype))
    return {"out": out, **dict(zip(present, grads, strict=True))}


def errors(args, grad):
    """Relative errors of the kernels and of stock, by name."""
    exact = with_gradients(by_definition, in_float64(args), grad)
    mine, theirs = (with_gradients(f, args, grad) for f in (norm_rope, stock))
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        assert value.shape == exact[name].shape
        assert not value.isnan().any()
    assert mine["out"].is_contiguous()
    return {
        name: (relative_error(mine[name], exact[name]), relative_error(theirs[name], exact[name]))
        for name in exact
    }


SIZES = [
    dict(),
    dict(text=None),
    dict(text=0),
    dict(text=1, image=1, batch=1, heads=1, head_dim=16),
    dict(batch=3, heads=5, head_dim=24),
    dict(text=3, image=11, heads=2, head_dim=128),
    dict(text=2, image=3, heads=1, head_dim=256),
    dict(text=2, image=3, heads=20, head_dim=250, batch=1),  # more heads than a tile holds
    dict(weighted=(False, False)),
    dict(weighted=(False, True)),
    dict(weighted=(True, False), text=4),
    dict(rope=False),
    dict(rope=False, head_dim=17, text=None, weighted=(False, False)),
    dict(text=None, weighted=(False, False)),
]


@slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients_are_as_close_as_stock(size):
    for name, (mine, theirs) in errors(*arguments(**size)).items():
        assert mine <= 2 * theirs + torch.finfo(torch.float32).eps / 2, name


@pytest.mark.parametrize(
    ("size", "dtype"), slow_but(product(SIZES, HALVES), *product(SIZES[:1], HALVES)), ids=str
)
def test_half_precision_is_as_close_as_stock(size, dtype):
    for name, (mine, theirs) in errors(*arguments(**size, dtype=dtype)).items():
        assert mine <= 1.01 * theirs, name  # stock rounds at least as often


@slow
@pytest.mark.parametrize(
    ("layout", "text"),
    list(product(LAYOUTS, [None, 4])),
)
def test_any_strides(layout, text):
    args, grad = arguments(text=text, batch=3, head_dim=24, layout=layout)
    plain, _ = arguments(text=text, batch=3, head_dim=24)
    assert layout == "contiguous" or not args[0].is_contiguous()
    expected = with_gradients(norm_rope, plain, grad.contiguous())
    for name, value in with_gradients(norm_rope, args, grad).items():
        assert torch.equal(value, expected[name]), name


def test_gradient_of_a_sum_and_of_some_inputs_only():
    args, grad = arguments()
    expected = with_gradients(norm_rope, args, torch.ones_like(grad))
    frozen = [x.detach() if torch.is_tensor(x) else x for x in args]
    frozen[1].requires_grad_()
    (of_text,) = torch.autograd.grad(norm_rope(*frozen).sum(), frozen[1])
    assert torch.equal(of_text, expected["text"])


@slow
def test_more_tokens_than_partial_sums(monkeypatch):
    monkeypatch.setattr(module, "WEIGHT_PARTIALS", 3)
    for name, (mine, theirs) in errors(*arguments(text=9, image=13, heads=20)).items():
        assert mine <= 2 * theirs, name
    args, grad = arguments(text=9, image=13)
    first, second = (with_gradients(norm_rope, args, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_in_another_dtype(dtype):
    args, grad = arguments(dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in args[2:4]]
    mixed = (*args[:2], *wide, *args[4:])
    result = with_gradients(norm_rope, mixed, grad)
    exact = with_gradients(by_definition, in_float64(mixed), grad)
    assert result["out"].dtype == result["tokens"].dtype == dtype
    assert result["weight"].dtype == result["text_weight"].dtype == torch.float32
    # One rounding of each result.
    limit = torch.finfo(dtype).eps / 2
    assert all(relative_error(result[name], exact[name]) < limit for name in exact)


def test_offsets_beyond_32_bits(tmp_path):
    step = 2**30 + 8
    file = tmp_path / "sparse"
    file.touch()
    memory = torch.from_file(str(file), shared=True, size=2 * step + 64, dtype=torch.float16)
    file.unlink()  # with the mapping it goes
    far = memory.as_strided((3, 2, 1, 32), (step, 32, 32, 1))
    args, grad = arguments(text=None, image=2, batch=3, heads=1, dtype=torch.float16)
    with torch.no_grad():
        far.copy_(args[0])
        assert torch.equal(norm_rope(far, *args[1:]), norm_rope(*args))
        far_grads = norm_rope_backward(grad, far, *args[1:])
        assert all(map(torch.equal, far_grads, norm_rope_backward(grad, *args)))
        far.copy_(grad)
        far_grads = norm_rope_backward(far, *args)
        assert all(map(torch.equal, far_grads, norm_rope_backward(grad, *args)))


@slow
@pytest.mark.parametrize("size", [dict(), dict(text=None), dict(rope=False, weighted=(0, 0))])
def test_custom_ops_are_well_formed(size):
    args, grad = arguments(**size)
    torch.library.opcheck(norm_rope, args)
    with torch.no_grad():
        torch.library.opcheck(norm_rope_backward, (grad, *args))


def test_8k_image_under_fake_tensors():
    with FakeTensorMode():
        image = torch.empty(1, 512 * 512, 24 * 128 * 3, dtype=torch.bfloat16, device="cuda")
        image = image.chunk(3, dim=-1)[0].unflatten(-1, (24, 128))
        text = torch.empty(1, 512, 24, 128, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(128, dtype=torch.bfloat16, device="cuda")
        table = torch.empty(512 * 513, 128, device="cuda")
        out = norm_rope(image, text, weight, weight, table, table, 1e-6)
    assert out.shape == (1, 512 * 513, 24, 128)
    assert out.is_contiguous()
    assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")


BAD = {
    r"tokens must be \(batch, .*float32, got \(2, 7, 96\)": dict(tokens=torch.zeros(2, 7, 96)),
    r"got \(2, 7, 3, 32\) and torch.float64": dict(tokens=torch.zeros(2, 7, 3, 32).double()),
    "text must be torch.float32, got torch.float16": dict(text=torch.zeros(2, 5, 3, 32).half()),
    r"text must be \(2, 5, 3, 32\) on cpu, got \(1, 5, 3, 32\)": dict(
        text=torch.zeros(1, 5, 3, 32)
    ),
    r"weight must be \(32,\) on cpu, got \(31,\) on cpu": dict(weight=torch.ones(31)),
    r"cos must be \(12, 32\) on cpu, got \(11, 32\)": dict(cos=torch.ones(11, 32)),
    "needs both cos and sin": dict(sin=None),
    "text_weight needs text": dict(text=None, cos=None, sin=None),
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=list(BAD))
def test_bad_arguments(message, change):
    names = (*NAMES, "cos", "sin", "eps")
    args = dict(zip(names, arguments()[0], strict=True)) | change
    with pytest.raises(ValueError, match=f"norm_rope: .*{message}"):
        norm_rope(**args)


def test_cpu_outside_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(module.triton, "JITFunction", object)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, got tokens on 'cpu'"):
        norm_rope(*arguments()[0])


# The processor


def transformer_run(model, inputs):
    model.zero_grad()
    out = model(**inputs).sample
    out.square().sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@slow
@pytest.mark.parametrize("projections", ["separate", "fused"])
def test_processor_equals_stock(fused_on_cpu, tiny_transformer, tiny_inputs, projections):
    inputs = tiny_inputs(3, 4, batch=2)
    model = tiny_transformer(seed=1)
    for name, parameter in model.named_parameters():
        if ".norm_q" in name or ".norm_k" in name or ".norm_added" in name:
            nn.init.normal_(parameter, mean=1, std=0.3)  # else all are ones
    out, grads = transformer_run(model, inputs)
    if projections == "fused":
        model.fuse_qkv_projections()
    apply_clear(model, radius=100)
    fused_out, fused_grads = transformer_run(model, inputs)
    assert len(fused_on_cpu) == 8  # 2 double and 2 single blocks, query and key
    assert [args[1] is None for args in fused_on_cpu] == [False] * 4 + [True] * 4
    torch.testing.assert_close(fused_out, out, rtol=1e-4, atol=2e-6)
    same = set(grads) & set(fused_grads)
    assert sum(".norm_" in name for name in same) == 12
    for name in same:
        torch.testing.assert_close(fused_grads[name], grads[name], rtol=1e-3, atol=1e-5)


@slow
def test_processor_compiles_without_graph_breaks(fused_on_cpu, tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(num_layers=1, num_single_layers=1), tiny_inputs(3, 2)
    apply_clear(model, radius=2)
    with torch.no_grad():
        expected = model(**inputs).sample
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(**inputs).sample, expected)


@slow
def test_a_model_on_a_cpu_does_not_import_the_kernels():
    code = (
        "import sys, torch; from clear_dit import CLEARProcessor; "
        "from clear_dit.attention.norm_rope import norm_and_rotate; "
        "norm_and_rotate(torch.randn(1, 4, 1, 16), torch.nn.RMSNorm(16, 1e-6), None); "
        "assert 'clear_dit.kernels.triton.norm_rope' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Subclassed(nn.RMSNorm):
    """May compute anything."""


def norm(cls=nn.RMSNorm, dim=32, eps=1e-6, prepare=None, **more):
    made = cls(dim, eps, **more)
    if prepare is not None:
        prepare(made)
    return made


def replace_forward(module):
    module.forward = module.forward


TOKENS, TEXT = torch.randn(2, 7, 3, 32), torch.randn(2, 5, 3, 32)
REASONS = {
    "needs float16, bfloat16 or float32, got torch.float64": dict(
        tokens=TOKENS.double(), norm=norm(dtype=torch.float64), text=None
    ),
    "needs an even head_dim of 16 to 256, got 8": dict(
        tokens=TOKENS[..., :8], norm=norm(dim=8), text=None, rotary=tables(7, 8)
    ),
    "needs an even head_dim of 16 to 256, got 31": dict(
        tokens=TOKENS[..., :31], norm=norm(dim=31), text=None, rotary=None
    ),
    "needs RMSNorm, got LayerNorm": dict(norm=norm(nn.LayerNorm)),
    "needs RMSNorm, got Subclassed": dict(text_norm=norm(Subclassed)),
    "needs RMSNorm, got Identity": dict(norm=nn.Identity()),
    "needs norms without hooks": dict(
        norm=norm(prepare=lambda m: m.register_forward_hook(lambda *_: None))
    ),
    "needs norms without hooks ": dict(
        norm=norm(prepare=lambda m: m.register_forward_pre_hook(lambda *_: None))
    ),
    "needs norms without hooks  ": dict(text_norm=norm(prepare=replace_forward)),
    "needs norms without bias": dict(norm=norm(RMSNorm, bias=True)),
    "needs norms over head_dim with an eps, got (3, 32) and eps=1e-06": dict(
        norm=norm(dim=(3, 32))
    ),
    "needs norms over head_dim with an eps, got (32,) and eps=None": dict(norm=norm(eps=None)),
    "needs norms of one eps, got 1e-06 and 1e-05": dict(text_norm=norm(eps=1e-5)),
    "needs norm weights on cpu, got torch.float64 on cpu": dict(
        norm=norm(RMSNorm, prepare=nn.Module.double)
    ),
    "needs text in torch.float32 on cpu, got torch.float16 on cpu": dict(
        text=TEXT.half(), text_norm=norm(dtype=torch.float16)
    ),
    "needs rotary tables (12, 32) in float32 on cpu, got (1, 32) in torch.float32 on cpu": dict(
        rotary=tables(1, 32)
    ),
    "needs rotary tables (12, 32) in float32 on cpu, got (12, 32) in torch.float16 on cpu": dict(
        rotary=[table.half() for table in tables(12, 32)]
    ),
}


def position_arguments(**change):
    usual = dict(tokens=TOKENS, norm=norm(), rotary=tables(12, 32), text=TEXT, text_norm=norm())
    usual |= change
    if usual["text"] is None:
        usual["text_norm"] = None
        if "rotary" not in change:
            usual["rotary"] = tables(7, 32)
    return usual


@pytest.mark.parametrize(("reason", "change"), REASONS.items(), ids=list(REASONS))
def test_falls_back_by_name(fused_on_cpu, caplog, reason, change):
    usual = position_arguments(**change)
    assert fused.why_not_norm_rope(**usual) == reason.rstrip()
    with caplog.at_level(logging.INFO, logger="clear_dit.attention.norm_rope"):
        for _ in range(2):
            out = fused.norm_and_rotate(**usual)
    assert not fused_on_cpu
    expected = usual["norm"](usual["tokens"])
    if usual["text"] is not None:
        expected = torch.cat([usual["text_norm"](usual["text"]), expected], dim=1)
    if usual["rotary"] is not None:
        expected = apply_rotary_emb(expected, usual["rotary"], sequence_dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert caplog.messages == [
        f"QK-norm and RoPE run one after the other; the fused kernel {reason.rstrip()}"
    ]


@pytest.mark.parametrize("cls", [nn.RMSNorm, RMSNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_runs_fused_and_says_so_once(fused_on_cpu, caplog, cls, affine):
    made = norm(cls, elementwise_affine=affine)
    usual = position_arguments(norm=made)
    with caplog.at_level(logging.INFO, logger="clear_dit.attention.norm_rope"):
        results = [fused.norm_and_rotate(**usual) for _ in range(2)]
    assert len(fused_on_cpu) == 2
    assert torch.equal(*results)
    assert caplog.messages == ["QK-norm and RoPE run fused"]


def test_device_and_triton_are_named(monkeypatch):
    usual = position_arguments()
    reason = "needs a CUDA or ROCm device, got tokens on 'cpu'"
    assert fused.why_not_norm_rope(**usual) == reason
    monkeypatch.setattr(fused, "FUSED_DEVICES", ("cpu",))
    assert fused.why_not_norm_rope(**usual) is None
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    assert fused.why_not_norm_rope(**usual) == "needs Triton, which is not installed"
