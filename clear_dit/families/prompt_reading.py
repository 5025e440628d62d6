"""How far the pipelines of a family read a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptReading:
    """The tokens that are made of a prompt, and how many of them are read.

    Attributes:
        tokens: that are read, at most.
        part: of the pipeline, the tokenizer of the encoder that reads furthest; or a processor,
            which holds one.
        template: (tokenizer, prompt) to the text of which tokens are made; None for the prompt
            alone, also where what stands around it does not count.
        adds_special: whether the tokenizer adds its special tokens to that, which then count.
    """

    tokens: int
    part: str = "tokenizer"
    template: Callable[[Any, str], str] | None = None
    adds_special: bool = True


def user_message(tokenizer: Any, prompt: str) -> str:
    """`PromptReading.template` of a chat in which the prompt is all that the user says."""
    # What else the pipelines ask for stands behind the prompt.
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    return text
