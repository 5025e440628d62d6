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
    assert labels() == ["full attention", "CLEAR r=8, untuned"]
    assert labels(radii=[2, 4, 2], down_factor=2) == [
        "full attention",
        "CLEAR r=2, down 2, untuned",
        "CLEAR r=4, down 2, untuned",
    ]


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
        ("any", {"radius": "4", "down_factor": "2"}, (4, 2)),
        ("clear_local_8_down_4", None, (8, 4)),
        ("clear_local_32", None, (32, 1)),
        ("clear_local_32", {"radius": "7"}, (7, 1)),
    ],
)
def test_settings_come_from_metadata_or_a_published_name(tmp_path, name, header, expected):
    path = tmp_path / f"{name}.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=header)
    assert weights_settings(path) == expected


def test_a_folder_of_published_names_is_searched_by_radius(weights, tmp_path):
    shutil.copy(weights, tmp_path / "clear_local_2.safetensors")
    found = make_evaluate_request("demo", "demo", 1, weights=[str(tmp_path)], radii=[2])
    assert found.variants[2].weights == tmp_path / "clear_local_2.safetensors"
    with pytest.raises(RequestError, match="clear_local_3"):
        make_evaluate_request("demo", "demo", 1, weights=[str(tmp_path)], radii=[3])


@pytest.mark.parametrize("radius", ["-4", "four", "9" * 5000])
def test_metadata_that_is_no_number(tmp_path, radius):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"radius": radius})
    with pytest.raises(RequestError, match="no numbers for radius and down_factor"):
        weights_settings(path)
