"""What is counted of quantised layers, against torchao's own tensors; and the table in the docs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.slow import slow
from torch import nn

from clear_dit.bench import fit
from clear_dit.bench.published import CONFIGURATIONS
from clear_dit.counting.fake import LiveStorages, tensor_bytes
from clear_dit.counting.flops import count_flops
from clear_dit.counting.memory import TransformerMemory
from clear_dit.counting.narrow import NARROW, STORED
from clear_dit.kernels.window import Window

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
]
DOCS = Path(__file__).parents[2] / "docs"
SIDES = 192, 96  # of a weight: out, in; no multiple of nvfp4's tiles


def inner(weight):
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


def true_weight(kind):
    """A weight quantised by torchao, as its configuration does it on a GPU."""
    plain = torch.randn(*SIDES, dtype=torch.bfloat16)
    if kind == "int8":
        from torchao.quantization import Int8Tensor, PerRow

        return Int8Tensor.from_hp(plain, PerRow())
    if kind == "fp8":
        from torchao.quantization import Float8Tensor

        return Float8Tensor.from_hp(plain)
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(plain.abs().max())
    return NVFP4Tensor.to_nvfp4(plain, per_tensor_scale=scale, is_swizzled_scales=True)


@slow
@pytest.mark.parametrize("kind", NARROW)
def test_weights_have_the_bytes_of_torchaos(kind):
    linear = nn.Linear(*SIDES[::-1], bias=False, dtype=torch.bfloat16, device="meta")
    expected = sum(part.nbytes for part in inner(true_weight(kind)))
    assert tensor_bytes(NARROW[kind](linear, None)) == expected
    stored = "int8" if kind == "int8" else "fp8"
    expected = sum(part.nbytes for part in inner(true_weight(stored)))
    assert tensor_bytes(STORED[kind](linear, None)) == expected


def peak_of(layer, rows):
    """Bytes besides the tokens and the weight."""
    tokens = torch.randn(1, rows, SIDES[1], dtype=torch.bfloat16)
    weight = [*layer.buffers()] or inner(layer.weight)
    with LiveStorages() as storages, torch.no_grad():
        storages.add([tokens, *weight])
        before = storages.live
        layer(tokens)
    return storages.peak - before


@slow
def test_int8_takes_what_torchao_does_without_its_passes_in_float32():
    """Compiled, rounding and scaling are a pass each; eager, they write float32 on the way."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    rows, (out, inside) = 512, SIDES
    linear = nn.Linear(inside, out, bias=False, dtype=torch.bfloat16)
    counted = peak_of(NARROW["int8"](linear, None), rows)
    quantize_(linear, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    eager = peak_of(linear, rows)
    # Rounded tokens and their scales; the product in int32 and in bfloat16.
    assert counted == pytest.approx(rows * (out * (4 + 2)), rel=0.01)
    assert counted <= eager <= counted + 3 * 4 * rows * max(out, inside)


@slow
def test_flops_and_weights_by_precision():
    config = CONFIGURATIONS["flux-dev"].transformer | {"num_layers": 1, "num_single_layers": 1}
    window = Window(16, 16, 64, 4)
    plain = count_flops(config, window)["rows"][1]
    assert plain["narrow_tflop"] == 0
    weights = [TransformerMemory(config, torch.bfloat16).weights]
    for kind in ("int8", "fp8", "nvfp4"):
        row = count_flops(config, window, kind)["rows"][1]
        both = row["linear_tflop"] + row["narrow_tflop"]
        assert both == pytest.approx(plain["linear_tflop"], rel=1e-9)
        assert row["narrow_tflop"] > 0.95 * both
        assert row["total_tflop"] == pytest.approx(plain["total_tflop"], rel=1e-9)
        weights.append(TransformerMemory(config, torch.bfloat16, kind).weights)
    # fp8 has no zero point besides the scales, which int8 has.
    assert weights == sorted(weights, reverse=True)


def test_memory_of_cards():
    assert fit.parse_memory("24GB") == fit.parse_memory("24GiB") == fit.parse_memory("24") == (24,)
    assert fit.parse_memory("8, 12.5gb") == (8, 12.5)
    assert fit.usable(24) == pytest.approx(21.8)


def test_the_largest_that_fits(monkeypatch):
    peaks = object.__new__(fit._Peaks)
    peaks.sides = [1024, 1536, 2048, 2560]
    monkeypatch.setattr(
        peaks, "_peak", lambda kind, offload, side: math.inf if side > 2048 else side / 100
    )
    sides = [peaks.row(None, "none", limit)["side"] for limit in (10, 10.24, 20, 99)]
    assert sides == [None, 1024, 1536, 2048]
    assert peaks.row("int8", "group", 10) == {
        "flags": "--quantize int8 --offload group",
        "side": None,
        "peak_gib": 10.24,
    }


@slow
def test_the_documented_table(capsys):
    """A cell of it."""
    text = (DOCS / "benchmarks.md").read_text()
    command = re.search(r"clear-dit (bench plan --model z-image .*--fit) (.*)", text)
    cards = command[2].split(",")
    assert run(*command[1].split(), "24", "--json") == 0
    (best,) = json.loads(capsys.readouterr().out.splitlines()[-1])["best"]
    cells = re.search(r"\| Z-Image \|(.*)\|", text)[1].split("|")
    assert len(cells) == len(cards)
    assert cells[cards.index("24")].strip() == f"{best['side']} {_short(best['flags'])}"


def _short(flags):
    return flags.replace("--quantize ", "").replace("--offload ", "")
