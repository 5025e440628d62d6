// One small menu for all buttons that have one.

import { byId, make } from "./dom.js";

/**
 * Opens the menu at a button; closed, the focus is where it was.
 * @param items {label, run}, which is given the button, or, for a file, {label, href}; perhaps a picture's
 *   address; null ones are left out.
 */
export function openMenu(anchor, items) {
  const menu = byId("menu");
  const buttons = items.filter(Boolean).map(({ label, run, href, danger, picture }) =>
    href
      ? make("a", { href, download: true, class: "button item", onclick: () => menu.hidePopover() }, label)
      : make("button", {
          type: "button",
          class: danger ? "item danger" : "item",
          onclick: () => {
            menu.hidePopover();
            run(anchor);
          },
        }, picture ? make("img", { src: picture, alt: "", width: 44, height: 44 }) : null, label),
  );
  menu.replaceChildren(...buttons);
  menu.showPopover();
  const at = anchor.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  const below = at.bottom + 4 + height <= innerHeight;
  menu.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${Math.max(8, below ? at.bottom + 4 : at.top - 4 - height)}px`;
  buttons[0].focus();
  menu.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = buttons.indexOf(document.activeElement);
    buttons[(place + step + buttons.length) % buttons.length].focus();
  };
}
