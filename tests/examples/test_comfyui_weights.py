"""The node "CLEAR weights": the library's files in a ComfyUI model, and what it refuses."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from support.comfyui.flux import Flux
from support.comfyui.from_diffusers import Inputs, bfl_state, pair
from support.comfyui.patcher import Model, ModelPatcher
from torch import nn
from torch.testing import assert_close

from clear_dit import apply_clear, load_clear_weights, save_clear_weights
from clear_dit.weights.format import parameters_by_key
from clear_dit.weights.known import PUBLISHED, PUBLISHED_SETTINGS
from clear_dit.weights.learned import make_far_trainable
from clear_dit.weights.load import published_name

PREFIX = "diffusion_model."


@pytest.fixture
def tuned(tmp_path):
    """A file of CLEAR weights of other values than the model's, by the library; its settings."""

    def make(name="own.safetensors", far=False, down_factor=1, learned=False):
        other, _ = pair(seed=1)
        apply_clear(other, radius=3, far=far, down_factor=down_factor)
        if learned:
            make_far_trainable(other)
        torch.manual_seed(2)
        for key, parameter in other.named_parameters():
            if ".processor." in key:
                parameter.data += 0.3 * torch.randn_like(parameter)
        path = tmp_path / name
        save_clear_weights(other, path)
        return path

    return make


@pytest.mark.parametrize(
    ("kind", "far"),
    [
        ({}, "auto"),
        ({"far": True}, "auto"),
        ({"far": True, "learned": True}, "auto"),
        ({"far": True, "learned": True}, "off"),
        ({"down_factor": 2}, "auto"),
        ({"down_factor": 2}, "off"),
        ({}, "on"),
    ],
)
@pytest.mark.parametrize("attention_first", [False, True])
def test_as_load_clear_weights_does_on_diffusers_model(pack, tuned, kind, far, attention_first):
    path = tuned(**kind)
    transformer, patcher = pair()
    settings = {"down_factor": kind.get("down_factor", 1)}
    settings["far"] = {"auto": None, "on": True, "off": False}[far]
    apply_clear(transformer, radius=3, **settings, weights=path)
    nodes = [
        lambda model: pack.node_weights.apply(model, path),
        lambda model: pack.node_attention.apply(model, radius=3, far=far),
    ]
    clear = patcher
    for node in nodes[::-1] if attention_first else nodes:
        clear = node(clear)
    for size in ((8, 8), (6, 10)):
        inputs = Inputs(*size, batch=2)
        expected = inputs.of_diffusers(transformer)
        assert_close(inputs.comfyui(clear), expected, atol=1e-5, rtol=1e-5)


def test_weights_round_trip_bit_for_bit(pack, tuned):
    """File, ComfyUI's patches, BFL's layout, and back by the library's map: the same bits."""
    from clear_dit.weights.bfl import from_bfl

    path = tuned()
    transformer, patcher = pair()
    stock = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    clear = pack.node_weights.apply(patcher, path)
    patched = {key.removeprefix(PREFIX): value for key, value in clear.patched().items()}
    tensors = load_file(path)
    assert len(tensors) == 2 * (2 * 4 + 2 * 3)
    back = from_bfl(patched, tensors, 32)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    # All else is as it was, and the whole is what diffusers' model with these weights becomes.
    apply_clear(transformer, radius=3)
    load_clear_weights(transformer, path)
    plain = {
        key: value for key, value in transformer.state_dict().items() if ".processor." not in key
    }
    base = {key.removeprefix(PREFIX): value for key, value in stock.items()}
    expected = bfl_state(plain, base, 32)
    assert patched.keys() == expected.keys()
    assert all(torch.equal(patched[key], value) for key, value in expected.items())
    # The model that came in is left alone.
    assert patcher.patches == {}
    now = patcher.model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in stock.items())


