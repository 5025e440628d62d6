"""compile_repeated_blocks(fullgraph=True), as graphs: no code generator runs here."""

import pytest
import torch
from diffusers import FluxPipeline
from support.ip_adapter import load_ip_adapters
from support.models import assert_same, by_definition, run
from support.slow import slow

from clear_dit import CLEARProcessor, apply_clear, remove_clear
from clear_dit.weights.learned import make_far_trainable


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


def with_references(inputs, number):
    """The last tokens of the image's ids become those of a reference image."""
    ids = torch.cat([inputs["img_ids"], torch.ones(number, 3)])
    tokens = torch.randn(1, len(ids), 4, generator=torch.Generator().manual_seed(0))
    return inputs | {"hidden_states": tokens, "img_ids": ids}


@slow  # families/test_compile.py has a quick one
@pytest.mark.parametrize("far", [False, True])
def test_another_resolution_compiles_nothing(tiny_transformer, tiny_inputs, far):
    """Images of other sizes and aspect ratios; then reference images, of two sizes."""
    stock, model = (tiny_transformer(num_layers=1, num_single_layers=1) for _ in range(2))
    apply_clear(model, radius=2, far=far)
    if far:
        make_far_trainable(model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for references in ((0, 0, 0), (15, 6)):
        for call, number in enumerate(references):
            rows, columns = ((4, 6), (6, 4), (5, 7))[call]
            inputs = tiny_inputs(rows, columns)
            if number:
                inputs = with_references(inputs, number)
            with by_definition(rows, columns, 2, far, references=number):
                expected = run(stock, inputs)
            with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
                assert_same(run(model, inputs), expected)


@slow
@pytest.mark.parametrize("far", [False, True])
def test_sizes_become_dynamic_by_themselves(tiny_transformer, tiny_inputs, far):
    """Without dynamic=True the second resolution compiles once more, and no later one does."""
    stock, model = (tiny_transformer(num_layers=1, num_single_layers=0) for _ in range(2))
    apply_clear(model, radius=2, far=far)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for rows, columns in ((4, 6), (5, 7), (9, 4), (3, 8)):
        inputs = tiny_inputs(rows, columns)
        with by_definition(rows, columns, 2, far):
            expected = run(stock, inputs)
        with torch.compiler.set_stance("default" if rows in (4, 5) else "fail_on_recompile"):
            assert_same(run(model, inputs), expected)


@slow
@pytest.mark.parametrize("far", [False, True])
def test_ip_adapter(tiny_pipeline, tiny_inputs, far):
    pipe, inputs = tiny_pipeline(FluxPipeline), tiny_inputs(4, 6)
    load_ip_adapters(pipe)
    model, prompt = pipe.transformer, torch.randn(1, 2, 6)

    def prompted():
        return run(model, inputs, joint_attention_kwargs={"ip_adapter_image_embeds": [prompt]})

    with by_definition(4, 6, 2, far):
        expected = prompted()
    apply_clear(model, radius=2, far=far)
    model.transformer_blocks[0].compile(fullgraph=True, dynamic=True, backend="eager")
    assert_same(prompted(), expected)


def test_the_bare_processor_does_not_compile(tiny_transformer, tiny_inputs):
    model = tiny_transformer(num_layers=1, num_single_layers=0)
    model.set_attn_processor(CLEARProcessor())
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="use apply_clear instead of set_attn_processor"):
        run(model, tiny_inputs(4, 6))


@slow
def test_a_model_without_clear_again(tiny_transformer, tiny_inputs):
    """It is compiled and exported whole, as a stock one."""
    model, inputs = tiny_transformer(num_layers=1, num_single_layers=1), tiny_inputs(3, 4)
    expected = run(model, inputs)
    apply_clear(model, radius=2, far=False)
    remove_clear(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(run(compiled, inputs), expected)
    exported = torch.export.export(model, (), inputs).module()
    assert_same(exported(**inputs).sample, expected)
