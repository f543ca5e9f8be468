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
    const guessed = pass.tree.path.slice(1);
    pass.texts.forEach((text, index) => {
      this.spans.push(text === "" ? null : this.span(text, pass, number, guessed[index]));
    });
  }

  span(text, pass, number, node) {
    const span = document.createElement("span");
    span.textContent = text;
    span.dataset.pass = number;
    if (node === undefined) {
      span.className = "token own";
      span.dataset.tip = `the model's own · pass ${number + 1}`;
    } else {
      const name = pass.tree.origins[node];
      const chance = pass.tree.scores[node];
      span.className = `token ${colour(name)}`;
      span.style.setProperty("--sure", `${14 + Math.round(46 * chance)}%`);
      span.dataset.tip = `${name} · chance ${Math.round(100 * chance)} % · pass ${number + 1}`;
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
