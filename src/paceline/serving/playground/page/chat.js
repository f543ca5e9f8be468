// What happens in a conversation: send, stop, regenerate, continue, edit, branch, call tools.

import { Conversation, messagesOf, separateReasoning } from "./conversation.js";
import { byId } from "./dom.js";
import { notify } from "./notices.js";
import { chatRequest } from "./request.js";
import { count } from "./run_card.js";
import { Refused } from "./server.js";
import { StoreError } from "./store.js";
import { Thread } from "./thread.js";
import { choosePass } from "./token_text.js";

const DRAW_MS = 100; // between drawings of an answer that grows

export class Chat {
  conversation = new Conversation();
  failures = new Map(); // id of a turn -> what went wrong after it
  traces = new Map(); // id of an answer -> {record, base, request} of its runs, while the page is open
  answering = null; // {conversation, turn} of the answer under way
  discarded = new Set(); // conversations that are deleted, which an answer under way must not keep
  waiting = ""; // why nothing comes yet
  colours = false; // whether answers are coloured by drafter

  /**
   * `events`: `changed()` after a change of the list of conversations, `inspect()` to open the
   * inspector, `refused(error)` after an error that concerns the whole page.
   */
  constructor(runs, store, events) {
    Object.assign(this, { runs, store, events });
    this.thread = new Thread(this);
    byId("talk").addEventListener("click", (event) => this.pick(event));
    runs.onChoose = (number) => this.markPass(number);
    addEventListener("pagehide", () => this.answering && this.keep(this.answering.conversation));
  }

  // What messages ask

  get busy() {
    return this.runs.busy;
  }

  isAnswering(turn) {
    return this.answering?.turn === turn;
  }

  isLast(turn) {
    return this.conversation.path.at(-1) === turn;
  }

  siblings(turn) {
    return this.conversation.siblings(turn);
  }

  runsOf(turn) {
    return this.traces.get(turn.id) ?? [];
  }

  /** Return the name of the function whose result a turn is. */
  callName(turn) {
    let caller = turn;
    while (caller?.role === "tool") caller = this.conversation.before(caller);
    return caller?.calls?.find(({ id }) => id === turn.call)?.name ?? "a tool";
  }

  // Conversations

  /** Show a conversation; an answer under way elsewhere goes on. */
  open(conversation) {
    this.conversation = conversation;
    this.thread.following = true;
    byId("system").value = conversation.system;
    byId("system-field").open = false;
    this.showSystem();
    this.render();
    if (this.busy) return;
    this.runs.clear();
    byId("status").textContent = byId("usage").textContent = "";
  }

  render() {
    this.thread.render();
    document.title = this.conversation.title ? `${this.conversation.title} · Paceline` : "Paceline";
    this.events.changed();
  }

  setColours(on) {
    this.colours = on;
    this.thread.render();
  }

  setSystem(text) {
    this.conversation.system = text;
    this.showSystem();
    if (this.conversation.turns.size) this.keep(this.conversation);
  }

  showSystem() {
    const text = this.conversation.system.trim().replaceAll("\n", " ");
    byId("system-summary").textContent = text ? `System prompt: ${text}` : "System prompt";
  }

  keep(conversation) {
    if (this.discarded.has(conversation)) return;
    try {
      this.store.save(conversation);
    } catch (error) {
      if (!(error instanceof StoreError)) throw error;
      if (error.message !== this.complaint) notify(error.message, { bad: true });
      this.complaint = error.message; // once is enough
    }
  }

  // Actions

  /** Send a turn of the user's. */
  async send(fields) {
    const { conversation } = this;
    const last = conversation.path.at(-1) ?? null;
    this.thread.following = true;
    await this.answer(conversation.add(last, { role: "user", ...fields }));
  }

