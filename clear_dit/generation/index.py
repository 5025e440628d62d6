"""What a folder or a hub repository says it holds: a pipeline's class, its parts, where each is.

A stock pipeline has its parts in folders of their names. A modular one has for each where it is
loaded from, which may be another repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError, first_line

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
CONFIG = "config.json"


class Part(NamedTuple):
    """A part of a pipeline.

    Attributes:
        class_name: None for one that the pipeline is without.
        source: the folder or hub repository it is in; None for nowhere.
        folder: in the source; "" for the source itself.
        revision: of the repository; None for the newest.
    """

    class_name: str | None
    source: str | None
    folder: str
    revision: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether it can be loaded; what is in a repository is taken to be there."""
        if self.source is None:
            return False
        return (Path(self.source) / self.folder).is_dir() or is_repository(self.source)


@dataclass(frozen=True)
class Index:
    """An index, as it stands in a folder or a repository.

    Attributes:
        path: of it, as `from_pretrained` takes it.
        content: of the file.
        parts: the pipeline's, by name.
    """

    path: str
    content: Mapping[str, Any]
    parts: Mapping[str, Part]

    @property
    def pipeline(self) -> str:
        """The name of the pipeline's class."""
        return str(self.content.get("_class_name"))

    def config(self, name: str, file: str = CONFIG) -> dict[str, Any]:
        """A JSON file of a part, fetched where that is on the hub.

        Raises:
            RequestError: it cannot be fetched or read.
        """
        part = self.parts[name]
        assert part.source is not None, name  # `find_model` has seen to it
        return _read(part.source, file, part.folder, part.revision)


def is_repository(name: str) -> bool:
    """Whether a name can be a hub repository's (owner/name), and is not that of a file."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def index_file(folder: Path) -> Path:
    """The index of a folder in diffusers format: a stock pipeline's, or else a modular one's."""
    modular = folder / MODULAR_INDEX
    return modular if modular.is_file() and not (folder / INDEX).exists() else folder / INDEX


def read_index(path: str) -> Index:
    """The index of a folder or of a hub repository.

    Raises:
        RequestError: there is none, or none that can be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        content = _fetch_index(path)
    else:
        try:
            content = json.loads(index_file(folder).read_text())
            str(content["_class_name"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"no valid {index_file(folder).name}"
            if (folder / CONFIG).is_file() and not index_file(folder).exists():
                why = "it is one model of it; give the folder around it"
            raise RequestError(
                f"--model: {folder} is not a pipeline in diffusers format ({why})."
            ) from error
    parts = {name: _part(path, name, entry) for name, entry in content.items()}
    return Index(path, content, {name: part for name, part in parts.items() if part is not None})


def _part(path: str, name: str, entry: Any) -> Part | None:
    """What an entry of an index says of a part; None for other settings, such as Krea 2's."""
    match entry:
        case [str() | None, (str() | None) as class_name]:
            return Part(class_name, path, name)
        case [_, _, {"type_hint": [_, (str() | None) as class_name], **where}]:  # as diffusers does
            texts = {key: value for key, value in where.items() if isinstance(value, str)}
            folder = texts.get("subfolder", "")
            if folder and (Path(path) / folder).is_dir():
                return Part(class_name, path, folder)
            source = texts.get("pretrained_model_name_or_path", texts.get("repo"))
            return Part(class_name, source, folder, texts.get("revision"))
    return None


def _fetch_index(repository: str) -> dict[str, Any]:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _read(repository, INDEX)
    except RequestError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        try:
            return _read(repository, MODULAR_INDEX)
        except RequestError:
            raise error from None


def _read(source: str, name: str, folder: str = "", revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a folder or a repository."""
    file = Path(source) / folder / name
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            file = Path(hf_hub_download(source, name, subfolder=folder or None, revision=revision))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise RequestError(
                f"--model {source}: {name} cannot be fetched from the hub ({first_line(error)}); a "
                "gated model needs its licence accepted, and hf auth login."
            ) from error
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"--model: {file} is missing or is not JSON.") from error
    if not isinstance(found, dict):
        raise RequestError(f"--model: {file} is not a JSON object.")
    return found
