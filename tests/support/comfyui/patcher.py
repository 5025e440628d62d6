"""ModelPatcher: a model, and what nodes change of it, each on a clone; and one forward of it."""

import torch
from torch import nn


class WrappersMP:
    DIFFUSION_MODEL = "diffusion_model"


class WrapperExecutor:
    """Runs a forward within wrappers; each gets the executor of what is within it."""

    def __init__(self, original, class_obj, wrappers, index=0):
        self.original, self.class_obj = original, class_obj
        self.wrappers, self.index = list(wrappers), index

    def __call__(self, *args, **kwargs):
        inner = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1)
        return inner.execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)


def within_wrappers(model, transformer_options):
    """An executor of `model._forward`, as ComfyUI's `forward` makes it."""
    keyed = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    wrappers = [wrapper for each in keyed.values() for wrapper in each]
    return WrapperExecutor(model._forward, model, wrappers)


def _copy(value):
    """Dicts and lists anew, all else shared."""
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


class Sampling:
    """Flow matching; a schedule without a shift."""

    def percent_to_sigma(self, percent):
        return 1.0 - percent


class Model(nn.Module):
    """The outer model: its weights are named "diffusion_model....."."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = Sampling()


class ModelPatcher:
    def __init__(self, model):
        self.model = model
        self.patches = {}
        self.wrappers = {}
        self.model_options = {"transformer_options": {}}

    def clone(self):
        clone = ModelPatcher(self.model)
        clone.patches = {key: list(patches) for key, patches in self.patches.items()}
        clone.wrappers = _copy(self.wrappers)
        clone.model_options = _copy(self.model_options)
        return clone

    def get_model_object(self, name):
        return getattr(self.model, name)

    def model_state_dict(self, prefix=""):
        state = self.model.state_dict()
        return {key: value for key, value in state.items() if key.startswith(prefix)}

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        state, added = self.model.state_dict(), []
        for key, value in patches.items():
            name, offset = (key, None) if isinstance(key, str) else key
            if name in state:
                entry = (strength_patch, value, strength_model, offset, None)
                self.patches.setdefault(name, []).append(entry)
                added.append(key)
        return added

    def patched(self):
        """The weights with the patches, by name."""
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        for key, patches in self.patches.items():
            for strength, (kind, (value,)), _, offset, _ in patches:
                place = state[key] if offset is None else state[key].narrow(*offset)
                if kind == "set":
                    place.copy_(value)
                else:
                    place.add_(strength * value)
        return state

    @torch.no_grad()
    def apply(self, *args, sigma=0.5, schedule=None, **kwargs):
        """One forward of the diffusion model, as a sampler asks for it.

        The options are this call's own, and the weights are patched for it.
        """
        options = _copy(self.model_options["transformer_options"])
        options["wrappers"] = _copy(self.wrappers)
        options["sigmas"] = torch.as_tensor(sigma).flatten()
        if schedule is not None:
            options["sample_sigmas"] = torch.as_tensor(schedule)
        if not self.patches:
            return self.model.diffusion_model(*args, transformer_options=options, **kwargs)
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.patched())
        try:
            return self.model.diffusion_model(*args, transformer_options=options, **kwargs)
        finally:
            self.model.load_state_dict(before)
