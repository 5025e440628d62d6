"""The three terms from their definitions, and what they train."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from clear_dit import CLEARProcessor
from clear_dit.distillation.losses import default_layers, parse_layers
from clear_dit.errors import RequestError
from clear_dit.families.table import attention_layers
from clear_dit.generation.models import DEMO
from clear_dit.weights.format import pooling_by_key


def recording(base, outputs):
    """A processor of class `base` that appends its outputs to a list."""

    class Recording(base):
        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states=None,
            attention_mask=None,
            image_rotary_emb=None,
        ):
            out = super().__call__(
                attn, hidden_states, encoder_hidden_states, None, image_rotary_emb
            )
            outputs.append(out)
            return out

    return Recording


def forward_by_hand(processor_class, layers, inputs, state=None, **settings):
    """A demo transformer of its own: its velocity, and the chosen single blocks' attention."""
    model = FluxTransformer2DModel.from_pretrained(DEMO, subfolder="transformer")
    learned = {name: value for name, value in (state or {}).items() if ".processor." in name}
    if state is not None:
        model.load_state_dict({name: state[name] for name in state.keys() - learned.keys()})
    model.set_attn_processor(processor_class(**settings))
    attention = {}
    for i in layers:
        attention[i] = []
        block = model.single_transformer_blocks[i].attn
        block.set_processor(recording(processor_class, attention[i])(**settings))
    if learned:  # of far keys, each layer's own
        for name, attn in attention_layers(model).items():
            if type(attn.processor) is processor_class:
                attn.set_processor(processor_class(**settings))
            attn.processor.far_weight, attn.processor.far_offset = (
                torch.nn.Parameter(learned[f"{name}.processor.far_{kind}"])
                for kind in ("weight", "offset")
            )
    with torch.no_grad():
        velocity = model(**inputs, return_dict=False)[0]
    return velocity, {i: outputs[0] for i, outputs in attention.items()}


def disturb(run, scale=0.02):
    """Move the student's weights away from the teacher's."""
    generator = torch.Generator().manual_seed(5)
    for parameter in run._trained().values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += scale * noise


def mean_square(one, other):
    return ((one - other) ** 2).sum().item() / one.numel()


@pytest.mark.parametrize(
    ("gradient_checkpointing", "far"), [(False, False), (True, False), (True, True)]
)
def test_all_terms_recomputed_from_their_definitions(prepared, gradient_checkpointing, far):
    run = prepared(
        far=far,
        attention_layers="1,3",
        output_weight=0.7,
        attention_weight=0.3,
        gradient_checkpointing=gradient_checkpointing,
    )
    stock = {name: p.clone() for name, p in run.model.state_dict().items()}
    disturb(run)
    batch = run.draws.batch(range(3))
    losses = run.losses(batch)
    losses.total.backward()

    noise_level = batch.s[:, None, None]
    x_t = (1 - noise_level) * batch.clean + noise_level * batch.noise
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ids = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], 1)
    inputs = {
        "hidden_states": x_t,
        **{
            name: torch.cat([given[name] for given in batch.conditionings])
            for name in ("encoder_hidden_states", "pooled_projections")
        },
        "timestep": batch.s,
        "img_ids": ids,
        "txt_ids": torch.zeros(64, 3),
    }
    state = {name: p for name, p in run.model.state_dict().items() if ".teacher." not in name}
    teacher, teacher_attention = forward_by_hand(FluxAttnProcessor, (1, 3), inputs)
    student, student_attention = forward_by_hand(
        CLEARProcessor, (1, 3), inputs, state, radius=2, impl="reference", far=far
    )
    assert student_attention[1].shape == (3, 64 + 24, 192)  # text too, before the projection
    flow = mean_square(student, batch.noise - batch.clean)
    output = mean_square(student, teacher)
    pairs = [mean_square(student_attention[i], teacher_attention[i]) for i in (1, 3)]
    attention = sum(pairs) / 2
    assert min(flow, output, attention) > 1e-4
    assert losses.flow.item() == pytest.approx(flow, rel=1e-4)
    assert losses.output.item() == pytest.approx(output, rel=1e-3)
    assert losses.attention.item() == pytest.approx(attention, rel=1e-3)
    total = flow + 0.7 * output + 0.3 * attention
    assert losses.total.item() == pytest.approx(total, rel=1e-4)
    frozen = set(stock) - set(run._trained())
    assert all(torch.equal(stock[name], run.model.state_dict()[name]) for name in frozen)


