// Remembers how the page is set: a few small values in localStorage, never the API key.

const KEY = "paceline.preferences";

/** Return the value of a name, or `otherwise` where none of the same type is kept. */
export function preference(name, otherwise) {
  const value = all()[name];
  return typeof value === typeof otherwise && value !== null ? value : otherwise;
}

/** Keep a value; nothing happens where storage is off or full. */
export function setPreference(name, value) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...all(), [name]: value }));
  } catch { /* it then lasts until the page is closed */ }
}

function all() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}
