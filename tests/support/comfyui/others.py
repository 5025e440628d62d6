"""Other models of ComfyUI's, as far as attention sees them: text, image, and how they are told.

The class names are ComfyUI's: by them a model is known. Blocks are one joint attention each.
"""

from typing import ClassVar

import torch
from torch import nn

from .attention import optimized_attention
from .flux import patches_of, token_ids
from .patcher import within_wrappers

CHANNELS, HEADS = 32, 2


class Block(nn.Module):
    """x + attention of x; query, key and value as the model hands them over."""

    def __init__(self, split):
        super().__init__()
        self.qkv, self.split = nn.Linear(CHANNELS, 3 * CHANNELS), split

    def forward(self, x, options, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.split:  # Z-Image
            q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
            out = optimized_attention(
                q, k, v, HEADS, mask, skip_reshape=True, transformer_options=options
            )
        else:  # Qwen-Image
            out = optimized_attention(q, k, v, HEADS, mask, transformer_options=options)
        return x + out


class _Base(nn.Module):
    stacks: ClassVar = {"double": "transformer_blocks"}
    split = True

    def __init__(self, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.patch_size = 2
        self.img_in = nn.Linear(4 * 4, CHANNELS)
        self.out = nn.Linear(CHANNELS, 4 * 4)
        for stack in self.stacks.values():
            setattr(self, stack, nn.ModuleList(Block(self.split) for _ in range(blocks)))

    def run(self, x, options, mask=None):
        """All blocks over (batch, text + image, channels)."""
        for kind, stack in self.stacks.items():
            options |= {"block_type": kind, "total_blocks": len(getattr(self, stack))}
            for index, block in enumerate(getattr(self, stack)):
                options["block_index"] = index
                x = block(x, options, mask)
        return self.out(x)


class Chroma(_Base):
    """No post_input: the latent and the prompt say all."""

    stacks: ClassVar = {"double": "double_blocks", "single": "single_blocks"}

    def forward(self, x, timestep, context, guidance=None, control=None, transformer_options=None):
        options = transformer_options or {}
        return within_wrappers(self, options).execute(
            x, timestep, context, guidance, control, options
        )

    def _forward(self, x, timestep, context, guidance=None, control=None, transformer_options=None):
        img, _, _ = patches_of(x, 2)
        tokens = torch.cat([context, self.img_in(img)], dim=1)
        return self.run(tokens, (transformer_options or {}).copy())[:, context.shape[1] :]


class QwenImageTransformer2DModel(_Base):
    """Five-dimensional latents, centred positions, a mask of padded text."""

    split = False

    def forward(
        self, x, timestep, context, attention_mask=None, ref_latents=None,
        additional_t_cond=None, transformer_options=None,
    ):  # fmt: skip
        options = transformer_options or {}
        return within_wrappers(self, options).execute(
            x, timestep, context, attention_mask, ref_latents, additional_t_cond, options
        )

    def _forward(
        self, x, timesteps, context, attention_mask=None, ref_latents=None,
        additional_t_cond=None, transformer_options=None,
    ):  # fmt: skip
        options = (transformer_options or {}).copy()
        img, rows, columns = patches_of(x[:, :, 0], 2)
        ids = token_ids(rows, columns, len(x)) - torch.tensor([0.0, rows // 2, columns // 2])
        img = self.img_in(img)
        txt_ids = torch.arange(context.shape[1]).reshape(1, -1, 1).expand(len(x), -1, 3)
        for patch in options.get("patches", {}).get("post_input", ()):
            given = {"img": img, "txt": context, "img_ids": ids, "txt_ids": txt_ids}
            given = patch(given | {"transformer_options": options})
            img, context = given["img"], given["txt"]
        mask = None
        if attention_mask is not None:  # (batch, text), 1 where there is text
            hidden = (attention_mask - 1).float() * torch.finfo(torch.float32).max
            mask = nn.functional.pad(hidden, (0, img.shape[1]))[:, None]
        tokens = torch.cat([context, img], dim=1)
        return self.run(tokens, options, mask)[:, context.shape[1] :]


class NextDiT(_Base):
    """Z-Image: text and image padded to a multiple, each refined apart; no position ids told."""

    stacks: ClassVar = {"double": "layers"}

    def __init__(self, multiple=8):
        super().__init__()
        self.pad_tokens_multiple = multiple
        self.context_refiner = nn.ModuleList([Block(True)])
        self.noise_refiner = nn.ModuleList([Block(True)])

    def forward(self, x, timesteps, context, num_tokens=0, attention_mask=None, **kwargs):
        return within_wrappers(self, kwargs.get("transformer_options") or {}).execute(
            x, timesteps, context, num_tokens, attention_mask, **kwargs
        )

    def _forward(
        self, x, timesteps, context, num_tokens, attention_mask=None, ref_latents=(),
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        options = transformer_options or {}  # not a copy: block_type stays there
        img, _, _ = patches_of(x, 2)
        own = img.shape[1]
        img, context = self._padded(self.img_in(img)), self._padded(context)
        for block in self.context_refiner:
            context = block(context, options)
        for block in self.noise_refiner:
            img = block(img, options)
        tokens = torch.cat([context, img], dim=1)
        return self.run(tokens, options)[:, context.shape[1] :][:, :own]

    def _padded(self, tokens):
        more = -tokens.shape[1] % self.pad_tokens_multiple
        return nn.functional.pad(tokens, (0, 0, 0, more), value=0.1)
