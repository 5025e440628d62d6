// Choosing a size by its longer side and its shape; the numbers in the fields are what counts.

import { make } from "./dom.js";

// How many times longer than high a shape is that another size keeps; beyond, it was a slip.
const LONGEST = 8;

/** Width and height of a shape whose longer side is given: multiples of a step, in pixels. */
export function presetSize(side, [across, down], step) {
  const scale = side / Math.max(across, down);
  return [across, down].map((part) => Math.max(1, Math.round((part * scale) / step)) * step);
}

/** What is twice as large as an image, to the nearest multiples of a step, in pixels. */
export const twice = ({ width, height }, step) =>
  [width, height].map((side) => Math.max(1, Math.round((2 * side) / step)) * step);

export const sideName = (side) => (side % 1024 === 0 ? `${side / 1024}K` : `${side}`);

/**
 * @param form with the fields width and height.
 * @param shapes of the server: names, and pairs of across and down.
 * @param onSize called when a preset has changed the fields.
 */
export function makeSizes(form, shapes, onSize) {
  const sides = form.querySelector("#sides");
  const frames = form.querySelector("#shapes");
  const { width, height } = form.elements;
  let model = null;

  const choice = (name, value, title, ...shown) =>
    make("label", { title }, make("input", { type: "radio", name, value, "aria-label": title }), ...shown);

  frames.append(
    ...Object.entries(shapes).map(([name, [across, down]]) => {
      const frame = make("span", { class: "frame" });
      frame.style.aspectRatio = `${across} / ${down}`;
      frame.style[across >= down ? "width" : "height"] = "20px";
      return choice("shape", name, name, make("span", { class: "box" }, frame), name.split(" ").pop());
    }),
  );

  const current = () => [Number(width.value), Number(height.value)];

  function set(side, shape) {
    const own = current();
    const kept = Math.min(...own) > 0 && Math.max(...own) <= LONGEST * Math.min(...own);
    const ratio = shape ? shapes[shape] : kept ? own : [1, 1];
    [width.value, height.value] = presetSize(side || Math.max(...own) || model.size, ratio, model.step);
    onSize();
  }

  form.addEventListener("change", ({ target }) => {
    if (target.name === "side") set(Number(target.value), form.elements.shape.value);
    if (target.name === "shape") set(Number(form.elements.side.value), target.value);
  });
  form.querySelector("#swap").addEventListener("click", () => {
    [width.value, height.value] = [height.value, width.value];
    onSize();
  });

  return {
    /** Offers the sizes of a model. */
    offer(its) {
      model = its;
      const all = [...new Set([its.size, ...its.sizes])].sort((one, other) => one - other);
      sides.replaceChildren(
        ...all.map((side) => choice("side", side, `${side} px, the longer side`, sideName(side))),
      );
    },
    /** Checks the choices that the fields' numbers are, if they are any. */
    follow() {
      const own = String(current());
      const longer = Math.max(...current());
      const fits = Object.entries(shapes).find(([, shape]) => String(presetSize(longer, shape, model.step)) === own);
      for (const radio of frames.querySelectorAll("input")) radio.checked = radio.value === fits?.[0];
      for (const radio of sides.querySelectorAll("input")) radio.checked = Number(radio.value) === longer;
    },
  };
}
