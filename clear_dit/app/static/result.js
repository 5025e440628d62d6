// The opened job: its image in the viewer, or what there is of it, and what can be done with it.

import { stateWords } from "./cards.js";
import { byId, icon, make, once, say, setAttribute, setText } from "./dom.js";
import { variantName } from "./fields.js";
import { ATTENTION, bytes, flops, size, stepsOf } from "./format.js";
import { openMenu } from "./menu.js";
import { isActive } from "./poll.js";

const ENDS = { failed: "Failed", stopped: "Stopped: the server was restarted", done: "Done" };

export function makeResult({ actions, closeComparison }) {
  const root = byId("opened");
  const stage = byId("stage");
  const welcome = byId("welcome");
  let job = null;
  let stageKey = "";
  let rowsKey = "";

  byId("cancel").addEventListener("click", once(() => actions.cancel(job)));
  byId("again").addEventListener("click", () => actions.again(job));
  byId("favourite").append(icon("star"));
  byId("favourite").addEventListener("click", () => actions.favourite(job));
  byId("delete").addEventListener("click", once(() => actions.remove(job)));
  byId("more-opened").append(icon("more"));
  byId("more-opened").addEventListener("click", ({ currentTarget }) => openMenu(currentTarget, actions.items(job)));
  byId("close-comparison").addEventListener("click", closeComparison);
  byId("compare").addEventListener("click", ({ currentTarget }) => openMenu(currentTarget, actions.comparisons(job)));
  ["use", "command", "link"].forEach((id, place) =>
    byId(id).addEventListener("click", () => actions.settings(job)[place].run()));

  /** Puts something into the image's place, if it is not there already. */
  function put(key, build) {
    if (stageKey === key) return;
    stageKey = key;
    stage.replaceChildren(build());
  }

  function viewer(address) {
    const frame = make("iframe", { class: "viewer", src: address, title: "Zoomable image", allow: "fullscreen" });
    // Files that are dragged over the viewer are dragged over the page.
    frame.addEventListener("load", () =>
      frame.contentWindow.addEventListener("dragenter", (event) => {
        if (event.dataTransfer?.types.includes("Files")) byId("drop").hidden = false;
      }));
    return frame;
  }

  function preview() {
    if (!job.preview) {
      return put(`empty ${job.id}`, () => frameOf(make("p", {}, "A preview appears here")));
    }
    put(`preview ${job.id}`, () => frameOf(make("img", { class: "preview", alt: "Preview" })));
    setAttribute(stage.querySelector(".preview"), "src", job.preview);
  }

  /** A place of the image's shape. */
  function frameOf(content) {
    const { width, height } = job.entry;
    const place = make("div", { class: "place" }, content);
    place.style.aspectRatio = `${width} / ${height}`;
    return place;
  }

  function showStage(beside) {
    if (!job) put("", () => welcome);
    else if (job.state === "done") {
      const address = beside ? `view/${job.id}?with=${beside}` : `view/${job.id}`;
      put(address, () => viewer(address));
    } else if (isActive(job)) preview();
    else {
      put(`${job.state} ${job.id}`, () =>
        make("div", { class: "ended" }, icon("warn"), make("p", {}, job.error ?? "The server was stopped before it was finished.")));
    }
  }

  function showState(before) {
    const active = isActive(job);
    setAttribute(byId("state"), "data-state", job.state);
    setText(byId("state-words"), active ? stateWords(job) : (ENDS[job.state] ?? ""));
    setText(byId("phase"), job.state === "running" ? job.phase : "");
    byId("state").hidden = job.state === "done";
    byId("cancel").hidden = !active;
    byId("again").hidden = job.state !== "failed" && job.state !== "stopped";
    byId("progress").hidden = !active;
    byId("progress").firstElementChild.style.width = `${100 * (job.fraction ?? 0)}%`;
    setAttribute(byId("progress"), "aria-valuenow", Math.round(100 * (job.fraction ?? 0)));
    if (before?.id === job.id && before.state !== job.state) {
      say(job.state === "failed" ? `Failed: ${job.error}` : ENDS[job.state] ?? "Generating");
    }
  }

  function showFacts() {
    const { entry } = job;
    setText(byId("prompt-shown"), entry.prompt);
    setText(byId("negative-shown"), entry.negative_prompt ? `Without: ${entry.negative_prompt}` : "");
    const facts = [
      `${size(entry)} px`, stepsOf(entry.steps), `guidance ${entry.guidance}`, `seed ${entry.seed}`, entry.model,
      entry.attention === "full" ? null : `radius ${entry.radius}`,
      entry.attention === "full" || variantName(entry.down_factor, entry.far) === "Auto" ? null : variantName(entry.down_factor, entry.far),
      entry.lora ? `${entry.lora} × ${entry.lora_scale}` : null,
      job.image_name ? `from ${job.image_name}` : null,
      entry.strength === null ? null : `strength ${entry.strength}`,
    ];
    setText(byId("facts"), facts.filter(Boolean).join(" · "));
    setAttribute(byId("favourite"), "aria-pressed", job.favourite);
    byId("command").hidden = !job.command;
    byId("favourite").hidden = job.state !== "done";
    byId("delete").hidden = isActive(job);
    byId("compare").hidden = !actions.comparisons(job).length;
  }

  /** A row for each finished image: what it took, its files, what to make of it. */
  function showRows() {
    const key = `${job.id} ${job.state}`;
    if (rowsKey === key) return;
    rowsKey = key;
    const done = job.state === "done" ? job.images : [];
    byId("rows").replaceChildren(...done.map(row));
    byId("gain").hidden = done.length < 2;
    if (done.length > 1) {
      const [clear, full] = done;
      const [quick, slow] = [clear, full].map(({ seconds }) => seconds.denoise);
      setText(byId("gain"),
        `Denoising with CLEAR took ${quick.toFixed(1)} s, with full attention ${slow.toFixed(1)} s ` +
        `(${(slow / Math.max(quick, 1e-3)).toFixed(1)}×), for ${(full.flops / clear.flops).toFixed(1)}× fewer FLOPs.`);
    }
  }

  function row(image) {
    const name = ATTENTION[image.attention];
    const which = job.images.length > 1 ? `, ${name}` : "";
    const mine = job;
    const more = make("button", { type: "button", class: "plain", "aria-label": `Formats${which}: JPEG, WebP, TIFF`,
      onclick: () => openMenu(more, actions.formats(mine, image)) }, "Formats");
    return make("li", {},
      make("span", { class: "took" }, make("b", {}, name), ` ${image.seconds.total.toFixed(1)} s · ${flops(image.flops)}`),
      make("span", { class: "buttons" },
        make("a", { class: "button", href: `images/${job.id}/${image.attention}.png`, download: true },
          icon("down"), `PNG, ${bytes(image.bytes)}`),
        more,
        make("button", { type: "button", class: "plain", "aria-label": `Upscale${which}`,
          onclick: () => actions.upscale(mine, image) }, "Upscale"),
        make("button", { type: "button", class: "plain", "aria-label": `Vary${which}`,
          onclick: () => actions.vary(mine, image) }, "Vary")));
  }

  return {
    /**
     * Shows a job, or that there is none.
     * @param beside the id of a job to compare it with, or null.
     */
    show(next, beside = null) {
      const before = job;
      const focused = root.contains(document.activeElement) ? document.activeElement : null;
      job = next;
      showStage(beside);
      byId("detail").hidden = !job;
      byId("close-comparison").hidden = !beside;
      if (!job) return;
      showState(before);
      showFacts();
      showRows();
      // A button that has gone leaves its focus here.
      if (focused && (!focused.isConnected || focused.hidden || focused.closest("[hidden]"))) byId("opened-title").focus();
    },
  };
}
