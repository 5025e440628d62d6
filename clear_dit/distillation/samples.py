"""The samples a model made itself, on disk: what distillation reads.

A folder holds `index.json`, `empty.safetensors` (the empty prompt's embeddings) and shards
`samples-00000.safetensors`, ... Sample n lies in shard n // shard_size. A shard holds:

- latents [n, tokens, channels], packed, as the transformer gives and takes them;
- prompt_embeds [u, text tokens, channels] and pooled_prompt_embeds [u, channels], one row for each
  different prompt in the shard; text [n] int64, the row of each sample;
- in its header: the numbers, prompts and seeds of its samples, and a digest of the index.

Floats have the dtype the index names. The index says what was asked for; what is there, the shards
say themselves: they appear whole or not at all.
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
from ..generation.denoising import Text
from ..generation.models import TOKEN_PIXELS
from .files import write_tensors, write_text
from .fingerprint import same_model

FORMAT = "clear-dit samples 1"
INDEX, EMPTY = "index.json", "empty.safetensors"
_TENSORS = {"latents": 3, "prompt_embeds": 3, "pooled_prompt_embeds": 2, "text": 1}
MAX_COUNT = 10_000_000


@dataclass(frozen=True)
class SampleIndex:
    """What a folder of samples holds, once it is complete.

    Attributes:
        model: its name, as it was asked for.
        fingerprint: see `fingerprint`.
        height, width: of the images, in pixels.
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
    steps: int
    guidance: float
    dtype: str
    prompts: str
    seed: int
    count: int
    shard_size: int
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        """Image tokens of a sample."""
        return self.height * self.width // TOKEN_PIXELS**2

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
    """One sample: latents [tokens, channels], its prompt's embeddings, its prompt, its seed."""

    latents: torch.Tensor
    words: torch.Tensor
    pooled: torch.Tensor
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
        if found.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        index = SampleIndex(**{field.name: found.pop(field.name) for field in fields(SampleIndex)})
        numbers = (index.height, index.width, index.count, index.shard_size)
        if not all(type(n) is int and n > 0 for n in numbers) or index.dtype not in DTYPES:
            raise ValueError("it has values out of their range")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is not an index of samples: {first_line(error)}.") from error
    return index


class SampleFolder:
    """A folder of samples and its index."""

    def __init__(self, folder: Path, index: SampleIndex) -> None:
        self.folder, self.index = folder, index
        self._files: dict[int, Any] = {}
        self._headers: dict[int, dict[str, list[Any]]] = {}

    def path(self, shard: int) -> Path:
        return self.folder / f"samples-{shard:05d}.safetensors"

    def write_index(self) -> None:
        found = {"format": FORMAT, **asdict(self.index)}
        write_text(self.folder / INDEX, json.dumps(found, indent=2) + "\n")

    def write_empty(self, text: Text) -> None:
        """Keep the empty prompt's embeddings, one row each."""
        tensors = {"prompt_embeds": text.words, "pooled_prompt_embeds": text.pooled}
        write_tensors(self.folder / EMPTY, {k: self._stored(v) for k, v in tensors.items()})

    def write(self, shard: int, latents: torch.Tensor, prompts: Sequence[str], text: Text) -> None:
        """Write a shard.

        Args:
            shard: its number.
            latents: [n, tokens, channels], of the samples `index.numbers(shard)`.
            prompts: n of them.
            text: the embeddings of the different prompts, in the order of their first use.

        Raises:
            RequestError: latents or embeddings that are not finite (in the dtype stored).
            OSError: it cannot be written; nothing is left of it.
        """
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        numbers = self.index.numbers(shard)
        tensors = {
            "latents": self._stored(latents),
            "prompt_embeds": self._stored(text.words),
            "pooled_prompt_embeds": self._stored(text.pooled),
            "text": torch.tensor([rows[prompt] for prompt in prompts]),
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
        }
        write_tensors(self.path(shard), tensors, header)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", DTYPES[self.index.dtype]).contiguous()

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
        """Numbers, seeds and prompts of a shard, after a check of all that needs no tensor.

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
                slices = {name: file.get_slice(name) for name in _TENSORS}
                shapes = {name: each.get_shape() for name, each in slices.items()}
            except (KeyError, ValueError, SafetensorError) as error:
                raise RequestError(f"{path} is not a shard of samples.") from error
            count = len(header["numbers"])
            rows = len(set(header["prompts"]))
            lengths = (count, rows, rows, count)
            expected = list(self.index.numbers(shard))
            if (
                header["numbers"] != expected[:count]
                or any(len(each) != count for each in header.values())
                or any(len(shapes[name]) != ndim for name, ndim in _TENSORS.items())
                or any(s[0] != n for s, n in zip(shapes.values(), lengths, strict=True))
                or shapes["latents"][1] != self.index.tokens
            ):
                raise RequestError(f"{path} is not a shard of the samples that {INDEX} names.")
            self._headers[shard] = header
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
        words = file.get_slice("prompt_embeds")[text]
        pooled = file.get_slice("pooled_prompt_embeds")[text]
        if not (words.isfinite().all() and pooled.isfinite().all()):
            raise RequestError(f"{self.path(shard)} has text embeddings that are not finite.")
        latents = file.get_slice("latents")[row]
        return Sample(latents, words, pooled, header["prompts"][row], header["seeds"][row])

    def latents(self, shard: int) -> torch.Tensor:
        """All latents of a shard, [n, tokens, channels]."""
        self.header(shard)
        return self._open(shard).get_tensor("latents")

    def empty(self) -> Text:
        """The empty prompt's embeddings, one row each.

        Raises:
            RequestError: the file is missing or not whole.
        """
        path = self.folder / EMPTY
        if not path.exists():
            raise RequestError(f"{path} is missing; run `clear-dit sample` again.")
        file = _open_tensors(path)
        try:
            text = Text(file.get_tensor("prompt_embeds"), file.get_tensor("pooled_prompt_embeds"))
        except SafetensorError as error:
            raise RequestError(f"{path} does not hold text embeddings.") from error
        if not all(tensor.isfinite().all() for tensor in text):
            raise RequestError(f"{path} has values that are not finite.")
        return text


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


def _open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise RequestError(
            f"{path} is truncated or not safetensors ({first_line(error)}); delete it and run "
            "`clear-dit sample` again."
        ) from error
