"""`--quantize` and `--offload`: the image is the same wherever its parts wait, and says how."""

import numpy as np
import pytest
from PIL import Image
from support.command_line import run
from support.rank_tasks import generate_all, run_ranks
from support.slow import slow

from clear_dit.errors import RequestError
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner, generate
from clear_dit.generation.sharing import check_shared

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao"),
]
PROMPT = "a red house on a hill"
SMALL = {"height": 64, "width": 96, "steps": 1, "radius": 4, "device": "cpu"}


def request_of(**changes):
    return make_request(PROMPT, **(SMALL | changes))


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "q4"), "--quantize: kind must be one of int8, fp8, nvfp4; got 'q4'"),
        (("--quantize", "fp8"), "--quantize: fp8 needs an NVIDIA GPU, Ada or Hopper"),
        (("--offload", "disk"), "--offload must be one of none, model, group; got 'disk'"),
    ],
)
def test_bad_requests(options, message, capsys):
    assert run("generate", PROMPT, "--device", "cpu", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@slow
def test_every_image_is_as_if_it_were_the_only_one(tmp_path):
    """With CLEAR weights, without, with others, and with full attention."""
    requests = [
        request_of(quantize="int8", **changes)
        for changes in (
            {"weights": "auto"},
            {"weights": "none"},
            {"weights": "none", "radius": 3},
            {"weights": "auto", "radius": 8},
            {"attention": "full"},
            {"weights": "auto"},
        )
    ]
    runner = PipelineRunner.of(requests[0])
    for index, request in enumerate(requests):
        runner.generate(request, tmp_path / f"{index}.png")
    generated = [pixels(tmp_path / f"{index}.png") for index in range(len(requests))]
    for index in (1, 3, 4):
        generate(requests[index], tmp_path / "alone.png", progress=False)
        np.testing.assert_array_equal(pixels(tmp_path / "alone.png"), generated[index])
    np.testing.assert_array_equal(generated[0], generated[5])
    assert len({image.tobytes() for image in generated[:5]}) == 5
    with pytest.raises(ValueError, match="quantize is 'int8' here, and the request says None"):
        runner.generate(request_of(), tmp_path / "other.png")


@slow
def test_offloaded_parts_and_what_stands_in_the_image(tmp_path):
    told = {}
    for offload in ("none", "model", "group"):
        request = request_of(quantize="int8", offload=offload)
        result = generate(request, tmp_path / f"{offload}.png", progress=False)
        told[offload] = read_settings(tmp_path / f"{offload}.png")
        assert told[offload]["quantised"] == result["quantised"]
        generate(request_of(offload=offload), tmp_path / f"plain-{offload}.png", progress=False)
    for kind in ("", "plain-"):
        for offload in ("model", "group"):
            one, other = (pixels(tmp_path / f"{kind}{name}.png") for name in ("none", offload))
            np.testing.assert_array_equal(one, other)
    assert told["none"]["quantised"] == told["group"]["quantised"]
    assert told["none"]["quantised"]["kind"] == told["none"]["quantize"] == "int8"
    assert "quantised" not in read_settings(tmp_path / "plain-none.png")


@slow
def test_an_image_is_that_of_float32(tmp_path):
    """With CLEAR weights and two stages, of which the first has full attention."""
    size = {"height": 768, "width": 768, "radius": 8, "steps": 4}
    for kind in (None, "int8"):
        generate(request_of(quantize=kind, **size), tmp_path / f"{kind}.png", progress=False)
    one, other = (pixels(tmp_path / f"{kind}.png").astype(float) for kind in (None, "int8"))
    error = ((one - other) ** 2).mean()
    assert 0 < error < 255**2 / 10**3  # 30 dB


@slow
def test_two_ranks(tmp_path):
    image = SMALL | {"prompt": PROMPT, "height": 256, "width": 256, "quantize": "int8"}
    (tmp_path / "two").mkdir()
    statuses, said = run_ranks(generate_all, 2, tmp_path, {"image": image}, tmp_path / "two")
    assert statuses == [0, 0], said
    generate(make_request(**image), tmp_path / "one.png", progress=False)
    one, two = (pixels(tmp_path / name).astype(int) for name in ("one.png", "two/image.png"))
    assert np.abs(one - two).max() <= 1


def test_what_ranks_do_not_share(monkeypatch):
    monkeypatch.setattr("clear_dit.pipelines.parallel.agreement.agree", lambda *_: None)
    monkeypatch.setattr("clear_dit.pipelines.parallel.bands.Bands", lambda *_: None)
    with pytest.raises(RequestError, match="--parallel keeps all parts on the devices"):
        check_shared(request_of(offload="model"), _Ranks())


class _Ranks:
    """What `check_shared` reads of ranks."""

    process_group = None

    class mesh:  # noqa: N801
        size = staticmethod(lambda dim: 2)
