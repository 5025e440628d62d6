import shutil

import pytest
import torch
from safetensors.torch import save_file

from clear_dit.errors import RequestError
from clear_dit.evaluation.request import make_evaluate_request, weights_settings


def labels(**arguments):
    request = make_evaluate_request("demo", "demo", 1, height=64, width=64, **arguments)
    return [variant.label for variant in request.variants]


def test_untuned_rows_by_radius():
    assert labels() == ["full attention", "CLEAR r=8 far, untuned"]
    assert labels(far=False) == ["full attention", "CLEAR r=8, untuned"]
    assert labels(radii=[2, 4, 2], down_factor=2) == [
        "full attention",
        "CLEAR r=2, down 2, untuned",
        "CLEAR r=4, down 2, untuned",
    ]


def test_one_command_has_rows_with_far_keys_and_without(weights, tmp_path):
    tuned = tmp_path / "clear_far_2.safetensors"
    save_file({"x": torch.zeros(1)}, tuned, metadata={"radius": "2", "far": "true"})
    request = make_evaluate_request(
        "demo", "demo", 1, height=64, width=64, weights=[str(weights), str(tuned)], radii=[3]
    )
    rows = [(v.label, v.folder.rpartition("-")[0] or v.folder, v.far) for v in request.variants]
    assert rows == [
        ("full attention", "full", False),
        ("CLEAR r=3 far, untuned", "r3", True),
        ("CLEAR r=2, untuned", "r2", False),
        ("CLEAR r=2, distilled", "r2", False),
        ("CLEAR r=2 far, untuned", "r2", True),
        ("CLEAR r=2 far, distilled", "r2-far", True),
    ]
    assert request.variants[1].folder == "r3-far"


def test_several_weights_of_one_setting_are_told_apart(weights, tmp_path):
    again = tmp_path / "again.safetensors"
    shutil.copy(weights, again)
    pair = ["full attention", "CLEAR r=2, untuned", "CLEAR r=2, distilled"]
    assert labels(weights=[str(weights)]) == pair
    assert labels(weights=[str(weights), str(again)]) == pair  # the same contents
    with again.open("ab") as file:
        file.write(b" ")
    # Only the header is read here; the contents are checked against the model.
    save_file({"x": torch.zeros(1)}, again, metadata={"radius": "2", "down_factor": "1"})
    assert labels(weights=[str(weights), str(again)])[2:] == [
        f"CLEAR r=2, distilled ({weights.parent.name}/tuned)",
        f"CLEAR r=2, distilled ({tmp_path.name}/again)",
    ]


@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("any", {"radius": "4", "down_factor": "2"}, (4, 2, False)),
        ("any", {"radius": "4", "down_factor": "1", "far": "true"}, (4, 1, True)),
        ("clear_local_8_down_4", None, (8, 4, False)),
        ("clear_local_32", None, (32, 1, False)),
        ("clear_local_32", {"radius": "7"}, (7, 1, False)),
        ("clear_far_32", None, (32, 1, False)),  # it is the metadata that says so
    ],
)
def test_settings_come_from_metadata_or_a_published_name(tmp_path, name, header, expected):
    path = tmp_path / f"{name}.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=header)
    assert weights_settings(path) == expected


def test_a_folder_of_published_names_is_searched_by_radius(weights, tmp_path):
    shutil.copy(weights, tmp_path / "clear_local_2.safetensors")
    found = make_evaluate_request("demo", "demo", 1, weights=[str(tmp_path)], radii=[2])
    assert found.variants[-1].weights == tmp_path / "clear_local_2.safetensors"
    assert not found.variants[-1].far
    with pytest.raises(RequestError, match="clear_local_3"):
        make_evaluate_request("demo", "demo", 1, weights=[str(tmp_path)], radii=[3])


def test_far_in_the_metadata_is_true_or_false(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"radius": "4", "far": "yes"})
    with pytest.raises(RequestError, match="neither true nor false for far: 'yes'"):
        weights_settings(path)


@pytest.mark.parametrize("radius", ["-4", "four", "9" * 5000])
def test_metadata_that_is_no_number(tmp_path, radius):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"radius": radius})
    with pytest.raises(RequestError, match="no numbers for radius and down_factor"):
        weights_settings(path)
