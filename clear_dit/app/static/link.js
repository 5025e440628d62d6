// A link that opens the form filled in. Whoever wrote it may be anybody: each value is checked.

const LONGEST = 40000;

const text = (most) => (value) => (value.length <= most ? value : undefined);
const choice = (...values) => (value) => (values.includes(value) ? value : undefined);
const number = (most, pattern = /^\d{1,16}$/) => (value) =>
  pattern.test(value) && Math.abs(value) <= most ? Number(value) : undefined;
const decimal = (most) => number(most, /^-?\d{1,5}(\.\d{1,6})?$/);

const checks = (limits) => ({
  prompt: text(limits.prompt),
  negative_prompt: text(limits.prompt),
  model: text(200),
  width: number(2 ** 20),
  height: number(2 ** 20),
  attention: choice("clear", "full", "both"),
  radius: number(512),
  down_factor: number(64),
  far: (value) => ({ true: true, false: false })[value],
  steps: number(limits.steps),
  guidance: decimal(100),
  seed: number(Number.MAX_SAFE_INTEGER),
  strength: decimal(1),
  lora: text(200),
  lora_scale: decimal(100),
});

/** The link of an entry, without its image: that is one visitor's. */
export function linkOf(entry, limits) {
  const told = new URLSearchParams();
  for (const name of Object.keys(checks(limits))) {
    const value = entry[name];
    if (value !== null && value !== undefined && value !== "") told.set(name, value);
  }
  return `${location.href.split("#")[0]}#${told}`;
}

/**
 * What a link's part after # says: {entry, wrong}, the names of what is not understood; null where
 * it says nothing.
 */
export function readLink(hash, limits) {
  if (!hash.includes("=")) return null;
  if (hash.length > LONGEST) return { entry: {}, wrong: ["its length"] };
  const entry = {};
  const wrong = [];
  const known = checks(limits);
  for (const [name, value] of new URLSearchParams(hash.slice(1))) {
    const read = Object.hasOwn(known, name) ? known[name](value) : undefined;
    if (read === undefined) wrong.push(name.slice(0, 30));
    else entry[name] = read;
  }
  return { entry, wrong };
}
