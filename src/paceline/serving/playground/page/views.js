// What is below the text: the pace, who guessed what, and the tree of a pass.

import { chart } from "./chart.js";
import { colour } from "./colours.js";
import { count } from "./side.js";
import { draw } from "./tree.js";

const field = (id) => document.getElementById(id);
const share = (right, guessed) => (guessed ? `${Math.round((100 * right) / guessed)} %` : "–");

/** The lines of both runs. */
export function pace(paced, plain) {
  field("views").hidden = false;
  chart(field("chart"), [
    ["with the pace line", "paced", paced],
    ["pace line off", "plain", plain],
  ]);
}

/** A row for each drafter that guessed. */
export function legend(record) {
  const rows = [...record.guesses].map(([name, [guessed, right]]) => {
    return row(colour(name), name, guessed, right, share(right, guessed));
  });
  rows.push(row("own", "the model", "", record.own, ""));
  document.querySelector("#legend tbody").replaceChildren(...rows);
}

function row(css, name, ...cells) {
  const found = document.createElement("tr");
  const head = document.createElement("th");
  const key = document.createElement("span");
  head.scope = "row";
  key.className = `key ${css}`;
  key.textContent = name;
  head.append(key);
  found.append(head);
  for (const cell of cells) found.insertCell().textContent = cell.toLocaleString("en");
  return found;
}

/** Let the slider choose among a record's passes, at first the one that got furthest. */
export function passes(record, words) {
  const slider = field("pass");
  slider.max = Math.max(record.passes.length, 1);
  const show = (number) => {
    const pass = record.passes[number];
    if (!pass) return;
    slider.value = number + 1;
    const said = `${number + 1} of ${record.passes.length}`;
    field("pass-number").value = said;
    slider.setAttribute("aria-valuetext", said);
    field("pass-summary").textContent = summary(pass);
    draw(field("tree"), pass);
    words.choose(number);
  };
  slider.oninput = () => show(slider.valueAsNumber - 1);
  const far = Math.max(...record.passes.map((pass) => pass.tokens.length));
  show(record.passes.findIndex((pass) => pass.tokens.length === far));
  return show;
}

function summary({ passes, tree, tokens, origins }) {
  if (passes > 1) return `${passes} passes that came as one; the tree is the last one's.`;
  const guesses = tree.tokens.length - 1;
  if (!guesses) return "Nothing was guessed: one token for one pass of the model.";
  const right = origins.filter((name) => name !== null).length;
  const gain = `${count(tokens.length, "token")} for one pass of the model`;
  return `${count(guesses, "guess", "guesses")}, ${right} right: ${gain}.`;
}
