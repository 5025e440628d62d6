// What a browser remembers over a reload: of each account, and each server, its own.

export function makeKeep(account) {
  const key = (name) => `clear-dit ${location.pathname} ${account ?? ""} ${name}`;
  return {
    /** What was saved, or null. */
    load(name) {
      try {
        return JSON.parse(localStorage.getItem(key(name)));
      } catch {
        return null; // closed by the visitor, or of another version
      }
    },
    save(name, value) {
      try {
        localStorage.setItem(key(name), JSON.stringify(value));
      } catch {
        // Full, or closed by the visitor: the page works without.
      }
    },
  };
}
