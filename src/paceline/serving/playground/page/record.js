// A run's passes, and what follows from them.

export class Record {
  passes = [];
  tokens = 0;
  finish = null;

  /**
   * Add a pass: `tokens`, `texts`, `origins` of each, `at` in seconds, `tree`. Where several
   * `passes` came as one, because the page was slow, the tree is the last one's.
   */
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

  /** Number of tokens over time: [seconds, tokens], from the first pass on. */
  get curve() {
    let tokens = -this.passes[0].tokens.length;
    return this.passes.map((pass) => [pass.at - this.passes[0].at, (tokens += pass.tokens.length)]);
  }

  /** Number of passes of the model. */
  get passCount() {
    return this.passes.reduce((sum, pass) => sum + pass.passes, 0);
  }

  /** Passes that came with their trees. */
  get traced() {
    return this.passes.filter((pass) => pass.passes === 1);
  }

  /** Proposed and accepted tokens of each drafter, as far as traced: name -> [proposed, accepted]. */
  get drafted() {
    const counts = new Map();
    const row = (name) => counts.get(name) ?? counts.set(name, [0, 0]).get(name);
    for (const { tree, origins } of this.traced) {
      for (const name of tree.origins) if (name !== null) row(name)[0] += 1;
      for (const name of origins) if (name !== null) row(name)[1] += 1;
    }
    return counts;
  }

  /** Number of tokens that no drafter proposed, as far as traced. */
  get own() {
    return this.traced.flatMap((pass) => pass.origins).filter((name) => name === null).length;
  }
}

/**
 * Return a pass's tokens: `{text, pass, name, probability}`; `name` is the drafter, null for the
 * model, and `probability` the drafter's, null where the pass came without its tree.
 */
export function tokensOf(pass, number) {
  const alone = pass.passes === 1;
  const first = alone ? 0 : pass.tokens.length - pass.tree.path.length; // that the tree is of
  const whole = alone || pass.origins.at(-1) === null;
  return pass.texts.map((text, index) => {
    const node = whole && index >= first ? pass.tree.path[index - first + 1] : undefined;
    const probability = node === undefined ? null : pass.tree.scores[node];
    return { text, pass: number, name: pass.origins[index], probability };
  });
}

/** Return where two runs first differ, as a number of tokens; -1 if one is the other's beginning. */
export function difference(one, other) {
  const [a, b] = [one.ids, other.ids];
  return a.findIndex((id, place) => place < b.length && id !== b[place]);
}
