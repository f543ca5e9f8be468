// Parses Markdown into blocks: headings, lists, quotations, code, tables, paragraphs.
//
// Markup in a text stays text. A line is `{text, at}`: what is left of it inside its block, and
// where that begins in the source.

const MAX_DEPTH = 10; // of lists and quotations in each other
const FENCE = /^(\s*)(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const indent = (text) => text.length - text.trimStart().length;

/** Return the lines of a text. */
export function linesOf(text) {
  let at = 0;
  return text.split("\n").map((each) => {
    const line = { text: each, at };
    at += each.length + 1;
    return line;
  });
}

/** Return the blocks of lines; each has a `kind` and the number of its `lines`. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let place = 0;
  while (place < lines.length) {
    if (!lines[place].text.trim()) {
      place += 1;
      continue;
    }
    const block = parseBlock(lines, place, depth);
    block.from = place;
    place += block.size;
    blocks.push(block);
  }
  return blocks;
}

function parseBlock(lines, place, depth) {
  const { text } = lines[place];
  const fence = FENCE.exec(text);
  if (fence) return code(lines, place, fence);
  const heading = HEADING.exec(text);
  if (heading) {
    const line = cut(lines[place], heading[0].length);
    line.text = line.text.replace(/(?:^|\s+)#+\s*$/, "");
    return { kind: "heading", level: heading[1].length, inside: [line], size: 1 };
  }
  if (RULE.test(text)) return { kind: "rule", size: 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(text)) return quotation(lines, place, depth);
    if (ITEM.test(text)) return list(lines, place, depth);
  }
  const delimiter = lines[place + 1]?.text;
  if (text.includes("|") && delimiter?.includes("-") && DELIMITER.test(delimiter)) {
    const head = cells(lines[place]);
    const columns = cells(lines[place + 1]).map(({ text: mark }) => alignment(mark));
    if (head.length === columns.length) return table(lines, place, head, columns);
  }
  return paragraph(lines, place, depth);
}

function cut({ text, at }, count) {
  return { text: text.slice(count), at: at + count };
}

function code(lines, place, [, space, mark, info]) {
  const end = new RegExp(`^\\s*${mark[0]}{${mark.length},}\\s*$`);
  const inside = [];
  let next = place + 1;
  while (next < lines.length && !end.test(lines[next].text)) {
    inside.push(cut(lines[next], Math.min(indent(lines[next].text), space.length)));
    next += 1;
  }
  const closed = next < lines.length;
  return { kind: "code", info: info.trim(), inside, size: next - place + closed, closed };
}

function quotation(lines, place, depth) {
  const inside = [];
  let next = place;
  while (next < lines.length) {
    const match = QUOTE.exec(lines[next].text);
    const lazy = !match && inside.at(-1).text.trim() && continues(lines[next].text);
    if (!match && !lazy) break;
    inside.push(match ? cut(lines[next], match[0].length) : lines[next]);
    next += 1;
  }
  return { kind: "quote", blocks: parseBlocks(inside, depth + 1), size: next - place };
}

function list(lines, place, depth) {
  const first = ITEM.exec(lines[place].text);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let next = place;
  let loose = false;
  while (next < lines.length) {
    const match = ITEM.exec(lines[next].text);
    if (!match || RULE.test(lines[next].text)) break;
    if (match[1].length > first[1].length + 1 && items.length) break;
    if (/\d/.test(match[2]) !== ordered || match[2].at(-1) !== first[2].at(-1)) break;
    const item = itemLines(lines, next, match);
    next += item.length;
    const blank = blankEnd(item);
    const again = next < lines.length && ITEM.test(lines[next].text);
    const blocks = parseBlocks(item, depth + 1);
    loose ||= (blank > 0 && again) || gaps(blocks);
    items.push(task(blocks));
  }
  const start = ordered ? Number.parseInt(first[2], 10) : null;
  return { kind: "list", ordered, start, items, loose, size: next - place };
}

/** Return the lines of the item at `place`, without its marker and indentation. */
function itemLines(lines, place, [marker, space]) {
  const width = Math.min(marker.length, space.length + 5);
  const item = [cut(lines[place], marker.length)];
  let next = place + 1;
  while (next < lines.length) {
    const { text } = lines[next];
    const blank = !text.trim();
    const inner = indent(text) > space.length + 1;
    const lazy = item.at(-1).text.trim() && continues(text) && !ITEM.test(text);
    if (!blank && !inner && !lazy) break;
    item.push(cut(lines[next], Math.min(indent(text), width)));
    next += 1;
  }
  return item;
}

function blankEnd(lines) {
  return lines.length - 1 - lines.findLastIndex(({ text }) => text.trim());
}

/** Return whether blank lines stand between paragraphs. */
function gaps(blocks) {
  return blocks.some(({ kind }, index) => kind === "paragraph" && blocks[index - 1]?.kind === kind);
}

/** Return an item; `checked` is true or false where it is a task. */
function task(blocks) {
  const line = blocks[0]?.kind === "paragraph" ? blocks[0].inside[0] : null;
  const match = line && /^\[([ xX])\]\s+/.exec(line.text);
  if (!match) return { blocks };
  blocks[0].inside[0] = cut(line, match[0].length);
  return { blocks, checked: match[1] !== " " };
}

/** Return the cells of a row; `\|` and bars in code do not end one. */
function cells({ text, at }) {
  const ends = [];
  let inCode = false;
  for (let place = 0; place < text.length; place++) {
    if (text[place] === "\\") place += 1;
    else if (text[place] === "`") inCode = !inCode;
    else if (text[place] === "|" && !inCode) ends.push(place);
  }
  const bounds = [-1, ...ends, text.length];
  const found = bounds.slice(1).map((end, index) => {
    const from = bounds[index] + 1;
    const cell = text.slice(from, end);
    return { text: cell.trim(), at: at + from + indent(cell) };
  });
  if (!found[0].text && ends.length) found.shift();
  if (!found.at(-1)?.text && found.length > 1) found.pop();
  return found;
}

function alignment(mark) {
  const [left, right] = [mark.startsWith(":"), mark.endsWith(":")];
  return right ? (left ? "center" : "end") : "start";
}

function table(lines, place, head, columns) {
  const rows = [];
  let next = place + 2;
  while (next < lines.length && lines[next].text.includes("|")) {
    const row = cells(lines[next]);
    rows.push(columns.map((_, index) => row[index] ?? { text: "", at: lines[next].at }));
    next += 1;
  }
  return { kind: "table", head, columns, rows, size: next - place };
}

function paragraph(lines, place, depth) {
  let next = place + 1;
  while (next < lines.length && continues(lines[next].text, depth)) next += 1;
  const inside = lines.slice(place, next).map((line) => cut(line, indent(line.text)));
  return { kind: "paragraph", inside, size: next - place };
}

/** Return whether a line goes on with a paragraph. */
function continues(text, depth = 0) {
  if (!text.trim() || FENCE.test(text) || HEADING.test(text) || RULE.test(text)) return false;
  if (depth >= MAX_DEPTH) return true;
  const item = ITEM.exec(text);
  return !QUOTE.test(text) && !(item && /^(?:[-*+]|1[.)])$/.test(item[2]) && item[0].length < text.length);
}
