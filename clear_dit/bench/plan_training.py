"""What a distillation step of a model will cost in memory: true configuration, no weights, no GPU.

One step of `clear-dit distill` runs under FakeTensorMode: teacher, student, losses and backward
with gradient checkpointing, bfloat16 under autocast, trained parameters in float32. What an
optimizer keeps is added: PyTorch's allocations between operators are counted, not its workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..attention.processor import CLEARProcessor
from ..counting.fake import IMPL, LiveStorages, build, defaults, quiet
from ..counting.inputs import Empty, check_positions, model_inputs, told_layout
from ..distillation.losses import (
    attention_outputs,
    default_layers,
    distillation_losses,
    last_stack,
)
from ..distillation.setup import OPTIMIZER_STATES
from ..distillation.student import add_lora, freeze_others, trained_parameters
from ..distillation.teacher import Teacher
from ..errors import RequestError, first_line
from ..generation.checks import find_window
from ..kernels.window import Window
from ..plugin import install
from ..tables import number, table
from ..weights.learned import make_far_trainable
from .configurations import find_configuration

# On "cpu", autocast works for fake tensors, and attention is PyTorch's fused one.
DEVICE = "cpu"
# Of a GPU sold as 80 GB: what it has, less what workspace, fragments and PyTorch itself take.
ROOM_GIB = 79 - 4
LORA_RANK = 64
ZERO_PROCESSES = 4


class Step(NamedTuple):
    """Of a step, in bytes: weights that stay, weights that are trained, and the peak, with both."""

    frozen: int
    trained: int
    peak: int


def plan_training(
    model: str,
    height: int,
    width: int,
    radius: int,
    down_factor: int,
    far: bool,
    batch: int,
    text_length: int | None = None,
) -> dict[str, Any]:
    """Peak memory of a distillation step, for what can be trained and how.

    Args:
        model: a name or a folder, see `find_configuration`.
        height, width: in pixels; radius and down_factor in tokens.
        far: whether with far keys.
        batch: samples at once.
        text_length: text tokens; the model's own where None.

    Returns:
        rows with what (in words), parameters (trained), frozen_gib (weights that both roles share,
        and the teacher's copies), trained_gib, optimizer_gib, step_gib (gradients and
        activations), total_gib and fits (one 80 GB GPU); and the setting.

    Raises:
        RequestError: an unknown model, or a size, radius or down_factor out of its range.
    """
    configuration = find_configuration(model)
    text_length = configuration.text_length if text_length is None else text_length
    window = find_window(
        height, width, radius, down_factor, text_length, configuration.token_pixels, far=far
    )
    rows = []
    for lora in (None, LORA_RANK):
        step = _measure_step(configuration.transformer, window, batch, lora)
        for optimizer, processes in (("prodigy", 1), ("adamw", 1), ("prodigy", ZERO_PROCESSES)):
            if lora is not None and processes > 1:
                continue
            what = "projections" if lora is None else f"LoRA of rank {lora}"
            shared = f", ZeRO-2 over {processes} GPUs" if processes > 1 else ""
            states = OPTIMIZER_STATES[optimizer] * step.trained // processes
            total = step.peak + states
            rows.append(
                {
                    "what": f"{what}, {optimizer}{shared}",
                    "parameters": step.trained // 4,
                    "frozen_gib": step.frozen / 2**30,
                    "trained_gib": step.trained / 2**30,
                    "optimizer_gib": states / 2**30,
                    "step_gib": (step.peak - step.frozen - step.trained) / 2**30,
                    "total_gib": total / 2**30,
                    "fits": total / 2**30 <= ROOM_GIB,
                }
            )
    return {
        "rows": rows,
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "down_factor": down_factor,
        "far": far,
        "text_length": window.text_length,
        "batch": batch,
        "torch": torch.__version__,
    }


def _measure_step(config: dict[str, Any], window: Window, batch: int, lora: int | None) -> Step:
    with defaults(torch.bfloat16, "meta"), quiet():
        model = build(config)
        far = window.far_levels > 0
        install([model], CLEARProcessor(window.radius, window.down_factor, IMPL, far=far))
        if lora is not None:
            add_lora(model, lora, seed=0)
        elif far:
            make_far_trainable(model)
    inputs = model_inputs(model, window, Empty(torch.bfloat16, "meta"), batch)
    try:
        check_positions(model, window, inputs)
    except ValueError as error:
        raise RequestError(first_line(error)) from error
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), told_layout(model, window):
        _move(model)  # only now, since peft cannot move fake weights
        inputs = tree_map_only(torch.Tensor, lambda x: _moved(x) if x.is_meta else x, inputs)
        teacher = Teacher(model)
        freeze_others(model, lora is not None)
        model.enable_gradient_checkpointing()
        trained = _bytes(trained_parameters(model, lora is not None).values())
        everything = _bytes(model.parameters())
        with LiveStorages() as storages, _ValuesStay():
            storages.add(model.parameters())
            _step(model, teacher, inputs)
        return Step(everything - trained, trained, storages.peak)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor of this device."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    return nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake


def _move(model: nn.Module) -> None:
    """Put such tensors in the place of all that a model has, tables that are no buffers, too."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name != "_modules":
                vars(module)[name] = tree_map_only(torch.Tensor, _moved, value)