def test_gradient_checkpointing_changes_no_gradient(prepared):
    gradients = []
    for checkpointing in (False, True):
        run = prepared(gradient_checkpointing=checkpointing)
        disturb(run)
        run.losses(run.draws.batch(range(2))).total.backward()
        gradients.append({name: p.grad for name, p in run._trained().items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(("down_factor", "far"), [(1, False), (2, False), (1, True)])
def test_only_the_intended_parameters_get_gradients_and_change(prepared, down_factor, far):
    run = prepared(down_factor=down_factor, far=far)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    expected = {name for name in before if name.split(".teacher.")[0] == name}
    intended = {
        name
        for name in expected
        if any(f".attn.{kind}." in name for kind in ("to_q", "to_k", "to_v", "to_out.0"))
        or name.endswith(("spatial_weight", "far_weight", "far_offset"))
    }
    assert len(intended) == 2 * 8 + 4 * 6 + 6 * (down_factor > 1) + 12 * far
    run.step(0)
    run.step(1)
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == intended
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == intended
    assert set(run._trained()) == intended
    if down_factor > 1 or far:
        assert set(pooling_by_key(run.model)) < intended


def test_at_first_far_keys_are_untuned(prepared):
    run = prepared(far=True)
    learned = run.losses(run.draws.batch(range(2)))
    for attn in attention_layers(run.model).values():
        attn.processor.far_weight = attn.processor.far_offset = None
    assert run.losses(run.draws.batch(range(2))).total == learned.total


def test_the_distillation_terms_vanish_where_student_and_teacher_are_one(prepared):
    run = prepared(radius=8)  # past the diagonal of 4 x 6 tokens
    losses = run.losses(run.draws.batch(range(2)))
    assert losses.output < 1e-9 * losses.flow
    assert losses.attention < 1e-9
    assert losses.total.item() == pytest.approx(losses.flow.item(), rel=1e-6)


def test_without_distillation_there_is_no_teacher(prepared):
    run = prepared(output_weight=0, attention_weight=0)
    assert run.teacher is None
    losses = run.losses(run.draws.batch(range(2)))
    assert (losses.output, losses.attention) == (0, 0)
    assert losses.total == losses.flow


def test_the_student_is_itself_again_after_the_teacher(prepared):
    run = prepared(radius=1)
    students = dict(run.model.attn_processors)

    def fail(*_):
        assert not torch.is_grad_enabled()
        inside = run.model.attn_processors.values()
        assert not any(isinstance(processor, CLEARProcessor) for processor in inside)
        raise RuntimeError("inside")

    handle = run.model.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        run.losses(run.draws.batch(range(2)))
    handle.remove()
    assert run.model.attn_processors == students
    run.teacher.detach()
    assert not any(".teacher." in name for name in run.model.state_dict())


def test_noise_levels_are_those_of_the_unshifted_schedule(prepared):
    run = prepared()
    levels = torch.cat([run.draws.batch([d]).s for d in range(600)])
    thousandths = levels * 1000
    assert torch.allclose(thousandths, thousandths.round(), atol=1e-3)
    assert 0.001 <= levels.min() < 0.02 and 0.98 < levels.max() <= 1  # noqa: PT018
    assert abs(levels.mean().item() - 0.5) < 0.04
    assert abs(levels.std().item() - 12**-0.5) < 0.02


def test_layers():
    assert default_layers(38) == (1, 5, 9, 13, 17, 21, 25, 29, 33, 37)
    assert default_layers(4) == (0, 1, 2, 3)
    assert default_layers(1) == (0,)
    assert parse_layers("3, 1,1", "blocks", 4) == (1, 3)
    for text in ("4", "-1", "one", ""):
        with pytest.raises(RequestError, match="numbers of blocks from 0 to 3, with commas"):
            parse_layers(text, "blocks", 4)
