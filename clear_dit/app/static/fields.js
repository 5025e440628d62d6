// Between what stands in the form's fields, as typed, and what the server is told.

export const VARIANTS = [
  ["Auto", 1, null],
  ["Sees all", 1, true],
  ["Local only", 1, false],
  ["Pooled by 2", 2, null],
  ["Pooled by 4", 4, null],
];
export const variantValue = (downFactor, far) => `${downFactor} ${far}`;
export const variantName = (downFactor, far) =>
  VARIANTS.find(([, factor, sees]) => factor === downFactor && sees === far)?.[0] ?? `Pooled by ${downFactor}`;
/** The name of a variant's value; null where it is none. */
export const variantTitle = (value) =>
  /^\d{1,2} (null|true|false)$/.test(value) ? variantName(...value.split(" ").map((part) => JSON.parse(part))) : null;

// Of fields that stand in the form as they are in an entry.
const NUMBERS = ["width", "height", "radius", "steps", "guidance", "seed", "lora_scale"];
const TEXTS = ["prompt", "negative_prompt", "model", "attention", "lora"];

/** A number of what was typed, or the text, which the server refuses in its words. */
export function toNumber(text) {
  const point = text.trim().replace(",", ".");
  return /^-?\d+(\.\d+)?$/.test(point) ? Number(point) : text.trim();
}

/**
 * What the server is told.
 * @param raw the fields' values, all text.
 * @param model of the server's models: what does not act with it is left as the model has it.
 * @param image the name of an upload, or "".
 */
export function entryOf(raw, model, image) {
  const [downFactor, far] = raw.variant.split(" ").map((part) => JSON.parse(part));
  return {
    ...Object.fromEntries(TEXTS.map((name) => [name, raw[name]])),
    ...Object.fromEntries(NUMBERS.map((name) => [name, toNumber(raw[name])])),
    ...(!model.negative && { negative_prompt: "" }),
    ...(!raw.lora && { lora_scale: 1 }),
    down_factor: downFactor,
    far,
    image,
    strength: raw.strength.trim() ? toNumber(raw.strength) : null,
  };
}

/** Values for the fields, of those that an entry has. */
export function rawOf(entry) {
  const raw = {};
  for (const name of [...TEXTS, ...NUMBERS]) if (name in entry) raw[name] = String(entry[name]);
  if ("strength" in entry) raw.strength = entry.strength === null ? "" : String(entry.strength);
  if ("down_factor" in entry || "far" in entry) {
    raw.variant = variantValue(entry.down_factor ?? 1, entry.far ?? null);
  }
  return raw;
}

/** A new seed, of nine digits at most. */
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1e9;
