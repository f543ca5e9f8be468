// A draft tree: the accepted path runs straight along the top, rejected branches hang below it.

import { colour } from "./colours.js";
import { mark, width } from "./drawing.js";

const FONT = '13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
const ROW = 32;
const BOX = 24;
const GAP = 26;
const LONGEST = 18; // characters

/** Draw the tree of a pass into `svg`. */
export function draw(svg, pass) {
  const nodes = layOut(pass);
  const rows = place(nodes, 0, 0);
  const wide = []; // of each column
  for (const node of nodes) wide[node.depth] = Math.max(wide[node.depth] ?? 0, node.width);
  const left = [1];
  wide.forEach((each, depth) => left.push(left[depth] + each + GAP));
  for (const node of nodes) {
    node.x = left[node.depth];
    node.y = node.row * ROW + BOX / 2 + 2;
  }
  const [across, down] = [left.at(-1) - GAP + 2, rows * ROW - (ROW - BOX) + 4];
  svg.setAttribute("viewBox", `0 0 ${across} ${down}`);
  svg.setAttribute("width", across);
  svg.setAttribute("height", down);
  const accepted = nodes.filter((node) => node.taken).map((node) => node.label);
  svg.setAttribute("aria-label", `Accepted: ${accepted.join(" ")}`);
  const below = nodes.slice(1).sort((a, b) => a.taken - b.taken); // the path over the rest
  svg.replaceChildren(...below.map((node) => edge(nodes[node.parent], node)), ...nodes.map(box));
}

/** Return the nodes to draw: the tree's, and the token that the model sampled at the path's end. */
function layOut({ tree, texts, origins }) {
  const nodes = tree.tokens.map((text, index) => ({
    label: label(text),
    parent: tree.parents[index],
    probability: tree.scores[index],
    origin: tree.origins[index],
    taken: tree.path.includes(index),
    children: [],
  }));
  if (origins.at(-1) === null) {
    const parent = tree.path.at(-1);
    nodes.push({ label: label(texts.at(-1)), parent, drawn: true, taken: true, children: [] });
  }
  nodes.forEach((node, index) => {
    node.percent = index && !node.drawn ? `${Math.round(100 * node.probability)}` : "";
    const extra = node.percent && width(node.percent, FONT) * 0.85 + 7;
    node.width = Math.ceil(width(node.label, FONT) + Number(extra)) + 18;
    if (index) nodes[node.parent].children.push(index);
  });
  for (const { children } of nodes) {
    children.sort((a, b) => nodes[b].taken - nodes[a].taken || nodes[b].probability - nodes[a].probability);
  }
  return nodes;
}

/** Give the branch at `index` rows from `row` on; return the first row below it. */
function place(nodes, index, row) {
  const node = nodes[index];
  node.row = row;
  node.depth = index ? nodes[node.parent].depth + 1 : 0;
  let next = row;
  for (const child of node.children) next = place(nodes, child, next);
  return Math.max(next, row + 1);
}

function box(node, index) {
  const kind = node.drawn ? "own drawn" : index ? colour(node.origin) : "own";
  const { x, y, width: wide } = node;
  const inside = [
    mark("title", {}, tip(node, index)),
    mark("rect", { x, y: y - BOX / 2, width: wide, height: BOX, rx: 6 }),
    mark("text", { x: x + 9, y: y + 4.5 }, node.label),
  ];
  if (node.percent) {
    const end = { class: "probability", x: x + wide - 8, y: y + 4.5, "text-anchor": "end" };
    inside.push(mark("text", end, node.percent));
  }
  return mark("g", { class: `node ${kind}${node.taken ? " taken" : ""}` }, ...inside);
}

function edge(above, node) {
  const [x1, y1, x2, y2] = [above.x + above.width, above.y, node.x, node.y];
  const path = y1 === y2
    ? `M${x1} ${y1}H${x2}`
    : `M${x1} ${y1}h6q6 0 6 6V${y2 - 6}q0 6 6 6H${x2}`;
  return mark("path", { class: `edge${node.taken ? " taken" : ""}`, d: path });
}

function tip(node, index) {
  if (!index) return "the last token before this pass";
  if (node.drawn) return "the model's own";
  const end = node.taken ? "accepted" : "rejected";
  return `${node.origin}: probability ${Math.round(100 * node.probability)} %, ${end}`;
}

function label(text) {
  const drawn = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").trim();
  const shown = drawn || (text ? "␣" : "·");
  const letters = [...shown];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : shown;
}
