// Asking the server. All addresses are relative: it may stand behind a prefix.

/** The server's no, in words for the visitor; `field` names what is at fault, or is null. */
export class Refusal extends Error {
  constructor(message, status, field = null) {
    super(message);
    Object.assign(this, { status, field });
  }
}

/** No answer, or none of our server's. */
export class Away extends Error {}

// What a proxy says while the server behind it is away.
const GATEWAY = [502, 503, 504];

/**
 * The answer's JSON and its response; null for one without a body.
 * @throws {Refusal|Away|DOMException} an AbortError where `options.signal` was aborted.
 */
export async function ask(method, path, body, options = {}) {
  const json = body !== undefined && !(body instanceof Blob);
  let response;
  try {
    response = await fetch(path, {
      method,
      body: json ? JSON.stringify(body) : body,
      ...options,
      headers: { ...options.headers, ...(json && { "content-type": "application/json" }) },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away();
  }
  if (response.status === 304 || response.status === 204) return { response, told: null };
  if (response.status === 401) {
    location.assign("login");
    throw new Refusal("Please log in.", 401);
  }
  // Undefined where it is no JSON; null is an answer like others.
  const told = await response.json().catch(() => undefined);
  if (response.ok && told !== undefined) return { response, told };
  if (told === undefined && (response.ok || GATEWAY.includes(response.status))) throw new Away();
  throw new Refusal(told?.error ?? "The server could not do this.", response.status, told?.field);
}

/** The answer's JSON. */
export const call = async (...request) => (await ask(...request)).told;