  async edit(turn, content) {
    if (this.busy || !(content.trim() || turn.attachments)) return;
    const { role, attachments } = turn;
    const fields = { role, content, ...(attachments && { attachments }) };
    const edited = this.conversation.add(this.conversation.before(turn), fields);
    if (role === "user") {
      await this.answer(edited);
      return;
    }
    this.keep(this.conversation);
    this.render();
  }

  async regenerate(turn) {
    if (this.busy) return;
    const before = this.conversation.before(turn);
    const others = this.siblings(turn);
    const made = await this.answer(before, null, others.length);
    if (made && others.some((other) => other.content === made.content)) {
      notify("The same text as before; a higher temperature in Settings varies it.");
    }
  }

  async continueTurn(turn) {
    if (this.busy) return;
    const before = turn.content;
    await this.answer(this.conversation.before(turn), turn);
    if (turn.content === before && turn.finish === "stop") {
      notify("The model ended its answer at once: it had nothing to add.");
    }
  }

  /** Answer again after a failure. */
  async retry(turn) {
    if (this.busy) return;
    if (turn.role === "assistant") await this.regenerate(turn);
    else await this.answer(turn);
  }

  async sendResults(turn, results) {
    if (this.busy) return;
    let last = turn;
    turn.calls.forEach(({ id }, index) => {
      last = this.conversation.add(last, { role: "tool", call: id, content: results[index] });
    });
    await this.answer(last);
  }

  choose(turn) {
    if (this.busy) return;
    this.conversation.choose(turn);
    this.keep(this.conversation);
    this.render();
  }

  /** Continue from a turn in a conversation of its own. */
  fork(turn) {
    const copy = this.conversation.fork(turn);
    this.keep(copy);
    this.open(copy);
    notify("A new conversation begins here; the other one stays as it is.");
  }

  /** Show the last run of an answer in the inspector. */
  inspect(turn) {
    const trace = this.runsOf(turn).at(-1);
    if (this.runs.paced.record !== trace.record) this.runs.show(trace.record, trace.request);
    this.events.inspect();
  }

  /** Choose the pass of a token that was clicked on. */
  pick({ target }) {
    const { pass } = target.dataset;
    if (!pass || this.busy) return;
    const trace = this.traces.get(target.closest("[data-turn]")?.dataset.turn)?.at(-1);
    if (!trace) return;
    if (this.runs.paced.record !== trace.record) this.runs.show(trace.record, trace.request);
    this.runs.choose(Number(pass));
  }

  /** Mark the tokens of the pass that the inspector shows. */
  markPass(number) {
    for (const [id, { element }] of this.thread.messages) {
      const here = this.traces.get(id)?.at(-1).record === this.runs.paced.record;
      choosePass(element, here ? number : -1);
    }
  }

  // Answers

  /**
   * Answer the turn `before`, or continue `turn`; return the answer, or null where none came.
   *
   * `variant` is added to the seed, so that a regenerated answer with a fixed seed is another one.
   */
  async answer(before, turn = null, variant = 0) {
    const { conversation } = this;
    if (this.busy) return null;
    const continued = turn !== null;
    this.failures.delete(before?.id);
    const shown = turn ?? conversation.add(before, { role: "assistant" });
    this.failures.delete(shown.id);
    const growth = new Growth(shown, continued);
    this.answering = { conversation, turn: shown };
    this.keep(conversation);
    try {
      await this.runs.during(async () => {
        this.render();
        await this.stream(growth, this.request(conversation, shown, continued, variant));
      });
    } catch (error) {
      growth.failure = failureText(error);
      if (error.status === 401) this.events.refused(error);
      byId("status").textContent = "";
    }
    this.answering = null;
    this.waiting = "";
    return this.finish(conversation, before, growth);
  }

  request(conversation, turn, continued, variant) {
    const path = conversation.path;
    const turns = path.slice(0, path.indexOf(turn) + (continued ? 1 : 0));
    if (continued && turn.reasoning && !turn.content) {
      turns[turns.length - 1] = { role: "assistant", content: `<think>\n${turn.reasoning}` };
    }
    const [address, body] = chatRequest(messagesOf(turns, conversation.system), continued);
    if (byId("seed").value !== "") body.seed += variant;
    return [address, body];
  }

