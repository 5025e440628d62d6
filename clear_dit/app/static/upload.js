// The image to enlarge or vary: chosen, dropped anywhere, pasted, replaced, removed.

import { Away, call } from "./api.js";
import { byId, say, setText } from "./dom.js";
import { bytes, size } from "./format.js";

/**
 * @param limits of the server.
 * @param onChange called when the image has changed.
 * @param onImage called with a new upload and its settings, or null; false where it is not wanted.
 */
export function makeUpload(limits, { onChange, onImage }) {
  const file = byId("file");
  let value = null;
  let sending = null;

  function show(problem = "") {
    byId("uploaded").hidden = !value;
    byId("choose").hidden = Boolean(value);
    setText(byId("upload-problem"), problem);
    byId("upload-problem").hidden = !problem;
    if (!value) return;
    setText(byId("upload-name"), value.title);
    setText(byId("upload-size"), value.width ? `${size(value)} px` : "");
    const preview = `uploads/${value.name}.jpg`;
    if (byId("upload-preview").getAttribute("src") !== preview) byId("upload-preview").src = preview;
  }

  function set(image) {
    sending?.abort();
    value = typeof image?.name === "string" ? image : null;
    show();
  }

  function fail(problem) {
    value = null;
    show(problem);
    onChange();
    say(problem);
  }

  async function send(chosen) {
    sending?.abort();
    if (chosen.size > limits.upload_bytes) {
      return fail(`${chosen.name} has ${bytes(chosen.size)}; at most ${bytes(limits.upload_bytes)} can be sent.`);
    }
    const mine = (sending = new AbortController());
    const focused = byId("upload").contains(document.activeElement);
    setText(byId("choose-label"), `Sending ${chosen.name}…`);
    byId("upload").setAttribute("aria-busy", "true");
    try {
      const told = await call("POST", "uploads", chosen, { signal: mine.signal });
      const image = { name: told.name, title: chosen.name, width: told.width, height: told.height };
      if (await onImage(image, told.settings)) {
        set(image);
        onChange(image);
        say(`${chosen.name} is the image to enlarge.`);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      const offline = navigator.onLine ? "The server does not answer" : "You are offline";
      fail(error instanceof Away ? `${offline}; ${chosen.name} was not sent.` : error.message);
    } finally {
      if (sending === mine) sending = null;
      setText(byId("choose-label"), "Enlarge or vary an image");
      byId("upload").removeAttribute("aria-busy");
      if (focused) byId(value ? "replace" : "choose").focus();
    }
  }

  file.addEventListener("change", () => {
    const [chosen] = file.files;
    if (chosen) send(chosen);
    file.value = ""; // so that the same file can be chosen again
  });
  for (const id of ["choose", "replace"]) byId(id).addEventListener("click", () => file.click());
  byId("remove").addEventListener("click", () => {
    set(null);
    onChange();
    byId("choose").focus();
  });
  byId("upload-preview").addEventListener("error", () => {
    if (value && navigator.onLine) fail(`${value.title} is no longer on the server; choose it again.`);
  });

  return {
    get value() {
      return value;
    },
    set,
    send,
  };
}

/** Sends files that are dropped anywhere on the page, or pasted. */
export function takeFiles(send) {
  const overlay = byId("drop");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    overlay.hidden = false;
  };
  addEventListener("dragenter", show);
  addEventListener("dragover", show);
  overlay.addEventListener("dragleave", () => (overlay.hidden = true));
  addEventListener("drop", (event) => {
    overlay.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [pasted] = event.clipboardData.files;
    if (!pasted || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    send(pasted);
  });
}
