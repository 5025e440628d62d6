"""Random IP-adapters for tiny pipelines."""

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection


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


def make_sd3_ip_adapter(layers, seed=0):
    """What the file of an IP-adapter of a tiny SD3 holds: 4 tokens for an image of (any, 6).

    Args:
        layers: attention layers of the model.
    """
    projection = IPAdapterTimeImageProjection(
        embed_dim=6, output_dim=32, hidden_dim=8, heads=1, num_queries=4, timestep_in_dim=8
    )
    layer = SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=8)
    generator = torch.Generator().manual_seed(seed)

    def random(state):
        return {name: torch.randn(x.shape, generator=generator) for name, x in state.items()}

    of_layers = {
        f"{index}.{name}": weight
        for index in range(layers)
        for name, weight in random(layer.state_dict()).items()
    }
    return {"image_proj": random(projection.state_dict()), "ip_adapter": of_layers}


def load_sd3_ip_adapter(pipe, seed=0):
    """Load an IP-adapter into a pipeline of SD3, without an image encoder."""
    adapter = make_sd3_ip_adapter(len(pipe.transformer.attn_processors), seed)
    pipe.load_ip_adapter(adapter, image_encoder_folder=None)
