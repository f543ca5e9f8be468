// A menu below a button, and a dialog that asks for a line of text.

import { make } from "./dom.js";

/** Open a menu of `items`, [label, function], at a button. */
export function openMenu(button, items) {
  const menu = make("div", { class: "menu", role: "menu" });
  const close = (focus) => {
    menu.remove();
    button.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", outside, true);
    if (focus) button.focus();
  };
  const outside = (event) => menu.contains(event.target) || close(false);
  for (const [label, run] of items) {
    const press = () => {
      close(true);
      run();
    };
    menu.append(make("button", { type: "button", role: "menuitem", tabindex: "-1", onclick: press }, label));
  }
  menu.addEventListener("keydown", (event) => {
    const all = [...menu.children];
    const place = all.indexOf(document.activeElement);
    const next = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: -1 }[event.key];
    if (next !== undefined) all.at(next % all.length).focus();
    else if (event.key === "Escape" || event.key === "Tab") close(true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.body.append(menu);
  const { left, bottom, top } = button.getBoundingClientRect();
  const room = innerHeight - bottom > menu.offsetHeight + 8;
  menu.style.left = `${Math.max(8, Math.min(left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${room ? bottom + 4 : Math.max(8, top - menu.offsetHeight - 4)}px`;
  button.setAttribute("aria-expanded", "true");
  document.addEventListener("pointerdown", outside, true);
  menu.firstElementChild.focus();
}

/** Ask for a line of text; return it, or null where it was cancelled. */
export function askText(label, value) {
  const input = make("input", { id: "asked", maxlength: "200", "aria-label": label });
  input.value = value;
  const dialog = make(
    "dialog",
    { class: "dialog", "aria-label": label },
    make("label", { for: "asked" }, label),
    input,
    make(
      "div",
      { class: "row" },
      make("button", { type: "button", class: "primary", onclick: () => dialog.close("ok") }, "Save"),
      make("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"),
    ),
  );
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) dialog.close("ok");
  });
  document.body.append(dialog);
  dialog.showModal();
  input.select();
  return new Promise((answer) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      answer(dialog.returnValue === "ok" && input.value.trim() ? input.value.trim() : null);
    });
  });
}
