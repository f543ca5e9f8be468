// A run's text, token by token. Whatever a model says goes in as text, never as markup.

import { colour } from "./colours.js";

export class Words {
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
    const alone = pass.passes === 1;
    const first = alone ? 0 : pass.tokens.length - pass.tree.path.length; // that the tree is of
    const whole = alone || pass.origins.at(-1) === null;
    pass.texts.forEach((text, index) => {
      const node = whole && index >= first ? pass.tree.path[index - first + 1] : undefined;
      this.spans.push(text === "" ? null : this.span(text, pass, number, index, node));
    });
  }

  span(text, pass, number, index, node) {
    const span = document.createElement("span");
    span.textContent = text;
    span.dataset.pass = number;
    const name = pass.origins[index];
    const probability = node === undefined ? null : pass.tree.scores[node];
    if (name === null) {
      span.className = "token own";
      span.dataset.tip = `the model's own · pass ${number + 1}`;
    } else {
      const said = probability === null ? "" : ` · probability ${Math.round(100 * probability)} %`;
      span.className = `token ${colour(name)}`;
      span.style.setProperty("--sure", `${14 + Math.round(46 * probability)}%`);
      span.dataset.tip = `${name}${said} · pass ${number + 1}`;
    }
    this.place.append(span);
    return span;
  }

  /** Mark the tokens of a pass. */
  choose(number) {
    this.chosen = number;
    for (const span of this.place.querySelectorAll(".chosen")) span.classList.remove("chosen");
    for (const span of this.place.querySelectorAll(`[data-pass="${number}"]`)) {
      span.classList.add("chosen");
    }
  }

  /** Mark everything from a token on: it differs from what it should be. */
  wrong(from) {
    for (const span of this.spans.slice(from)) span?.classList.add("wrong");
  }
}
