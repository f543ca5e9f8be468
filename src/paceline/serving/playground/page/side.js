// One run's card: its text as it grows, its speed, what there is to say.

import { Record } from "./record.js";
import { Words } from "./words.js";

export class Side {
  record = null;

  constructor(card, onPick) {
    this.card = card;
    this.words = new Words(card.querySelector(".text"), onPick);
    this.speed = card.querySelector(".speed");
    this.summary = card.querySelector(".summary");
  }

  begin() {
    this.card.hidden = false;
    this.card.setAttribute("aria-busy", "true");
    this.record = new Record();
    this.shown = 0; // passes
    this.words.clear();
    this.summary.textContent = "";
    this.draw();
    return this.record;
  }

  /** Show what came since the last time. */
  draw() {
    const { passes, speed } = this.record;
    while (this.shown < passes.length) this.words.add(passes[this.shown], this.shown++);
    const big = document.createElement("span");
    big.className = "big";
    big.textContent = speed === null ? "–" : round(speed);
    this.speed.replaceChildren(big, " tokens/s");
  }

  end() {
    this.draw();
    this.card.removeAttribute("aria-busy");
    const { ran, seen, tokens, guesses } = this.record;
    if (!ran) return;
    const rate = (tokens / ran).toFixed(2);
    const passes = count(ran, "pass", "passes");
    this.summary.textContent = `${count(tokens, "token")} in ${passes}, ${rate} a pass.`;
    const lost = ran - seen.length;
    if (lost && guesses.size) {
      this.summary.append(` Too fast for this page: ${lost} without their trees.`);
    }
  }

  hide() {
    this.card.hidden = true;
    this.record = null;
  }
}

/** `1 token`, `2 tokens`. */
export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** Three digits that matter. */
function round(value) {
  return value < 100 ? String(+value.toPrecision(3)) : Math.round(value).toLocaleString("en");
}
