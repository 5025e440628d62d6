"""A tiny FLUX of diffusers' and the same in BFL's layout, and inputs for both."""

import torch

from clear_dit.weights.bfl import into_bfl, place_in_bfl
from support.families.models import make_inputs, make_model

from .flux import Flux
from .patcher import Model, ModelPatcher

# What is outside of attention; a block's own number stands at {}.
REST = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "transformer_blocks.{}.norm1.linear": "double_blocks.{}.img_mod.lin",
    "transformer_blocks.{}.norm1_context.linear": "double_blocks.{}.txt_mod.lin",
    "transformer_blocks.{}.ff.net.0.proj": "double_blocks.{}.img_mlp.0",
    "transformer_blocks.{}.ff.net.2": "double_blocks.{}.img_mlp.2",
    "transformer_blocks.{}.ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
    "transformer_blocks.{}.ff_context.net.2": "double_blocks.{}.txt_mlp.2",
    "single_transformer_blocks.{}.norm.linear": "single_blocks.{}.modulation.lin",
}


def _rest(name):
    stem, kind = name.rsplit(".", 1)
    number = next((part for part in stem.split(".") if part.isdigit()), "")
    general = stem.replace(f"blocks.{number}.", "blocks.{}.", 1) if "blocks." in stem else stem
    return f"{REST[general].format(number)}.{kind}"


def bfl_state(state, base, channels):
    """diffusers' state by BFL's names; `base` has the shapes."""
    attention = {name: x for name, x in state.items() if place_in_bfl(name, channels)}
    found = into_bfl(attention, base, channels)
    for name in state.keys() - attention.keys():
        value = state[name]
        if name.startswith("norm_out.linear"):  # scale before shift, and the other way round
            value = torch.cat(value.chunk(2)[::-1])
        found[_rest(name)] = value
    return found


def bfl_model(transformer):
    """A diffusers FLUX in BFL's layout."""
    config = transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    model = Flux(
        in_channels=config.in_channels, channels=channels, heads=config.num_attention_heads,
        context=config.joint_attention_dim, pooled=config.pooled_projection_dim,
        double=config.num_layers, single=config.num_single_layers, axes=config.axes_dims_rope,
        guidance=config.guidance_embeds,
    ).eval()  # fmt: skip
    model.load_state_dict(bfl_state(transformer.state_dict(), model.state_dict(), channels))
    return model


def pair(seed=0, **config):
    """The same model twice: diffusers', and ComfyUI's patcher of BFL's."""
    transformer = make_model("flux", seed, guidance_embeds=True, **config)
    return transformer, ModelPatcher(Model(bfl_model(transformer)))


def _packed(latent):
    x = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(tokens, rows, columns):
    x = tokens.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Inputs:
    """The same inputs for both.

    Args:
        rows, columns: of the image, in tokens.
        references: (rows, columns) of reference images.
        level: of noise.
    """

    def __init__(self, rows, columns, text=5, batch=1, references=(), level=0.5, seed=0):
        self.rows, self.columns, self.level = rows, columns, level
        self.diffusers = make_inputs(
            "flux", rows, columns, text, batch=batch, guidance=True, references=references,
            seed=seed,
        )  # fmt: skip
        self.diffusers["timestep"] = torch.full((batch,), level)
        tokens, sizes = self.diffusers["hidden_states"], [(rows, columns), *references]
        parts = tokens.split([a * b for a, b in sizes], dim=1)
        self.latent, *refs = (
            _unpacked(part, *size) for part, size in zip(parts, sizes, strict=True)
        )
        self.references = refs or None

    def comfyui(self, patcher, **kwargs):
        """(batch, channels, height, width) of a forward."""
        given = self.diffusers
        return patcher.apply(
            self.latent, given["timestep"], given["encoder_hidden_states"],
            given["pooled_projections"], given["guidance"], self.references,
            sigma=[self.level] * len(self.latent), **kwargs,
        )  # fmt: skip

    @torch.no_grad()
    def of_diffusers(self, transformer):
        """The same of diffusers' model."""
        out = transformer(**self.diffusers).sample
        return _unpacked(out[:, : self.rows * self.columns], self.rows, self.columns)
