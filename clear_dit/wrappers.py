"""What wraps a model without being one: torch.compile, DDP, FSDP, its checkpointing and PEFT."""

from __future__ import annotations

from typing import Any

# Package of a wrapper's class: the names it may keep the model under, as a submodule. A wrapper
# passes other names on to the model, so that `getattr` would not tell them apart.
INSIDE: dict[str, tuple[str, ...]] = {
    "torch": ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"),
    "peft": ("base_model", "model"),
}


def unwrapped(model: Any) -> Any:
    """The model or block inside of wrappers, however many."""
    package = type(model).__module__.partition(".")[0]
    submodules = getattr(model, "_modules", {})
    for name in INSIDE.get(package, ()):
        if name in submodules:
            return unwrapped(submodules[name])
    return model
