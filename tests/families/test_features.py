"""What is trained of a family, and which pipelines are refused."""

import json

import pytest
from support.families.models import make_model

from clear_dit.distillation.student import lora_config
from clear_dit.errors import RequestError
from clear_dit.generation.models import model_path


def test_what_is_trained_comes_from_the_table():
    pytest.importorskip("peft")
    targets = set(lora_config(make_model("flux2"), rank=2).target_modules)
    double = {f"transformer_blocks.0.attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")}
    assert double | {"single_transformer_blocks.1.attn.to_qkv_mlp_proj"} < targets
    assert len(targets) == 2 * 4 + 2


@pytest.mark.parametrize(
    ("transformer", "known"),
    [
        ("QwenImageTransformer2DModel", "; of Qwen-Image .* pipelines are QwenImagePipeline, "),
        ("UNet2DConditionModel", ", whose transformer is none of FluxTransformer2DModel, "),
    ],
)
def test_command_line(tmp_path, transformer, known):
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", transformer]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match=f"holds a SomePipeline{known}"):
        model_path(str(tmp_path))
