"""The backend CLEAR in vLLM-Omni's own selector, attention layer and transformers.

vLLM's wheels are for GPUs; support/vllm_stand_in.py stands for what is used of it. vLLM-Omni itself
is the published one, see support/packages.py. (The folder of these tests has another name: this one
would be found for the package.)
"""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from support.packages import need
from support.vllm_stand_in import vllm_omni

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window
from clear_dit.vllm_omni import register
from clear_dit.vllm_omni.settings import VARIABLE

need("vllm-omni")

ROWS, COLUMNS, TEXT, RADIUS = 6, 7, 3, 3
SIZES = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4}
FLUX = SIZES | {
    "num_single_layers": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6), "guidance_embeds": False,
}  # fmt: skip
FLUX2 = SIZES | {
    "num_single_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 16, "guidance_embeds": False,
}  # fmt: skip
QWEN = SIZES | {"joint_attention_dim": 8, "axes_dims_rope": (4, 6, 6), "out_channels": 1}
MODELS = {
    "flux": ("flux.flux_transformer.FluxTransformer2DModel", FLUX),
    "kontext": ("flux.flux_transformer.FluxKontextTransformer2DModel", FLUX),
    "flux2": ("flux2.flux2_transformer.Flux2Transformer2DModel", FLUX2),
    "klein": ("flux2_klein.flux2_klein_transformer.Flux2Transformer2DModel", FLUX2),
    "qwen": ("qwen_image.qwen_image_transformer.QwenImageTransformer2DModel", QWEN),
}


@pytest.fixture(scope="module", autouse=True)
def omni():
    with vllm_omni():
        register()
        yield


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setenv(VARIABLE, f'{{"radius": {RADIUS}, "far": false}}')


def of_omni(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"vllm_omni.diffusion.{module}"), attribute)


def config(backend, **degrees):
    made = of_omni("data.AttentionConfig")
    given = backend if isinstance(backend, dict) else {"default": backend}
    parallel = {"ring_degree": 1, "sequence_parallel_size": 1, "ulysses_degree": 1} | degrees
    return SimpleNamespace(
        diffusion_attention_config=made(**given),
        parallel_config=SimpleNamespace(mask_sp_padding=False, **parallel),
        tf_model_config=SimpleNamespace(num_layers=1),
        model_class_name=None,
    )


def make(name, backend="CLEAR"):
    """A tiny transformer of vLLM-Omni's, the same each time but for the backend."""
    path, sizes = MODELS[name]
    torch.manual_seed(0)
    with of_omni("config.set_current_diffusion_config")(config(backend)):
        return of_omni(f"models.{path}")(od_config=config(backend), **sizes).eval()


def raster(rows, columns, channels, group=0):
    ids = torch.zeros(rows, columns, channels)
    ids[..., 0], ids[..., 1], ids[..., 2] = (
        group, torch.arange(rows)[:, None], torch.arange(columns),
    )  # fmt: skip
    return ids.flatten(0, 1)


def arguments(name, rows=ROWS, columns=COLUMNS, references=()):
    """What a pipeline gives the transformer; reference images as (rows, columns)."""
    generator = torch.Generator().manual_seed(1)
    channels = 4 if name in ("flux2", "klein") else 3
    images = [(rows, columns), *references]
    tokens = sum(height * width for height, width in images)
    given = {
        "hidden_states": torch.randn(1, tokens, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 8, generator=generator),
        "timestep": torch.tensor([0.5]),
    }
    if name == "qwen":
        shapes = [[(1, height, width) for height, width in images]]
        return given | {"img_shapes": shapes, "txt_seq_lens": [TEXT]}
    ids = [raster(*size, channels, group) for group, size in enumerate(images)]
    given |= {"img_ids": torch.cat(ids), "txt_ids": torch.zeros(TEXT, channels)}
    return given if channels == 4 else given | {"pooled_projections": torch.ones(1, 8)}


def generate(transformer, given):
    about = of_omni("forward_context.ForwardContext")(omni_diffusion_config=config("CLEAR"))
    with of_omni("forward_context.override_forward_context")(about), torch.no_grad():
        return transformer(**given).sample


def dense_under(mask):
    """PyTorch's attention with a mask, for a transformer that has no other."""
    stock = torch.nn.functional.scaled_dot_product_attention

    def attend(*tokens, attn_mask=None, **others):
        return stock(*tokens, attn_mask=mask, **others)

    return attend


TWO = ((2, 3), (4, 2))
CASES = [*((name, ()) for name in MODELS), ("kontext", TWO), ("flux2", TWO), ("klein", TWO)]


