"""What a visitor should know about a prompt before an image is made of it."""

from __future__ import annotations

import re
import threading
from typing import Any

from .models import DEMOS, find_model, quiet_libraries
from .stage_plan import described

# Of what is quoted in a note.
_MOST_CHARACTERS, _MOST_WORDS = 200, 12
# Stands for the prompt where it is looked for in a template: of Unicode's private use.
_PLACE = "\ue000"
# Some scripts put no blanks between words.
_WORD_SO_FAR = re.compile(r"(?<!\S)\S{1,30}$")
_APOSTROPHES = ("'", "\u2019")  # before an s that nobody need know


class PromptReader:
    """What a model reads of prompts, by its tokenizer alone; from any thread.

    Where the tokenizer is not on this machine, or the model reads all of any prompt, nothing is
    said of its length.

    Args:
        model: see `GenerateRequest`.

    Raises:
        RequestError: see `find_model`.
    """

    def __init__(self, model: str) -> None:
        found = find_model(model)
        self._is_demo = model in DEMOS
        self._parts = found.index.parts
        self._reading = found.family.recipe.prompts(described(found))
        self._one_at_a_time = threading.Lock()  # a tokenizer holds at which length it cuts
        self._tokenizer: Any = None

    def notes(self, prompt: str) -> list[str]:
        """Sentences for whoever wrote a prompt; none where all of it is read and known."""
        found = []
        unread = self.left_out(prompt)
        if unread:
            found.append(
                f"The prompt is longer than the model reads; this end of it is left out: "
                f"{_shortened(unread)}"
            )
        unknown = self.unknown_words(prompt)
        if unknown:
            more = len(unknown) - _MOST_WORDS
            listed = ", ".join(unknown[:_MOST_WORDS]) + (f" and {more} more" if more > 0 else "")
            found.append(f"The demo does not know these words, and leaves them out: {listed}.")
        return found

    def left_out(self, prompt: str) -> str:
        """The end of a prompt that no text encoder reads; a word of which a part is read is in it.

        Returns:
            "" where all of it is read, or where nothing can be said.
        """
        reading = self._reading
        tokenizer = None if reading is None else self._find_tokenizer()
        if reading is None or tokenizer is None:
            return ""
        prompt = prompt.strip()  # as templates do
        with self._one_at_a_time:
            text, start = prompt, 0
            if reading.template is not None:
                text = reading.template(tokenizer, prompt)
                start = reading.template(tokenizer, _PLACE).index(_PLACE)
            cut = {"truncation": True, "max_length": reading.tokens}
            whole, read = (
                tokenizer(
                    text,
                    add_special_tokens=reading.adds_special,
                    return_offsets_mapping=True,
                    verbose=False,
                    **options,
                )["offset_mapping"]
                for options in ({}, cut)
            )
        if len(whole) <= len(read):
            return ""
        end = max(0, max((last for _, last in read), default=0) - start)
        before = _WORD_SO_FAR.search(prompt[:end])
        if before is not None and not prompt[end : end + 1].isspace():
            end = before.start()
        return prompt[end:].strip()

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that a demo does not know, each once; none of other models."""
        tokenizer = self._find_tokenizer() if self._is_demo else None
        if tokenizer is None:
            return []
        with self._one_at_a_time:
            found = tokenizer(
                prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        words = (
            prompt[first:last].lower()
            for token, (first, last) in zip(
                found["input_ids"], found["offset_mapping"], strict=True
            )
            if token == tokenizer.unk_token_id and prompt[first - 1 : first] not in _APOSTROPHES
        )
        return list(dict.fromkeys(word for word in words if _is_word(word)))

    def known_words(self) -> list[str] | None:
        """All words that a demo knows, sorted; None of other models."""
        tokenizer = self._find_tokenizer() if self._is_demo else None
        if tokenizer is None:
            return None
        special = set(tokenizer.all_special_tokens)
        words = tokenizer.get_vocab().keys() - special
        return sorted(word for word in words if _is_word(word))

    def _find_tokenizer(self) -> Any:
        """Its own; None where it is not here (yet), or cannot tell where its tokens are."""
        with self._one_at_a_time:
            part = self._parts.get("tokenizer" if self._reading is None else self._reading.part)
            if self._tokenizer is None and part is not None and part.source is not None:
                with quiet_libraries():
                    from transformers import AutoTokenizer

                    try:
                        found = AutoTokenizer.from_pretrained(
                            part.source,
                            subfolder=part.folder,
                            revision=part.revision,
                            local_files_only=True,
                        )
                    except (OSError, ValueError, ImportError):
                        return None
                chats = self._reading is not None and self._reading.template is not None
                if found.is_fast and (found.chat_template is not None or not chats):
                    self._tokenizer = found
            return self._tokenizer


def _is_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