class _ValuesStay(TorchDispatchMode):
    """What is computed of tensors with values alone has values: a model reads them of a mask."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        valued = given and not any(isinstance(tensor, FakeTensor) for tensor in given)
        valued = valued or func is torch.ops.aten.scalar_tensor.default
        with unset_fake_temporarily() if valued else nullcontext():
            return func(*args, **(kwargs or {}))


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _step(model: nn.Module, teacher: Teacher, inputs: dict[str, Any]) -> None:
    """What `Run.losses` does, and the backward pass."""
    layers = default_layers(last_stack(model)[1])
    with _autocast(), teacher.attention(), attention_outputs(model, layers) as expected_attention:
        expected = _velocity(model, inputs)
    with _autocast(), attention_outputs(model, layers) as attention:
        predicted = _velocity(model, inputs)
    clean = torch.empty_like(expected)
    losses = distillation_losses(
        clean, clean, predicted, expected, attention, expected_attention, 0.5, 0.5
    )
    losses.total.backward()


def _velocity(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """One tensor of all that the model returns for the images, in float32."""
    output = model(**inputs, return_dict=False)[0]
    return (torch.stack(output) if isinstance(output, list) else output).float()


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast(DEVICE, torch.bfloat16):
        yield


def report(result: dict[str, Any]) -> str:
    """The table of a plan."""
    rows = [
        {
            "trained": row["what"],
            "parameters": f"{row['parameters'] / 1e6:,.1f} M",
            "frozen GiB": number(row["frozen_gib"]),
            "trained GiB": number(row["trained_gib"]),
            "optimizer GiB": number(row["optimizer_gib"]),
            "gradients, activations GiB": number(row["step_gib"]),
            "sum GiB": number(row["total_gib"]),
            "one 80 GB GPU": "fits" if row["fits"] else "does not fit",
        }
        for row in result["rows"]
    ]
    pooled = f", pooled by {result['down_factor']}" if result["down_factor"] > 1 else ""
    sees = ", far keys" if result["far"] else pooled
    return f"""\
{result["model"]}, {result["height"]} x {result["width"]} px, batch {result["batch"]}
Distillation with radius {result["radius"]} tokens{sees}

Peak memory of a step, of each GPU:
{table(rows)}
bfloat16 under autocast, gradient checkpointing; trained parameters, their gradients and the
optimizer's numbers in float32. Tensors only: workspace, fragments and PyTorch's own come on top,
for which 4 GiB are left. With ZeRO-2 only the optimizer's numbers are counted as shared."""
