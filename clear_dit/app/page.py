"""The page: what stands where, and which action a button has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..generation.models import Model, find_model
from . import markup
from .actions import Actions, refusal, who_asks
from .api import add_api
from .files import STATIC
from .request import SHAPES, SIDES, VARIANTS, Entry, preset_size
from .settings import MAX_PROMPT
from .store import ENDED

CUSTOM = "Custom"
# Seconds between two questions of a page whether something is new.
ASK_EVERY = 0.5
EXAMPLES = (
    "a violet tower in the desert at sunset, a golden moon on the right",
    "a blue house in the hills at night",
    "a pink balloon by the sea by day, a crimson sun on the left",
)
UPLOAD = """<label class="upload">
<input type="file" accept="image/png,image/jpeg,image/webp" hidden>
<span class="name">${name || "Choose an image to enlarge (optional)"}
<span class="problem">${problem}</span></span>
${value ? '<button class="remove" type="button">Remove</button>' : ""}</label>"""
OPEN_CARD = """element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-job]");
  if (card) trigger("select", { job: card.dataset.job });
});"""


def make_page(actions: Actions) -> gr.Blocks:
    """The page of a server."""
    settings = actions.settings
    models = [find_model(name) for name in settings.models]
    defaults = models[0].defaults
    with gr.Blocks(title="clear-dit", analytics_enabled=False) as page:
        # First: Gradio numbers the names of later functions that are called the same.
        add_api(actions)
        gr.HTML(
            "<h1>clear-dit</h1><p>Images of any size from diffusion transformers, in time linear "
            "in their pixels.</p>",
            elem_id="head",
        )
        job, told = gr.State(""), gr.State(None)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="entry"):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="What to generate",
                    lines=3,
                    max_length=MAX_PROMPT,
                    elem_id="prompt",
                )
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
            with gr.Column(elem_id="result"):
                status = gr.HTML("", elem_id="status")
                view = gr.HTML(markup.view(None), elem_id="view")
                with gr.Column(elem_id="history"):
                    gr.HTML("<h3>Your images</h3>")
                    cards = gr.HTML("", js_on_load=OPEN_CARD, elem_id="cards")
            with gr.Column(elem_id="settings"):
                with gr.Row():
                    side = gr.Dropdown(
                        [*size_choices(models, settings.max_pixels), (CUSTOM, 0)],
                        value=defaults.size,
                        label="Size",
                        elem_id="side",
                        min_width=120,
                    )
                    shape = gr.Dropdown(
                        list(SHAPES), value=next(iter(SHAPES)), label="Shape", min_width=120
                    )
                with gr.Row():
                    size = {"step": models[0].side_pixels, "precision": 0, "min_width": 120}
                    width = gr.Number(defaults.size, label="Width, px", elem_id="width", **size)
                    height = gr.Number(defaults.size, label="Height, px", elem_id="height", **size)
                attention = gr.Radio(
                    [("CLEAR", "clear"), ("Full", "full"), ("Both, to compare", "both")],
                    value="clear",
                    label="Attention",
                    elem_id="attention",
                )
                with gr.Row():
                    radius = gr.Dropdown(
                        [(f"{value} tokens", value) for value in (4, 8, 16, 32)],
                        value=defaults.radius,
                        label="Radius",
                        min_width=120,
                    )
                    variant = gr.Dropdown(
                        list(VARIANTS),
                        value=next(iter(VARIANTS)),
                        label="Variant",
                        elem_id="variant",
                        min_width=120,
                    )
                with gr.Row():
                    steps = gr.Number(
                        defaults.steps, label="Steps", precision=0, elem_id="steps", min_width=120
                    )
                    guidance = gr.Number(
                        defaults.guidance, label="Guidance", step=0.5, min_width=120
                    )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120)
                    model = gr.Dropdown(
                        list(settings.models),
                        value=settings.models[0],
                        label="Model",
                        min_width=120,
                    )
                image = gr.HTML(
                    "",
                    html_template=UPLOAD,
                    js_on_load=(STATIC / "upload.js").read_text(),
                    elem_id="image",
                    name="",
                    problem="",
                )
                gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples")

        entered = [
            *(prompt, width, height, attention, radius, variant, steps, guidance, seed, model)
        ]
        shown = [status, view, cards, generate, cancel]

        def show(who: str, found: markup.Status, before: markup.Status | None) -> list[Any]:
            """Values of `shown`; what is as it was before is not sent again."""
            known = before if before is not None and before.get("id") == found.get("id") else None
            same_state = known is not None and found.get("state") == known.get("state")
            same_view = same_state and found.get("preview") == (known or {}).get("preview")
            generating = bool(found) and found["state"] not in ENDED
            return [
                markup.status(found or None),
                gr.skip() if same_view else markup.view(found or None),
                gr.skip()
                if same_state
                else markup.history(actions.store.history(who), actions.jobs.active(who)),
                gr.update(visible=not generating),
                gr.update(visible=generating),
            ]

        def submit(request: gr.Request, *values: Any) -> str:
            *fields, upload = values
            place = entered.index(variant)
            if fields[place] not in VARIANTS:
                raise refusal(f"Variant must be one of {', '.join(VARIANTS)}.")
            fields[place : place + 1] = VARIANTS[fields[place]]  # two fields of an entry
            return actions.submit(Entry(*fields), upload or "", "uploaded", who_asks(request))

        def look(name: str, before: markup.Status | None, request: gr.Request) -> list[Any]:
            """What is new since the page was last told.

            It asks again and again: that outlasts what a stream does not, such as a phone that
            slept, a restart of the server, and a minute without news.
            """
            who = who_asks(request)
            found = dict((actions.jobs.status(who, name) if name else None) or {})
            if found == before:
                return [gr.skip()] * (len(shown) + 1)
            if found.get("state") == "failed":
                gr.Warning(found["error"] or "", duration=12, title="Failed")
            return [*show(who, found, before), found]

        def restore(request: gr.Request) -> str:
            active = actions.jobs.active(who_asks(request))
            return active[0]["id"] if active else ""

        def stop(name: str, request: gr.Request) -> None:
            actions.jobs.cancel(who_asks(request), name)

        def open_card(event: gr.EventData, request: gr.Request) -> str:
            name = str(event._data.get("job", ""))
            if actions.jobs.status(who_asks(request), name) is None:
                raise refusal("There is no such image of yours; it may have been removed.")
            return name

        def resize(side: int, shape: str, model: str) -> tuple[Any, Any]:
            if not side:
                return gr.skip(), gr.skip()
            return preset_size(side, shape, find_model(model).side_pixels)

        def enlarge(upload: str, model: str, request: gr.Request) -> tuple[Any, Any, Any]:
            size = actions.enlarged(upload, model, who_asks(request)) if upload else None
            return (gr.skip(),) * 3 if size is None else (*size, 0)

        def suit(model: str) -> tuple[Any, ...]:
            its, step = find_model(model).defaults, find_model(model).side_pixels
            size = gr.update(value=its.size, step=step)
            return its.size, size, size, its.radius, its.steps, its.guidance

        quiet: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_limit": None,
        }
        looking = {"fn": look, "inputs": [job, told], "outputs": [*shown, told], **quiet}
        gr.on([generate.click, prompt.submit], submit, [*entered, image], job, **quiet).success(
            **looking
        )
        page.load(restore, None, job, **quiet).then(**looking)
        gr.Timer(ASK_EVERY).tick(**looking)
        cards.select(open_card, None, job, **quiet).success(**looking)
        cancel.click(stop, job, None, **quiet)
        for control in (side, shape):
            control.input(resize, [side, shape, model], [width, height], **quiet)
        for control in (width, height):
            control.input(lambda: 0, None, side, **quiet)
        image.change(enlarge, [image, model], [width, height, side], **quiet)
        model.input(suit, model, [side, width, height, radius, steps, guidance], **quiet)
    page.queue(max_size=200, default_concurrency_limit=None)
    return page


def size_choices(models: Sequence[Model], max_pixels: int) -> list[tuple[str, int]]:
    """Names and longer sides, in pixels, to choose from; every model's own is among them."""
    natives = {model.defaults.size for model in models}
    offered = {side for side in SIDES if side * side <= max_pixels}
    return [(_side_name(side), side) for side in sorted(offered | natives)]


def _side_name(side: int) -> str:
    return f"{side // 1024}K ({side} px)" if side % 1024 == 0 else f"{side} px"
