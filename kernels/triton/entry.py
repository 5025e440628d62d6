"""What launches an entry of the tables of image queries."""

from __future__ import annotations

from collections.abc import Callable

from .launch import far_attention, image_attention
from .tables import AnyForwardConfig, GluonConfig


def attention_of(entry: AnyForwardConfig, far: bool) -> Callable[..., None]:
    """What launches an entry of the tables, with far keys or without: see `image_attention`."""
    if isinstance(entry, GluonConfig):
        from .gluon.launch import gluon_attention

        return gluon_attention
    return far_attention if far else image_attention
