// What is asked for, before it is: its seconds and memory, or why it is refused.

import { call } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { bytes, duration, flops, size } from "./format.js";

const QUIET = 300;
const AGAIN = 3000;

/**
 * @param form see `makeForm`.
 * @returns `changed(atOnce)`, which asks anew, at once or when the form has been quiet for a moment;
 *   and `news()`, when the queue has changed, which asks anew if the last answer is of a while ago.
 */
export function makeEstimate(form) {
  let timer = 0;
  let asked = null;
  let last = 0;

  function show(told) {
    setText(byId("estimate"), told?.allowed ? words(told) : "");
    setText(byId("plan"), told?.allowed ? plan(told) : "");
    byId("notes").replaceChildren(...(told?.notes ?? []).map((note) => make("li", {}, note)));
    byId("estimate").classList.remove("error");
    // Who has not begun to write is not told off, except by Generate.
    if (!told || (told.field === "prompt" && !form().entry().prompt.trim())) return;
    form().marks.clear();
    if (told.allowed) return;
    if (form().marks.set(told.field, told.reason) && form().marks.seen()) return;
    setText(byId("estimate"), told.reason);
    byId("estimate").classList.add("error");
  }

  function words(told) {
    const count = form().images;
    const each = count > 1 ? " each" : "";
    const parts = [
      count > 1 ? `${count} images` : null,
      told.seconds === null ? "time known after the first image" : `about ${duration(told.seconds)}${each}`,
      told.memory_bytes ? `at least ${bytes(told.memory_bytes)} of memory` : null,
      told.queue_seconds ? `next image starts in about ${duration(told.queue_seconds)}` : null,
    ];
    return parts.filter(Boolean).join(" · ");
  }

  const plan = ({ stages, flops: count }) =>
    [stages.map(size).join(" → "), count ? flops(count) : ""].filter(Boolean).join(" px · ");

  async function ask() {
    clearTimeout(timer);
    timer = 0;
    last = Date.now();
    asked?.abort();
    const mine = (asked = new AbortController());
    try {
      const told = await call("POST", `api/estimate?images=${form().images}`, form().entry(), { signal: mine.signal });
      if (mine === asked) show(told);
    } catch (error) {
      if (mine === asked && error.name !== "AbortError") show(null);
    }
  }

  return {
    changed(atOnce = false) {
      clearTimeout(timer);
      timer = setTimeout(ask, atOnce ? 0 : QUIET);
    },
    news() {
      timer ||= setTimeout(ask, Math.max(0, last + AGAIN - Date.now()));
    },
  };
}
