"""Loading is strict: a file either fits completely, or the model stays as it was."""

import json
import logging
import os
import stat

import huggingface_hub
import pytest
import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clear_dit import (
    CLEARProcessor,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.attention.radii import Radii
from clear_dit.kernels.cells import FAR_LEVELS
from clear_dit.versions import __version__
from clear_dit.weights.format import parameters_by_key, pooling_by_key
from clear_dit.weights.learned import make_far_trainable
from clear_dit.weights.load import find_weights, published_name
from clear_dit.weights.state import (
    FAR_WITH_LOCAL_WEIGHTS,
    LOCAL_WITH_FAR_WEIGHTS,
    WITHOUT_LEARNED,
    ClearState,
)

Q = "transformer_blocks.0.attn.to_q.weight"

# https://huggingface.co/black-forest-labs/FLUX.1-dev, transformer/config.json
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


def published_names(num_layers, num_single_layers, pooled):
    """The keys of the five published checkpoints, written out."""
    names = []
    for stack, count in (
        ("transformer_blocks", num_layers),
        ("single_transformer_blocks", num_single_layers),
    ):
        for i in range(count):
            parts = ["to_q", "to_k", "to_v"] + ["to_out.0"] * (stack == "transformer_blocks")
            names += [f"{stack}.{i}.attn.{p}.{kind}" for p in parts for kind in ("weight", "bias")]
            names += [f"{stack}.{i}.attn.processor.spatial_weight"] * pooled
    return names


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture
def tensors(tiny_transformer):
    """Random contents of a file without pooling weights, for the tiny model."""
    torch.manual_seed(1)
    return {key: torch.randn(p.shape) for key, p in parameters_by_key(tiny_transformer()).items()}


@pytest.fixture
def clear_model(tiny_transformer):
    model = tiny_transformer()
    apply_clear(model)
    return model


def test_the_published_format_of_flux_dev():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX_DEV)
    parameters = parameters_by_key(model)
    assert list(parameters) == published_names(19, 38, pooled=False)
    assert len(parameters) == 380
    assert sum(p.numel() for p in parameters.values()) == 1_793_648_640
    apply_clear(model, radius=8, down_factor=4)
    names = {*parameters, *pooling_by_key(model)}
    assert names == set(published_names(19, 38, pooled=True))
    assert all(p.shape == (1, 1, 1, 4, 1, 4, 1) for p in pooling_by_key(model).values())


@pytest.mark.parametrize(("radius", "factor"), [(8, 1), (16, 1), (32, 1), (8, 4), (16, 4)])
def test_published_files_load_and_are_removed(tiny_transformer, tmp_path, radius, factor):
    model = tiny_transformer()
    before = snapshot(model)
    names = published_names(2, 2, pooled=factor > 1)
    shape = (1, 1, 1, factor, 1, factor, 1)
    contents = {
        name: torch.randn(shape if "spatial" in name else before[name].shape).bfloat16()
        for name in names
    }
    suffix = f"_down_{factor}" if factor > 1 else ""
    save_file(contents, tmp_path / f"clear_local_{radius}{suffix}.safetensors")
    apply_clear(model, radius, factor, weights=tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in contents.items())
    assert all(torch.equal(state[name], before[name]) for name in before.keys() - set(names))
    remove_clear(model)
    assert_unchanged(model, before)


def test_parameters_stay_the_same_objects(clear_model, tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    objects = {name: id(p) for name, p in clear_model.named_parameters()}
    load_clear_weights(clear_model, tmp_path / "a.safetensors")
    assert {name: id(p) for name, p in clear_model.named_parameters()} == objects
    assert torch.equal(clear_model.state_dict()[Q], tensors[Q])


def test_loading_again_keeps_the_first_originals(tiny_transformer, tensors, tmp_path):
    model = tiny_transformer()
    before = snapshot(model)
    model.set_attn_processor(CLEARProcessor(radius=8))  # one for all layers will do
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "b.safetensors")
    load_clear_weights(model, str(tmp_path / "a.safetensors"))
    load_clear_weights(model, tmp_path, weight_name="b.safetensors")
    assert torch.equal(model.state_dict()[Q], tensors[Q] + 1)
    assert all(
        value.device.type == "cpu" for value in ClearState.on(model).originals._values.values()
    )
    assert remove_clear(model)
    assert_unchanged(model, before)
    assert remove_clear(model) is False


