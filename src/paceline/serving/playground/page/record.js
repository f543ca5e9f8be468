// What is kept of a run: its passes, and what follows from them.

export class Record {
  passes = [];
  tokens = 0;
  finish = null;

  /** A pass: `tokens`, `texts`, `origins` of each, `at` in seconds, `tree`. */
  add(pass) {
    this.passes.push(pass);
    this.tokens += pass.tokens.length;
  }

  get text() {
    return this.passes.flatMap((pass) => pass.texts).join("");
  }

  get ids() {
    return this.passes.flatMap((pass) => pass.tokens);
  }

  /** Tokens a second after the first pass, or null while there is none. */
  get speed() {
    const seconds = this.passes.length > 1 ? this.passes.at(-1).at - this.passes[0].at : 0;
    return seconds > 0 ? (this.tokens - this.passes[0].tokens.length) / seconds : null;
  }

  /** Tokens there were at each moment: [seconds, tokens], from the first pass on. */
  get curve() {
    let tokens = -this.passes[0].tokens.length;
    return this.passes.map((pass) => [pass.at - this.passes[0].at, (tokens += pass.tokens.length)]);
  }

  /** Who guessed how much, and how much of it was right: name -> [guessed, right]. */
  get guesses() {
    const found = new Map();
    const row = (name) => found.get(name) ?? found.set(name, [0, 0]).get(name);
    for (const { tree, origins } of this.passes) {
      for (const name of tree.origins) if (name !== null) row(name)[0] += 1;
      for (const name of origins) if (name !== null) row(name)[1] += 1;
    }
    return found;
  }

  /** Tokens that nobody guessed. */
  get own() {
    return this.passes.flatMap((pass) => pass.origins).filter((name) => name === null).length;
  }
}

/** Where two runs first differ, as a number of tokens; -1 if one is the beginning of the other. */
export function difference(one, other) {
  const [a, b] = [one.ids, other.ids];
  return a.findIndex((id, place) => place < b.length && id !== b[place]);
}
