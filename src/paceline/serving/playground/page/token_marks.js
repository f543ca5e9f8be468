// Colours an answer that is shown as Markdown: which characters of it came with which token.

import { tokensOf } from "./record.js";
import { tokenElement } from "./token_text.js";

/**
 * Return the tokens of an answer with their places in it: `{start, end, token}`, in order.
 *
 * `runs` are `{record, base}`: what ran, and where in `text` its part begins. What was taken out of
 * a run's text, such as reasoning, is found by where the rest begins.
 */
export function marksOf(text, runs) {
  return runs.flatMap(({ record, base }, index) => {
    const end = runs[index + 1]?.base ?? text.length;
    const last = index + 1 === runs.length; // the one that the inspector can show
    const offset = record.text.indexOf(text.slice(base, end));
    if (offset < 0) return [];
    let place = base - offset;
    return record.passes.flatMap((pass, number) =>
      tokensOf(pass, number).map((token) => {
        const start = place;
        place += token.text.length;
        return { start, end: place, token: last ? token : { ...token, pass: null } };
      }),
    );
  });
}

/** Return a writer for `showMarkdown` that colours by marks. */
export function markedWriter(marks) {
  return (parent, text, at) => {
    let index = firstAfter(marks, at);
    let place = 0;
    while (place < text.length) {
      const mark = marks[index];
      const covered = mark && mark.start <= at + place;
      const end = Math.min(text.length, (mark ? (covered ? mark.end : mark.start) : Infinity) - at);
      const piece = text.slice(place, end);
      parent.append(covered ? tokenElement(mark.token, piece) : piece);
      place = end;
      if (covered) index += 1;
      while (marks[index] && marks[index].end <= at + place) index += 1;
    }
  };
}

/** Return the index of the first mark that ends behind a place. */
function firstAfter(marks, place) {
  let [low, high] = [0, marks.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (marks[middle].end <= place) low = middle + 1;
    else high = middle;
  }
  return low;
}
