"""What the page shows of jobs, as HTML. Everything that people wrote is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Status = Mapping[str, Any]
NAMES = {"clear": "CLEAR", "full": "Full attention"}


def status(job: Status | None) -> str:
    """The line above the image: place and time left, progress, or how it ended."""
    if job is None:
        return ""
    if job["state"] == "waiting":
        text = f"<b>Waiting</b> Place {job['place']} of {job['waiting']}{_left(job)}"
        return _box("waiting", text, 0.0)
    if job["state"] == "running":
        text = f"<b>Generating</b> {escape(job['phase'])}{_left(job)}"
        return _box("running", text, job["fraction"])
    if job["state"] == "cancelled":
        return _box("cancelled", "<b>Cancelled</b> Nothing was kept.")
    if job["state"] == "failed":
        return _box("failed", f"<b>Failed</b> {escape(job['error'] or '')}")
    return _box("done", _summary(job))


def view(job: Status | None, base: str = "") -> str:
    """The image's place: the viewer, a preview, or what there will be.

    Args:
        job: see `Jobs.status`.
        base: what precedes the routes of `files`.
    """
    if job is not None and job["state"] == "done":
        return (
            f'<iframe class="viewer" src="{base}view/{job["id"]}" title="Zoomable image" '
            'allow="fullscreen"></iframe>'
        )
    if job is not None and job.get("preview"):
        ratio = f"{job['width']} / {job['height']}"
        return (
            f'<div class="place"><img class="preview" alt="Preview" src="{job["preview"]}" '
            f'style="aspect-ratio: {ratio}"></div>'
        )
    active = job is not None and job["state"] in ("waiting", "running")
    words = "A preview appears here" if active else "Your image appears here"
    return f'<div class="place empty"><span>{words}</span></div>'


def history(jobs: Sequence[Status], active: Sequence[Status] = (), base: str = "") -> str:
    """Small images of a visitor's jobs, those that wait and run first; a click opens one."""
    cards = [
        f'<button class="card pending" data-job="{job["id"]}" title="{_title(job)}">'
        f"<span>{'Generating' if job['state'] == 'running' else 'Waiting'}</span>"
        f"<small>{_size(job)}</small></button>"
        for job in active
    ]
    cards += [
        f'<button class="card" data-job="{job["id"]}" title="{_title(job)}">'
        f'<img loading="lazy" alt="{_title(job)}" src="{base}images/{job["id"]}/'
        f'{job["images"][0]["attention"]}/{min(8, job["images"][0]["levels"] - 1)}/0_0.jpg">'
        f"<small>{_size(job)}{' · 2' if len(job['images']) > 1 else ''}</small></button>"
        for job in jobs
    ]
    if not cards:
        return '<p class="none">Nothing yet. Images you generate are kept here.</p>'
    return f'<div class="cards">{"".join(cards)}</div>'


def _box(state: str, text: str, fraction: float | None = None) -> str:
    bar = ""
    if fraction is not None:
        percent = f"{100 * fraction:.1f}"
        bar = (
            f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" '
            f'aria-valuemax="100"><div style="width: {percent}%"></div></div>'
        )
    return f'<div class="status {state}" role="status"><div class="text">{text}</div>{bar}</div>'


def _left(job: Status) -> str:
    seconds = job["seconds_left"]
    return "" if seconds is None else f" · {duration(seconds)} left"


def duration(seconds: float) -> str:
    """As people say it, not more exact than an estimate is."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def _summary(job: Status) -> str:
    """A row for each image: attention, seconds, FLOPs, and the file."""
    rows = []
    for one in job["images"]:
        name = NAMES[one["attention"]]
        how = ""
        if one["attention"] == "clear":
            pooled = f", pooled by {job['down_factor']}" if job["down_factor"] > 1 else ""
            # Images of before far keys do not say.
            pooled = ", sees all" if one.get("far") else pooled
            how = f" radius {job['radius']}{pooled}"
        file = f"images/{job['id']}/{one['attention']}.png"
        rows.append(
            f"<tr><td><b>{name}</b>{how}</td><td>{one['seconds']['total']:.1f} s</td>"
            f"<td>{flops(one['flops'])}</td>"
            f'<td><a href="{file}" download>PNG, {megabytes(one["bytes"])}</a></td></tr>'
        )
    gain = ""
    if len(job["images"]) == 2:
        clear, full = (one["seconds"]["denoise"] for one in job["images"])
        less = job["images"][1]["flops"] / job["images"][0]["flops"]
        gain = (
            f'<p class="gain">Denoising with CLEAR took {clear:.1f} s, with full attention '
            f"{full:.1f} s ({full / max(clear, 1e-3):.1f}×), for {less:.1f}× fewer FLOPs.</p>"
        )
    return (
        f'<p class="prompt">{escape(job["prompt"])}</p><p class="facts">{_size(job)} px · '
        f"{job['steps']} steps · guidance {job['guidance']:g} · seed {job['seed']} · "
        f"{escape(job['model'])}</p><table>{''.join(rows)}</table>{gain}"
    )


def flops(count: float) -> str:
    """A number of floating-point operations."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= 0.1 * size:
            value = count / size
            return f"{value:,.2f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{count / 1e9:,.0f} GFLOP"


def megabytes(count: int) -> str:
    """The size of a file."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _size(job: Status) -> str:
    return f"{job['width']} × {job['height']}"


def _title(job: Status) -> str:
    return escape(job["prompt"], quote=True)
