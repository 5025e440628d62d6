// The page: its parts, and what passes between them.

import { makeActions } from "./actions.js";
import { call, Refusal } from "./api.js";
import { makeCards } from "./cards.js";
import { choose, endToast, toast } from "./dialogs.js";
import { byId, icon, make, say, setText } from "./dom.js";
import { makeEstimate } from "./estimate.js";
import { makeForm } from "./form.js";
import { shorten } from "./format.js";
import { makeKeep } from "./keep.js";
import { readLink } from "./link.js";
import { isActive, makePoll } from "./poll.js";
import { makeResult } from "./result.js";
import { makeSubmit } from "./submit.js";
import { makeUpload, takeFiles } from "./upload.js";

const AGAIN = 2000;
// Where there is no room for the form beside the image, as in page.css.
const narrow = () => matchMedia("(max-width: 760px)").matches;

function showAway(away) {
  const words = navigator.onLine
    ? "The server does not answer; trying again."
    : "You are offline; trying again as soon as there is a network.";
  setText(byId("banner"), away ? words : "");
  byId("banner").hidden = !away;
}

/** What the server offers; asked for until it answers. */
async function loadSetup() {
  for (;;) {
    try {
      return await call("GET", "api/setup");
    } catch (error) {
      if (error instanceof Refusal && error.status === 401) throw error;
      showAway(true);
      await new Promise((resolve) => setTimeout(resolve, AGAIN));
    }
  }
}

async function start(setup) {
  const keep = makeKeep(setup.account);
  const hidden = new Set();
  const cancelled = new Set();
  let opened = keep.load("opened");
  let beside = null;

  const listed = () => poll.jobs.filter((job) => !hidden.has(job.id) && !(cancelled.has(job.id) && isActive(job)));
  const find = (id) => listed().find((job) => job.id === id) ?? null;

  function show() {
    const jobs = listed();
    // One that was cancelled, or deleted in another tab, gives its place to the newest.
    if (!find(opened) && jobs.length) opened = jobs[0].id;
    const job = find(opened);
    if (beside && !find(beside)) beside = null;
    cards.show(jobs, job?.id ?? null);
    result.show(job, beside);
    document.body.classList.toggle("first", !jobs.length);
  }

  function open(id, byHand = false) {
    opened = id;
    beside = null;
    keep.save("opened", id);
    show();
    if (!byHand) return;
    byId("opened").scrollIntoView();
    say(`Opened: ${shorten(find(id)?.entry.prompt ?? "")}`);
  }

  const upload = makeUpload(setup.limits, {
    onChange: (image) => (image ? page.form.enlarge(image) : page.form.withoutImage()),
    onImage: takeImage,
  });
  const page = {
    setup,
    open,
    opened: () => find(opened),
    listed,
    compare(id) {
      beside = id;
      show();
      byId("opened").scrollIntoView();
    },
    /** Unfolds the form, on a phone, and goes to its button. */
    showForm() {
      fold(false);
      byId("generate").focus({ preventScroll: true });
      byId("form").scrollTop = 0;
      if (narrow()) byId("form").scrollIntoView();
    },
    /** Hides a cancelled job, which may be at work for some moments more. */
    leaveOut(id) {
      cancelled.add(id);
      show();
    },
    /** Hides a job, and opens the next one; the answer shows it again, opened. */
    hide(id) {
      const jobs = listed();
      const place = jobs.findIndex((job) => job.id === id);
      hidden.add(id);
      const next = jobs[place + 1] ?? jobs[place - 1];
      if (id === opened && next) open(next.id);
      else show();
      return () => {
        hidden.delete(id);
        open(id);
      };
    },
  };

  const estimate = makeEstimate(() => page.form);
  const poll = makePoll({
    onJobs() {
      estimate.news();
      actions.withdraw();
      show();
    },
    onAway: showAway,
  });
  page.poll = poll;
  const actions = makeActions(page);
  const cards = makeCards({ actions, open });
  const result = makeResult({ actions, closeComparison: () => open(opened) });
  page.form = makeForm(setup, { keep, upload, onChange: estimate.changed });

  /** Whether a new upload is to be enlarged; where it tells how it was made, that is asked. */
  async function takeImage(image, settings) {
    fold(false);
    if (!settings) return true;
    const question = `${image.title} tells how it was made. What shall it be used for?`;
    const answer = await choose(question, [["", "Nothing"], ["enlarge", "Enlarge this image"], ["settings", "Use its settings", "primary"]]);
    if (answer === "settings") actions.fill(settings, { image: null }, "Settings taken over.");
    const { prompt } = page.form.element.elements;
    if (answer === "enlarge" && !prompt.value.trim()) prompt.value = settings.prompt ?? "";
    return answer === "enlarge";
  }

  /** Folds the form where there is no room beside it. */
  function fold(on) {
    byId("form").classList.toggle("folded", on);
    byId("fold").setAttribute("aria-expanded", !on);
  }

  function followLink() {
    const link = readLink(location.hash, setup.limits);
    if (!link) return;
    history.replaceState(null, "", location.pathname + location.search);
    const wrong = link.wrong.length ? ` Not understood: ${link.wrong.join(", ")}.` : "";
    actions.fill(link.entry, {}, `Filled in from the link.${wrong}`);
  }

  makeSubmit(page, upload, (jobs) => {
    const [first] = jobs;
    const now = page.opened();
    // One that is at work stays opened: of the new ones there is nothing to see yet.
    const stays = now && isActive(now) && now.id !== first.id;
    const place = stays && first.place ? `, place ${first.place}` : "";
    const words = jobs.length > 1 ? `${jobs.length} images are in the queue` : `In the queue${place}`;
    if (!stays) open(first.id);
    fold(true);
    if (narrow()) byId("opened").scrollIntoView();
    (stays ? toast : say)(words);
  });
  byId("fold").addEventListener("click", () => {
    fold(!byId("form").classList.contains("folded"));
    byId("form").scrollIntoView();
  });
  byId("examples").append(
    ...setup.examples.map((text) =>
      make("li", {}, make("button", { type: "button", class: "plain example", onclick: () => example(text) }, text))));
  function example(text) {
    page.form.set({ prompt: text });
    page.showForm();
  }

  takeFiles(upload.send);
  byId("account").hidden = setup.account === null;
  setText(byId("account-name"), setup.account ?? "");
  setText(byId("kept"), `Kept for ${setup.keep_days} days`);
  byId("choose").prepend(icon("image"));
  byId("swap").append(icon("swap"));
  addEventListener("hashchange", followLink);
  addEventListener("pagehide", endToast);
  fold(true);
  followLink();
  await poll.look(); // the form is folded, on a phone, or not: nothing moves once it is seen
  byId("page").hidden = false;
}

await start(await loadSetup());
