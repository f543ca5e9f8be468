// A conversation: a tree of turns. Every turn may have several successors; one of them is chosen.

export const VERSION = 1;
const ROLES = ["user", "assistant", "tool"];
const MAX_TURNS = 10_000;

/** Data that is no conversation; the message says why. */
export class InvalidConversation extends Error {}

/** Return a new random name; without `crypto.randomUUID`, which a page without HTTPS lacks. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Conversation {
  constructor({ id = newId(), title = "", created = Date.now(), updated = created, system = "" } = {}) {
    Object.assign(this, { id, title, created, updated, system });
    this.turns = new Map(); // id -> turn
    this.chosen = new Map(); // id of a turn, or "" -> id of the successor that is shown
  }

  /** Return the turns that are shown, in their order. */
  get path() {
    const path = [];
    let turn = this.turns.get(this.chosen.get(""));
    while (turn) {
      path.push(turn);
      turn = this.turns.get(this.chosen.get(turn.id));
    }
    return path;
  }

  /** Add a turn behind `parent` (null: at the beginning), choose it, and return it. */
  add(parent, fields) {
    const turn = { id: newId(), parent: parent?.id ?? null, content: "", ...fields };
    this.turns.set(turn.id, turn);
    this.choose(turn);
    if (!this.title && turn.role === "user") this.title = titleOf(turn);
    return turn;
  }

  /** Show a turn among its siblings. */
  choose(turn) {
    this.chosen.set(turn.parent ?? "", turn.id);
    this.updated = Date.now();
  }

  /** Return the turns at the same place, itself included. */
  siblings(turn) {
    return [...this.turns.values()].filter((each) => each.parent === turn.parent);
  }

  /** Return the turn before, or null. */
  before(turn) {
    return this.turns.get(turn.parent) ?? null;
  }

  /** Take a turn without successors away; its last sibling is shown then. */
  remove(turn) {
    const others = this.siblings(turn).filter((each) => each !== turn);
    this.turns.delete(turn.id);
    if (others.length) this.chosen.set(turn.parent ?? "", others.at(-1).id);
    else this.chosen.delete(turn.parent ?? "");
  }

  /** Return a conversation of its own with the turns up to `turn`. */
  fork(turn) {
    const copy = new Conversation({ title: `${this.title} (branch)`, system: this.system });
    let last = null;
    for (const each of this.path) {
      const { id, parent, ...fields } = structuredClone(each);
      last = copy.add(last, fields);
      if (each === turn) break;
    }
    return copy;
  }

  /** Return what is stored and exported. */
  data() {
    const { id, title, created, updated, system } = this;
    const chosen = Object.fromEntries(this.chosen);
    return { version: VERSION, id, title, created, updated, system, turns: [...this.turns.values()], chosen };
  }
}

function titleOf({ content, attachments }) {
  const line = content.trim().split("\n")[0] || attachments?.[0]?.name || "Conversation";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** Return the messages for the server. */
export function messagesOf(path, system) {
  const messages = path.map(messageOf);
  return system.trim() ? [{ role: "system", content: system.trim() }, ...messages] : messages;
}

function messageOf({ role, content, reasoning, attachments = [], calls, call }) {
  const message = { role, content: [content, ...attachments.map(attached)].filter(Boolean).join("\n\n") };
  if (reasoning) message.reasoning_content = reasoning;
  if (call) message.tool_call_id = call;
  if (calls?.length) {
    message.tool_calls = calls.map(({ id, name, text }) => {
      return { id, type: "function", function: { name, arguments: text } };
    });
  }
  return message;
}

/** Return an attached file as part of a message. */
function attached({ name, text }) {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `File ${name}:\n${fence}\n${text}\n${fence}`;
}

/** Split `<think>...</think>` at the beginning from what follows. */
export function separateReasoning(text) {
  const match = /^\s*<think>([^]*?)(?:<\/think>\s*([^]*))?$/.exec(text);
  return match ? { reasoning: match[1].trim(), content: match[2] ?? "" } : { reasoning: "", content: text };
}

/**
 * Return a conversation of data that was stored or imported.
 *
 * Throws InvalidConversation, with what was found and what was expected.
 */
export function readConversation(data) {
  check(isObject(data), "a conversation is an object");
  check(data.version === VERSION, `expected version ${VERSION}, found ${show(data.version)}`);
  check(/^[\w-]{1,64}$/.test(data.id ?? ""), `expected an id of letters and digits, found ${show(data.id)}`);
  for (const name of ["title", "system"]) {
    check(typeof data[name] === "string", `expected a text as ${name}, found ${show(data[name])}`);
  }
  for (const name of ["created", "updated"]) {
    check(Number.isFinite(data[name]), `expected milliseconds as ${name}, found ${show(data[name])}`);
  }
  check(Array.isArray(data.turns) && data.turns.length <= MAX_TURNS, `expected at most ${MAX_TURNS} turns`);
  const conversation = new Conversation(data);
  data.turns.forEach((turn, index) => {
    const read = readTurn(turn, `turn ${index + 1}`, conversation.turns);
    conversation.turns.set(read.id, read);
  });
  check(isObject(data.chosen), "expected an object as chosen");
  for (const [parent, id] of Object.entries(data.chosen)) {
    const turn = conversation.turns.get(id);
    check(turn && (turn.parent ?? "") === parent, `the chosen turn ${show(id)} is not among the turns`);
    conversation.chosen.set(parent, id);
  }
  return conversation;
}

function readTurn(turn, where, earlier) {
  check(isObject(turn), `${where} is no object`);
  const { id, parent, role, content } = turn;
  check(/^[\w-]{1,64}$/.test(id ?? "") && !earlier.has(id), `${where} needs an id of its own`);
  check(parent === null || earlier.has(parent), `${where} follows ${show(parent)}, which is not before it`);
  check(ROLES.includes(role), `${where} has the role ${show(role)}, expected ${ROLES.join(", ")}`);
  check(typeof content === "string", `${where} needs a text as content`);
  const read = { id, parent, role, content };
  for (const name of ["reasoning", "finish", "call"]) {
    if (turn[name] === undefined || turn[name] === null) continue;
    check(typeof turn[name] === "string", `${where} needs a text as ${name}`);
    read[name] = turn[name];
  }
  if (turn.attachments) read.attachments = texts(turn.attachments, ["name", "text"], `${where}, attachments`);
  if (turn.calls) read.calls = texts(turn.calls, ["id", "name", "text"], `${where}, calls`);
  return read;
}

/** Return copies of objects that have these texts and nothing else. */
function texts(list, names, where) {
  check(Array.isArray(list), `${where}: expected a list`);
  return list.map((each) => {
    const whole = isObject(each) && names.every((name) => typeof each[name] === "string");
    check(whole, `${where}: expected the texts ${names.join(", ")}`);
    return Object.fromEntries(names.map((name) => [name, each[name]]));
  });
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function show(value) {
  const text = JSON.stringify(value) ?? "nothing";
  return text.length > 40 ? `${text.slice(0, 39)}…` : text;
}

function check(holds, reason) {
  if (!holds) throw new InvalidConversation(reason);
}
