"""LoRA files for the demo, as diffusers saves them."""

from pathlib import Path

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from clear_dit.generation.models import load_pipeline

# Some of attention, some of the layers around it.
LAYERS = ("to_q", "to_out.0", "ff.net.0.proj", "norm1.linear")


def save_lora(path: Path, seed: int = 0, rank: int = 2, layers: tuple[str, ...] = LAYERS) -> Path:
    """Save a random LoRA that changes images visibly, with a strength of its own."""
    transformer = load_pipeline(
        "demo", torch.float32, torch.device("cpu"), only_transformer=True
    ).transformer
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=list(layers)
    )
    transformer.add_adapter(config)
    diffusers.FluxPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        weight_name=path.name,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return path
