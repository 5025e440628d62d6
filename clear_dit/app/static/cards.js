// The history: a card for each job, kept in its place while it changes, so that focus and scroll stay.

import { byId, copy, icon, once, setAttribute, setText } from "./dom.js";
import { duration, shorten, size } from "./format.js";
import { openMenu } from "./menu.js";
import { isActive } from "./poll.js";

const STATES = { waiting: "Waiting", running: "Generating", failed: "Failed", stopped: "Stopped", done: "" };

/** What a job's state is, in few words; nothing where it is done. */
export function stateWords(job) {
  const left = job.seconds_left == null ? "" : ` · about ${duration(job.seconds_left)} left`;
  if (job.state === "waiting") return `Waiting · place ${job.place} of ${job.waiting}${left}`;
  if (job.state === "running") return `Generating · ${Math.round(100 * job.fraction)}%${left}`;
  return STATES[job.state];
}

/** The address of an image of a job, small. */
export const thumbnail = (job, { attention, levels }) =>
  `images/${job.id}/${attention}/${Math.min(8, levels - 1)}/0_0.jpg`;

export function makeCards({ actions, open }) {
  const list = byId("cards");
  const cards = new Map();
  let only = false;
  let latest = { jobs: [], opened: null };

  function build(job) {
    const root = copy("card");
    root.dataset.job = job.id;
    const part = (name) => root.querySelector(`.${name}`);
    const card = { root, job, told: "", picture: part("picture"), open: part("open"),
      title: part("title"), words: part("words"),
      size: part("size"), bar: part("bar"), star: part("star"), more: part("more"), cancel: part("cancel"),
      again: part("again") };
    card.star.append(icon("star"));
    card.more.append(icon("more"));
    card.open.addEventListener("click", () => open(card.job.id, true));
    card.star.addEventListener("click", () => actions.favourite(card.job));
    card.more.addEventListener("click", () => openMenu(card.more, actions.items(card.job)));
    card.cancel.addEventListener("click", once(() => actions.cancel(card.job)));
    card.again.addEventListener("click", () => actions.again(card.job));
    return card;
  }

  function update(card, job) {
    const told = JSON.stringify(job);
    if (card.told === told) return;
    Object.assign(card, { job, told });
    const title = shorten(job.entry.prompt);
    const source = job.state === "done" ? thumbnail(job, job.images[0]) : (job.preview ?? null);
    setAttribute(card.root, "data-state", job.state);
    setAttribute(card.picture, "src", source);
    card.picture.hidden = source === null;
    setText(card.title, source === null ? title : "");
    setText(card.words, stateWords(job));
    setText(card.size, size(job.entry) + (job.images.length > 1 ? " · 2" : ""));
    setAttribute(card.open, "aria-label", `Open ${title} (${[stateWords(job), size(job.entry)].filter(Boolean).join(", ")})`);
    setAttribute(card.open, "title", title);
    card.bar.hidden = job.state !== "running";
    if (job.state === "running") card.bar.firstElementChild.style.width = `${100 * job.fraction}%`;
    setAttribute(card.star, "aria-pressed", job.favourite);
    setAttribute(card.star, "aria-label", `Favourite: ${title}`);
    setAttribute(card.more, "aria-label", `More: ${title}`);
    setAttribute(card.cancel, "aria-label", `Cancel: ${title}`);
    setAttribute(card.again, "aria-label", `Run again: ${title}`);
    card.star.hidden = job.state !== "done";
    card.cancel.hidden = !isActive(job);
    card.again.hidden = job.state !== "failed" && job.state !== "stopped";
  }

  /** Shows jobs in their order. */
  function show(jobs, opened) {
    latest = { jobs, opened };
    const focused = list.contains(document.activeElement) ? document.activeElement : null;
    const ids = new Set(jobs.map(({ id }) => id));
    for (const [id, card] of cards) {
      if (ids.has(id)) continue;
      if (card.root.contains(focused)) focusNear(card.root);
      card.root.remove();
      cards.delete(id);
    }
    let place = list.firstElementChild;
    for (const job of jobs) {
      const card = cards.get(job.id) ?? build(job);
      cards.set(job.id, card);
      update(card, job);
      setAttribute(card.open, "aria-current", job.id === opened ? "true" : null);
      card.root.hidden = only && !job.favourite;
      if (card.root === place) place = place.nextElementSibling;
      else list.insertBefore(card.root, place);
    }
    if (focused?.isConnected && !focused.hidden && document.activeElement !== focused) focused.focus();
    const shown = jobs.filter((job) => !only || job.favourite).length;
    byId("none").hidden = shown > 0;
    setText(byId("none"), only ? "No favourites yet. A star on an image makes it one." : "Nothing yet. Images you generate are kept here.");
    byId("zip").hidden = !jobs.some(({ state }) => state === "done");
    setText(byId("zip"), only ? "Download all images" : "Download all");
    byId("filter").hidden = !jobs.length;
  }

  function focusNear(root) {
    const other = root.nextElementSibling ?? root.previousElementSibling;
    (other?.querySelector(".open") ?? byId("history-title")).focus();
  }

  byId("filter").addEventListener("change", ({ target }) => {
    only = target.value === "favourites";
    show(latest.jobs, latest.opened);
  });

  return { show };
}
