// Questions, and messages that go by themselves.

import { byId, make, say } from "./dom.js";

// For how long messages stay; those that put something off, which can still be undone, longer.
const SHOWN = 10000;
const SHOWN_UNDO = 30000;

/**
 * Asks in a dialog; the value of the answer, or null where it was closed.
 * @param answers pairs of value and label; the last one is what the dialog is about.
 * @param more.content what stands below the question.
 * @param more.signal of an AbortController that closes the dialog.
 */
export function choose(question, answers, { content = null, signal = null } = {}) {
  const dialog = make("dialog", { "aria-labelledby": "question" },
    make("form", { method: "dialog" },
      make("h2", { id: "question" }, question),
      content,
      make("div", { class: "answers" },
        ...answers.map(([value, label, kind]) => make("button", { value, class: kind ?? "plain" }, label)),
      ),
    ),
  );
  signal?.addEventListener("abort", () => dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue || null);
    });
  });
}

/** Puts a text on the clipboard, or shows it to be copied by hand where that is not allowed. */
export async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    const field = make("textarea", { readonly: true, rows: 5, "aria-label": what });
    field.value = text;
    const closed = choose(`${what}: copy it with Ctrl+C or ⌘C`, [["", "Close"]], { content: field });
    field.select();
    await closed;
  }
}

let ending = null;

/** Moves the message up where it would lie over buttons. */
function keepOff() {
  const box = byId("toast");
  if (box.hidden) return;
  box.style.bottom = "";
  for (const id of ["go", "fold", "opened-buttons"]) {
    const own = box.getBoundingClientRect();
    const other = byId(id).getBoundingClientRect();
    const apart = own.top >= other.bottom || own.bottom <= other.top || own.left >= other.right || own.right <= other.left;
    if (!apart) box.style.bottom = `${innerHeight - other.top + 8}px`;
  }
}

/**
 * A message at the page's edge. It stays while the pointer or the focus is on it.
 * @param undo what its button does; without, it has none.
 * @param after what is done when it has gone, and nobody has pressed the button.
 */
export function toast(text, { undo = null, after = null, problem = false } = {}) {
  endToast();
  const box = byId("toast");
  let timer = 0;
  const end = (undone) => {
    // Taking away what has the focus or the pointer must not start the timer anew.
    clearTimeout(timer);
    box.onpointerenter = box.onfocusin = box.onpointerleave = box.onfocusout = null;
    ending = null;
    box.replaceChildren();
    box.hidden = true;
    if (undone) {
      undo();
      say("Undone");
    } else after?.();
  };
  const start = () => {
    clearTimeout(timer);
    timer = setTimeout(() => end(false), after ? SHOWN_UNDO : SHOWN);
  };
  box.replaceChildren(
    make("span", {}, text),
    ...(undo ? [make("button", { type: "button", class: "undo", onclick: () => end(true) }, "Undo")] : []),
    make("button", { type: "button", class: "plain", onclick: () => end(false) }, "Close"),
  );
  box.classList.toggle("problem", problem);
  box.onpointerenter = box.onfocusin = () => clearTimeout(timer);
  box.onpointerleave = box.onfocusout = start;
  box.hidden = false;
  keepOff();
  ending = end;
  say(text);
  start();
}

// Buttons move when the page is scrolled, and when the form is folded.
addEventListener("scroll", keepOff, { passive: true });
new ResizeObserver(keepOff).observe(byId("form"));

/** Does at once what messages have put off. */
export const endToast = () => ending?.(false);
