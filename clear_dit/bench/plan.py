"""What a model will cost at a size: FLOPs and memory, without its weights and without a GPU.

The true configuration runs under FakeTensorMode: tensors with a shape and no data.

FLOPs are those of one forward pass at batch 1: matrix products of the linear layers, counted by
PyTorch, and attention, 4 per attended pair and channel. Norms, RoPE and activations are not
counted.

Memory is that of the tensors alive between PyTorch's operators, at most. What an operator takes
for itself (workspace of convolutions, products and attention), the allocator's fragments and
PyTorch's own few hundred MiB on a GPU come on top. QK-norm and RoPE are counted step by step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..checks import find_window
from ..errors import RequestError, first_line
from ..kernels.window import Window
from ..processor import CLEARProcessor
from .configurations import Configuration, find_configuration
from .executed import tile_choices
from .timing import table

# Latents along a side of a token.
TOKEN_LATENTS = 2
LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
# Any custom op counts the same FLOPs and returns the same tensors; this one takes all devices.
IMPL = "tiled"
ATTENTION_OP = torch.ops.clear_dit.tiled_attention
# Fake tensors on "meta" take the way of a GPU through diffusers and the processor. On "cpu" they
# take PyTorch's fused attention in the autoencoder, as on a GPU; on "meta" it would be dense.
TRANSFORMER_DEVICE, OTHERS_DEVICE = "meta", "cpu"


def plan(
    model: str,
    height: int,
    width: int,
    radius: int,
    down_factor: int,
    text_length: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """FLOPs of a step, the most CLEAR can gain, peak memory by stage, and what tiles cost.

    Args:
        model: a name or a folder, see `find_configuration`.
        height, width: in pixels; radius and down_factor in tokens.
        text_length: text tokens; the model's own where None.
        dtype: of weights and activations.

    Returns:
        rows with attention ("full", "clear"), linear_tflop, attention_tflop, total_tflop,
        attention_share and attention_gflop_per_layer; `bound`, the ratio of both totals; `memory`,
        rows with stage, weights_gib, activations_gib and total_gib; `resident_gib`, the highest
        stage with the weights of all; `tiles`, see `tile_choices`; and the setting.

    Raises:
        RequestError: an unknown model, or a size, radius or down_factor out of its range.
    """
    configuration = find_configuration(model)
    text_length = configuration.text_length if text_length is None else text_length
    window = find_window(height, width, radius, down_factor, text_length)
    with FakeTensorMode(), torch.no_grad():
        flops, denoising = _plan_transformer(configuration.transformer, window, dtype)
        stages = {
            "text encoding": _plan_text(configuration, text_length, dtype),
            "denoising": denoising,
            "decoding": _plan_decoder(configuration.autoencoder, window, dtype),
        }
    weights = sum(memory.weights for memory in stages.values())
    activations = max(memory.activations for memory in stages.values())
    return {
        **flops,
        "memory": [
            {
                "stage": stage,
                "weights_gib": memory.weights / 2**30,
                "activations_gib": memory.activations / 2**30,
                "total_gib": (memory.weights + memory.activations) / 2**30,
            }
            for stage, memory in stages.items()
        ],
        "resident_gib": (weights + activations) / 2**30,
        "tiles": tile_choices(window),
        "model": model,
        "height": height,
        "width": width,
        "token_rows": window.height,
        "token_columns": window.width,
        "radius": radius,
        "down_factor": down_factor,
        "text_length": text_length,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


class Memory(NamedTuple):
    """Of one stage, in bytes: the weights, and the most that is alive besides them."""

    weights: int
    activations: int


class LiveStorages(TorchDispatchMode):
    """Adds up the storages of the tensors that are alive while it is active.

    Attributes:
        live, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensors: Iterable[Any]) -> None:
        """Count the tensors whose storage is not counted yet, until they are freed."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self._known:
                self._known.add(address)
                self.live += size
                weakref.finalize(storage, self._freed, address, size).atexit = False
        self.peak = max(self.peak, self.live)

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


@contextmanager
def quiet() -> Iterator[None]:
    """Hide which kernels would run on fake tensors: they say nothing about a real device."""
    logger = logging.getLogger("clear_dit")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Dtype and device of the parameters of models built inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(config: dict[str, Any]) -> Any:
    """A model of diffusers or transformers from its config.json."""
    import diffusers
    import transformers

    try:
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config).eval()
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class.from_dict(config)).eval()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"--model: cannot be built: {first_line(error)}") from error


def _measure(model: nn.Module, run: Callable[[], object]) -> Memory:
    """Memory of one run of a model."""
    with LiveStorages() as storages:
        storages.add(model.parameters())
        storages.add(model.buffers())
        weights = storages.live
        run()
    return Memory(weights, storages.peak - weights)


def _plan_transformer(
    config: dict[str, Any], window: Window, dtype: torch.dtype
) -> tuple[dict[str, Any], Memory]:
    """FLOPs of a forward pass, full and local, and its memory."""
    with defaults(dtype, TRANSFORMER_DEVICE):
        model = build(config)
        grid = (window.height, window.width)
        model.set_attn_processor(CLEARProcessor(window.radius, window.down_factor, IMPL, grid))
    inputs = flux_inputs(model.config, window, dtype, TRANSFORMER_DEVICE)
    counter = FlopCounterMode(display=False)

    def run() -> None:
        with counter:
            model(**inputs)

    with quiet():
        memory = _measure(model, run)
    config = model.config
    layers = config["num_layers"] + config["num_single_layers"]
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]

    counts = dict(counter.get_flop_counts()["Global"])
    local = counts.pop(ATTENTION_OP)
    assert set(counts) <= set(LINEAR_OPS), counts
    assert local == layers * window.attention_flops(heads, head_dim)
    full = layers * 4 * window.sequence_length**2 * heads * head_dim
    linear = sum(counts.values())
    rows = [
        {
            "attention": name,
            "linear_tflop": linear / 1e12,
            "attention_tflop": attention / 1e12,
            "total_tflop": (linear + attention) / 1e12,
            "attention_share": attention / (linear + attention),
            "attention_gflop_per_layer": attention / layers / 1e9,
        }
        for name, attention in (("full", full), ("clear", local))
    ]
    flops = {
        "rows": rows,
        "bound": (linear + full) / (linear + local),
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
    }
    return flops, memory


def flux_inputs(
    config: Any, window: Window, dtype: torch.dtype, device: str, batch: int = 1
) -> dict[str, torch.Tensor | None]:
    """What a FLUX transformer is called with, without values."""
    image, text = window.image_length, window.text_length
    empty = partial(torch.empty, device=device, dtype=dtype)
    return {
        "hidden_states": empty(batch, image, config.in_channels),
        "encoder_hidden_states": empty(batch, text, config.joint_attention_dim),
        "pooled_projections": empty(batch, config.pooled_projection_dim),
        "timestep": empty(batch),
        "guidance": empty(batch) if config.guidance_embeds else None,
        "img_ids": empty(image, 3, dtype=torch.float32),
        "txt_ids": empty(text, 3, dtype=torch.float32),
    }


def _plan_text(configuration: Configuration, text_length: int, dtype: torch.dtype) -> Memory:
    """Memory of the text encoders, all of them there while one after the other runs."""
    parts = [_plan_encoder(config, text_length, dtype) for config in configuration.text_encoders]
    return Memory(sum(part.weights for part in parts), max(part.activations for part in parts))


def _plan_encoder(config: dict[str, Any], text_length: int, dtype: torch.dtype) -> Memory:
    with defaults(dtype, OTHERS_DEVICE):
        model = build(config)
    length = min(text_length, getattr(model.config, "max_position_embeddings", text_length))
    tokens = torch.zeros(1, length, dtype=torch.int64, device=OTHERS_DEVICE)
    return _measure(model, lambda: model(tokens))


def _plan_decoder(config: dict[str, Any], window: Window, dtype: torch.dtype) -> Memory:
    """Memory of the stock autoencoder on the whole picture at once."""
    with defaults(dtype, OTHERS_DEVICE):
        model = build(config)
    height, width = (TOKEN_LATENTS * size for size in (window.height, window.width))
    shape = (1, model.config.latent_channels, height, width)
    latents = torch.empty(shape, dtype=dtype, device=OTHERS_DEVICE)
    return _measure(model, lambda: model.decode(latents))


def report(result: dict[str, Any]) -> str:
    """The tables of a plan."""
    pooled = f", pooled by {result['down_factor']}" if result["down_factor"] > 1 else ""
    flops = [
        {
            "attention": row["attention"],
            "linear TFLOP": number(row["linear_tflop"]),
            "attention TFLOP": number(row["attention_tflop"]),
            "sum TFLOP": number(row["total_tflop"]),
            "attention's share": f"{row['attention_share']:.1%}",
            "GFLOP per attention layer": number(row["attention_gflop_per_layer"]),
        }
        for row in result["rows"]
    ]
    memory = [
        {
            "stage": row["stage"],
            "weights GiB": number(row["weights_gib"]),
            "activations GiB": number(row["activations_gib"]),
            "sum GiB": number(row["total_gib"]),
        }
        for row in result["memory"]
    ]
    tiles = [
        {
            "attention by": row["impl"],
            "query tile": row["query_tile"],
            "key tile": row["key_tile"],
            "keys computed": f"{row['keys_per_query']:,.0f}",
            "computed / needed": f"{row['executed_over_exact']:.2f}",
        }
        for row in result["tiles"]
    ]
    return f"""\
{result["model"]}, {result["height"]} x {result["width"]} px, {result["dtype"]}
{result["token_rows"]} x {result["token_columns"]} image tokens, {result["text_length"]} text tokens
{result["layers"]} attention layers of {result["heads"]} heads x {result["head_dim"]}
CLEAR with radius {result["radius"]} tokens{pooled}

One forward pass:
{table(flops)}
End to end, the FLOPs allow CLEAR to be at most {result["bound"]:.2f} times faster.

Peak memory with CLEAR:
{table(memory)}
With the weights of all stages resident: {number(result["resident_gib"])} GiB.
Tensors only: the workspace of convolutions, products and attention comes on top.
Denoising: QK-norm and RoPE step by step; the fused kernel takes less.
Decoding: the stock autoencoder, the whole picture at once, no tiling.

Keys for each image query, text included, by choice of tiles (in tokens):
{table(tiles)}"""


def number(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
