"""Random IP-adapters for the tiny pipeline."""

import torch


def make_ip_adapter(seed=0):
    """What the file of an IP-adapter holds: 4 tokens for an image of 6 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def linear(name, outputs, inputs):
        return {
            f"{name}.weight": torch.randn(outputs, inputs, generator=generator),
            f"{name}.bias": torch.randn(outputs, generator=generator),
        }

    projection = linear("proj", 4 * 8, 6)
    norm = {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    layers = {}
    for layer in range(2):
        for part in ("to_k_ip", "to_v_ip"):
            layers |= linear(f"{layer}.{part}", 32, 8)
    return {"image_proj": projection | norm, "ip_adapter": layers}


def load_ip_adapters(pipe, *seeds):
    """Load one IP-adapter for each seed (default 0), without an image encoder."""
    files = [make_ip_adapter(seed) for seed in seeds or (0,)]
    pipe.load_ip_adapter(
        files, weight_name=[""] * len(files), image_encoder_pretrained_model_name_or_path=None
    )
