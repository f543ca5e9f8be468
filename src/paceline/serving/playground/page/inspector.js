// The inspector: speed over time, what each drafter proposed, and the draft tree of a pass.

import { chart } from "./chart.js";
import { colour } from "./colours.js";
import { byId } from "./dom.js";
import { count } from "./run_card.js";
import { draw } from "./tree.js";

const share = (accepted, proposed) => (proposed ? `${Math.round((100 * accepted) / proposed)} %` : "–");

/** Draw the lines of both runs. */
export function showPace(paced, plain) {
  byId("views").hidden = false;
  byId("nothing").hidden = true;
  chart(byId("chart"), [
    ["with the pace line", "paced", paced],
    ["pace line off", "plain", plain],
  ]);
}

/** Show that there is no run to inspect. */
export function showNothing() {
  byId("views").hidden = true;
  byId("nothing").hidden = false;
}

/** Show a row for each drafter that proposed tokens. */
export function showDrafters(record) {
  const rows = [...record.drafted].map(([name, [proposed, accepted]]) => {
    return row(colour(name), name, proposed, accepted, share(accepted, proposed));
  });
  rows.push(row("own", "the model", "", record.own, ""));
  document.querySelector("#legend tbody").replaceChildren(...rows);
}

function row(css, name, ...cells) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  const key = document.createElement("span");
  head.scope = "row";
  key.className = `key ${css}`;
  key.textContent = name;
  head.append(key);
  line.append(head);
  for (const cell of cells) line.insertCell().textContent = cell.toLocaleString("en");
  return line;
}

/** Let the slider choose among a record's passes; return a function that shows one by its number. */
export function showPasses(record, onChoose) {
  const slider = byId("pass");
  slider.max = Math.max(record.passes.length, 1);
  const show = (number) => {
    const pass = record.passes[number];
    if (!pass) return;
    slider.value = number + 1;
    const label = `${number + 1} of ${record.passes.length}`;
    byId("pass-number").value = label;
    slider.setAttribute("aria-valuetext", label);
    byId("pass-summary").textContent = summary(pass);
    draw(byId("tree"), pass);
    onChoose(number);
  };
  slider.oninput = () => show(slider.valueAsNumber - 1);
  const longest = Math.max(...record.passes.map((pass) => pass.tokens.length));
  show(record.passes.findIndex((pass) => pass.tokens.length === longest));
  return show;
}

function summary({ passes, tree, tokens, origins }) {
  if (passes > 1) return `${passes} passes that came as one; the tree is the last one's.`;
  const drafted = tree.tokens.length - 1;
  if (!drafted) return "Nothing was drafted: one token for one pass of the model.";
  const accepted = origins.filter((name) => name !== null).length;
  const gain = `${count(tokens.length, "token")} for one pass of the model`;
  return `${count(drafted, "drafted token")}, ${accepted} accepted: ${gain}.`;
}
