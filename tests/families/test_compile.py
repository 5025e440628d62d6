"""Every family's blocks under torch.compile, as graphs: no code generator runs here."""

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, run, sized
from support.slow import slow

from clear_dit import apply_clear
from clear_dit.families.table import MODELS, family_of

# FLUX.1 has tests/plugin/test_compile.py.
NAMES = [n for n, tiny in FAMILIES.items() if tiny.model_class.__name__ in MODELS and n != "flux"]
# Those without far keys too.
FEW = ("flux2", "sd3", "qwen-image", "krea2")
# Rows and columns: from a square one to others.
SIZES = ((12, 12), (12, 18), (18, 13))
# Models with positions for them.
LARGER = {
    "sd3": {"pos_embed_max_size": 18},
    "z-image": {"axes_lens": [256, 18, 18]},
    "cogview4": {"rope_axes_dim": (18, 18)},
}


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


@slow
@pytest.mark.parametrize(
    ("name", "far"), [*((name, True) for name in NAMES), *((name, False) for name in FEW)]
)
def test_another_resolution_compiles_nothing(name, far):
    model = make_model(name, **LARGER.get(name, {}))
    inputs = [make_inputs(name, *sized(name, *size), text=23) for size in SIZES]
    apply_clear(model, radius=2, far=far)
    expected = [run(model, given) for given in inputs]
    family, options = family_of(model), {"fullgraph": True, "dynamic": True, "backend": "eager"}
    assert bool(model._repeated_blocks) == family.repeated_blocks
    if family.repeated_blocks:
        model.compile_repeated_blocks(**options)
    else:
        for stack in family.stacks:
            for block in getattr(model, stack):
                block.compile(**options)
    for call, (given, eager) in enumerate(zip(inputs, expected, strict=True)):
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            found = run(model, given)
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=3e-6)
