"""The page's one request, with a tiny pipeline of every family: queue, work planned, preview."""

import pytest
from PIL import Image
from support.app_jobs import ended, make_actions, visitors
from support.families.folders import NATIVE, token_pixels
from support.families.pipelines import PIPELINES
from support.slow import slow

from clear_dit.app.entry import make_entry, make_requests
from clear_dit.app.offer import offer
from clear_dit.app.preview import Previewer
from clear_dit.counting.flops import config_of, count_flops
from clear_dit.errors import RequestError
from clear_dit.generation.checks import find_window
from clear_dit.generation.denoising import passes, text_length
from clear_dit.generation.runner import PipelineRunner

pytestmark = slow
families = pytest.mark.parametrize("family", PIPELINES)


@pytest.fixture
def actions(family, family_folder, tmp_path):
    """Those of a server with the demo and the family's pipeline, which is loaded."""
    model = str(family_folder(family))
    actions = make_actions(tmp_path, PipelineRunner, models=(model, "demo"), max_pixels=600**2)
    actions.jobs.start(model, "float32", "cpu")
    yield actions
    actions.jobs.stop()


def given_of(family, model, rows, columns):
    side = token_pixels(family)
    size = {"width": columns * side, "height": rows * side, "radius": 3, "steps": 3}
    return {"prompt": "a red house", "model": model, "attention": "both", "guidance": 2.0, **size}


@families
def test_one_request(actions, family, monkeypatch):
    (model, _), (who,) = actions.settings.models, visitors(1)
    previews, after = [], Previewer.after
    monkeypatch.setattr(
        Previewer, "after", lambda self, step: previews.append(after(self, step)) or previews[-1]
    )
    rows, columns = 12, 16
    (job,) = actions.submit(given_of(family, model, rows, columns), 1, who)
    found = ended(actions, who, job["id"], 60)
    assert found["state"] == "done", found["error"]
    assert [one["attention"] for one in found["images"]] == ["clear", "full"]
    side = token_pixels(family)
    with Image.open(actions.store.file(who.owner, job["id"], "clear.png")) as image:
        assert image.size == (columns * side, rows * side)
    assert any(url is not None for url in previews)

    # Of the last stage, what was planned is what `bench plan` counts.
    pipe = actions.jobs.worker.load(model, "float32", "cpu").pipe
    window = find_window(rows * side, columns * side, 3, 1, text_length(pipe), side, far=True)
    counted = {
        row["attention"]: row["total_tflop"]
        for row in count_flops(config_of(pipe.transformer), window)["rows"]
    }
    entry = make_entry(found["entry"], actions.settings)
    for request in make_requests(entry, actions.settings):
        first, last = actions._planners[model].plan(request)
        assert (first.attention, last.attention) == ("full", request.attention)
        of_pass = last.flops / last.steps / passes(pipe, request.guidance)
        assert of_pass == pytest.approx(1e12 * counted[request.attention], rel=1e-9)


@pytest.mark.parametrize("family", ["hunyuan-image"])
def test_sizes_go_by_the_model(actions, family):
    """Whole tokens, of 2 pixels here and of 16 in the demo."""
    (model, _), (who,) = actions.settings.models, visitors(1)
    its, demo = offer(actions, who)["models"]
    assert (its["sizes"], its["step"]) == ([2 * NATIVE, 512], 2)
    assert (demo["sizes"], demo["step"]) == ([512], 16)
    with pytest.raises(RequestError, match="Width must be a multiple of 2 pixels"):
        actions.submit(given_of(family, model, 8, 8) | {"width": 33}, 1, who)
