"""The parameters that CLEAR weights replaced: kept, and put back.

Meanwhile others may have changed the model. A LoRA that was fused into the CLEAR weights is one
matrix more on every weight; it stays, on whatever weights come next. Whatever else changed a
parameter belongs to it as a whole, and is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .format import listed, parameters_by_key, refuse_unsuitable
from .saved import marked, unmark
from .values import (
    CASTS,
    cast,
    casts_between,
    difference,
    digest,
    fingerprint,
    is_lora,
    precision_of,
)

# What a parameter is now.
LOADED, ORIGINAL, LORA = "as loaded", "the original", "as loaded, with a LoRA"


class Now(NamedTuple):
    """What became of a parameter.

    Attributes:
        kind: `LOADED`, `ORIGINAL` or `LORA`.
        casts: those of `CASTS` that may have happened since it was loaded, the likeliest first.
    """

    kind: str
    casts: Sequence[tuple[torch.dtype, ...]] = ((),)


@dataclass(frozen=True)
class _Loaded:
    """What tells whether a parameter is still what was loaded into it.

    Attributes:
        dtype: the parameter's, at the time.
        prints: fingerprints of the values in that dtype, and as `model.to` may cast them.
        version: PyTorch's count of writes. Merging goes past it (`weight.data`), optimizers and
            `load_state_dict` do not. None in a copy of the model, whose counts start again.
        with_lora: the fingerprint of a change that was found to be a LoRA's: not looked at again.
    """

    dtype: torch.dtype
    prints: dict[torch.dtype, int]
    version: int | None
    with_lora: int | None = None


class Originals:
    """Parameters as they were before CLEAR weights, on the CPU, and what became of those since.

    Attributes:
        lost: whether the model came with CLEAR weights (`save_pretrained`), without the originals.
    """

    def __init__(self, lost: bool = False) -> None:
        self.lost = lost
        self._values: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._path: Path | None = None
        self._tuned: _Copies | None = None  # while the originals are back
        # Of a model that was quantised with CLEAR weights: the originals, quantised like them.
        self._alike: dict[str, torch.Tensor] = {}
        self._exchanged = False  # while these are back, and CLEAR's are in their place here

    def __bool__(self) -> bool:
        """Whether the model has CLEAR weights."""
        return self.lost or bool(self._loaded)

    @property
    def loaded_here(self) -> bool:
        """Whether they come from a file that was loaded into this model."""
        return bool(self._loaded)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model."""
        loaded = {key: replace(one, version=None) for key, one in self._loaded.items()}
        return self.__dict__ | {"_loaded": loaded, "_tuned": None, "_exchanged": False}

    def refuse_lost(self, who: str) -> None:
        """Refuse a model that came without its originals.

        Raises:
            ValueError: it did.
        """
        if self.lost:
            raise ValueError(
                f"{who}: the model was saved by save_pretrained with CLEAR weights, and its "
                "original weights are not there; load the original model with from_pretrained."
            )

    def check(self, model: nn.Module, who: str) -> dict[str, Now]:
        """What the parameters are now, by name.

        Raises:
            ValueError: parameters that cannot be read, or that were changed by anything but a LoRA.
        """
        if not self:
            return {}
        refuse_unsuitable(model, who, merged_lora=True)
        parameters = parameters_by_key(model)
        if not self._loaded:
            return dict.fromkeys(self._as_saved(model, parameters, who), Now(LOADED))
        found: dict[str, Now] = {}
        strange = []
        for key in self._loaded:
            now = self._state(key, parameters.get(key), found, who)
            if now is None:
                strange.append(key)
            else:
                found[key] = now
        if strange:
            raise ValueError(
                f"{who}: {listed(strange)} changed since CLEAR weights were loaded, and not by a "
                "LoRA that was fused: training or other weights, for which the originals that are "
                "kept do not stand. Make the model anew with from_pretrained."
            )
        return _cast_alike(found)

    @torch.no_grad()
    def load(self, model: nn.Module, file: Any, path: Path, now: dict[str, Now]) -> None:
        """Copy the tensors of a file into the model, keeping what they replace.

        Args:
            file: safetensors, opened; it holds all parameters.
            now: from `check`; fused LoRAs stay.
        """
        loaded = {}
        for key, parameter in parameters_by_key(model).items():
            if not self.lost:
                self._values.setdefault(key, parameter.detach().to("cpu", copy=True))
            value = file.get_tensor(key).to(parameter)
            parameter.copy_(self._with_changes(key, parameter, value, now.get(key, Now(ORIGINAL))))
            dtypes = dict.fromkeys((parameter.dtype, torch.bfloat16, torch.float16))
            prints = {dtype: fingerprint(value.to(dtype)) for dtype in dtypes}
            loaded[key] = _Loaded(parameter.dtype, prints, _version(parameter))
        self._loaded, self._path = loaded, path.absolute()

    def digests(self) -> dict[str, str]:
        """One for each dtype: what is loaded, as `model.to` may cast it."""
        prints = [one.prints for one in self._loaded.values()]
        dtypes = set.intersection(*map(set, prints))
        return {
            str(dtype): digest(one[dtype] for one in prints) for dtype in sorted(dtypes, key=str)
        }

    @property
    def are_quantised(self) -> bool:
        """Whether they are those of a model that `quantize` made of one with CLEAR weights."""
        return bool(self._alike)

    def plain(self, model: nn.Module, who: str) -> dict[str, torch.Tensor]:
        """The parameters by name as `back` has them, on the CPU.

        Raises:
            ValueError: as `check`.
        """
        with self.back(model, who):
            parameters = parameters_by_key(model)
            return {key: parameters[key].detach().to("cpu", copy=True) for key in self._loaded}

    def keep_quantised(self, alike: dict[str, torch.Tensor]) -> None:
        """Take what `plain` gave, quantised as the model's parameters now are, on the CPU."""
        self._alike, self._values = alike, {}

    def put_back(self, model: nn.Module, who: str) -> None:
        """Bring the original parameters back for good, bit for bit; fused LoRAs stay on them.

        Raises:
            ValueError: as `check`, or there are none; nothing is changed then.
        """
        if self:
            self._write(model, who)
            unmark(model)
        self._values, self._loaded = {}, {}

    @contextmanager
    def back(self, model: nn.Module, who: str) -> Iterator[None]:
        """Within it the parameters are those of `put_back`; afterwards as before, bit for bit.

        Raises:
            ValueError: as `put_back`.
        """
        if self.are_back:  # in a call around this one
            yield
            return
        if self._alike:
            with self._exchange(model):
                yield
            return
        tuned = _Copies(model, self._loaded)
        try:
            if self:
                self._write(model, who)
            self._tuned = tuned
            yield
        finally:
            self._tuned = None
            self._loaded = tuned.put_back(self._loaded)

    @property
    def are_back(self) -> bool:
        """Whether a thread is within `back`: that which has the model for itself."""
        return self._tuned is not None or self._exchanged

    @contextmanager
    def away(self, model: nn.Module) -> Iterator[None]:
        """Within it, within `back`, the parameters are again those before `back`."""
        if self._exchanged:
            with self._exchange(model):
                yield
            return
        tuned, loaded, originals = self._tuned, self._loaded, _Copies(model, self._loaded)
        assert tuned is not None
        try:
            self._tuned, self._loaded = None, tuned.put_back(loaded)
            yield
        finally:
            originals.put_back(loaded)
            self._tuned, self._loaded = tuned, loaded

    @contextmanager
    def undone_on_error(self, model: nn.Module) -> Iterator[None]:
        """Within it an error, or an interruption, leaves parameters and what is known as before."""
        before, tuned = dict(vars(self)), _Copies(model, self._loaded)
        self._values = dict(self._values)
        try:
            yield
        except BaseException:
            replaced = {key: self._values[key] for key in self._values.keys() - before["_values"]}
            parameters = parameters_by_key(model) if replaced else {}
            with torch.no_grad():
                for key, value in replaced.items():
                    parameters[key].copy_(value)
            vars(self).update(before)
            self._loaded = tuned.put_back(self._loaded)
            raise

    @contextmanager
    def _exchange(self, model: nn.Module) -> Iterator[None]:
        """Within it the quantised parameters and those that are kept here have changed places."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        # Values are copied: hooks that offload a model hold its tensors.
        parameters = parameters_by_key(model)
        for key, kept in self._alike.items():
            for here, there in zip(_parts(kept), _parts(parameters[key]), strict=True):
                value = there.to("cpu", copy=True)
                there.copy_(here)
                here.copy_(value)
        self._exchanged = not self._exchanged

    @torch.no_grad()
    def _write(self, model: nn.Module, who: str) -> None:
        self.refuse_lost(who)
        now = self.check(model, who)
        for key, parameter in parameters_by_key(model).items():
            if now[key].kind != ORIGINAL:
                value = self._values[key].to(parameter.device)
                parameter.copy_(self._with_changes(key, parameter, value, now[key]))

    def _state(
        self, key: str, parameter: nn.Parameter | None, found: dict[str, Now], who: str
    ) -> Now | None:
        """What a parameter is now, None for anything else.

        Args:
            found: of the keys before; a weight comes before its bias.
        """
        loaded, original = self._loaded[key], self._values.get(key)
        if parameter is None:
            return None
        value = parameter.detach()
        current = fingerprint(value)
        for dtype, known in loaded.prints.items():  # its own first: it may not be rounded
            if current == known:
                cast_to = [casts for casts in CASTS if casts[-1:] == (dtype,)]
                return Now(LOADED, ((),) if dtype == loaded.dtype else cast_to)
        if current == loaded.with_lora:
            return Now(LORA)
        if (
            original is not None
            and value.shape == original.shape
            and casts_between(original, value)
        ):
            return Now(ORIGINAL)
        if loaded.version not in (None, _version(parameter)):
            return None
        before = self._read(key, who).to(value.device)
        if before.shape != value.shape:
            return None
        casts = casts_between(before, value)
        if casts:
            return Now(LOADED, casts)
        if key.endswith(".bias"):  # a LoRA may have one, but never that alone
            weight = found.get(key.removesuffix("bias") + "weight")
            merged = weight is not None and weight.kind == LORA
        else:
            merged = is_lora(value, _cast(before, value))
        if merged:
            self._loaded[key] = replace(loaded, with_lora=current)
        return Now(LORA) if merged else None

    def _with_changes(
        self, key: str, parameter: nn.Parameter, value: torch.Tensor, now: Now
    ) -> torch.Tensor:
        """What takes the place of a parameter: with its LoRA, and cast as it was cast since.

        Args:
            value: without both.
            now: what the parameter is.
        """
        current = parameter.detach()
        if now.kind == ORIGINAL:
            return value
        if now.kind == LOADED:
            return cast(value, now.casts[0])
        before = self._read(key, "CLEAR weights").to(current.device)
        change = difference(current, _cast(before, current))
        return _cast(_cast(value, current).to(change) + change, current)

    def _read(self, key: str, who: str) -> torch.Tensor:
        """What was loaded, from its file, in the dtype of the time."""
        loaded = self._loaded[key]
        try:
            assert self._path is not None
            with safe_open(self._path, framework="pt", device="cpu") as file:
                value = file.get_tensor(key).to(loaded.dtype)
            if fingerprint(value) == loaded.prints[loaded.dtype]:
                return value
            happened = "is another file now"
        except (OSError, SafetensorError):
            happened = "cannot be read any more"
        raise ValueError(
            f"{who}: {key} changed since CLEAR weights were loaded, and what it was cannot be "
            f"told: {str(self._path)!r} {happened}; put it back there."
        )

    def _as_saved(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], who: str
    ) -> list[str]:
        """The names of parameters that came with the model.

        Raises:
            ValueError: they are not what was loaded before the model was saved.
        """
        entry = marked(model)
        assert entry is not None
        current = digest(fingerprint(parameter) for parameter in parameters.values())
        if current not in entry["fingerprints"].values():
            raise ValueError(
                f"{who}: the model was saved with CLEAR weights ({entry['file']}) that a LoRA, "
                "training or a cast to 8 bits had changed, which other weights would drop; start "
                "from the original model, load CLEAR weights, then the LoRA."
            )
        return list(parameters)


class _Copies:
    """Parameters with CLEAR weights as they are now, on the CPU.

    Args:
        keys: of the parameters.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str]) -> None:
        wanted = set(keys)
        found = parameters_by_key(model) if wanted else {}  # quantised layers may have none
        self._parameters = {key: parameter for key, parameter in found.items() if key in wanted}
        self._values = {
            key: parameter.detach().to("cpu", copy=True)
            for key, parameter in self._parameters.items()
        }
        self._versions = {key: _version(parameter) for key, parameter in self._parameters.items()}

    @torch.no_grad()
    def put_back(self, loaded: dict[str, _Loaded]) -> dict[str, _Loaded]:
        """Write those that changed; what was loaded, with PyTorch's counts after that."""
        found = dict(loaded)
        for key, value in self._values.items():
            parameter = self._parameters[key]
            # Ours were no changes; somebody's before us still count.
            if _version(parameter) != self._versions[key]:
                parameter.copy_(value)
                if loaded[key].version == self._versions[key]:
                    found[key] = replace(loaded[key], version=_version(parameter))
        return found


def _cast_alike(found: dict[str, Now]) -> dict[str, Now]:
    """The same; where one way to cast explains them all, it is that: few values may fit several."""
    ways = [now.casts for now in found.values() if now.kind == LOADED]
    common = [casts for casts in CASTS if all(casts in each for each in ways)]
    return {key: now._replace(casts=common or now.casts) for key, now in found.items()}


def _cast(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the dtype of another tensor, rounded as far as that one's values are."""
    return value.to(precision_of(like)).to(like.dtype)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: several if it is quantised."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _version(parameter: nn.Parameter) -> int | None:
    return None if parameter.is_inference() else parameter._version
