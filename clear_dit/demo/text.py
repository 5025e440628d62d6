"""The demo's two tokenizers and text encoders, and their training before the transformer's.

Both encoders learn to spell out a caption's attributes: linear heads must read all of them from the
CLIP encoder's pooled vector, from the mean of the T5 encoder's tokens and from each token alone.
They stay frozen afterwards.

`FluxPipeline` passes no attention mask to T5 and pads to 512 tokens. `_pin_padding` fixes a few
weights of T5 so that padding cannot be seen by words and comes out as one constant vector, whatever
its length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from clear_dit.demo.captions import ATTRIBUTES, caption, parse, sample_scene, vocabulary
from clear_dit.demo.checkpoint import load_checkpoint, save_checkpoint

WIDTH = 128
MAX_LENGTH = 64
# </s> must not get id 2: transformers takes that for a sign to pool at the largest id instead.
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_UNKNOWN_WORD = "lovely"  # not in the vocabulary: teaches the encoders to pass over other words
_BATCH, _PEAK_RATE = 64, 1e-3


def build_tokenizer(begin: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the caption grammar; `begin` puts <s> first, as CLIP does."""
    words = {word: index for index, word in enumerate([*_SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begin else "$A </s>",
        special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class TextEncoders(nn.Module):
    """CLIP and T5 encoders with their tokenizers, called as `FluxPipeline` calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(True)
        self.tokenizer_2: PreTrainedTokenizerFast = build_tokenizer(False)
        self.clip: CLIPTextModel = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=WIDTH,
                pad_token_id=self.tokenizer.pad_token_id,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )
        self.t5: T5EncoderModel = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer_2),
                d_model=WIDTH,
                d_kv=64,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=self.tokenizer_2.pad_token_id,
                eos_token_id=self.tokenizer_2.eos_token_id,
            )
        )
        _pin_padding(self.t5)

    def forward(self, captions: list[str], length: int) -> tuple[torch.Tensor, ...]:
        """Encode: (pooled [b, WIDTH], tokens [b, length, WIDTH], real [b, length] bool)."""
        first = self.tokenizer(
            captions, padding=True, max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        )  # CLIP is causal: what follows the end of the text changes nothing
        second = self.tokenizer_2(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        pooled = self.clip(first.input_ids).pooler_output
        tokens = self.t5(second.input_ids)[0]
        return pooled, tokens, second.attention_mask.bool()


@torch.no_grad()
def _pin_padding(t5: T5EncoderModel) -> None:
    """Hide padding from words and words from padding, by two marker channels of the residual.

    Channel 0 marks words, channel 1 padding. The first query and key channel of each head read
    only the markers: word-to-padding scores come to about -40, padding-to-padding to +100.
    """
    embedding = t5.shared.weight
    embedding[:, 0], embedding[:, 1] = 4.0, 0.0
    embedding[t5.config.pad_token_id] = 0.0
    embedding[t5.config.pad_token_id, 1] = 4.0
    t5.encoder.final_layer_norm.weight[:2] = 1.0
    for block in t5.encoder.block:
        attention, feed_forward = block.layer[0], block.layer[1]
        attention.layer_norm.weight[:2] = 1.0
        q, k = attention.SelfAttention.q.weight, attention.SelfAttention.k.weight  # [out, in]
        q[:, 1] = 0.0
        k[:, 1] = 0.0
        for first in range(0, q.shape[0], t5.config.d_kv):
            q[first], k[first] = 0.0, 0.0
            q[first, 0], q[first, 1], k[first, 1] = 1.0, -1.0, -1.0
        attention.SelfAttention.o.weight[:2] = 0.0
        feed_forward.DenseReluDense.wo.weight[:2] = 0.0


class _Heads(nn.Module):
    """One linear classifier per attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(values) for values in ATTRIBUTES.values()]
        self.linear = nn.Linear(WIDTH, sum(self.sizes))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = self.linear(features).split(self.sizes, -1)
        losses = [
            F.cross_entropy(part, labels[:, i], ignore_index=-100, reduction="sum")
            for i, part in enumerate(parts)
        ]
        return sum(losses) / (labels >= 0).sum().clamp_min(1)

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        parts = self.linear(features).split(self.sizes, -1)
        right = torch.stack([p.argmax(-1) == labels[:, i] for i, p in enumerate(parts)], 1)
        return right[labels >= 0].float().mean().item()


def draw_captions(
    rng: np.random.Generator, count: int, held_out: bool = False
) -> tuple[list[str], torch.Tensor]:
    """Random captions and their labels [count, attributes], -100 where a caption is silent."""
    texts, labels = [], []
    for _ in range(count):
        text = caption(sample_scene(rng, held_out), rng, partial=rng.random() < 0.12)
        named = parse(text)
        labels.append(
            [v.index(named[name]) if name in named else -100 for name, v in ATTRIBUTES.items()]
        )
        if rng.random() < 0.25:
            words = text.split()
            words.insert(rng.integers(len(words) + 1), _UNKNOWN_WORD)
            text = " ".join(words)
        texts.append(text)
    return texts, torch.tensor(labels)


def train_text(checkpoint: Path, steps: int, batch: int = _BATCH) -> TextEncoders:
    """Train the encoders for `steps`, resuming from `checkpoint`; print held-out accuracy."""
    torch.manual_seed(0)
    encoders = TextEncoders()
    classifiers = [_Heads() for _ in range(3)]
    heads = nn.ModuleList(classifiers)
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start, losses = load_checkpoint(checkpoint, encoders=encoders, heads=heads, optimizer=optimizer)
    bar = tqdm(range(start, steps), desc="text encoders", initial=start, total=steps)
    for step in bar:
        rng = np.random.default_rng((7, step))
        for group in optimizer.param_groups:
            group["lr"] = (
                _PEAK_RATE * min(1, (step + 1) / 50) * min(1, 2 * (1 - step / steps) + 0.01)
            )
        texts, labels = draw_captions(rng, batch)
        pooled, tokens, real = encoders(texts, int(rng.integers(26, MAX_LENGTH)))
        weights = real.float()
        mean = (tokens * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        # A random word of each caption must know the attributes too.
        chosen = torch.multinomial(weights, 1)[:, 0]
        single = tokens[torch.arange(len(texts)), chosen]
        parts = [
            h.loss(x, labels) for h, x in zip(classifiers, (pooled, mean, single), strict=True)
        ]
        loss = parts[0] + parts[1] + 0.3 * parts[2]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _pin_padding(encoders.t5)
        losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(
                checkpoint, step + 1, losses, encoders=encoders, heads=heads, optimizer=optimizer
            )
    encoders.eval().requires_grad_(False)
    with torch.no_grad():
        texts, labels = draw_captions(np.random.default_rng(99), 512, held_out=True)
        pooled, tokens, real = encoders(texts, 32)
        mean = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        print(
            "text encoders on unseen captions: "
            f"pooled {classifiers[0].accuracy(pooled, labels):.4f}, "
            f"mean of tokens {classifiers[1].accuracy(mean, labels):.4f}"
        )
    return encoders
