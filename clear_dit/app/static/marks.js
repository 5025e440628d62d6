// Messages beside the fields that they are about.

import { byId, make } from "./dom.js";

// Fields of an entry that another field of the form stands for.
const STANDS_FOR = { down_factor: "variant", far: "variant" };

export function makeMarks(form) {
  let marked = null;

  function clear() {
    if (!marked) return;
    for (const control of marked.controls) {
      control.removeAttribute("aria-invalid");
      const others = (control.getAttribute("aria-describedby") ?? "").replace(marked.message.id, "").trim();
      if (others) control.setAttribute("aria-describedby", others);
      else control.removeAttribute("aria-describedby");
    }
    marked.message.remove();
    marked = null;
  }

  /** The element that a message about a field of an entry goes into, and its controls. */
  function place(field) {
    const name = STANDS_FOR[field] ?? field;
    if (name === "image") {
      return { box: byId("upload"), controls: [byId(byId("uploaded").hidden ? "choose" : "replace")] };
    }
    const found = name ? form.elements.namedItem(name) : null;
    if (!found) return null;
    const controls = found instanceof RadioNodeList ? [...found] : [found];
    return { box: controls[0].closest(".row") ?? controls[0].closest(".field"), controls };
  }

  return {
    clear,
    /** Says what is wrong beside a field; false where the form has no such field. */
    set(field, reason) {
      clear();
      const at = place(field);
      if (!at) return false;
      const message = make("p", { class: "error", id: "field-error" }, reason);
      at.box.append(message);
      for (const control of at.controls) {
        if (control.name) control.setAttribute("aria-invalid", "true");
        const others = control.getAttribute("aria-describedby");
        control.setAttribute("aria-describedby", [others, message.id].filter(Boolean).join(" "));
      }
      marked = { message, controls: at.controls };
      return true;
    },
    /** Whether what is wrong is said where it is not folded away. */
    seen: () => marked !== null && !marked.message.closest("details:not([open])"),
    /** Brings the field that is wrong into view. */
    focus() {
      if (!marked) return;
      const [first] = marked.controls;
      const folded = first.closest("details");
      if (folded) folded.open = true;
      (marked.controls.find((control) => control.checked) ?? first).focus();
    },
  };
}
