"""`comfy_api.latest.io`, as far as nodes of the V3 schema need it."""

from dataclasses import dataclass


@dataclass
class Input:
    """An input of a node; a widget where it has a default or options."""

    id: str
    io_type: str = ""
    tooltip: str | None = None
    default: object = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    options: list | None = None


@dataclass
class Output:
    """An output of a node."""

    io_type: str = ""


def _type(name):
    class Type:
        """One of ComfyUI's types."""

        @staticmethod
        def Input(id, **more):  # noqa: N802
            return Input(id, name, **more)

        @staticmethod
        def Output():  # noqa: N802
            return Output(name)

    return Type


Model, Int, Float, String, Combo = map(_type, ("MODEL", "INT", "FLOAT", "STRING", "COMBO"))


@dataclass
class Schema:
    """What a node is."""

    node_id: str
    display_name: str
    category: str
    inputs: list
    outputs: list
    description: str = ""


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args):
        self.args = args


class ComfyNode:
    """A node: `define_schema` and `execute` are class methods."""


class ComfyExtension:
    """A pack of nodes."""
