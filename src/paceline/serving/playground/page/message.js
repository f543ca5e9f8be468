// One turn of a conversation as an element: its text, reasoning, files, tool calls and actions.

import { separateReasoning } from "./conversation.js";
import { copyButton, icon, iconButton, make } from "./dom.js";
import { clearMarkdown, showMarkdown } from "./render.js";
import { markedWriter, marksOf } from "./token_marks.js";

const NAMES = { user: "You", assistant: "Model", tool: "Tool" };
const ENDS = {
  length: "Cut at the limit of tokens.",
  stopped: "Stopped.",
  timeout: "Cut by the time limit.",
  error: "Broken off.",
};

export class Message {
  /** `chat` answers what surrounds the turn, and does what its buttons ask for. */
  constructor(turn, chat) {
    this.turn = turn;
    this.chat = chat;
    this.body = make("div", { class: turn.role === "assistant" ? "body markdown" : "body" });
    this.reasoning = make("div", { class: "markdown" });
    this.reasoningLabel = make("summary");
    this.folded = make("details", { class: "reasoning", hidden: true }, this.reasoningLabel, this.reasoning);
    this.after = make("div", { class: "after" });
    this.element = make(
      "li",
      { class: `turn ${turn.role}`, "data-turn": turn.id },
      make("b", { class: "unseen" }, this.name),
      ...(turn.role === "assistant" ? [this.folded] : []),
      this.body,
      this.after,
    );
    this.draw();
  }

  get name() {
    if (this.turn.role !== "tool") return NAMES[this.turn.role];
    return `Result of ${this.chat.callName(this.turn)}`;
  }

  /** Show the turn as it is now. */
  draw() {
    const { turn, chat } = this;
    const busy = chat.isAnswering(turn);
    this.element.toggleAttribute("data-busy", busy);
    this.element.setAttribute("aria-busy", String(busy));
    if (turn.role === "assistant") this.drawAnswer(busy);
    else this.drawSaid();
    this.after.replaceChildren(...this.parts(busy));
  }

  drawSaid() {
    const { content, attachments = [], role } = this.turn;
    const files = attachments.map(({ name, text }) => {
      const summary = make("summary", {}, icon("file"), name);
      return make("details", { class: "file" }, summary, make("pre", { tabindex: "0" }, text));
    });
    const text = content && make(role === "tool" ? "pre" : "p", { class: "said" }, content);
    const title = role === "tool" && make("div", { class: "call-name" }, icon("tool"), this.name);
    this.body.replaceChildren(...[title, ...files, text].filter(Boolean));
  }

  drawAnswer(busy) {
    const { turn, chat } = this;
    const parts = turn.reasoning
      ? { reasoning: turn.reasoning, content: turn.content }
      : separateReasoning(turn.content);
    const runs = chat.colours ? chat.runsOf(turn) : [];
    const key = runs.length ? "marked" : "plain";
    if (this.key !== key) [this.body, this.reasoning].forEach(clearMarkdown);
    this.key = key;
    const marks = runs.length ? marksOf(turn.content, runs) : [];
    const shift = turn.content.length - parts.content.length;
    const shifted = shift
      ? marks.map(({ start, end, token }) => ({ start: start - shift, end: end - shift, token }))
      : marks;
    showMarkdown(this.body, parts.content, marks.length ? markedWriter(shifted) : undefined);
    this.folded.hidden = !parts.reasoning;
    this.reasoningLabel.textContent = busy && !parts.content ? "Thinking…" : "Reasoning";
    if (parts.reasoning) showMarkdown(this.reasoning, parts.reasoning);
  }

  /** Return what stands below the text. */
  parts(busy) {
    const { turn, chat } = this;
    const failure = chat.failures.get(turn.id);
    return [
      ...(turn.calls ?? []).map((call) => this.callElement(call)),
      !busy && this.resultForm(),
      busy && chat.waiting && make("p", { class: "waiting" }, chat.waiting),
      failure && this.failureElement(failure),
      !busy && this.actions(),
    ].filter(Boolean);
  }

