// Shows Markdown as elements. Only element names of this file are made, and texts stay texts.

import { copyButton, make } from "./dom.js";
import { codeParts } from "./highlight.js";
import { parseInline } from "./inline.js";
import { linesOf, parseBlocks } from "./markdown.js";

const shown = new WeakMap(); // container -> sources of its blocks
const asText = (parent, text) => parent.append(text);

/**
 * Show a text in a container. Blocks that have not changed stay, with what is selected in them.
 *
 * `write(parent, text, at)` adds a piece of text that begins at character `at` of the source.
 */
export function showMarkdown(container, text, write = asText) {
  const lines = linesOf(text);
  const blocks = parseBlocks(lines);
  const sources = blocks.map(({ from, size }) => {
    const source = lines.slice(from, from + size).map((line) => line.text);
    return `${lines[from].at}:${source.join("\n")}`;
  });
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same += 1;
  while (container.children.length > same) container.lastElementChild.remove();
  for (const block of blocks.slice(same)) container.append(element(block, write));
  shown.set(container, sources);
}

/** Forget what a container shows, so that all of it is drawn again. */
export function clearMarkdown(container) {
  shown.delete(container);
  container.replaceChildren();
}

function element(block, write) {
  if (block.kind === "code") return codeBlock(block, write);
  if (block.kind === "heading") return inlines(`h${Math.min(block.level + 2, 6)}`, block.inside, write);
  if (block.kind === "rule") return make("hr");
  if (block.kind === "quote") {
    return make("blockquote", {}, ...block.blocks.map((each) => element(each, write)));
  }
  if (block.kind === "list") return listElement(block, write);
  if (block.kind === "table") return tableElement(block, write);
  return inlines("p", block.inside, write);
}

function codeBlock({ info, inside }, write) {
  const code = make("code");
  const language = info.split(/\s/)[0];
  const text = inside.map((line) => line.text).join("\n");
  if (write === asText) {
    for (const part of codeParts(text, language)) {
      code.append(part.kind ? make("span", { class: `code-${part.kind}` }, part.text) : part.text);
    }
  } else {
    inside.forEach((line, index) => {
      write(code, line.text + (index + 1 < inside.length ? "\n" : ""), line.at);
    });
  }
  return make(
    "div",
    { class: "code" },
    make("div", { class: "code-head" }, make("span", {}, language), copyButton("Copy code", () => text)),
    make("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, code),
  );
}

function listElement({ ordered, start, items, loose }, write) {
  const rows = items.map(({ blocks, checked }) => {
    const row = make("li", { class: checked === undefined ? null : "task" });
    if (checked !== undefined) {
      const state = checked ? "Done" : "Open";
      row.append(make("input", { type: "checkbox", disabled: true, checked, "aria-label": state }));
    }
    for (const block of blocks) {
      if (block.kind === "paragraph" && !loose) fill(row, block.inside, write);
      else row.append(element(block, write));
    }
    return row;
  });
  return make(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? String(start) : null }, ...rows);
}

function tableElement({ head, columns, rows }, write) {
  const row = (cells, tag) =>
    make("tr", {}, ...cells.map((cell, index) => {
      const made = inlines(tag, [cell], write);
      made.classList.add(columns[index]);
      return made;
    }));
  const body = make("tbody", {}, ...rows.map((cells) => row(cells, "td")));
  const table = make("table", {}, make("thead", {}, row(head, "th")), body);
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

function inlines(tag, lines, write) {
  return fill(make(tag), lines, write);
}

/** Add lines, as one text, to an element. */
function fill(parent, lines, write) {
  const starts = [];
  let length = 0;
  for (const line of lines) {
    starts.push(length);
    length += line.text.length + 1;
  }
  const source = (place) => {
    const index = starts.findLastIndex((start) => start <= place);
    return lines[index].at + place - starts[index];
  };
  const text = lines.map((line) => line.text).join("\n");
  add(parent, parseInline(text), (to, piece, place) => write(to, piece, source(place)));
  return parent;
}

function add(parent, nodes, write) {
  for (const node of nodes) {
    if (!node.tag) write(parent, node.text, node.at);
    else if (node.tag === "br") parent.append(make("br"));
    else if (node.tag === "a") add(linkTo(parent, node), node.children, write);
    else add(parent.appendChild(make(node.tag)), node.children, write);
  }
}

function linkTo(parent, { href, image }) {
  const link = make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });
  if (image) link.append("Image: ");
  parent.append(link);
  return link;
}
