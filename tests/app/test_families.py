"""The page's one request, with a tiny pipeline of every family: queue, work planned, preview."""

import time
from dataclasses import replace

import gradio as gr
import pytest
from PIL import Image
from support.families.folders import NATIVE, token_pixels
from support.families.pipelines import PIPELINES
from support.slow import slow

from clear_dit.app.actions import Actions
from clear_dit.app.jobs import Jobs
from clear_dit.app.page import size_choices
from clear_dit.app.preview import Previewer
from clear_dit.app.request import Entry, make_requests
from clear_dit.app.settings import Settings
from clear_dit.app.store import ENDED, Store, new_secret, visitor_of
from clear_dit.counting.flops import config_of, count_flops
from clear_dit.generation.checks import find_window
from clear_dit.generation.denoising import passes, text_length
from clear_dit.generation.models import find_model

pytestmark = slow
families = pytest.mark.parametrize("family", PIPELINES)


@pytest.fixture
def actions(family, family_folder, tmp_path):
    """Those of a server with the demo and the family's pipeline, which is loaded."""
    model = str(family_folder(family))
    settings = Settings(models=(model, "demo"), out=tmp_path, device="cpu")
    store = Store(tmp_path)
    jobs = Jobs(settings, store)
    jobs.start(model, "float32", "cpu")
    yield Actions(settings, store, jobs)
    jobs.stop()


def entry_of(family, model, rows, columns, steps=3):
    side = token_pixels(family)
    return Entry(
        *("a red house", columns * side, rows * side, "both", 3, 1, None, steps, 2.0, 0, model)
    )


@families
def test_one_request(actions, family, monkeypatch):
    (model, _), who = actions.settings.models, visitor_of(new_secret())
    previews, after = [], Previewer.after
    monkeypatch.setattr(
        Previewer, "after", lambda self, step: previews.append(after(self, step)) or previews[-1]
    )
    rows, columns = 12, 16
    entry = entry_of(family, model, rows, columns)
    job = actions.submit(entry, "", "", who)
    end = time.monotonic() + 60
    while (found := actions.status(job, who))["state"] not in ENDED:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert found["state"] == "done", found["error"]
    assert [one["attention"] for one in found["images"]] == ["clear", "full"]
    side = token_pixels(family)
    with Image.open(actions.store.folder(who, job) / "clear.png") as image:
        assert image.size == (columns * side, rows * side)
    assert any(url is not None for url in previews)

    # Of the last stage, what was planned is what `bench plan` counts.
    pipe = actions.jobs._runner.pipe
    window = find_window(rows * side, columns * side, 3, 1, text_length(pipe), side, far=True)
    counted = {
        row["attention"]: row["total_tflop"]
        for row in count_flops(config_of(pipe.transformer), window)["rows"]
    }
    for request in make_requests(entry, actions.settings):
        first, last = actions.jobs._planners[model].plan(request)
        assert (first.attention, last.attention) == ("full", request.attention)
        of_pass = last.flops / last.steps / passes(pipe, request.guidance)
        assert of_pass == pytest.approx(1e12 * counted[request.attention], rel=1e-9)


@pytest.mark.parametrize("family", ["hunyuan-image"])
def test_sizes_go_by_the_model(actions, family):
    """Whole tokens, of 2 pixels here and of 16 in the demo."""
    (model, demo), who = actions.settings.models, visitor_of(new_secret())
    sizes = size_choices([find_model(model), find_model(demo)], 600**2)
    assert sizes == [(f"{2 * NATIVE} px", 2 * NATIVE), ("512 px", 512)]
    with pytest.raises(gr.Error, match="Width must be a multiple of 2 pixels, got 33"):
        actions.submit(replace(entry_of(family, model, 8, 8), width=33), "", "", who)
    upload = actions.store.new_upload(who)
    Image.new("RGB", (18, 22)).save(upload, "PNG")
    assert actions.enlarged(upload.name, model, who) == (36, 44)
    assert actions.enlarged(upload.name, "another", who) is None
