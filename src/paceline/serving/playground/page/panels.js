// The panels at both sides. On a narrow window they lie over the page, one at a time.

import { byId } from "./dom.js";
import { preference, setPreference } from "./preferences.js";

const WIDE = matchMedia("(min-width: 900px)");
const NAMES = ["sidebar", "inspector", "settings"];
const RIGHT = ["inspector", "settings"]; // in the same place
const button = (name) => byId(`show-${name}`);

export class Panels {
  constructor() {
    for (const name of NAMES) {
      button(name).addEventListener("click", () => this.show(name, byId(name).hidden, true));
      byId(name).querySelector(".close").addEventListener("click", () => this.show(name, false, true));
    }
    byId("shade").addEventListener("click", () => this.closeAll());
    WIDE.addEventListener("change", () => this.start());
    this.start();
  }

  /** Show what was open at the last visit; nothing on a narrow window. */
  start() {
    const kept = preference("panels", { sidebar: true });
    for (const name of NAMES) this.set(name, WIDE.matches && kept[name] === true);
    this.settle();
  }

  /** Open or close a panel. `byUser`: it is kept for the next visit, and the focus follows. */
  show(name, open, byUser = false) {
    const others = WIDE.matches ? RIGHT : NAMES;
    if (open && others.includes(name)) others.forEach((other) => this.set(other, false));
    this.set(name, open);
    this.settle();
    if (!byUser) return;
    if (WIDE.matches) {
      setPreference("panels", Object.fromEntries(NAMES.map((each) => [each, !byId(each).hidden])));
    } else {
      (open ? byId(name).querySelector(".close") : button(name)).focus();
    }
  }

  /** Close what lies over the page; return whether there was anything. */
  closeAll() {
    const open = NAMES.find((name) => !byId(name).hidden);
    if (WIDE.matches || !open) return false;
    this.show(open, false, true);
    return true;
  }

  set(name, open) {
    byId(name).hidden = !open;
    button(name).setAttribute("aria-expanded", String(open));
  }

  settle() {
    const over = !WIDE.matches && NAMES.some((name) => !byId(name).hidden);
    byId("shade").hidden = !over;
    for (const id of ["stage", "top"]) byId(id).inert = over;
  }
}
