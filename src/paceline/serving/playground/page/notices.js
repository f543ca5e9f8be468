// Short messages at the edge of the page; screen readers announce them.

import { byId, make } from "./dom.js";

const SECONDS = 12;

/** Show a message for a while. `action`: [label, function] of a button; `bad`: something failed. */
export function notify(message, { action = null, bad = false } = {}) {
  const box = make("div", { class: bad ? "notice bad-notice" : "notice" }, make("span", {}, message));
  if (action) {
    const [label, run] = action;
    const press = () => {
      box.remove();
      run();
    };
    box.append(make("button", { type: "button", class: "small", onclick: press }, label));
  }
  const close = make("button", { type: "button", class: "ghost", "aria-label": "Dismiss" }, "×");
  close.addEventListener("click", () => box.remove());
  box.append(close);
  byId("notices").append(box);
  setTimeout(() => box.remove(), 1000 * SECONDS);
}