  /** Run a request; while the server loads its model, ask again and again. */
  async stream(growth, request) {
    const { turn } = growth;
    let timer = 0;
    const draw = () => {
      timer = 0;
      this.thread.update(turn);
    };
    const onPiece = (piece, record) => {
      this.waiting = "";
      if (!growth.trace && piece.paceline) {
        growth.trace = { record, base: growth.base, request };
        this.traces.set(turn.id, [...this.runsOf(turn), growth.trace]);
      }
      growth.add(piece.choices[0]?.delta ?? {});
      if (piece.usage) showUsage(piece.usage, this.runs.known()?.context);
      growth.finish = piece.choices[0]?.finish_reason ?? growth.finish;
      timer ||= setTimeout(draw, DRAW_MS);
    };
    try {
      for (;;) {
        try {
          return await this.runs.run(request, onPiece);
        } catch (error) {
          if (!(error instanceof Refused && error.loading) || growth.trace) throw error;
          this.waiting = `Not ready: ${error.message}. Asking again every few seconds.`;
          this.thread.update(turn);
          if (!(await pause(error.wait ?? 2, this.runs.control.signal))) {
            this.runs.stopped = true;
            return undefined;
          }
        }
      }
    } finally {
      clearTimeout(timer);
    }
  }

  /** Keep what was written, or take an answer without a word away; say what went wrong. */
  finish(conversation, before, { turn, continued, failure, finish }) {
    const written = turn.content || turn.reasoning || turn.calls?.length;
    const ended = finish && !failure;
    if (written || continued) {
      turn.finish = finish ?? (failure ? "error" : "stopped");
      if (failure) this.failures.set(turn.id, failure);
    } else {
      conversation.remove(turn);
      if (failure) this.failures.set(before?.id, failure);
      else if (ended) this.failures.set(before?.id, "The model ended its answer before the first word.");
      else this.failures.set(before?.id, "Stopped before the first word.");
    }
    conversation.updated = Date.now();
    this.keep(conversation);
    this.render();
    return written ? turn : null;
  }
}

/** An answer as it grows. */
class Growth {
  trace = null;
  failure = "";
  finish = null;
  content = "";
  reasoning = "";

  constructor(turn, continued) {
    this.turn = turn;
    this.continued = continued;
    this.before = { content: turn.content, reasoning: turn.reasoning ?? "" };
    this.base = turn.content.length;
    this.thinking = continued && !turn.content && this.before.reasoning !== "";
  }

  add({ content, reasoning_content: reasoning, tool_calls: calls }) {
    const { turn, before } = this;
    this.content += content ?? "";
    this.reasoning += reasoning ?? "";
    if (this.thinking) {
      // The reasoning was cut; the server sends the rest of it as content.
      Object.assign(turn, separateReasoning(`<think>${before.reasoning}${this.content}`));
    } else {
      turn.content = before.content + this.content;
      if (this.reasoning) turn.reasoning = before.reasoning + this.reasoning;
    }
    for (const { id, function: called } of calls ?? []) {
      turn.calls = [...(turn.calls ?? []), { id, name: called.name, text: called.arguments }];
    }
  }
}

/** Wait some seconds; return false where `signal` ended that. */
function pause(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(true), 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve(false);
    });
  });
}

function failureText(error) {
  if (error instanceof Refused) return error.message;
  console.error(error);
  return `The page failed: ${error.message}`;
}

function showUsage({ total_tokens: used }, context) {
  const share = context ? ` of ${context.toLocaleString("en")}` : "";
  byId("usage").textContent = `${used.toLocaleString("en")}${share} tokens of context used`;
  byId("usage").title = count(used, "token");
}