def test_half_precision_models_are_restored_bit_for_bit(tiny_transformer, tensors, tmp_path):
    model = tiny_transformer().to(torch.bfloat16)
    before = snapshot(model)
    save_file(tensors, tmp_path / "a.safetensors")
    apply_clear(model, weights=tmp_path / "a.safetensors")
    assert torch.equal(model.state_dict()[Q], tensors[Q].bfloat16())
    remove_clear(model)
    assert_unchanged(model, before)


def test_lora_stays_on_top(clear_model, tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    clear_model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    before = snapshot(clear_model)
    load_clear_weights(clear_model, tmp_path / "a.safetensors")
    layer = clear_model.transformer_blocks[0].attn.to_q
    assert torch.equal(layer.base_layer.weight, tensors[Q])
    save_clear_weights(clear_model, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()
    layer.merge()
    with pytest.raises(ValueError, match=r"LoRA is merged into transformer_blocks.0.attn.to_q"):
        save_clear_weights(clear_model, tmp_path / "a.safetensors")
    load_clear_weights(clear_model, tmp_path / "a.safetensors")  # on which it stays
    layer.unmerge()
    remove_clear(clear_model)
    original = before["transformer_blocks.0.attn.to_q.base_layer.weight"]
    assert torch.equal(layer.base_layer.weight, original)


def test_round_trip_with_metadata(tiny_transformer, tmp_path, caplog):
    path = tmp_path / "adapter.safetensors"
    model = tiny_transformer(seed=5)
    apply_clear(model, radius=8, down_factor=2)
    for number, weight in enumerate(pooling_by_key(model).values()):
        weight.data.fill_(number)
    save_clear_weights(model, path, base_model="owner/base")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "clear-dit"
    assert (metadata["radius"], metadata["down_factor"]) == ("8", "2")
    assert metadata["base_model"] == "owner/base"
    assert metadata["clear_dit_version"] == __version__
    assert metadata["torch_version"] == torch.__version__
    assert "diffusers_version" in metadata
    other = tiny_transformer(seed=6)
    apply_clear(other, radius=8, down_factor=2, weights=path)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    saved = load_file(path)
    state = other.state_dict()
    assert set(saved) == set(published_names(2, 2, pooled=True))
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    apply_clear(other, radius=4, down_factor=2, weights=path)  # zero-shot use
    assert "was trained with radius=8, the model runs radius=4" in caplog.text


def changed(tensors, **changes):
    return {**tensors, **changes}


SPATIAL = {
    f"{stack}.{i}.attn.processor.spatial_weight": torch.full((1, 1, 1, 2, 1, 2, 1), 0.25)
    for stack in ("transformer_blocks", "single_transformer_blocks")
    for i in range(2)
}
WRONG_FILES = {
    "missing": (
        lambda t: {k: v for k, v in t.items() if k != Q},
        rf"weights for another model: 1 tensors \({Q}\) missing, 0 tensors unexpected",
    ),
    "unexpected": (
        lambda t: changed(t, extra=torch.zeros(1)),
        r"0 tensors missing, 1 tensors \(extra\) unexpected",
    ),
    "another model's names": (
        lambda t: {"unet." + k: v for k, v in t.items()},
        r"28 tensors \(single_transformer_blocks.0.attn.to_k.bias, .*, \.\.\.\) missing, 28 tens",
    ),
    "another model's shapes": (
        lambda t: {k: torch.zeros(*(2 * s for s in v.shape)) for k, v in t.items()},
        r"28 of 28 tensors have another shape \(.* has \(64,\), the model \(32,\)\)",
    ),
    "integers": (
        lambda t: changed(t, **{Q: torch.zeros(32, 32, dtype=torch.int8)}),
        rf"{Q} must have one of the dtypes F32, F16, BF16, got I8",
    ),
    "double": (lambda t: {k: v.double() for k, v in t.items()}, "must have one of .* got F64"),
    "nan": (
        lambda t: changed(t, **{Q: torch.full((32, 32), float("nan"))}),
        rf"{Q} has values that are not finite",
    ),
    "infinite": (
        lambda t: changed(t, **{Q: torch.full((32, 32), float("inf"))}),
        rf"{Q} has values that are not finite",
    ),
    "pooled": (
        lambda t: {**t, **SPATIAL},
        r"is for down_factor=2, but the model runs down_factor=1; call apply_clear\(..., down_fac",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_change_nothing(tiny_transformer, tensors, tmp_path, name):
    change, message = WRONG_FILES[name]
    path = tmp_path / "wrong.safetensors"
    save_file(change(tensors), path)
    model = tiny_transformer()
    before, originals = snapshot(model), model.attn_processors
    with pytest.raises(ValueError, match=f"load_clear_weights: wrong.safetensors.*{message}"):
        apply_clear(model, weights=path)
    assert model.attn_processors == originals
    assert ClearState.on(model) is None
    apply_clear(model)
    with pytest.raises(ValueError, match=message):
        load_clear_weights(model, path)
    assert_unchanged(model, before)
    assert not ClearState.on(model).originals


def test_values_that_overflow_the_model_s_dtype(tiny_transformer, tensors, tmp_path):
    save_file(changed(tensors, **{Q: torch.full((32, 32), 1e30)}), tmp_path / "a.safetensors")
    apply_clear(tiny_transformer(), weights=tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        apply_clear(tiny_transformer().half(), weights=tmp_path / "a.safetensors")


def test_files_for_another_down_factor(tiny_transformer, tensors, tmp_path):
    model = tiny_transformer()
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is for down_factor=1, but the model runs down_factor=4"):
        apply_clear(model, down_factor=4, weights=tmp_path / "plain.safetensors")
    save_file({**tensors, **SPATIAL}, tmp_path / "pooled.safetensors")
    with pytest.raises(ValueError, match="is for down_factor=2, but the model runs down_factor=4"):
        apply_clear(model, down_factor=4, weights=tmp_path / "pooled.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"radius": "wide"}, "metadata's radius is not a number: 'wide'"),
        ({"down_factor": "4"}, "metadata says down_factor=4, the tensors 1"),
        ({"far": "yes"}, "metadata's far is not true or false: 'yes'"),
    ],
)
def test_metadata_that_contradicts_itself(clear_model, tensors, tmp_path, metadata, message):
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load_clear_weights(clear_model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["truncated", "cut header", "pickle", "empty", "text"])
def test_not_safetensors(clear_model, tensors, tmp_path, kind):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    if kind == "pickle":
        torch.save(tensors, path)
    else:
        header = json.dumps({"a": 1}).encode()
        path.write_bytes(
            {"truncated": whole[:-1], "cut header": whole[:30], "empty": b"", "text": header}[kind]
        )
    before = snapshot(clear_model)
    with pytest.raises(ValueError, match=r"a.safetensors is not a safetensors file, or is trunc"):
        load_clear_weights(clear_model, path)
    assert_unchanged(clear_model, before)


def test_models_that_cannot_take_weights(clear_model, tiny_transformer, tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="has FluxAttnProcessor, not CLEARProcessor; call apply_c"):
        load_clear_weights(tiny_transformer(), path)
    shared = tiny_transformer()
    shared.set_attn_processor(CLEARProcessor(down_factor=2))
    with pytest.raises(ValueError, match="down_factor > 1 each layer needs a CLEARProc"):
        load_clear_weights(shared, path)
    clear_model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections; call unfuse_qkv_projections"):
        load_clear_weights(clear_model, path)
    clear_model.unfuse_qkv_projections()
    clear_model.transformer_blocks[0].attn.processor.radii = Radii(3)
    with pytest.raises(ValueError, match="differ in radius, down_factor, far or poo"):
        load_clear_weights(clear_model, path)
    with torch.device("meta"):
        absent = tiny_transformer()
    apply_clear(absent)
    with pytest.raises(ValueError, match=r"has no values here .meta device"):
        load_clear_weights(absent, path)
    quantised = tiny_transformer()
    linear = quantised.transformer_blocks[1].attn.to_k
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    apply_clear(quantised)
    with pytest.raises(ValueError, match=r"blocks.1.attn.to_k.weight is quantised or sharded"):
        load_clear_weights(quantised, path)


def test_files_that_are_not_there(clear_model, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("no network for a local path")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    (tmp_path / "other.safetensors").touch()
    for path in ("no-file.safetensors", "folder/no-file.safetensors", "./a/b", "/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load_clear_weights(clear_model, path)
    names = r"'clear_far_16.safetensors' or 'clear_local_16.safetensors'"
    message = rf"there is no {names} in .* there: other.safetensors. Choose one"
    with pytest.raises(FileNotFoundError, match=message):
        load_clear_weights(clear_model, tmp_path)
    with pytest.raises(ValueError, match=r"weight_name must end in '.safetensors', got 'a.bin'"):
        load_clear_weights(clear_model, tmp_path, weight_name="a.bin")


def test_hub_repositories(tiny_transformer, tensors, tmp_path, monkeypatch):
    calls = []

    def download(repository, name, **options):
        calls.append((repository, name, options))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(f"404: no {name} there\nsecond line")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    save_file(tensors, tmp_path / "clear_local_8.safetensors")
    model = tiny_transformer()
    apply_clear(model, radius=8, weights="Huage001/CLEAR")
    assert torch.equal(model.state_dict()[Q], tensors[Q])
    load_clear_weights(model, "Huage001/CLEAR", revision="main", local_files_only=True)
    names = ["clear_far_8.safetensors", "clear_local_8.safetensors"]
    assert [call[:2] for call in calls] == [("Huage001/CLEAR", name) for name in names * 2]
    assert all(call[2]["revision"] == "main" for call in calls[2:])
    assert all(call[2]["local_files_only"] is True for call in calls[2:])
    calls.clear()
    apply_clear(model, radius=8, far=False, weights="Huage001/CLEAR")
    assert [call[1] for call in calls] == ["clear_local_8.safetensors"]
    with pytest.raises(
        OSError, match=r"cannot get 'clear_local_16_down_4.safetensors' .* no clear_"
    ):
        apply_clear(model, 16, 4, weights="Huage001/CLEAR")
    assert model.transformer_blocks[0].attn.processor.radius == 8


def save_weights(folder, model, far, learned=False):
    """What a model of another seed has tuned, in a file of its name."""
    apply_clear(model, radius=4, far=far)
    if learned:
        make_far_trainable(model)
        for weight in pooling_by_key(model).values():
            weight.data.uniform_(0, 0.5)
    path = folder / published_name(4, 1, far)
    save_clear_weights(model, path)
    return path


def far_of(model):
    """Whether all layers have far keys, or none."""
    (far,) = {processor.has_far_keys for processor in model.attn_processors.values()}
    return far


ROUTES = {
    "apply_clear": lambda model, path, **far: apply_clear(model, radius=4, weights=path, **far),
    "loaded": lambda model, path, **far: (
        apply_clear(model, radius=4, **far),
        load_clear_weights(model, path),
    ),
    "bare": lambda model, path, **far: (
        model.set_attn_processor(CLEARProcessor(radius=4, **far)),
        load_clear_weights(model, path),
    ),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("made_for", [False, True])
def test_far_keys_follow_the_weights(tiny_transformer, tmp_path, caplog, route, made_for):
    path = save_weights(tmp_path, tiny_transformer(seed=5), made_for)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["far"] == str(made_for).lower()
    model = tiny_transformer()
    route(model, path)
    assert far_of(model) == made_for
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    # So do settings and processors that come later, until the weights are taken away.
    apply_clear(model, radius=3)
    assert far_of(model) == made_for
    remove_clear(model)
    apply_clear(model, radius=3)
    assert far_of(model)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("made_for", [False, True])
def test_settings_against_the_weights(tiny_transformer, tmp_path, caplog, route, made_for):
    path = save_weights(tmp_path, tiny_transformer(seed=5), made_for, learned=made_for)
    model = tiny_transformer()
    route(model, path, far=not made_for)
    assert far_of(model) == (not made_for)
    assert not pooling_by_key(model)  # what was learned is of no use without far keys
    message = LOCAL_WITH_FAR_WEIGHTS if made_for else FAR_WITH_LOCAL_WEIGHTS
    assert caplog.text.count(message) == 1
    caplog.clear()
    apply_clear(model, radius=4)
    assert far_of(model) == made_for
    assert bool(pooling_by_key(model)) == made_for  # and back with them
    apply_clear(model, radius=4, far=not made_for)
    assert caplog.text.count(message) == 1


def test_processors_set_after_the_weights(tiny_transformer, tiny_inputs, tmp_path, caplog):
    path = save_weights(tmp_path, tiny_transformer(seed=5), far=False)
    model = tiny_transformer()
    apply_clear(model, radius=4, weights=path)
    model.set_attn_processor(CLEARProcessor(radius=4))
    save_clear_weights(model, tmp_path / "again.safetensors")  # before any forward
    with safe_open(tmp_path / "again.safetensors", framework="pt") as file:
        assert file.metadata()["far"] == "false"
    model.set_attn_processor(CLEARProcessor(radius=4))
    model(**tiny_inputs(4, 6))
    assert not far_of(model)
    model.set_attn_processor(CLEARProcessor(radius=4, far=True))
    for _ in range(2):
        model(**tiny_inputs(4, 6))
    assert caplog.text.count(FAR_WITH_LOCAL_WEIGHTS) == 1


def test_a_processor_outlives_the_weights(tiny_transformer, tmp_path):
    path = save_weights(tmp_path, tiny_transformer(seed=5), far=False)
    model, processor = tiny_transformer(), CLEARProcessor(radius=4)
    model.set_attn_processor(processor)
    load_clear_weights(model, path)
    assert not far_of(model)
    remove_clear(model)
    model.set_attn_processor(processor)
    assert far_of(model)


def test_far_weights_without_what_they_learned(tiny_transformer, tiny_inputs, tmp_path, caplog):
    path = save_weights(tmp_path, tiny_transformer(seed=5), far=True, learned=True)
    model = tiny_transformer()
    apply_clear(model, radius=4, weights=path)
    model.set_attn_processor(CLEARProcessor(radius=4))
    model(**tiny_inputs(4, 6))
    assert caplog.text.count(WITHOUT_LEARNED) == 1
    apply_clear(model, radius=1)  # there are none
    assert caplog.text.count(LOCAL_WITH_FAR_WEIGHTS) == 1
    apply_clear(model, radius=4)
    assert pooling_by_key(model).keys() == ClearState.on(model).learned.keys()


@pytest.mark.parametrize("made_for", [None, False])
def test_files_that_say_nothing_are_local(tiny_transformer, tensors, tmp_path, made_for):
    """The published ones, and ours from before there were far keys."""
    metadata = None if made_for is None else {"format": "clear-dit", "radius": "4"}
    save_file(tensors, tmp_path / "clear_local_4.safetensors", metadata=metadata)
    model = tiny_transformer()
    apply_clear(model, radius=4, weights=tmp_path)
    assert not far_of(model)


def test_what_was_learned_of_far_keys(tiny_transformer, tmp_path):
    tuned, model = tiny_transformer(seed=5), tiny_transformer()
    before = snapshot(model)
    path = save_weights(tmp_path, tuned, far=True, learned=True)
    learned = {key: tensor.clone() for key, tensor in pooling_by_key(tuned).items()}
    assert {tuple(tensor.shape) for tensor in learned.values()} == {
        (FAR_LEVELS, 2, 2),
        (FAR_LEVELS, 2),
    }
    apply_clear(model, radius=4)
    assert not pooling_by_key(model)
    load_clear_weights(model, path)
    found = pooling_by_key(model)
    assert found.keys() == learned.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in learned.items())
    assert {key for key in load_file(path) if ".processor." in key} == learned.keys()
    # Settings and dtypes change around them; weights without them take them away.
    apply_clear(model.to(torch.bfloat16), radius=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, learned[key].bfloat16()) for key, p in pooling_by_key(model).items())
    model.float()
    (tmp_path / "other").mkdir()
    other = save_weights(tmp_path / "other", tiny_transformer(seed=6), far=True)
    load_clear_weights(model, other)
    assert far_of(model)
    assert not pooling_by_key(model)
    model = tiny_transformer()
    apply_clear(model, radius=4, weights=path)
    remove_clear(model)
    assert_unchanged(model, before)


WRONG_FAR_FILES = {
    "a layer's are missing": (
        lambda t: {k: v for k, v in t.items() if not (k.startswith(Q[:24]) and "far_off" in k)},
        r"1 tensors \(transformer_blocks.0.attn.processor.far_offset\) missing, 0 tensors unexpect",
    ),
    "fewer levels": (
        lambda t: {k: v[:3] if "far_" in k else v for k, v in t.items()},
        r"8 of 36 tensors have another shape \(.*far_offset has \(3, 2\), the model \(10, 2\)\)",
    ),
    "not finite": (
        lambda t: {k: v / 0 if "far_weight" in k else v for k, v in t.items()},
        "far_weight has values that are not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG_FAR_FILES)
def test_wrong_files_of_far_keys(tiny_transformer, tmp_path, name):
    change, message = WRONG_FAR_FILES[name]
    path = save_weights(tmp_path, tiny_transformer(seed=5), far=True, learned=True)
    save_file(change(load_file(path)), path)
    model = tiny_transformer()
    with pytest.raises(ValueError, match=message):
        apply_clear(model, radius=4, weights=path)
    assert ClearState.on(model) is None


def test_learned_of_far_keys_by_a_layer_each(tiny_transformer, tmp_path):
    path = save_weights(tmp_path, tiny_transformer(seed=5), far=True, learned=True)
    model = tiny_transformer()
    model.set_attn_processor(CLEARProcessor(radius=4))
    with pytest.raises(
        ValueError,
        match=r"clear_far_4.safetensors learned of far keys, for which each layer needs a CL",
    ):
        load_clear_weights(model, path)
    with pytest.raises(ValueError, match="to learn of far keys each layer needs a CLEARProcessor"):
        make_far_trainable(model)
    apply_clear(model, radius=4, far=False)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn has no far keys; call apply_clear\(..., f"
    ):
        make_far_trainable(model)
    with pytest.raises(ValueError, match="is for down_factor=1, but the model runs down_factor=2"):
        apply_clear(model, radius=4, down_factor=2, weights=path)


def test_pooled_keys_that_count(tiny_transformer, tmp_path, caplog):
    """Weights are made for pooled keys of one weight; the published ones for "one"."""
    model = tiny_transformer()
    settings = {"radius": 4, "down_factor": 2}
    apply_clear(model, **settings)
    save_clear_weights(model, tmp_path / "one.safetensors")
    apply_clear(model, **settings, pooled_weight="count")
    save_clear_weights(model, tmp_path / "count.safetensors")
    apply_clear(model, **settings, pooled_weight="count", weights=tmp_path / "count.safetensors")
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    apply_clear(model, **settings, pooled_weight="count", weights=tmp_path / "one.safetensors")
    assert "trained with pooled_weight='one', the model runs pooled_weight='count'" in caplog.text


def test_folders_of_both(tiny_transformer, tmp_path):
    """The setting decides which comes first."""
    for far in (False, True):
        save_weights(tmp_path, tiny_transformer(seed=5), far)
    for far, name in ((None, "far"), (True, "far"), (False, "local")):
        assert find_weights(tmp_path, 4, 1, far).name == f"clear_{name}_4.safetensors"
    (tmp_path / "clear_far_4.safetensors").unlink()
    assert find_weights(tmp_path, 4, 1, far=True).name == "clear_local_4.safetensors"


def test_saving_is_refused_before_a_file_appears(clear_model, tiny_transformer, tmp_path):
    with pytest.raises(ValueError, match=r"must end in '.safetensors', got 'a.pt'"):
        save_clear_weights(clear_model, tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing'; make it first"):
        save_clear_weights(clear_model, tmp_path / "missing" / "a.safetensors")
    with pytest.raises(ValueError, match="call apply_clear first"):
        save_clear_weights(tiny_transformer(), tmp_path / "a.safetensors")
    clear_model.transformer_blocks[0].attn.to_q.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{Q} has values that are not finite"):
        save_clear_weights(clear_model, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_file(clear_model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_clear_weights(clear_model, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.safetensors"]
