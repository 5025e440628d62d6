// What can be done with a job: by its card's menu, and where it is opened.

import { Away, call } from "./api.js";
import { thumbnail } from "./cards.js";
import { choose, copyText, toast } from "./dialogs.js";
import { say } from "./dom.js";
import { drawSeed } from "./fields.js";
import { ATTENTION, duration, shorten, size } from "./format.js";
import { linkOf } from "./link.js";
import { openMenu } from "./menu.js";
import { isActive } from "./poll.js";

// A job that has run longer, in seconds, is not cancelled without a question.
const ASK_AFTER = 20;
const VARIED = 0.6;
// Of images that one can be compared with, the newest.
const COMPARED = 12;

/**
 * @param page its parts: {setup, form, poll, open, opened, listed, compare, showForm, hide, leaveOut}.
 */
export function makeActions(page) {
  const { setup, poll } = page;
  let removing = []; // what is hidden, and deleted when its message goes: {id, undelete}
  let asking = null; // whether a job shall be cancelled: {id, closing}

  /** Does it; what goes wrong is told. */
  const guarded = (work) => async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      if (!(error instanceof Away) && !error.status) throw error;
      const text = error instanceof Away ? "The server does not answer; try again." : error.message;
      toast(text, { problem: true });
    }
  };

  function fill(entry, options, said) {
    const { unknown, undo } = page.form.set(entry, options);
    const left = unknown.length ? ` Not offered here: ${unknown.join(", ")}.` : "";
    page.showForm();
    toast(said + left, { undo });
  }

  /** Makes an image of a job an upload: a finished one, or that which it enlarged. */
  async function reuse(job, which, title) {
    const { name, width, height } = await call("POST", `api/jobs/${job.id}/${which}/upload`);
    return { name, width, height, title };
  }

  const useSettings = guarded(async (job) => {
    let image = null;
    let said = "Settings taken over.";
    if (job.entry.image) {
      try {
        image = await reuse(job, "image", job.image_name);
      } catch (error) {
        if (error.status !== 404) throw error;
        said = `Settings taken over, but ${job.image_name} is gone.`;
      }
    }
    fill(job.entry, { image }, said);
  });

  /** Makes a finished image the one to enlarge or vary. */
  const remake = (change, said, options) => guarded(async (job, { attention }) => {
    const image = await reuse(job, attention, "your image");
    fill({ ...job.entry, attention, ...change(image) }, { image, ...options }, said);
  });

  const again = guarded(async (job) => {
    const { jobs } = await call("POST", `api/jobs/${job.id}/again`);
    poll.add(jobs);
    page.open(jobs[0].id);
  });

  const cancel = guarded(async (job) => {
    if (job.ran > ASK_AFTER) {
      const question = `Cancel this image? It has run for ${duration(job.ran)}.`;
      const answers = [["no", "Let it run"], ["yes", "Cancel the image", "danger"]];
      const closing = new AbortController();
      asking = { id: job.id, closing };
      const answer = await choose(question, answers, { signal: closing.signal });
      asking = null;
      if (closing.signal.aborted) toast("It has ended meanwhile.");
      if (answer !== "yes") return;
    }
    const { cancelled } = await call("POST", `api/jobs/${job.id}/cancel`);
    if (cancelled) page.leaveOut(job.id);
    toast(cancelled ? "Cancelled" : "It had ended already");
    poll.look();
  });

  /** Withdraws the question whether to cancel a job that has ended meanwhile. */
  function withdraw() {
    if (asking && !poll.jobs.some((job) => job.id === asking.id && isActive(job))) asking.closing.abort();
  }

  async function erase({ id, undelete }) {
    try {
      await call("DELETE", `api/jobs/${id}`, undefined, { keepalive: true });
    } catch (error) {
      if (error.status === 404) return; // in another tab
      undelete();
      throw error;
    }
  }

  /** Hides a job; it is deleted, with those that were shortly before, when the message has gone. */
  function remove(job) {
    const all = [{ id: job.id, undelete: page.hide(job.id) }, ...removing];
    removing = all;
    toast(all.length > 1 ? `${all.length} images deleted` : "Deleted", {
      undo() {
        removing = [];
        for (const { undelete } of all) undelete();
      },
      after: guarded(async () => {
        if (removing !== all) return; // the next message has them
        removing = [];
        await Promise.all(all.map(erase));
      }),
    });
  }

  const favourite = guarded(async (job) => {
    const told = await call("PUT", `api/jobs/${job.id}/favourite`, { favourite: !job.favourite });
    poll.add(poll.jobs.map((one) => (one.id === job.id ? { ...one, ...told } : one)));
    say(told.favourite ? "A favourite" : "No longer a favourite");
  });

  const upscale = remake(
    ({ width, height }) => {
      const [wide, high] = page.form.twice({ width, height });
      const clear = wide * high > setup.limits.full_pixels;
      return { width: wide, height: high, strength: null, ...(clear && { attention: "clear" }) };
    },
    "The image is ready to be enlarged: press Generate.",
  );
  const vary = remake(
    () => ({ strength: VARIED, seed: drawSeed() }),
    "The image is ready to be varied: press Generate.",
    { seedLocked: false }, // another one, each time
  );

  /** Items of a menu: files of an image of other kinds than PNG. */
  const formats = (job, { attention }) =>
    [["JPEG", "jpg"], ["WebP", "webp"], ["TIFF", "tif"]].map(([label, ending]) => ({
      label,
      href: `images/${job.id}/${attention}.${ending}`,
    }));

  /** Items of a menu: for jobs of every state. */
  function settings(job) {
    return [
      { label: "Use settings", run: () => useSettings(job) },
      job.command ? { label: "Copy as command", run: () => copyText(job.command, "Command") } : null,
      { label: "Copy link", run: () => copyText(linkOf(job.entry, setup.limits), "Link") },
    ];
  }

  /** Items of a menu: the images that a job's can be compared with. */
  const comparisons = (job) =>
    page.listed().filter((other) => comparable(other, job)).slice(0, COMPARED).map((other) => ({
      picture: thumbnail(other, other.images[0]),
      label: `${size(other.images[0])} · seed ${other.entry.seed} · ${shorten(other.entry.prompt, 40)}`,
      run: () => page.compare(other.id),
    }));

  /** All of a card's menu. */
  function items(job) {
    const open = page.opened();
    const several = job.images.length > 1;
    const ofImage = (image) => {
      const which = several ? `, ${ATTENTION[image.attention]}` : "";
      return [
        { label: `Upscale${which}`, run: () => upscale(job, image) },
        { label: `Vary${which}`, run: () => vary(job, image) },
        { label: `Download PNG${which}`, href: `images/${job.id}/${image.attention}.png` },
      ];
    };
    return [
      job.state === "failed" || job.state === "stopped" ? { label: "Run again", run: () => again(job) } : null,
      ...settings(job),
      ...(job.state === "done" ? job.images.flatMap(ofImage) : []),
      job.id === open?.id && comparisons(job).length
        ? { label: "Compare with…", run: (anchor) => openMenu(anchor, comparisons(job)) }
        : null,
      comparable(job, open) ? { label: "Compare with the opened image", run: () => page.compare(job.id) } : null,
      isActive(job) ? null : { label: "Delete", danger: true, run: () => remove(job) },
    ];
  }

  return { again, cancel, withdraw, remove, favourite, upscale, vary, formats, settings, comparisons, items, fill };
}

/** Whether two jobs' images can lie one over the other: both done, of one shape. */
function comparable(job, other) {
  if (!other || other.id === job.id || job.state !== "done" || other.state !== "done") return false;
  const [one, two] = [job.images[0], other.images[0]].map(({ width, height }) => width / height);
  return Math.abs(one / two - 1) < 0.01;
}
