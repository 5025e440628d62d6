"""Tiny random FLUX models and pipelines, built on the fly: no network, no files."""

import os

# What these tests say of implementations and devices is what a machine without a GPU says.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Triton kernels run in its interpreter; read when Triton is imported (see support/triton_mode.py).
os.environ["TRITON_INTERPRET"] = "1"
# Workers share the cores; so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ("a", "small", "red", "house", "by", "the", "sea")


def make_transformer(seed: int = 0, **config) -> FluxTransformer2DModel:
    """A FLUX transformer with 2 double and 2 single blocks, 2 heads of 16 channels."""
    torch.manual_seed(seed)
    tiny = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**tiny, **config}).eval()


def make_ids(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The position ids of an image, (rows * columns, 3), as the stock pipeline makes them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return ids.reshape(-1, 3).to(dtype)


def make_inputs(rows: int, columns: int, text: int = 3, batch: int = 1, seed: int = 0) -> dict:
    """Random inputs for `make_transformer()`; the ids are those of a stock pipeline."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, rows * columns, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 8, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": make_ids(rows, columns),
        "txt_ids": torch.zeros(text, 3),
    }


def make_components() -> dict:
    """The parts of a FLUX pipeline; a token is 4 x 4 pixels, prompts are known words only."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizers = [
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            model_max_length=8,
        )
        for _ in range(2)
    ]
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    t5 = T5Config(vocab_size=len(vocabulary), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=1,
            norm_num_groups=2,
            sample_size=16,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        "text_encoder": CLIPTextModel(clip).eval(),
        "tokenizer": tokenizers[0],
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizers[1],
        "transformer": make_transformer(),
    }


@pytest.fixture
def tiny_transformer():
    """`make_transformer`, a function of the seed and changes to the configuration."""
    return make_transformer


@pytest.fixture
def tiny_inputs():
    """`make_inputs`, a function of rows, columns, text, batch and seed."""
    return make_inputs


@pytest.fixture
def tiny_pipeline():
    """A function that makes a pipeline of a class from tiny random parts."""

    def make(cls):
        pipe = cls(**make_components())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def position_ids():
    """`make_ids`, a function of rows, columns and dtype."""
    return make_ids


@pytest.fixture
def poisoned_memory():
    """What `torch.empty` and its like return is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
