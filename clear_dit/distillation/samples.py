"""The samples a model made itself, on disk: what distillation reads.

A folder holds `index.json`, `empty.safetensors` (the conditioning of the prompt that stands for
none) and shards `samples-00000.safetensors`, ... Sample n lies in shard n // shard_size. A shard
holds:

- latents [n, ...], as the denoising loop holds them;
- conditioning.0. ..., conditioning.1. ..., what the transformer is given for each different prompt
  in the shard, see `Conditioning`, each of its own length; text [n] int64, that of each sample;
- in its header: the numbers, prompts and seeds of its samples, what the conditionings' tensors are
  parts of, and a digest of the index.

Floats have the dtype the index names, but for position ids. The index says what was asked for; what
is there, the shards say themselves: they appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RequestError, first_line
from ..generation.checks import DTYPES
from ..generation.conditioning import Conditioning, moved
from .conditionings import described, restored, tensors_of
from .files import write_tensors, write_text
from .fingerprint import same_model

FORMAT = "clear-dit samples 2"
INDEX, EMPTY = "index.json", "empty.safetensors"
_ANY_FORMAT = FORMAT.rpartition(" ")[0]
CONDITIONING = "conditioning"
MAX_COUNT = 10_000_000


@dataclass(frozen=True)
class SampleIndex:
    """What a folder of samples holds, once it is complete.

    Attributes:
        model: its name, as it was asked for.
        fingerprint: see `fingerprint`.
        height, width: of the images, in pixels.
        shape: of a sample's latents.
        steps, guidance: see `GenerateRequest`.
        dtype: the computation's, and that of the stored numbers.
        prompts: a digest of all prompts, or "demo".
        seed: sample n starts from the noise of seed + n.
        count: how many samples.
        shard_size: samples in a shard; the last may have fewer.
        versions: of the packages that made them.
    """

    model: str
    fingerprint: dict[str, Any]
    height: int
    width: int
    shape: tuple[int, ...]
    steps: int
    guidance: float
    dtype: str
    prompts: str
    seed: int
    count: int
    shard_size: int
    versions: dict[str, str]

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def numbers(self, shard: int) -> range:
        """The samples of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.count))

    @property
    def digest(self) -> str:
        """Of all that decides what sample n is."""
        kept = asdict(self)
        for name in ("model", "fingerprint", "count", "versions"):
            del kept[name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


class Sample(NamedTuple):
    """One sample: its latents, what the transformer is given for its prompt, that, and its seed."""

    latents: torch.Tensor
    conditioning: Conditioning
    prompt: str
    seed: int


def read_index(folder: Path) -> SampleIndex:
    """The index of a folder of samples.

    Raises:
        RequestError: there is none, or it is not one.
    """
    path = folder / INDEX
    if not path.is_file():
        raise RequestError(f"{folder} is no folder of samples: it has no {INDEX}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        its_format = str(found.pop("format"))
        if its_format != FORMAT and its_format.startswith(_ANY_FORMAT):
            raise RequestError(
                f"{folder} holds {its_format!r}, and this version reads {FORMAT!r}: run "
                "`clear-dit sample` again, into another folder."
            )
        if its_format != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        given = {field.name: found.pop(field.name) for field in fields(SampleIndex)}
        index = SampleIndex(**given | {"shape": tuple(given["shape"])})
        numbers = (index.height, index.width, index.count, index.shard_size, *index.shape)
        if not all(type(n) is int and n > 0 for n in numbers) or index.dtype not in DTYPES:
            raise ValueError("it has values out of their range")
    except RequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is not an index of samples: {first_line(error)}.") from error
    return index


class SampleFolder:
    """A folder of samples and its index."""

    def __init__(self, folder: Path, index: SampleIndex) -> None:
        self.folder = folder
        self.index = index
        self._files: dict[int, Any] = {}
        self._headers: dict[int, dict[str, list[Any]]] = {}

    def path(self, shard: int) -> Path:
        return self.folder / f"samples-{shard:05d}.safetensors"

    def write_index(self) -> None:
        found = {"format": FORMAT, **asdict(self.index)}
        write_text(self.folder / INDEX, json.dumps(found, indent=2) + "\n")

    def write_empty(self, conditioning: Conditioning) -> None:
        """Keep the conditioning of the prompt that stands for none."""
        stored = self._stored(conditioning)
        header = {"format": FORMAT, CONDITIONING: json.dumps(described(stored))}
        write_tensors(self.folder / EMPTY, _own_tensors(stored), header)

    def write(
        self,
        shard: int,
        latents: torch.Tensor,
        prompts: Sequence[str],
        conditionings: Sequence[Conditioning],
    ) -> None:
        """Write a shard.

        Args:
            shard: its number.
            latents: [n, ...], of the samples `index.numbers(shard)`.
            prompts: n of them.
            conditionings: of the different prompts, in the order of their first use.

        Raises:
            RequestError: latents or embeddings that are not finite (in the dtype stored).
            OSError: it cannot be written; nothing is left of it.
        """
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        numbers = self.index.numbers(shard)
        stored = [self._stored(one) for one in conditionings]
        tensors = {
            "latents": latents.to("cpu", DTYPES[self.index.dtype]).contiguous(),
            "text": torch.tensor([rows[prompt] for prompt in prompts]),
            **_own_tensors(stored),
        }
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise RequestError(
                    f"{self.index.model} in {self.index.dtype} gives {name} that are not finite; "
                    "use another --dtype."
                )
        header = {
            "format": FORMAT,
            "digest": self.index.digest,
            "numbers": json.dumps(list(numbers)),
            "seeds": json.dumps([self.index.seed + number for number in numbers]),
            "prompts": json.dumps(list(prompts)),
            CONDITIONING: json.dumps([described(one) for one in stored]),
        }
        write_tensors(self.path(shard), tensors, header)

    def _stored(self, conditioning: Conditioning) -> Conditioning:
        return moved(conditioning, torch.device("cpu"), DTYPES[self.index.dtype])

    def missing(self) -> list[int]:
        """The shards that are not there, or have fewer samples than the index says by now.

        Raises:
            RequestError: a shard that is not whole, or of other samples.
        """
        return [
            shard
            for shard in range(self.index.shards)
            if not self.path(shard).exists()
            or len(self.header(shard)["numbers"]) < len(self.index.numbers(shard))
        ]

    def header(self, shard: int) -> dict[str, list[Any]]:
        """Numbers, seeds and prompts of a shard's samples, and descriptions of its conditionings.

        After a check of all that needs no tensor.

        Raises:
            RequestError: it is not whole, or holds other samples than the index says.
        """
        if shard not in self._headers:
            path = self.path(shard)
            file = self._open(shard)
            found = file.metadata() or {}
            if found.get("digest") != self.index.digest:
                raise RequestError(f"{path} holds samples of another request than {INDEX} names.")
            try:
                header = {name: json.loads(found[name]) for name in ("numbers", "seeds", "prompts")}
                conditionings = json.loads(found[CONDITIONING])
                latents, text = (file.get_slice(one).get_shape() for one in ("latents", "text"))
                restored(conditionings, CONDITIONING, file.get_slice)
            except (KeyError, ValueError, SafetensorError) as error:
                raise RequestError(f"{path} is not a shard of samples.") from error
            count = len(header["numbers"])
            if (
                header["numbers"] != list(self.index.numbers(shard))[:count]
                or any(len(each) != count for each in header.values())
                or len(conditionings) != len(set(header["prompts"]))
                or latents != [count, *self.index.shape]
                or text != [count]
            ):
                raise RequestError(f"{path} is not a shard of the samples that {INDEX} names.")
            self._headers[shard] = header | {CONDITIONING: conditionings}
        return self._headers[shard]

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = _open_tensors(self.path(shard))
        return self._files[shard]

    def forget(self, shard: int) -> None:
        """Look at a shard anew: it was written."""
        self._files.pop(shard, None)
        self._headers.pop(shard, None)

    def check(self, count: int) -> None:
        """Refuse what cannot be trained on: reads the first `count` samples' latents.

        Raises:
            RequestError: a sample that is missing, a shard that is truncated or has latents that
                are not finite.
        """
        for shard in range(-(-count // self.index.shard_size)):
            path = self.path(shard)
            needed = min(count - shard * self.index.shard_size, self.index.shard_size)
            if not path.exists() or len(self.header(shard)["numbers"]) < needed:
                raise RequestError(
                    f"{path} is missing or unfinished; finish `clear-dit sample` "
                    "(the same command goes on), or train on fewer by --max-train-samples."
                )
            latents = self._open(shard).get_tensor("latents")
            if not latents.isfinite().all():
                raise RequestError(
                    f"{path} has latents that are not finite; delete it and run `clear-dit sample` "
                    "again."
                )

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, in the dtype it is stored in, on the CPU.

        Raises:
            RequestError: its text embeddings are not finite.
        """
        shard, row = divmod(number, self.index.shard_size)
        header, file = self.header(shard), self._open(shard)
        text = int(file.get_slice("text")[row])
        description, name = header[CONDITIONING][text], f"{CONDITIONING}.{text}"
        conditioning = restored(description, name, file.get_tensor)
        if not all(tensor.isfinite().all() for _, tensor in tensors_of(conditioning, name)):
            raise RequestError(f"{self.path(shard)} has text embeddings that are not finite.")
        latents = file.get_slice("latents")[row]
        return Sample(latents, conditioning, header["prompts"][row], header["seeds"][row])

    def latents(self, shard: int) -> torch.Tensor:
        """All latents of a shard, [n, ...]."""
        self.header(shard)
        return self._open(shard).get_tensor("latents")

    def empty(self) -> Conditioning:
        """The conditioning of the prompt that stands for none.

        Raises:
            RequestError: the file is missing or not whole.
        """
        description, file = self._empty()
        path = self.folder / EMPTY
        try:
            found: Conditioning = restored(description, CONDITIONING, file.get_tensor)
        except (ValueError, SafetensorError) as error:
            raise RequestError(f"{path} does not hold text embeddings.") from error
        if not all(tensor.isfinite().all() for _, tensor in tensors_of(found, CONDITIONING)):
            raise RequestError(f"{path} has values that are not finite.")
        return found

    def _empty(self) -> tuple[Any, Any]:
        """Its description, and the file."""
        path = self.folder / EMPTY
        if not path.exists():
            raise RequestError(f"{path} is missing; run `clear-dit sample` again.")
        file = _open_tensors(path)
        try:
            return json.loads((file.metadata() or {})[CONDITIONING]), file
        except (KeyError, ValueError) as error:
            raise RequestError(f"{path} does not hold text embeddings.") from error

    def have_one_shape(self, count: int, with_empty: bool) -> bool:
        """Whether conditionings can be put together in one batch.

        Args:
            count: of so many first samples.
            with_empty: and of the prompt that stands for none.
        """
        shards = range(-(-count // self.index.shard_size))
        found = [each for shard in shards for each in self.header(shard)[CONDITIONING]]
        if with_empty:
            found.append(self._empty()[0])
        return all(each == found[0] for each in found)


def open_samples(folder: Path, model: str, fingerprint: dict[str, Any], count: int) -> SampleFolder:
    """A folder of samples of a model, at least `count` of them complete and checked.

    Args:
        folder: what `clear-dit sample` wrote.
        model, fingerprint: of the model that is to be trained on them.
        count: how many are needed; 0 for all.

    Raises:
        RequestError: it is not such a folder, of another model, or incomplete.
    """
    index = read_index(folder)
    if not same_model(index.fingerprint, fingerprint):
        raise RequestError(
            f"{folder} holds samples of another model: of {index.model!r}, not of {model!r}."
        )
    if count > index.count:
        raise RequestError(
            f"--max-train-samples must be from 1 to the {index.count} samples in {folder}, "
            f"got {count}."
        )
    samples = SampleFolder(folder, index)
    samples.check(count or index.count)
    return samples


def _own_tensors(conditionings: Any) -> dict[str, torch.Tensor]:
    """By name, each with memory of its own: they may be parts of something, or the same."""
    parts = tensors_of(conditionings, CONDITIONING)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in parts}


def _open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} is truncated or not safetensors ({first_line(error)}); delete it and run "
            "`clear-dit sample` again."
        ) from error
