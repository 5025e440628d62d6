"""Scenes of the demo world and the sentences that describe them.

A scene is seven choices (sky, land, and kind, colour and place of a sun or moon, kind and colour of
a large object) and a seed for everything a caption does not name. The grammar::

    caption = "a blue house in the hills at night, a golden moon on the left"   (one of TEMPLATES)
    BODY    = colour ("sun" | "moon")                 colour: white, golden, crimson
    PLACE   = "on the left" | "in the middle" | "on the right"
    OBJECT  = colour ("house" | "tree" | "tower" | "balloon")  colour: blue, green, violet, pink
    LAND    = hills, sea or desert, each with synonyms
    SKY     = day, sunset or night, each with synonyms

Body and object share no colour word. One combination of attributes in sixteen is held out of
training, chosen by hash, so that a held-out caption is unseen whatever its template.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": ("day", "sunset", "night"),
    "land": ("hills", "sea", "desert"),
    "body": ("sun", "moon"),
    "body_colour": ("white", "golden", "crimson"),
    "place": ("left", "middle", "right"),
    "object": ("house", "tree", "tower", "balloon"),
    "object_colour": ("blue", "green", "violet", "pink"),
}
SKY_WORDS = {
    "day": ("by day", "on a clear day", "in the daytime"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
    "night": ("at night", "on a starry night", "at midnight"),
}
LAND_WORDS = {
    "hills": ("in the hills", "in grassy hills", "on rolling hills"),
    "sea": ("by the sea", "in the ocean", "on the open sea"),
    "desert": ("in the desert", "on sand dunes", "in a sandy desert"),
}
PLACE_WORDS = {
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "at the right"),
}
TEMPLATES = (
    "a {object} {land} {sky}, a {body} {place}",
    "a {object} {land}, with a {body} {place}, {sky}",
    "a {body} {place} and a {object} {land} {sky}",
    "{sky}, a {object} {land} under a {body} {place}",
    "a picture of a {object} {land} {sky} with a {body} {place}",
    "{land}, a {object} {sky} and a {body} {place}",
    "{object}, {land}, {sky}, {body} {place}",
)
PARTIAL_TEMPLATES = (
    "a {object}",
    "a {object} {land}",
    "a {object} {sky}",
    "a {body} {place}",
    "a {object} under a {body}",
    "a {body} {place} {sky}",
    "a {object} {land} {sky}",
)
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Scene:
    """One image: seven captioned attributes, and a seed for all that is left to chance."""

    sky: str
    land: str
    body: str
    body_colour: str
    place: str
    object: str
    object_colour: str
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"Scene.{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}"
                )

    @property
    def labels(self) -> tuple[int, ...]:
        """The index of each attribute's value, in the order of `ATTRIBUTES`."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())

    @property
    def held_out(self) -> bool:
        """Whether this combination of attributes is kept for evaluation (the seed is ignored)."""
        key = " ".join(getattr(self, name) for name in ATTRIBUTES)
        return hashlib.sha256(key.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene with uniform attributes from the training or the held-out combinations."""
    while True:
        values = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        scene = Scene(**values, seed=int(rng.integers(2**31)))
        if scene.held_out == held_out:
            return scene


def caption(scene: Scene, rng: np.random.Generator | None = None, partial: bool = False) -> str:
    """Describe `scene` by a random template and synonyms, or by the first ones without `rng`.

    A partial caption leaves some attributes open; `parse` tells which it names.
    """

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options)) if rng is not None else 0]

    return pick(PARTIAL_TEMPLATES if partial else TEMPLATES).format(
        sky=pick(SKY_WORDS[scene.sky]),
        land=pick(LAND_WORDS[scene.land]),
        place=pick(PLACE_WORDS[scene.place]),
        body=f"{scene.body_colour} {scene.body}",
        object=f"{scene.object_colour} {scene.object}",
    )


def parse(text: str) -> dict[str, str]:
    """The attributes a caption names, as {attribute: value}; the inverse of `caption`."""
    found = {}
    words = text.replace(",", " ").split()
    for name in ("body", "object"):
        for before, word in pairwise(words):
            if word in ATTRIBUTES[name] and before in ATTRIBUTES[f"{name}_colour"]:
                found[name], found[f"{name}_colour"] = word, before
    for name, table in (("sky", SKY_WORDS), ("land", LAND_WORDS), ("place", PLACE_WORDS)):
        found[name] = next(
            (v for v, phrases in table.items() if any(p in text for p in phrases)), ""
        )
    return {name: value for name, value in found.items() if value}


def vocabulary() -> list[str]:
    """Every word and mark of the grammar, sorted."""
    texts = list(TEMPLATES)
    for table in (SKY_WORDS, LAND_WORDS, PLACE_WORDS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    texts += [value for values in ATTRIBUTES.values() for value in values]
    words = " ".join(texts).replace(",", " , ").split()
    return sorted({word for word in words if "{" not in word})
