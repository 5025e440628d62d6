"""The demo at 64 px and 2 steps, weights for it, and the command line in this process."""

import pytest
import torch
from support.command_line import run

from clear_dit import apply_clear, save_clear_weights
from clear_dit.generation.models import load_pipeline
from clear_dit.weights.format import parameters_by_key, pooling_by_key
from clear_dit.weights.learned import make_far_trainable

SMALL = ("--height", 64, "--width", 64, "--steps", 2, "--guidance", 1.5)


@pytest.fixture(scope="session")
def pipe():
    return load_pipeline("demo", torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """CLEAR weights of the demo for radius 2, a little off its own."""
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"))
    apply_clear(pipe, radius=2, far=False)
    torch.manual_seed(0)
    for parameter in parameters_by_key(pipe.transformer).values():
        parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "tuned.safetensors"
    save_clear_weights(pipe, path)
    return path


@pytest.fixture(scope="session")
def far_weights(tmp_path_factory):
    """CLEAR weights of the demo for radius 2 with far keys, which they learned something of."""
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"))
    apply_clear(pipe, radius=2, far=True)
    make_far_trainable(pipe.transformer)
    torch.manual_seed(0)
    for parameter in pooling_by_key(pipe.transformer).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "far.safetensors"
    save_clear_weights(pipe, path)
    return path


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """A LoRA of rank 2 on the demo's queries, as diffusers saves it."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = load_pipeline("demo", torch.float32, torch.device("cpu")).transformer
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    folder = tmp_path_factory.mktemp("lora")
    layers = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def evaluate():
    """Runs a small `clear-dit evaluate` into a folder; its exit status."""

    def run_small(out, *arguments, count=3):
        return run("evaluate", *SMALL, "--count", count, "--out", out, *arguments)

    return run_small