@pytest.mark.parametrize(("name", "references"), CASES)
def test_a_transformer_sees_what_the_window_says(monkeypatch, name, references):
    given = arguments(name, references=references)
    found = generate(make(name), given)
    stock = make(name, "TORCH_SDPA")
    dense = generate(stock, given)
    # Text and reference images first, then the image, which here comes before the latter.
    others = sum(rows * columns for rows, columns in references)
    mask = Window(ROWS, COLUMNS, TEXT + others, RADIUS).mask()
    text, image = range(TEXT), range(TEXT + others, len(mask))
    order = torch.tensor([*text, *image, *range(TEXT, TEXT + others)])
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", dense_under(mask[order][:, order])
    )
    torch.testing.assert_close(found, generate(stock, given), atol=1e-5, rtol=1e-4)
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_far_keys_are_those_of_local_attention(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, '{"radius": 2}')
    given = arguments(name)
    found = generate(make(name), given)
    window = Window(ROWS, COLUMNS, TEXT, 2, far_levels=10)

    def attend(query, key, value, attn_mask=None, *, scale, **others):
        tokens = (x.transpose(1, 2) for x in (query, key, value))
        return local_attention(*tokens, window, scale=scale, impl="reference").transpose(1, 2)

    stock = make(name, "TORCH_SDPA")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    torch.testing.assert_close(found, generate(stock, given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_radius_over_everything_is_the_dense_image(monkeypatch, name):
    monkeypatch.setenv(VARIABLE, '{"radius": 1048576}')
    given = arguments(name)
    torch.testing.assert_close(
        generate(make(name), given), generate(make(name, "TORCH_SDPA"), given)
    )


def test_sizes_may_change_between_requests_compiled_or_not():
    eager, compiled = make("flux"), make("flux")
    for block in (*compiled.transformer_blocks, *compiled.single_transformer_blocks):
        block.compile(backend="eager")  # as vLLM-Omni does, block by block
    for size in ((6, 7), (7, 6), (3, 14), (6, 7), (4, 4)):  # four have as many tokens
        given = arguments("flux", *size)
        torch.testing.assert_close(generate(compiled, given), generate(eager, given))


def layer(role="self", backend="CLEAR", causal=False, **degrees):
    made = config(backend, **degrees)
    with of_omni("config.set_current_diffusion_config")(made):
        return of_omni("attention.layer.Attention")(
            num_heads=2, head_size=16, causal=causal, softmax_scale=0.25, role=role
        )


def tokens(count, keys=None):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, length, 2, 16, generator=generator)
        for length in (count, keys or count, keys or count)
    ]


def metadata(**given):
    return of_omni("attention.backends.abstract.AttentionMetadata")(**given)


def test_what_a_model_publishes_of_its_grid_is_taken():
    video = of_omni("attention.backends.abstract.VideoTokenLayout")
    window = Window(ROWS, COLUMNS, TEXT, RADIUS)
    given = tokens(window.sequence_length)
    published = metadata(video_layout=video(prefix_len=TEXT, latent_grid=(1, ROWS, COLUMNS)))
    wanted = local_attention(*given, window, scale=0.25, impl="reference")
    torch.testing.assert_close(layer()(*given, published), wanted)
    film = metadata(video_layout=video(prefix_len=TEXT, latent_grid=(2, 3, COLUMNS)))
    with pytest.raises(ValueError, match=r"^CLEAR: takes images, that is one frame; got a video"):
        layer()(*given, film)


def test_a_layer_of_role_cross_stays_dense():
    given = tokens(8, keys=5)
    dense = layer("cross", "TORCH_SDPA")(*given)
    torch.testing.assert_close(layer("cross")(*given), dense)
    mask = torch.tensor([[True, True, True, False, False]])
    with pytest.raises(ValueError, match="'CLEAR' does not support attn_mask"):
        layer("cross")(*given, metadata(attn_mask=mask))


def test_a_role_may_have_another_backend():
    chosen = {"default": "CLEAR", "per_role": {"refiner": "TORCH_SDPA"}}
    assert layer("refiner", chosen)(*tokens(8)).shape == (1, 8, 2, 16)
    assert layer("self", chosen).attn_backend.get_name() == "CLEAR"


def test_a_layer_that_knows_no_grid_is_refused():
    told = r"^CLEAR: the grid of the image is not known in a layer of role 'self'. It is in Flux2"
    with pytest.raises(ValueError, match=told):
        layer()(*tokens(45))
    generate(make("flux"), arguments("flux"))  # what it said is forgotten
    with pytest.raises(ValueError, match=told):
        layer()(*tokens(45))


def test_tokens_that_are_not_the_image_are_refused():
    transformer, given = make("flux"), arguments("flux")
    other = layer()
    transformer.norm_out.register_forward_hook(lambda *_: other(*tokens(44)))
    told = (
        r"^CLEAR: 3 tokens of text, 6 x 7 of the image are 45, got 44 queries and 44 keys in a "
        r"layer of role 'self'\.$"
    )
    with pytest.raises(ValueError, match=told):
        generate(transformer, given)


