// One run's card: its text as it grows, its speed, a summary.

import { Record } from "./record.js";
import { TokenText } from "./token_text.js";

export class RunCard {
  record = null;

  constructor(card, onPick) {
    this.card = card;
    this.text = new TokenText(card.querySelector(".text"), onPick);
    this.speed = card.querySelector(".speed");
    this.summary = card.querySelector(".summary");
  }

  /** Start a run; return its record, which is to be filled. */
  begin() {
    this.card.setAttribute("aria-busy", "true");
    this.start(new Record());
    this.draw();
    return this.record;
  }

  /** Show a run that is over. */
  show(record) {
    this.start(record);
    this.end();
  }

  start(record) {
    this.card.hidden = false;
    this.record = record;
    this.shown = 0; // passes
    this.text.clear();
    this.summary.textContent = "";
  }

  /** Show what came since the last time. */
  draw() {
    const { passes, speed } = this.record;
    while (this.shown < passes.length) this.text.add(passes[this.shown], this.shown++);
    const big = document.createElement("span");
    big.className = "big";
    big.textContent = speed === null ? "–" : round(speed);
    this.speed.replaceChildren(big, " tokens/s");
  }

  /** Show all of a run, and its summary. */
  end() {
    this.draw();
    this.card.removeAttribute("aria-busy");
    const { passCount, traced, tokens, drafted } = this.record;
    if (!passCount) return;
    const rate = (tokens / passCount).toFixed(2);
    const passes = count(passCount, "pass", "passes");
    this.summary.textContent = `${count(tokens, "token")} in ${passes}, ${rate} a pass.`;
    const lost = passCount - traced.length;
    if (lost && drafted.size) {
      this.summary.append(` Too fast for this page: ${lost} without their trees.`);
    }
  }

  hide() {
    this.card.hidden = true;
    this.record = null;
  }
}

/** Return `1 token`, `2 tokens`. */
export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** Return a number with three significant digits. */
export function round(value) {
  return value < 100 ? String(+value.toPrecision(3)) : Math.round(value).toLocaleString("en");
}
