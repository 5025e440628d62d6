// Small helpers. Everything that is shown is made of text nodes; nothing is parsed as markup.

/** A listener that passes over further clicks of a double click, after which another thing may be there. */
export const once = (act) => (event) => {
  if (event.detail < 2) act(event);
};

export const byId = (id) => document.getElementById(id);

/** An element; `on...` attributes are listeners, null and false ones are left out. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Sets a text that has changed, so that nothing is read out or selected anew. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Sets an attribute that has changed; null removes it. */
export function setAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** A copy of a template's one element. */
export const copy = (id) => byId(id).content.firstElementChild.cloneNode(true);

const PATHS = {
  star: "M12 3.6l2.6 5.3 5.8.8-4.2 4.1 1 5.8-5.2-2.7-5.2 2.7 1-5.8L3.6 9.7l5.8-.8z",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  close: "M6 6l12 12M18 6L6 18",
  image: "M4 5h16v14H4zM4 16l5-5 5 5M13 14l3-3 4 4M15.5 8.5h.01",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 6.8-1.2",
  swap: "M7 7h11l-3-3M17 17H6l3 3",
  down: "M12 4v11M7 11l5 5 5-5M5 20h14",
  warn: "M12 8v5M12 16.5h.01M12 3.5L21.5 20h-19z",
};

/** A drawing of 24 units a side, in the colour of the text; nothing to those who listen. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** Tells those who listen, when they have time. */
export function say(text) {
  byId("live").textContent = text;
}
