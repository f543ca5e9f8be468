// Parses Markdown inside a paragraph: emphasis, code, links, escapes.
//
// Returns a tree of plain objects; no markup is made here. Every leaf knows where it stands in the
// text, so that it can be coloured by its tokens.

const MAX_OPEN = 40; // delimiters that wait for their end; bounds time and depth
const MAX_URL = 2000; // characters
const ESCAPED = /[!-/:-@[-`{-~]/;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const ENTITY = /&(amp|lt|gt|quot|apos|nbsp|#39);/y;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const BARE = /https?:\/\/[^\s<>"'`\])|\\]+/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const SCHEMES = ["http:", "https:", "mailto:"];
const LETTER = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

/** Return an address that a link may have, or null: only absolute ones of the web and of mail. */
export function safeAddress(text) {
  if (text.length > MAX_URL || !URL.canParse(text)) return null;
  const url = new URL(text);
  return SCHEMES.includes(url.protocol) ? url.href : null;
}

/** Parse a text; returns nodes: `{text, at}`, `{tag, children}`, `{tag: "a", href, children}`. */
export function parseInline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  constructor(text) {
    this.text = text;
    this.place = 0;
    this.start = 0; // of the text that is not yet a node
    this.nodes = [];
    this.open = []; // delimiters and brackets, in their order: {kind, node, count}
    this.ticks = backticks(text);
  }

  parse() {
    const { text } = this;
    while (this.place < text.length) {
      if (!this.special(text[this.place])) this.place += 1;
    }
    this.flush(this.place);
    return plain(this.nodes);
  }

  /** Handle a character that may mean something; return whether it did. */
  special(letter) {
    if (letter === "\\") return this.escape();
    if (letter === "`") return this.code();
    if (letter === "*" || letter === "_" || letter === "~") return this.delimiters(letter);
    if (letter === "[" || letter === "!") return this.bracket(letter);
    if (letter === "]") return this.link();
    if (letter === "&") return this.entity();
    if (letter === "\n") return this.lineBreak();
    if (letter === "<") return this.address(ANGLE, 1);
    if (letter === "h") return this.address(BARE, 0);
    return false;
  }

  /** Make the text before `end` a leaf. */
  flush(end) {
    if (end > this.start) {
      this.nodes.push({ text: this.text.slice(this.start, end), at: this.start });
    }
  }

  /** Add a node that stands for the text up to `end`. */
  put(node, end) {
    this.flush(this.place);
    if (node) this.nodes.push(node);
    this.place = this.start = end;
    return true;
  }

  escape() {
    const next = this.text[this.place + 1];
    if (next === "\n") return this.put({ tag: "br" }, this.place + 2);
    if (next === undefined || !ESCAPED.test(next)) return false;
    return this.put({ text: next, at: this.place + 1 }, this.place + 2);
  }

  entity() {
    ENTITY.lastIndex = this.place;
    const match = ENTITY.exec(this.text);
    if (!match) return false;
    const letter = ENTITIES[match[1]] ?? "'";
    return this.put({ text: letter, at: this.place }, ENTITY.lastIndex);
  }

  lineBreak() {
    return this.put({ tag: "br", at: this.place }, this.place + 1);
  }

  code() {
    const { length, close } = this.ticks(this.place);
    const begin = this.place + length;
    if (close < 0) {
      this.place = begin;
      return true;
    }
    let [from, to] = [begin, close];
    const inside = this.text.slice(from, to);
    if (/^[ \n].*[ \n]$/s.test(inside) && inside.trim()) [from, to] = [from + 1, to - 1];
    const leaf = { text: this.text.slice(from, to).replaceAll("\n", " "), at: from };
    return this.put({ tag: "code", children: [leaf] }, close + length);
  }

  delimiters(letter) {
    const { text, place } = this;
    let end = place;
    while (text[end] === letter) end += 1;
    const [before, after] = [text[place - 1] ?? " ", text[end] ?? " "];
    const word = letter === "_";
    const opens = !SPACE.test(after) && !(word && LETTER.test(before));
    const closes = !SPACE.test(before) && !(word && LETTER.test(after));
    let count = end - place;
    if ((letter === "~" && count !== 2) || !(opens || closes)) {
      this.place = end;
      return true;
    }
    this.put(null, place);
    if (closes) count = this.close(letter, count);
    this.start = end - count;
    if (opens && count && this.open.length < MAX_OPEN) {
      const node = { text: text.slice(this.start, end), at: this.start };
      this.open.push({ kind: letter, count, index: this.nodes.push(node) - 1 });
      this.start = end;
    }
    this.place = end;
    return true;
  }

  /** Match `count` closing delimiters with open ones; return how many are left. */
  close(letter, count) {
    while (count) {
      const found = this.open.findLastIndex((each) => each.kind === letter);
      if (found < 0) return count;
      const opener = this.open[found];
      const used = count > 1 && opener.count > 1 ? 2 : 1;
      this.open.length = found + 1; // what opened in between stays text
      const children = this.nodes.splice(opener.index + 1);
      opener.count -= used;
      const node = this.nodes[opener.index];
      node.text = node.text.slice(0, opener.count);
      if (!opener.count) this.open.pop();
      const tag = letter === "~" ? "del" : used === 2 ? "strong" : "em";
      this.nodes.push({ tag, children });
      count -= used;
    }
    return 0;
  }

  bracket(letter) {
    const image = letter === "!";
    if (image && this.text[this.place + 1] !== "[") return false;
    const size = image ? 2 : 1;
    const node = { text: this.text.slice(this.place, this.place + size), at: this.place };
    this.put(node, this.place + size);
    if (this.open.length < MAX_OPEN) {
      this.open.push({ kind: "[", image, index: this.nodes.length - 1 });
    }
    return true;
  }

  /** Make what stands between brackets a link; an image too, since none is fetched. */
  link() {
    const found = this.open.findLastIndex((each) => each.kind === "[");
    if (found < 0) return false;
    const opener = this.open[found];
    TARGET.lastIndex = 0;
    const match = TARGET.exec(this.text.slice(this.place + 1, this.place + 1 + 2 * MAX_URL));
    const href = match && safeAddress(match[1] ?? match[2]);
    if (!href) {
      this.open.splice(found, 1);
      return false;
    }
    this.flush(this.place);
    this.open.length = found;
    const children = this.nodes.splice(opener.index);
    children.shift(); // the bracket itself
    if (!children.length) children.push({ text: href, at: this.place });
    this.nodes.push({ tag: "a", href, children, image: opener.image });
    this.place = this.start = this.place + 1 + match[0].length;
    return true;
  }

  address(pattern, edge) {
    if (edge === 0 && LETTER.test(this.text[this.place - 1] ?? " ")) return false;
    if (this.open.some((each) => each.kind === "[")) return false; // no link within a link
    pattern.lastIndex = this.place;
    const match = pattern.exec(this.text);
    if (!match) return false;
    const shown = edge ? match[1] : match[0].replace(/[.,;:!?*_~]+$/, "");
    const href = safeAddress(shown);
    if (!href) return false;
    const leaf = { text: shown, at: this.place + edge };
    return this.put({ tag: "a", href, children: [leaf] }, this.place + shown.length + 2 * edge);
  }
}

/** Return a function that gives the length of the run of backticks at a place, and its end. */
function backticks(text) {
  const runs = [...text.matchAll(/`+/g)].map((match) => [match.index, match[0].length]);
  const next = new Map(); // start of a run -> start of the next one of the same length
  const last = new Map(); // length -> start
  for (const [start, length] of runs.reverse()) {
    next.set(start, { length, close: last.get(length) ?? -1 });
    last.set(length, start);
  }
  return (place) => next.get(place) ?? { length: 1, close: -1 };
}

/** Return nodes without empty texts. */
function plain(nodes) {
  return nodes
    .filter((node) => node.tag || node.text)
    .map((node) => (node.children ? { ...node, children: plain(node.children) } : node));
}
