"""Operations on a model in any order: after each its image is that of a model made so at once.

Or the operation was refused, and the image is the same as before, bit for bit.
"""

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.utils import logging
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.any_order import (
    FILES,
    GRIDS,
    LORA_TARGETS,
    TOLERANCE,
    Clear,
    State,
    checkpoint,
    draw,
    error,
    expected,
    fill,
    give_learned,
    gradient,
    load_image_prompt,
    lora_parts,
    make_pipe,
    plain_model,
    right_gradient,
    tuned_values,
)
from support.slow import slow, slow_but

from clear_dit import (
    CLEARProcessor,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.families.table import attention_layers
from clear_dit.weights.learned import make_far_trainable

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, of LoRAs that are merged

MUST, MAY, REFUSE = "must work", "may be refused", "must be refused"
STOCK = {"flux": FluxAttnProcessor, "sd3": JointAttnProcessor2_0}
BROKEN = ("torn", "nan", "short")  # files
SETTINGS = st.sampled_from(
    [
        Clear(2),
        Clear(2, far=False),
        Clear(2, far=True),
        Clear(3, far=False),
        Clear(2, down_factor=2),
        Clear(100, far=False),
        Clear(1),
    ]
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """diffusers has something to say of every step."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory):
    """For each family a folder of the files of `FILES`, and of some that must be refused."""
    root = tmp_path_factory.mktemp("weights")
    for family in STOCK:
        (root / family).mkdir()
        for name, file in FILES.items():
            model = plain_model(family, 0)
            model.load_state_dict(tuned_values(model, file), strict=False)
            apply_clear(model, radius=2, down_factor=file.down_factor, far=file.far or None)
            if file.learned:
                make_far_trainable(model)
            give_learned(model, file)
            if not file.far and file.down_factor == 1:
                apply_clear(model, radius=2, far=False)
            save_clear_weights(model, root / family / f"{name}.safetensors")
        tensors = load_file(root / family / "local.safetensors")
        key = sorted(tensors)[-1]
        torn = (root / family / "local.safetensors").read_bytes()[:-100]
        (root / family / "torn.safetensors").write_bytes(torn)
        save_file(tensors | {key: tensors[key] * float("nan")}, root / family / "nan.safetensors")
        del tensors[key]
        save_file(tensors, root / family / "short.safetensors")
    return root


class AnyOrder(RuleBasedStateMachine):
    """One model, and in `state` what it ought to be."""

    family: str
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.state = State(self.family)
        self.model = plain_model(self.family, 0)
        self.steps = 0
        self.before = self.images()
        self.left: list[tuple[torch.nn.Module, State]] = []

    def images(self) -> list[torch.Tensor] | None:
        """Two images, of other sizes at every step; None where the forward is refused."""
        return [draw(self.model, self.state.seen, grid) for grid in self.grids()]

    def grids(self) -> list[tuple[int, int]]:
        return [GRIDS[(self.steps + place) % len(GRIDS)] for place in range(2)]

    def attempt(self, run: Callable[[], object], then: State, ought: str = MUST) -> None:
        """Run an operation, which leads to another state or is refused, and look at the images."""
        before, refused = self.state, None
        try:
            run()
        except ValueError as raised:
            refused = raised
        if refused is None:
            assert ought != REFUSE, "was not refused"
            self.state = then
        else:
            assert ought != MUST, f"refused: {refused}"
            self.check_unchanged()  # at the sizes of the images before
        self.steps += 1
        self.check(f"{before} -> {self.state}")

    def check_unchanged(self) -> None:
        if self.before is None:
            return
        for was, now in zip(self.before, self.images(), strict=True):
            assert torch.equal(was, now), "was refused, but changed the image"

    def check(self, what: str) -> None:
        if self.state.blocked:
            with pytest.raises(ValueError, match=r"apply_clear|remove_clear"):
                self.images()
            self.before = None
            return
        self.before = self.images()
        self.compare(self.model, self.state, self.before, what)

    def compare(self, model, state, images, what) -> None:
        for grid, image in zip(self.grids(), images, strict=True):
            far_off = error(image, expected(state.seen, grid))
            assert far_off < TOLERANCE[state.dtype], f"{grid}: error {far_off:.2g}, {what}"

    @rule(clear=SETTINGS)
    def apply(self, clear):
        then = self.with_clear(clear)
        self.attempt(lambda: apply_clear(self.model, **clear._asdict()), then, self.reapplied())

    @rule(clear=SETTINGS, name=st.sampled_from(sorted(FILES)))
    def apply_with_any_weights(self, clear, name):
        self.apply_with_weights(clear, name)

    def apply_with_weights(self, clear, name):
        then = self.loaded(self.with_clear(clear), name)
        path = self.folder / self.family / f"{name}.safetensors"
        ought = self.loads() if FILES[name].down_factor == clear.down_factor else REFUSE
        self.attempt(lambda: apply_clear(self.model, weights=path, **clear._asdict()), then, ought)

    @rule()
    def remove(self):
        state = self.state
        ought = MUST
        if state.strange or state.lost:
            ought = REFUSE
        elif state.tuned is not None and (state.merged or state.burned or state.fused):
            ought = MAY
        then = replace(
            state,
            tuned=None,
            clear=None,
            applied=False,
            shared=False,
            by_hand=False,
            pooling=None,
            blocked=False,
        )
        self.attempt(lambda: remove_clear(self.model), then, ought)

    @rule(name=st.sampled_from(sorted(FILES)))
    def apply_with_fitting_weights(self, name):
        self.apply_with_weights(Clear(2, FILES[name].down_factor), name)

    @rule(name=st.sampled_from([*sorted(FILES), *BROKEN]))
    def load(self, name):
        state = self.state
        path = self.folder / self.family / f"{name}.safetensors"
        if name in BROKEN:
            self.attempt(lambda: load_clear_weights(self.model, path), state, REFUSE)
            return
        ought = self.loads()
        if state.clear is None or FILES[name].down_factor != state.clear.down_factor:
            ought = REFUSE
        elif state.shared and (FILES[name].down_factor > 1 or FILES[name].learned):
            ought = MAY
        then = self.loaded(state, name)
        self.attempt(lambda: load_clear_weights(self.model, path), then, ought)

    def loads(self) -> str:
        """Whether the model takes weights."""
        state = self.state
        if state.strange:
            return REFUSE
        return MAY if state.merged or state.burned or state.fused or state.lost else MUST

    def reapplied(self) -> str:
        """Whether CLEAR can be applied: not to learned pooling that `from_pretrained` left out."""
        return MAY if self.state.lost else MUST

    def with_clear(self, clear: Clear) -> State:
        state = self.state
        file = FILES.get(state.pooling or "")
        keeps = file is not None and not state.shared and file.down_factor == clear.down_factor
        then = replace(state, clear=clear, applied=True, shared=False, by_hand=False, blocked=False)
        if state.tuned is not None and not state.lost:  # what the weights learned comes with them
            keeps, then = True, replace(then, pooling=state.tuned)
            file = FILES[state.tuned]
        fits = keeps and file.down_factor == clear.down_factor
        if fits and file.learned:
            fits = bool(then.seen.clear.far)
        elif fits:
            fits = file.down_factor > 1
        return then if fits else replace(then, pooling=None)

    def loaded(self, state: State, name: str) -> State:
        file = FILES[name]
        then = replace(state, tuned=name, lost=state.lost)
        pooled = file.down_factor > 1 or (file.learned and then.seen.clear and then.seen.clear.far)
        return replace(then, pooling=name if pooled else None)

    @rule(clear=SETTINGS, by_name=st.booleans())
    @precondition(lambda self: self.family == "flux" and not self.state.prompted)
    # Nothing tells processors that were set alone which weights a model was saved with.
    @precondition(lambda self: self.state.applied or not self.state.lost)
    def set_processors(self, clear, by_name):
        processors = CLEARProcessor(**clear._asdict())
        if by_name:
            names = self.model.attn_processors
            processors = {name: CLEARProcessor(**clear._asdict()) for name in names}
        then = replace(
            self.state, clear=clear, shared=not by_name, by_hand=True, pooling=None, blocked=False
        )
        self.attempt(lambda: self.model.set_attn_processor(processors), then)

    @rule()
    @precondition(lambda self: not self.state.prompted and not self.state.fused)
    def set_stock_processors(self):
        state = self.state
        then = replace(
            state, clear=None, shared=False, by_hand=False, pooling=None, blocked=state.applied
        )
        self.attempt(lambda: self.model.set_attn_processor(STOCK[self.family]()), then)

    @rule(scale=st.sampled_from([0.5, 1.0]), merge=st.booleans())
    @precondition(lambda self: not self.state.merged and not self.state.disabled)
    @precondition(lambda self: not self.state.fused and len(self.state.lora) < 2)
    def add_lora(self, scale, merge):
        name = "b" if "a" in dict(self.state.lora) else "a"
        lora = (*self.state.lora, (name, scale))
        self.attempt(lambda: self.add(name, lora), replace(self.state, lora=lora))
        if merge:
            self.merge_lora()

    @torch.no_grad()
    def add(self, name, lora) -> None:
        config = LoraConfig(r=1, lora_alpha=1, target_modules=LORA_TARGETS)
        self.model.add_adapter(config, adapter_name=name)
        for target, module in self.model.named_modules():
            if name in getattr(module, "lora_A", ()):
                down, up = lora_parts(target, module.base_layer.weight.shape, name)
                module.lora_A[name].weight.copy_(down)
                module.lora_B[name].weight.copy_(up)
        self.set_scales(lora)

    def set_scales(self, lora) -> None:
        names, scales = zip(*lora, strict=True)
        self.model.set_adapters(list(names), list(scales))

    @rule(scale=st.sampled_from([0.5, 1.0, 2.0]))
    @precondition(lambda self: self.state.lora and not self.state.merged)
    @precondition(lambda self: not self.state.disabled)
    def scale_lora(self, scale):
        lora = tuple((name, scale) for name, _ in self.state.lora)
        self.attempt(lambda: self.set_scales(lora), replace(self.state, lora=lora))

    @rule()
    @precondition(lambda self: self.state.lora and not self.state.merged)
    def switch_lora(self):
        off = self.state.disabled
        run = self.model.enable_adapters if off else self.model.disable_adapters
        self.attempt(run, replace(self.state, disabled=not off))

    @rule()
    @precondition(lambda self: self.state.lora and not self.state.disabled)
    @precondition(lambda self: not self.state.fused)
    def merge_lora(self):
        merged = self.state.merged
        run = self.model.unfuse_lora if merged else self.model.fuse_lora
        self.attempt(run, replace(self.state, merged=not merged))

    @rule()
    @precondition(lambda self: self.state.lora and not self.state.disabled)
    @precondition(lambda self: not self.state.fused)
    def unload_lora(self):
        state = self.state
        part = "own" if state.tuned is None else "burned"
        stays = getattr(state, part) + (state.lora if state.merged else ())
        then = replace(state, lora=(), merged=False, **{part: stays})
        self.attempt(self.model.unload_lora, then)

    @rule()
    @precondition(lambda self: len(self.state.lora) == 2 and not self.state.merged)
    @precondition(lambda self: not self.state.disabled)
    def delete_lora(self):
        kept, (name, _) = self.state.lora
        self.attempt(lambda: self.model.delete_adapters(name), replace(self.state, lora=(kept,)))

    @rule(prompt=st.booleans())
    @precondition(lambda self: not self.state.blocked)
    def fuse_or_prompt(self, prompt):
        """Fuse or unfuse projections, load or unload an IP-adapter, as far as diffusers can."""
        state, flux = self.state, self.family == "flux"
        if prompt:
            # Processors that were set alone are made again without their settings.
            if not state.by_hand and (flux or not state.fused):
                self.image_prompt()
        elif (flux or not state.prompted) and (state.fused or state.merged or not state.lora):
            self.fuse_projections()

    def fuse_projections(self):
        fused = self.state.fused
        model = self.model
        run = model.unfuse_qkv_projections if fused else model.fuse_qkv_projections
        self.attempt(run, replace(self.state, fused=not fused))

    def image_prompt(self):
        state = self.state
        on = state.prompted

        def run():
            if on:
                make_pipe(self.family, self.model).unload_ip_adapter()
            else:
                load_image_prompt(self.family, self.model)

        self.attempt(run, replace(state, prompted=not on))

    @rule(to=st.sampled_from([*sorted(TOLERANCE, key=str), "cpu"]))
    def cast_or_move(self, to):
        then = self.state if to == "cpu" else replace(self.state, dtype=to)
        self.attempt(lambda: self.model.to(to), then)

    @rule(way=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def go_on_with_a_copy(self, way):
        left = (self.model, self.state)

        def run():
            self.model = way(self.model)

        self.attempt(run, self.state)
        self.left.append(left)

    @rule()
    @precondition(lambda self: not (self.state.lora or self.state.prompted or self.state.fused))
    @precondition(lambda self: not (self.state.strange or self.state.blocked))
    @precondition(lambda self: not (self.state.own or self.state.burned))
    def save_and_load(self):
        state = self.state

        def run():
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                self.model = type(self.model).from_pretrained(folder, torch_dtype=state.dtype)

        then = replace(state, clear=None, applied=False, shared=False, by_hand=False, pooling=None)
        self.attempt(run, replace(then, lost=state.tuned is not None))

    @rule()
    @precondition(lambda self: not self.state.merged and not self.state.fused)
    @precondition(lambda self: not self.state.lost and not self.state.strange)
    def load_another_checkpoint(self):
        state, model = self.state, self.model
        seed = state.checkpoint % 2 + 1
        tensors = {}
        for name, value in checkpoint(self.family, seed).items():
            module, _, kind = name.rpartition(".")
            wrapped = hasattr(model.get_submodule(module), "base_layer")
            tensors[f"{module}.base_layer.{kind}" if wrapped else name] = value
        then = replace(state, checkpoint=seed, own=(), burned=(), strange=state.tuned is not None)
        self.attempt(lambda: model.load_state_dict(tensors, strict=False), then)

    @rule()
    @precondition(lambda self: not self.state.blocked)
    def train(self):
        """Gradients with checkpointing are those of the fresh model, and nothing is left."""

        def run():
            far_off = error(gradient(self.model, self.state.seen), right_gradient(self.state.seen))
            assert far_off < 5 * TOLERANCE[self.state.dtype], f"gradient: error {far_off:.2g}"

        self.attempt(run, self.state)

    @rule(kind=st.sampled_from([RuntimeError, KeyboardInterrupt]), place=st.booleans())
    @precondition(lambda self: not self.state.blocked)
    def stop_in_the_middle(self, kind, place):
        layers = list(attention_layers(self.model).values())

        def stop(*_):
            raise kind("stop")

        def run():
            hook = layers[-1 if place else 0].to_q.register_forward_hook(stop)
            if self.state.fused:
                hook.remove()
                hook = self.model.proj_out.register_forward_hook(stop)
            with pytest.raises(kind, match="stop"):
                draw(self.model, self.state.seen, GRIDS[2])
            hook.remove()

        self.attempt(run, self.state)

    def teardown(self):
        for model, state in self.left:
            if not state.blocked:
                images = [draw(model, state.seen, grid) for grid in self.grids()]
                self.compare(model, state, images, f"the original of a copy, {state}")


class Flux(AnyOrder):
    family = "flux"


class SD3(AnyOrder):
    family = "sd3"


def run(machine, folder, examples, steps=12):
    machine.folder = folder
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", slow_but([Flux, SD3], Flux))
def test_a_few(machine, weights_folder):
    run(machine, weights_folder, 5)


@slow
@pytest.mark.parametrize("machine", [Flux, SD3])
def test_many(machine, weights_folder):
    run(machine, weights_folder, 100)


def test_images_tell_states_apart():
    """Far beyond the tolerance, or no test above could fail."""
    for family in STOCK:
        plain = State(family)
        clear = replace(plain, clear=Clear(2, far=False))
        pooled = replace(plain, tuned="pooled", clear=Clear(2, 2))
        lora = replace(plain, lora=(("a", 1.0),))
        states = [
            plain,
            clear,
            pooled,
            lora,
            replace(plain, checkpoint=1),
            replace(plain, tuned="local"),
            replace(plain, tuned="other"),
            replace(plain, prompted=True),
            replace(plain, lora=(("a", 0.5),)),
            replace(plain, lora=(("b", 1.0),)),
            replace(clear, clear=Clear(3, far=False)),
            replace(clear, clear=Clear(2, far=True)),
            replace(pooled, pooling="pooled"),
        ]
        images = [expected(state.seen, GRIDS[0]) for state in states]
        for place, image in enumerate(images):
            for other in images[:place]:
                assert error(image, other) > 20 * TOLERANCE[torch.float32]


def test_fresh_weights():
    """What the states are made of survives bfloat16."""
    model = fill(plain_model("flux", 0), 3)
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