def test_every_published_tensor_has_its_rows_at_flux_1_dev_s_true_shapes(pack):
    """Without values: the names that the library loads, and BFL's shapes."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        model = Flux(
            64, 3072, 24, context=4096, pooled=768, double=19, single=38, axes=(16, 56, 56)
        )
    state, adapter = model.state_dict(), pack.adapter
    assert sum(x.numel() for x in state.values()) == 11_901_408_320
    names = parameters_by_key(transformer)
    assert len(names) == 19 * 8 + 38 * 6
    rows = {}
    for name, parameter in names.items():
        place = adapter.place_in_bfl(name, 3072)
        target = adapter._target(place, state[place.key])
        key, offset = (target, None) if isinstance(target, str) else target
        whole = state[key.removeprefix(PREFIX)]
        assert (whole if offset is None else whole.narrow(*offset)).shape == parameter.shape
        rows.setdefault(key, []).append(offset and offset[1])
    assert {tuple(starts) for starts in rows.values()} == {(None,), (0, 3072, 6144)}


def test_a_lora_after_the_weights_is_added_to_them(pack, tuned):
    _, patcher = pair()
    clear = pack.node_weights.apply(patcher, tuned())
    key, place = f"{PREFIX}double_blocks.0.img_attn.qkv.weight", (0, 32, 32)
    before = clear.patched()[key]
    change = torch.randn(32, 32)
    clear.add_patches({(key, place): ("diff", (change,))})
    expected = before.clone()
    expected[32:64] += change
    assert torch.equal(clear.patched()[key], expected)


@pytest.mark.parametrize("kind", ["lora", "weights"])
def test_patches_before_the_weights_would_be_lost(pack, tuned, kind):
    _, patcher = pair()
    path = tuned()
    if kind == "weights":
        patcher = pack.node_weights.apply(patcher, path)
    else:
        key = f"{PREFIX}single_blocks.1.linear1.weight"
        patcher.add_patches({key: ("diff", (torch.zeros(224, 32),))})
    with pytest.raises(ValueError, match=r"patched already .*put CLEAR weights before it"):
        pack.node_weights.apply(patcher, path)


def test_float8_models_are_patched_as_loras_do_it(pack, tuned):
    _, patcher = pair()
    patcher.model.to(torch.float8_e4m3fn)
    path = tuned()
    patched = pack.node_weights.apply(patcher, path).patched()
    key = "transformer_blocks.1.attn.to_v.weight"
    found = patched[f"{PREFIX}double_blocks.1.img_attn.qkv.weight"][64:]
    assert torch.equal(found.float(), load_file(path)[key].to(torch.float8_e4m3fn).float())


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: _without(t, "transformer_blocks.1.attn.to_k.weight"),
            r"has 13 of the 14 tensors .*transformer_blocks\.1\.attn\.to_k\.weight is missing",
        ),
        (lambda t: {"lora_unet.x.lora_up.weight": torch.zeros(2, 2)}, "no place for lora_unet"),
        (
            lambda t: t | {"transformer_blocks.2.attn.to_q.weight": torch.zeros(32, 32)},
            r"no place for transformer_blocks\.2",
        ),
        (
            lambda t: t | {"transformer_blocks.0.attn.to_q.weight": torch.zeros(64, 64)},
            r"has shape \(64, 64\), its place in double_blocks\.0\.img_attn\.qkv\.weight \(32,",
        ),
        (
            lambda t: t | {"transformer_blocks.0.attn.to_q.bias": torch.full((32,), torch.nan)},
            "not finite",
        ),
    ],
)
def test_files_that_do_not_fit(pack, tuned, change, message):
    _, patcher = pair()
    path = tuned()
    save_file(change(load_file(path)), path)
    with pytest.raises(ValueError, match=f"^CLEAR weights: .*{message}"):
        pack.node_weights.apply(patcher, path)
    assert patcher.patches == {}


def test_a_truncated_file(pack, tuned):
    _, patcher = pair()
    path = tuned()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"own\.safetensors is not a safetensors file"):
        pack.node_weights.apply(patcher, path)


def test_weights_of_packed_models_cannot_be_replaced(pack, tuned):
    _, patcher = pair()
    attn = patcher.model.diffusion_model.double_blocks[0].img_attn
    del attn.qkv.weight
    attn.qkv.register_buffer("weight", torch.zeros(1536, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"is packed \(torch\.uint8, .* bf16, fp16 or fp8"):
        pack.node_weights.apply(patcher, tuned())


def test_blocks_that_another_node_has_compiled_hide_their_weights(pack, tuned):
    _, patcher = pair()
    blocks = patcher.model.diffusion_model.double_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"has compiled this model's blocks .*; unload the models"):
        pack.node_weights.apply(patcher, tuned())


class UNetModel(nn.Module):
    """Stable Diffusion's, for ComfyUI."""


def test_a_workflow_without_a_flux_model(pack, tuned):
    with pytest.raises(ValueError, match=r"are for FLUX\.1 and Chroma, .*\(UNetModel\)"):
        pack.node_weights.apply(ModelPatcher(Model(UNetModel())), tuned())


def test_pooled_keys_and_far_keys_exclude_each_other(pack, tuned):
    _, patcher = pair()
    clear = pack.node_weights.apply(patcher, tuned(down_factor=2))
    clear = pack.node_attention.apply(clear, radius=3, far="on")
    with pytest.raises(ValueError, match=r"down_factor=2.*set far to auto"):
        Inputs(8, 8).comfyui(clear)


@pytest.mark.parametrize(
    ("name", "radius", "said"),
    [
        ("clear_local_16.safetensors", 16, False),
        ("clear_local_16.safetensors", 8, True),
        ("mine.safetensors", 8, False),
    ],
)
def test_another_radius_than_the_weights_were_made_for_is_said(
    pack, tuned, caplog, name, radius, said
):
    """The published files have no metadata; their names have it."""
    _, patcher = pair()
    path = tuned(name)
    save_file(load_file(path), path)
    clear = pack.node_weights.apply(patcher, path)
    pack.node_attention.apply(clear, radius=radius)
    assert ("was made for radius 16, the node has 8" in caplog.text) == said


def test_files_are_those_of_models_clear_and_the_published_ones(pack, tuned, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "clear"
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    path = tuned()
    path.rename(folder / path.name)
    schema = pack.node_weights.ClearWeights.define_schema()
    (choice,) = (one for one in schema.inputs if one.id == "weights")
    published = [published_name(*setting) for setting in PUBLISHED_SETTINGS]
    assert choice.options == ["own.safetensors", *(f"{PUBLISHED}/{name}" for name in published)]
    _, patcher = pair()
    clear = pack.node_weights.ClearWeights.execute(patcher, "own.safetensors").args[0]
    assert clear.patches.keys() >= {f"{PREFIX}double_blocks.0.img_attn.proj.weight"}
    fetched = []

    def download(repository, name, **options):
        fetched.append((repository, name))
        return str(folder / path.name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pack.node_weights.ClearWeights.execute(patcher, "Huage001/CLEAR/clear_local_8.safetensors")
    assert fetched == [("Huage001/CLEAR", "clear_local_8.safetensors")]


def test_weights_that_cannot_be_fetched(pack, monkeypatch):
    def unreachable(*args):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    _, patcher = pair()
    with pytest.raises(OSError, match=r"cannot get clear_local_8\.safetensors .*into models/clear"):
        pack.node_weights.ClearWeights.execute(patcher, "Huage001/CLEAR/clear_local_8.safetensors")
