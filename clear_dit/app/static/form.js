// The form: its fields, filled in, kept, and read.

import { byId, icon, make, setText } from "./dom.js";
import { drawSeed, entryOf, rawOf, VARIANTS, variantTitle, variantValue } from "./fields.js";
import { ATTENTION, stepsOf } from "./format.js";
import { makeMarks } from "./marks.js";
import { makeSizes, presetSize, twice } from "./sizes.js";

const RADII = [4, 8, 16, 32];
const radiusName = (value) => (/^\d{1,3}$/.test(value) ? `${value} tokens` : null);

/**
 * @param setup what the server offers.
 * @param keep where the entry is kept as typed.
 * @param upload the image to enlarge: {value, set}.
 * @param onChange called when what would be asked for has changed; with true, all at once.
 */
export function makeForm(setup, { keep, upload, onChange }) {
  const form = byId("form");
  const fields = form.elements;
  const marks = makeMarks(form);
  const sizes = makeSizes(form, setup.shapes, changed);
  let locked = false;
  let offered = null;
  // Size, strength and lock before there was an image to enlarge; null where there is none.
  let plain = null;

  const model = () => setup.models.find(({ name }) => name === fields.model.value) ?? setup.models[0];
  const names = ["prompt", "negative_prompt", "model", "width", "height", "attention", "radius", "variant",
    "steps", "guidance", "seed", "strength", "lora", "lora_scale", "images"];
  const raw = () => Object.fromEntries(names.map((name) => [name, fields.namedItem(name).value]));

  fields.model.append(...setup.models.map(({ name, title }) => new Option(title, name)));
  fields.lora.append(new Option("None", ""), ...setup.loras.map((name) => new Option(name)));
  fields.radius.append(...RADII.map((radius) => new Option(radiusName(radius), radius)));
  fields.variant.append(...VARIANTS.map(([name, factor, far]) => new Option(name, variantValue(factor, far))));
  fields.prompt.maxLength = fields.negative_prompt.maxLength = setup.limits.prompt;
  byId("images").append(
    ...Array.from({ length: setup.limits.images }, (_, index) =>
      make("label", {}, make("input", { type: "radio", name: "images", value: index + 1, checked: !index }),
        `${index + 1}`)),
  );
  byId("field-model").hidden = setup.models.length < 2;
  byId("field-images").hidden = setup.limits.images < 2;

  /** Offers what the chosen model can do. */
  function offer() {
    const its = model();
    if (its === offered) return;
    offered = its;
    sizes.offer(its);
    byId("field-negative").hidden = !its.negative;
    byId("words").hidden = !its.words?.length;
    fields.prompt.placeholder = its.words?.length
      ? "What would you like to see? This demo knows few words, those below."
      : "What would you like to see?";
    byId("words-list").replaceChildren(
      ...(its.words ?? []).map((word) =>
        make("button", { type: "button", class: "chip", onclick: () => addWord(word) }, word)),
    );
  }

  /** Numbers that suit the chosen model. */
  function suit() {
    const its = model();
    const shape = setup.shapes[fields.shape.value] ?? [1, 1];
    [fields.width.value, fields.height.value] = presetSize(its.size, shape, its.step);
    Object.assign(fields.steps, { value: its.steps });
    Object.assign(fields.guidance, { value: its.guidance });
    choose("radius", String(its.radius));
  }

  /** Sets a field; false where it is a choice that there is not. */
  function choose(name, value) {
    const field = fields.namedItem(name);
    if (field.tagName === "SELECT" && ![...field.options].some((option) => option.value === value)) {
      const label = { radius: radiusName, variant: variantTitle }[name]?.(value);
      if (!label) return false;
      field.append(new Option(label, value));
    }
    field.value = value;
    return true;
  }

  /** Sets fields; the values of those that cannot be set. */
  const fill = (values) =>
    Object.entries(values)
      .filter(([name, value]) => names.includes(name) && typeof value === "string" && !choose(name, value))
      .map(([, value]) => value);

  function lock(on) {
    locked = on;
    byId("lock").setAttribute("aria-pressed", on);
    byId("lock").replaceChildren(icon(on ? "lock" : "unlock"));
    byId("seed-kept").hidden = !on;
  }

  function addWord(word) {
    const before = fields.prompt.value.trimEnd();
    fields.prompt.value = before ? `${before} ${word}` : word;
    changed();
  }

  const notePlain = () => {
    plain ??= { ...Object.fromEntries(["width", "height", "strength"].map((name) => [name, fields[name].value])), locked };
  };

  function changed(atOnce = false) {
    offer();
    sizes.follow();
    byId("field-lora-scale").hidden = !fields.lora.value;
    // Beside the image, where there is one, it is what matters most.
    const place = byId(upload.value ? "upload-strength" : "more-strength");
    if (byId("strength").parentElement !== place) place.append(byId("strength"));
    const its = model();
    // Where it does not act it is not shown; but never hidden with a number in it, nor while it is typed.
    const above = fields.width.value * fields.height.value > its.size ** 2;
    byId("strength").hidden = !upload.value && !above && !fields.strength.value && document.activeElement !== fields.strength;
    const parts = [setup.models.length > 1 && its.title, ATTENTION[fields.attention.value], stepsOf(fields.steps.value),
      `guidance ${fields.guidance.value}`, fields.strength.value && `strength ${fields.strength.value}`, fields.lora.value];
    setText(byId("summary"), parts.filter(Boolean).join(" · "));
    marks.clear();
    keep.save("entry", { ...raw(), locked, plain, upload: upload.value });
    onChange(atOnce);
  }

  form.addEventListener("input", ({ target }) => {
    if (target.name === "seed") lock(true);
    changed();
  });
  form.addEventListener("change", ({ target }) => {
    if (target.name === "model") suit();
    if (target.tagName === "SELECT") changed();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    const step = Number(event.target.dataset.step ?? (event.target.dataset.side && model().step));
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    const value = Number(event.target.value);
    if (!step || !way || Number.isNaN(value)) return;
    event.preventDefault();
    event.target.value = Math.max(0, Math.round((value + way * step) * 100) / 100);
    event.target.dispatchEvent(new Event("input", { bubbles: true }));
  });
  byId("lock").addEventListener("click", () => {
    lock(!locked);
    changed();
  });
  byId("next-seed").addEventListener("click", () => {
    fields.seed.value = (Number(fields.seed.value) || 0) + 1;
    lock(true);
    changed();
  });

  offer();
  suit();
  fields.seed.value = drawSeed();
  const kept = keep.load("entry") ?? {};
  fill(kept);
  lock(kept.locked === true);
  plain = kept.plain ?? null;
  upload.set(kept.upload ?? null);
  changed();

  return {
    marks,
    element: form,
    model,
    get images() {
      return Number(fields.images.value);
    },
    entry: () => entryOf(raw(), model(), upload.value?.name ?? ""),
    /** Draws another seed, unless it is locked. */
    newSeed() {
      if (!locked) fields.seed.value = drawSeed();
      changed();
    },
    /** Fills in what an entry has: names that are not offered here, and a way back. */
    set(entry, { image, seedLocked = locked || "seed" in entry } = {}) {
      const before = { ...raw(), locked, plain, upload: upload.value };
      if (image) notePlain();
      else if (image === null) plain = null;
      const unknown = fill(rawOf(entry));
      if (image !== undefined) upload.set(image);
      lock(seedLocked);
      changed(true);
      const undo = () => {
        fill(before);
        lock(before.locked);
        plain = before.plain;
        upload.set(before.upload);
        changed(true);
      };
      return { unknown, undo };
    },
    /** Width and height of twice an image. */
    twice: (image) => twice(image, model().step),
    /** Asks for twice an image. */
    enlarge(image) {
      notePlain();
      fields.strength.value = "";
      [fields.width.value, fields.height.value] = twice(image, model().step);
      changed(true);
    },
    /** Asks again for what was asked for before there was an image to enlarge. */
    withoutImage() {
      fill(plain ?? {});
      if (plain) lock(plain.locked === true);
      plain = null;
      changed(true);
    },
  };
}
