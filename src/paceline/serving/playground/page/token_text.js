// A run's text, token by token, coloured by drafter. Texts go in as text, never as markup.

import { colour } from "./colours.js";
import { make } from "./dom.js";
import { tokensOf } from "./record.js";

/**
 * Return an element that shows a token of `tokensOf`, or a part of its text. Where `pass` is null,
 * it cannot be chosen.
 */
export function tokenElement({ pass, name, probability }, text) {
  const element = make("span", { "data-pass": pass === null ? null : String(pass) }, text);
  const where = pass === null ? "an earlier run" : `pass ${pass + 1}`;
  if (name === null) {
    element.className = "token own";
    element.dataset.tip = `the model's own · ${where}`;
  } else {
    const detail = probability === null ? "" : ` · probability ${Math.round(100 * probability)} %`;
    element.className = `token ${colour(name)}`;
    element.style.setProperty("--sure", `${14 + Math.round(46 * probability)}%`);
    element.dataset.tip = `${name}${detail} · ${where}`;
  }
  return element;
}

/** Mark the tokens of a pass in `place`. */
export function choosePass(place, number) {
  for (const span of place.querySelectorAll(".chosen")) span.classList.remove("chosen");
  for (const span of place.querySelectorAll(`[data-pass="${number}"]`)) span.classList.add("chosen");
}

export class TokenText {
  constructor(place, onPick) {
    this.place = place;
    this.spans = []; // of each token; null where it has no text of its own
    this.chosen = 0;
    place.addEventListener("click", (event) => {
      const { pass } = event.target.dataset;
      if (pass) onPick(Number(pass));
    });
    place.addEventListener("keydown", ({ key }) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (step) onPick(this.chosen + step);
    });
  }

  clear() {
    this.place.replaceChildren();
    this.spans = [];
  }

  /** Show the tokens of pass `number`. */
  add(pass, number) {
    for (const token of tokensOf(pass, number)) {
      const span = token.text === "" ? null : tokenElement(token, token.text);
      this.spans.push(span);
      if (span) this.place.append(span);
    }
  }

  /** Mark the tokens of a pass. */
  choose(number) {
    this.chosen = number;
    choosePass(this.place, number);
  }

  /** Mark everything from a token on: it differs from what it should be. */
  wrong(from) {
    for (const span of this.spans.slice(from)) span?.classList.add("wrong");
  }
}
