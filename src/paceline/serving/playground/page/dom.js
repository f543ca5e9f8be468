// Builds elements. Text stays text: nothing here parses markup.

export const byId = (id) => document.getElementById(id);

/**
 * Return an HTML element.
 *
 * `attributes` whose value is a function are event listeners (`onclick`); those whose value is
 * null, undefined or false are left out, and true is an empty value. `children` are nodes or texts;
 * null, undefined and false are left out.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const PATHS = {
  copy: "M6 6h8v8H6zM10 6V2H2v8h4",
  done: "M3 9l3.5 3.5L13.5 4",
  edit: "M3 13l1-3.5L11.5 2 14 4.5 6.5 12z",
  again: "M13.5 8a5.5 5.5 0 1 1-1.7-4M13.5 1.5v3.5H10",
  more: "M4 3l5 5-5 5M11 3v10",
  branch: "M4 3v10M4 10c0-4 8-1 8-5M12 2.5v2.5M2.5 3h3M2.5 13h3M10.5 2.5h3",
  inspect: "M2 13V9M6 13V4M10 13V7M14 13V2",
  back: "M10 3L5 8l5 5",
  next: "M6 3l5 5-5 5",
  menu: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  close: "M4 4l8 8M12 4l-8 8",
  file: "M4 1.5h5l3.5 3.5v9.5H4zM9 1.5V5h3.5",
  tool: "M6 2.5a3.5 3.5 0 0 0 4 4.8l3.5 3.5-2 2L8 9.3A3.5 3.5 0 0 1 3.5 5L6 6.5 7.5 5z",
};

/** Return an icon, which screen readers skip. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** Return a button that shows an icon only, named by `label`. */
export function iconButton(name, label, onclick, attributes = {}) {
  const settings = { type: "button", class: "ghost", "aria-label": label, title: label };
  return make("button", { ...settings, ...attributes, onclick }, icon(name));
}

/** Put a text on the clipboard, also where the page has no secure origin; return whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Return a button that copies what `text()` returns, and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "done" : "close"));
    button.setAttribute("aria-label", copied ? "Copied" : "Copying failed");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}
