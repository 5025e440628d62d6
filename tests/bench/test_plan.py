"""`clear-dit bench plan`: what a model costs at a size, against the paper and arithmetic."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from support.command_line import run
from support.slow import slow

from clear_dit import Window
from clear_dit.bench.configurations import find_configuration
from clear_dit.bench.executed import raster_keys, tile_choices, tiled_keys
from clear_dit.bench.plan_memory import cascade_sizes, plan_memory
from clear_dit.bench.published import CLIP_L, CONFIGURATIONS
from clear_dit.chunking import chunk_feed_forward
from clear_dit.counting.fake import LiveStorages, build, defaults, tensor_bytes
from clear_dit.counting.flops import count_flops
from clear_dit.counting.memory import TransformerMemory
from clear_dit.generation.models import DEMO
from clear_dit.kernels import flex

# (side in pixels, radius): GFLOP per attention layer, full and local (the paper's table 2); TFLOP
# of a step, linear layers and full attention; the most that CLEAR can gain. Every cell of the
# paper's table is in tests/kernels/test_window.py.
FLUX_DEV = {
    (1024, 8): (260.9, 63.5, 59, 15, 1.18),
    (2048, 16): (3507.9, 352.6, 218, 200, 1.75),
    (4096, 32): (53604.4, 3141.7, 853, 3055, 3.79),
    (8192, 8): (847726.7, 3915.4, 3391, 48320, 14.31),
    (8192, 16): (847726.7, 5789.2, 3391, 48320, 13.90),
    (8192, 32): (847726.7, 13085.0, 3391, 48320, 12.50),
}


def plan(capsys, *arguments):
    """The JSON of a plan."""
    assert run("bench", "plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def check_flux_dev(result, side, radius):
    full_gflop, local_gflop, linear, full, bound = FLUX_DEV[side, radius]
    dense, local = result["rows"]
    assert (dense["attention"], local["attention"]) == ("full", "clear")
    assert round(dense["attention_gflop_per_layer"], 1) == full_gflop
    assert round(local["attention_gflop_per_layer"], 1) == local_gflop
    assert dense["linear_tflop"] == local["linear_tflop"] == pytest.approx(linear, rel=0.01)
    assert dense["attention_tflop"] == pytest.approx(full, rel=0.01)
    assert dense["total_tflop"] == dense["linear_tflop"] + dense["attention_tflop"]
    assert result["bound"] == pytest.approx(bound, abs=0.005)
    assert (result["layers"], result["heads"], result["head_dim"]) == (57, 24, 128)


@slow
@pytest.mark.parametrize(("side", "radius"), FLUX_DEV)
def test_flux_dev_is_the_papers_table_and_the_bound(side, radius):
    window = Window(side // 16, side // 16, 512, radius)
    check_flux_dev(count_flops(CONFIGURATIONS["flux-dev"].transformer, window), side, radius)


@slow
def test_the_table_by_the_command_at_another_size_and_radius(capsys):
    size = ("--height", 1024, "--width", 1024, "--radius", 8)
    check_flux_dev(plan(capsys, *size), 1024, 8)


@slow
def test_seconds_and_little_memory_for_the_tables_and_the_json():
    """In a process of its own: what it takes is what a user's machine needs."""
    program = (
        "import sys, time\n"
        # As if not installed: they warn of themselves on stderr.
        "sys.modules['torchao'] = sys.modules['bitsandbytes'] = None\n"
        "from clear_dit import cli\n"
        "sys.argv = ['clear-dit', 'bench', 'plan', '--json']\n"
        "try: cli.main()\n"
        "finally:\n"
        "    import torch\n"
        "    from clear_dit.memory import peak_mb\n"
        "    print(time.process_time(), peak_mb(torch.device('cpu')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, peak = map(float, done.stderr.split())  # and not a word more
    assert seconds < 60  # of one core
    assert peak * 2**20 < 2e9

    *lines, last = done.stdout.splitlines()
    assert "flux-dev, 8192 x 8192 px, bfloat16" in lines
    assert all(len(line) <= 100 for line in lines)
    assert any(line.split()[:2] == ["clear", "3,391.1"] for line in lines)
    stages = {row["stage"]: row for row in json.loads(last)["memory"]}
    sizes = [f"denoising {side} x {side}" for side in (1024, 2048, 4096, 8192)]
    assert list(stages) == ["text encoding", *sizes, "decoding a tile of 1152 x 1152"]
    parameters = {
        "text encoding": 123_060_480 + 4_762_310_656,  # CLIP-L, T5-XXL
        "denoising": 11_901_408_320,
        "decoding": 83_819_683,  # encoder and decoder
    }
    for row in stages.values():  # all of them resident
        assert row["weights_gib"] == pytest.approx(2 * sum(parameters.values()) / 2**30, rel=1e-3)
        assert row["total_gib"] == pytest.approx(row["weights_gib"] + row["activations_gib"])
    # 256 channels at full size, three times, in two bytes.
    decoding = stages["decoding a tile of 1152 x 1152"]["activations_gib"]
    assert decoding == pytest.approx(3 * 256 * 2 * 1152**2 / 2**30, rel=0.05)
    check_flux_dev(json.loads(last), 8192, 8)
    highest = max(row["total_gib"] for row in stages.values())
    assert json.loads(last)["peak_gib"] == highest


# A tensor of the sequence of 8192 px in bfloat16, and the weights of the whole transformer, in GiB.
SEQUENCE_8K = (512 + 512 * 512) * 3072 * 2 / 2**30
FLUX_WEIGHTS = 2 * 11_901_408_320 / 2**30


@pytest.fixture(scope="module")
def flux():
    """FLUX.1-dev with the window of 8192 px, and what its memory is by (quantize, offload)."""
    configuration = CONFIGURATIONS["flux-dev"]
    window = Window(512, 512, 512, 8)
    # Encoders and decoder are the same in all settings, and have a test of their own.
    configuration = dataclasses.replace(configuration, text_encoders=(CLIP_L,))

    def peak(*setting):
        rows = plan_memory(configuration, window, torch.bfloat16, *setting)
        return {row["stage"]: row for row in rows}["denoising 8192 x 8192"]

    return peak


@slow
def test_8192_pixels_within_40_gb_in_bfloat16(flux):
    row = flux(None, "model")
    assert row["weights_gib"] == pytest.approx(FLUX_WEIGHTS, rel=1e-3)
    # Input, norm, query, key, value and output of the attention, and the rotary table.
    assert row["activations_gib"] == pytest.approx(6 * SEQUENCE_8K + 0.25, abs=0.3)
    assert row["total_gib"] < 40e9 / 2**30  # GB, not GiB


@slow
@pytest.mark.parametrize(
    "setting",
    [
        ("int8", "model"),
        ("fp8", "model"),
        (None, "group"),
    ],
)
def test_8192_pixels_within_24_gb_with_8_bit_weights_or_offload(flux, setting):
    row = flux(*setting)
    autoencoder = 2 * 83_819_683 / 2**30  # stays on the device
    weights = FLUX_WEIGHTS / 2 if setting[0] else 1.385 + autoencoder
    assert row["weights_gib"] == pytest.approx(weights, rel=0.05)
    assert row["total_gib"] < 24e9 / 2**30


@slow
def test_chunks_are_what_makes_it_fit():
    window = Window(512, 512, 512, 8)
    config = CONFIGURATIONS["flux-dev"].transformer
    stock, chunked = (
        TransformerMemory(config, torch.bfloat16, None, tokens).activations(window) / 2**30
        for tokens in (None, 16384)
    )
    assert stock > 14 * SEQUENCE_8K
    assert chunked < 6.5 * SEQUENCE_8K


@slow
def test_far_keys_take_a_third_of_the_keys_more():
    window = Window(512, 512, 512, 8)
    far = dataclasses.replace(window, far_levels=10)
    memory = TransformerMemory(CONFIGURATIONS["flux-dev"].transformer, torch.bfloat16, None)
    more = (memory.activations(far) - memory.activations(window)) / 2**30
    assert more == pytest.approx(2 / 3 * SEQUENCE_8K, rel=0.01)  # keys and values


def test_few_blocks_stand_for_all():
    """The demo has 2 double and 4 single blocks, of which 2 are measured."""
    config = find_configuration("demo").transformer
    few = TransformerMemory(config, torch.float32, None, 300)
    with defaults(torch.float32, "meta"):
        assert few.weights == tensor_bytes(build(config))
    window = Window(32, 32, 64, 8)
    more = TransformerMemory(config, torch.float32, None, 300)
    with defaults(torch.float32, "meta"):
        more._model = build(config)
    chunk_feed_forward(more._model, 300)
    assert few.activations(window) == more.activations(window)


def test_cascade_sizes():
    assert cascade_sizes(Window(512, 512, 0, 8), 1024) == [
        (64, 64),
        (128, 128),
        (256,) * 2,
        (512,) * 2,
    ]
    assert cascade_sizes(Window(60, 70, 0, 8), 1024) == [(60, 70)]
    assert cascade_sizes(Window(75, 131, 0, 8), 1024) == [(48, 85), (75, 131)]


@slow
def test_linear_flops_and_memory_grow_with_the_tokens(capsys):
    small, large = (
        plan(capsys, "--model", "demo", "--height", side, "--dtype", dtype)
        for side, dtype in ((1024, "bfloat16"), (4096, "float32"))
    )
    tokens = [64 + 64 * 512, 64 + 256 * 512]
    ratio = tokens[1] / tokens[0]
    measured = large["rows"][1]["linear_tflop"] / small["rows"][1]["linear_tflop"]
    assert measured == pytest.approx(ratio, rel=0.01)
    before, after = (result["memory"][-2] for result in (small, large))
    assert after["weights_gib"] == pytest.approx(2 * before["weights_gib"], rel=0.01)
    # Twice the bytes of an element, but not of those that are float32 anyway.
    assert ratio < after["activations_gib"] / before["activations_gib"] < 2 * ratio


@slow
def test_schnell_has_shorter_texts(capsys):
    result = plan(capsys, "--model", "flux-schnell", "--height", 512, "--width", 512)
    assert result["text_length"] == 256
    gflop = Window(32, 32, 256, 8).attention_flops(24, 128) / 1e9
    assert result["rows"][1]["attention_gflop_per_layer"] == gflop


@slow
def test_text_length(capsys):
    result = plan(capsys, "--model", "demo", "--height", 512, "--text-length", 9)
    assert result["text_length"] == 9
    gflop = Window(32, 512, 9, 8).attention_flops(3, 64) / 1e9
    assert result["rows"][1]["attention_gflop_per_layer"] == gflop


@slow
def test_far_keys(capsys):
    size = ("--model", "demo", "--height", 512, "--width", 512, "--radius", 4)
    local = plan(capsys, *size)
    assert run("bench", "plan", *size, "--far", "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    far = json.loads(last)
    assert "CLEAR with radius 4 tokens, far keys" in lines
    assert (local["far"], far["far"]) == (False, True)
    gflop = Window(32, 32, 64, 4, far_levels=10).attention_flops(3, 64) / 1e9
    assert far["rows"][1]["attention_gflop_per_layer"] == gflop
    assert far["rows"][0] == local["rows"][0]
    assert 1 < far["bound"] < local["bound"]
    assert run("bench", "plan", *size, "--far", "--down-factor", 2) == 2
    assert "--far and --down-factor 2 exclude each other" in capsys.readouterr().err


@slow
def test_the_demo_and_a_folder_are_read_from_their_files(capsys, tmp_path):
    size = ("--height", 512, "--width", 768, "--radius", 16, "--down-factor", 3)
    demo = plan(capsys, "--model", "demo", *size)
    window = Window(32, 48, 64, 16, 3)
    assert demo["text_length"] == window.text_length
    assert demo["rows"][1]["attention_gflop_per_layer"] == window.attention_flops(3, 64) / 1e9
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    read = plan(capsys, "--model", copy, *size)
    assert read["rows"] == demo["rows"]
    assert read["memory"][-1] == demo["memory"][-1]  # the stages differ by what is native
    (copy / "vae" / "config.json").write_text("[]")
    assert run("bench", "plan", "--model", copy) == 2
    (copy / "vae" / "config.json").write_text('{"_class_name": "Autoencoder"}')
    assert run("bench", "plan", "--model", copy) == 2
    (copy / "vae" / "config.json").unlink()
    assert run("bench", "plan", "--model", copy) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "is not a JSON object" in errors[0]
    assert "cannot be built" in errors[1]
    assert "is missing or is not JSON" in errors[2]


def test_tile_choices():
    # Keys computed over needed at 8192 px: the kernels' first choice, and raster blocks.
    for radius, most, raster in ((8, 1.60, 7.5), (16, 1.60, 8.0), (32, 1.40, 5.65)):
        window = Window(512, 512, 512, radius)
        rows = tile_choices(window)
        assert [row["impl"] for row in rows[-2:]] == ["tiled", "flex"]
        first, blocks = rows[0], rows[-1]
        assert (first["impl"], first["query_tile"], first["key_tile"]) == ("triton", "8x8", "8x8")
        assert 1 < first["executed_over_exact"] <= most
        assert blocks["executed_over_exact"] == pytest.approx(raster, abs=0.05)
        exact = window.attended_pairs() - window.text_length * window.sequence_length
        for row in rows:
            needed = row["keys_per_query"] / row["executed_over_exact"]
            assert needed == pytest.approx(exact / window.image_length)


@slow
def test_tile_choices_with_far_keys():
    window = Window(128, 96, 512, 8, far_levels=10)
    rows = tile_choices(window)
    assert [row["impl"] for row in rows] == ["triton"] * 5 + ["tiled", "flex"]
    assert (rows[0]["query_tile"], rows[0]["key_tile"]) == ("8x8", "32")
    exact = window.image_queries.attended_pairs() / window.image_length
    for row in rows:
        assert row["keys_per_query"] / row["executed_over_exact"] == pytest.approx(exact)
    assert [1 < row["executed_over_exact"] < 2 for row in rows] == [True] * 6 + [False]


def random_windows(count):
    generator = random.Random(0)
    for _ in range(count):
        rows, columns = generator.randint(2, 40), generator.randint(2, 200)
        text = generator.choice([0, 5, 128, 130, 300])
        radius, factor = generator.choice([1, 2, 8, 16, 10**9]), generator.choice([1, 1, 2])
        yield Window(rows, columns, text, radius, factor)
        if radius > 1 and factor == 1:
            levels = generator.choice([1, 3, 10])
            yield Window(rows, columns, text, radius, far_levels=levels)


@slow
def test_raster_keys_are_those_of_the_block_mask():
    for window in random_windows(12):
        mask = flex.block_mask(window, torch.device("cpu"))
        blocks = (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0].double()
        query_blocks = (torch.arange(window.image_length) + window.text_length) // flex.BLOCK
        assert raster_keys(window) == float(flex.BLOCK * blocks[query_blocks].mean()), window


def test_past_the_diagonal_tiles_compute_everything():
    window = Window(16, 24, 12, 40)
    assert tiled_keys(window) == window.sequence_length
    rows = tile_choices(Window(512, 512, 512, 10**9))  # at once, without the lists of tiles
    assert [(row["impl"], row["executed_over_exact"]) for row in rows] == [
        ("tiled", 1.0),
        ("flex", 1.0),
    ]
    assert rows[0]["key_tile"] == "512x512"


def test_live_storages():
    kib = torch.empty(256)
    with LiveStorages() as storages:
        storages.add([kib, kib[1:]])
        assert storages.live == 1024
        doubled = kib + kib
        view = doubled.view(16, 16)
        assert storages.live == 2048
        del doubled
        assert storages.live == 2048
        del view
        assert (storages.live, storages.peak) == (1024, 2048)


def test_configurations_name_what_they_take():
    for name, configuration in CONFIGURATIONS.items():
        assert find_configuration(name) is configuration
        assert 256 <= configuration.text_length <= 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 100), "--height must be a multiple of 16"),
        (("--width", 1048576), "from 16 to 16384"),
        (("--radius", 0), "radius must be at least 1"),
        (("--down-factor", 600), "down_factor must not exceed the token grid (512 x 512)"),
        (("--dtype", "int8"), "--dtype must be one of float32"),
        (("--text-length", 0), "text-length"),
        (("--quantize", "int4"), "--quantize must be one of int8, fp8, nvfp4; got 'int4'"),
        (("--fit", "large"), "--fit must be a card's memory, such as 24GB, or several with commas"),
        (("--fit", "24GB,0"), "--fit must be a card's memory"),
        (("--fit", "24", "--offload", "model"), "--fit tries --offload itself"),
        (("--fit", "24", "--quantize", "q8"), "--quantize must be one of int8, fp8, nvfp4"),
        (("--offload", "disk"), "--offload must be one of none, model, group; got 'disk'"),
        (("--model", "flux"), "--model must be one of flux-dev, flux-schnell, chroma, "),
        (("--model", "."), "is not a pipeline in diffusers format"),
    ],
)
def test_bad_requests(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    assert run("bench", "plan", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