  callElement({ name, text }) {
    return make(
      "div",
      { class: "call" },
      make("div", { class: "call-name" }, icon("tool"), `Calls ${name}`),
      make("pre", { tabindex: "0" }, pretty(text)),
    );
  }

  /** Return fields for the results of tool calls, where the conversation waits for them. */
  resultForm() {
    const { turn, chat } = this;
    if (!turn.calls?.length || !chat.isLast(turn)) return null;
    const fields = turn.calls.map(({ name, id }) => {
      const field = make("textarea", { rows: "2", id: `result-${id}`, spellcheck: "false" });
      return [make("label", { for: field.id }, `Result of ${name}`), field];
    });
    const send = () => chat.sendResults(turn, fields.map(([, field]) => field.value));
    const button = make("button", { type: "button", class: "primary", onclick: send }, "Send results");
    return make("div", { class: "results" }, ...fields.flat(), button);
  }

  failureElement(message) {
    const retry = () => this.chat.retry(this.turn);
    const button = make("button", { type: "button", class: "small", onclick: retry }, "Retry");
    return make("div", { class: "failure", role: "alert" }, make("span", {}, message), button);
  }

  actions() {
    const { turn, chat } = this;
    const assistant = turn.role === "assistant";
    const last = chat.isLast(turn);
    const action = (name, label, run, disabled = false) =>
      iconButton(name, label, run, { "data-action": name, disabled });
    const buttons = [
      ...this.pager(),
      copyButton("Copy message", () => turn.content),
      turn.role !== "tool" && action("edit", "Edit", () => this.edit(), chat.busy),
      assistant && action("again", "Regenerate", () => chat.regenerate(turn), chat.busy),
      assistant && last && !turn.calls?.length &&
        action("more", "Continue", () => chat.continueTurn(turn), chat.busy),
      action("branch", "Branch from here", () => chat.fork(turn)),
      assistant && chat.runsOf(turn).length > 0 && action("inspect", "Inspect", () => chat.inspect(turn)),
    ];
    const end = assistant && ENDS[turn.finish];
    const hint = end && make("span", { class: "hint" }, end);
    return make("div", { class: last ? "actions last" : "actions" }, ...buttons, hint);
  }

  /** Return buttons that lead to the other versions of a turn. */
  pager() {
    const { turn, chat } = this;
    const all = chat.siblings(turn);
    if (all.length < 2) return [];
    const place = all.indexOf(turn);
    const step = (name, label, index) => {
      const attributes = { "data-action": name, disabled: chat.busy || !all[index] };
      return iconButton(name, label, () => chat.choose(all[index]), attributes);
    };
    return [
      step("back", "Previous version", place - 1),
      make("span", { class: "pages" }, `${place + 1} / ${all.length}`),
      step("next", "Next version", place + 1),
    ];
  }

  /** Let the text be edited in its place. */
  edit() {
    const { turn, chat } = this;
    if (chat.busy) return;
    const sends = turn.role === "user";
    const field = make("textarea", { class: "editing", "aria-label": `Edit: ${this.name}`, rows: "3" });
    field.value = turn.content;
    const save = () => chat.edit(turn, field.value);
    const cancel = () => {
      this.body.classList.remove("edited");
      this.key = null;
      clearMarkdown(this.body);
      this.draw();
      this.element.querySelector('[data-action="edit"]')?.focus();
    };
    field.addEventListener("keydown", (event) => {
      const enter = event.key === "Enter" && !event.isComposing;
      if (enter && (event.ctrlKey || event.metaKey || (sends && !event.shiftKey))) save();
      else if (event.key === "Escape") cancel();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = make(
      "div",
      { class: "row" },
      make("button", { type: "button", class: "primary", onclick: save }, sends ? "Send" : "Save"),
      make("button", { type: "button", onclick: cancel }, "Cancel"),
    );
    clearMarkdown(this.body);
    this.body.classList.add("edited");
    this.body.append(field, buttons);
    this.after.replaceChildren();
    field.focus();
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