def test_ids_that_are_no_image_are_refused():
    given = arguments("flux")
    given["img_ids"] = given["img_ids"].flip(0).roll(3, 0)
    with pytest.raises(ValueError, match="are not those of one image in raster order"):
        generate(make("flux"), given)


@pytest.mark.parametrize(
    "shapes", [[[(1, 6, 7), (1, 6, 7)]], [[(1, 6, 7)], [(1, 7, 6)]], [[(2, 3, 7)]], None], ids=str
)
def test_qwen_image_is_one_image_of_one_size(shapes):
    given = arguments("qwen") | {"img_shapes": shapes}
    with pytest.raises(ValueError, match=r"^CLEAR: (Qwen-Image takes one image|takes images, got)"):
        generate(make("qwen"), given)


def test_padded_prompts_are_refused_and_full_masks_are_not():
    given = arguments("qwen")
    whole = torch.ones(1, TEXT, dtype=torch.bool)
    wanted = generate(make("qwen"), given)
    torch.testing.assert_close(
        generate(make("qwen"), given | {"encoder_hidden_states_mask": whole}), wanted
    )
    padded = whole.clone()
    padded[:, -1] = False
    with pytest.raises(ValueError, match="'CLEAR' does not support attn_mask"):
        generate(make("qwen"), given | {"encoder_hidden_states_mask": padded})


@pytest.mark.parametrize(
    "given",
    [
        {"joint_query": torch.ones(1)},
        {"packed_padding": "some"},
        {"query_ranges": ()},
        {"extra": {"valid_kv_length": 40}},
        {"extra": {"cu_seqlens_q": torch.ones(1)}},
    ],
    ids=str,
)
def test_restrictions_it_would_not_keep_are_refused(given):
    with pytest.raises(ValueError, match=r"^CLEAR: takes prompts of one length without padding"):
        layer()(*tokens(45), metadata(**given))


def test_layers_it_cannot_be_are_refused_when_they_are_made():
    with pytest.raises(ValueError, match=r"^CLEAR: attention of an image is not causal"):
        layer(causal=True)
    for name in ("ulysses_degree", "ring_degree", "allgather_degree", "sequence_parallel_size"):
        with pytest.raises(ValueError, match=rf"^CLEAR: ranks cannot share .* got {name}=2;"):
            layer(**{name: 2})


def test_bad_settings_are_refused_before_a_model_is_made(monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"radius": 0}')
    of_omni("attention.selector._cached_get_backend_cls").cache_clear()
    with pytest.raises(ValueError, match=rf"^{VARIABLE}: radius must be an integer of 2 or more"):
        of_omni("attention.selector.get_attn_backend_for_role")(
            "self", 16, of_omni("data.AttentionConfig")(default="CLEAR")
        )


def test_it_is_chosen_by_the_environment_in_any_case(monkeypatch):
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "clear")
    chosen = of_omni("data.build_attention_config")()
    found, spec = of_omni("attention.selector.get_attn_backend_for_role")("self", 128, chosen)
    assert (found.get_name(), spec.backend) == ("CLEAR", "clear")
    assert found.supports_head_size(128)


def test_other_platforms_are_refused(monkeypatch):
    platform = importlib.import_module("vllm_omni.platforms").current_omni_platform
    enum = importlib.import_module("vllm_omni.platforms.interface").OmniPlatformEnum
    monkeypatch.setattr(type(platform), "_omni_enum", enum.NPU)
    with pytest.raises(ValueError, match=r"CLEAR diffusion .* runs on cuda, rocm only"):
        platform.get_diffusion_attn_backend_cls("CLEAR", 128)


def test_vllm_omni_loads_the_entry_point(monkeypatch, tmp_path):
    plugins = importlib.import_module("vllm_omni.plugins")
    about = tmp_path / "clear_dit_here-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: clear-dit-here\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        f"[{plugins.OMNI_DEFAULT_PLUGINS_GROUP}]\nclear_dit = clear_dit.vllm_omni:register\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = importlib.import_module("vllm_omni.diffusion.attention.backends.registry")
    backend = registry.DiffusionAttentionBackendEnum["CLEAR"]
    backend.clear_override()
    with pytest.raises(ValueError, match="must be registered before use"):
        backend.get_class()
    monkeypatch.setattr(plugins, "omni_plugins_loaded", False)
    plugins.load_omni_general_plugins()
    assert backend.get_class().get_name() == "CLEAR"


def test_the_transformers_forward_keeps_its_signature():
    cls = type(make("flux"))
    assert "img_ids" in inspect.signature(cls.forward).parameters
    wrapped = cls.forward
    make("flux")
    assert cls.forward is wrapped
