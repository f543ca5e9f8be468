// The page: what happens when.

import { ask, parsed, plain } from "./ask.js";
import { colour } from "./colours.js";
import { difference } from "./record.js";
import { Refused, facts, pieces } from "./server.js";
import { Side, count } from "./side.js";
import * as views from "./views.js";

const CALM = 100; // milliseconds between drawings: they take time from a server on the same machine
const field = (id) => document.getElementById(id);
const form = field("form");
const paced = new Side(field("paced"), (number) => choose(number));
const bare = new Side(field("plain"), () => {});

let known = null; // what the server is
let talk = []; // of the conversation so far
let asked = null; // of the last run
let halted = false; // whether the user stopped it
let control = null; // of the run under way
let choose = () => {};

const chatting = () => form.elements.mode.value === "chat";
const key = () => field("key").value;

// The server

async function meet() {
  try {
    known = await facts(key());
  } catch (error) {
    return complain(error);
  }
  field("problem").hidden = true;
  field("facts").textContent = `${known.model} · ${count(known.context, "token")} of context`;
  const own = new Option(`default: ${known.drafter}`, "");
  field("drafter").replaceChildren(own, ...known.drafters.map((name) => new Option(name, name)));
  known.drafters.forEach(colour);
  const [, chat] = form.elements.mode;
  chat.disabled = !known.chat;
  chat.parentElement.title = known.chat ? "" : "This model has no chat template.";
}

function complain(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refused)) console.error(error);
  const problem = field("problem");
  problem.textContent =
    error instanceof Refused ? error.message : `The page failed: ${error.message}`;
  problem.hidden = false;
  field("status").textContent = "";
  if (error.status === 401) {
    field("settings").open = true;
    field("key-field").hidden = false;
    field("key").focus();
  }
}

// Runs

async function run() {
  if (control) return;
  if (!known) await meet();
  if (!known) return;
  const said = field("prompt").value;
  const before = talk;
  if (chatting()) {
    talk = [...talk, { role: "user", content: said }];
    field("prompt").value = "";
    showTalk();
  }
  asked = ask(chatting() ? talk : null);
  field("answer").hidden = false;
  bare.hide();
  await busy(async () => {
    await one(paced, asked);
    if (field("compare").checked && !halted) await replay();
  });
  const came = paced.record.tokens > 0;
  field("answer").hidden = field("views").hidden = !came;
  if (!chatting()) return;
  if (came) {
    talk = [...talk, { role: "assistant", content: paced.record.text }];
  } else {
    talk = before;
    field("prompt").value ||= said;
    showTalk();
  }
}

async function replay() {
  await one(bare, plain(asked)).finally(() => bare.record.tokens || bare.hide());
  if (bare.record) judge();
}

/** Something that can be stopped. */
async function busy(work) {
  control = new AbortController();
  halted = false;
  field("problem").hidden = field("verdict").hidden = true;
  const [start, stop] = [field("run"), field("stop")];
  stop.disabled = false;
  if (document.activeElement === start) stop.focus();
  start.disabled = form.elements.mode[0].closest("fieldset").disabled = true;
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    control = null;
    start.disabled = form.elements.mode[0].closest("fieldset").disabled = false;
    if (document.activeElement === stop) start.focus();
    stop.disabled = true;
  }
}

/** One run, shown as it comes. */
async function one(side, [path, body]) {
  const record = side.begin();
  const start = performance.now();
  let first = null;
  let timer = 0;
  const draw = () => {
    timer = 0;
    side.draw();
    views.pace(paced.record, bare.record);
  };
  field("status").textContent = side === paced ? "Running." : "Running with the pace line off.";
  try {
    for await (const piece of pieces(path, body, key(), control.signal)) {
      record.finish = piece.choices[0].finish_reason;
      if (!piece.paceline) continue;
      first ??= performance.now() - start;
      record.add(piece.paceline);
      timer ||= setTimeout(draw, CALM);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    halted = true;
  } finally {
    clearTimeout(timer);
    side.end();
    if (record.passes.length) finish(side, body);
  }
  const end = halted ? "stopped" : `ended by ${record.finish}`;
  const wait = first === null ? "" : `, the first after ${Math.round(first)} ms`;
  const came = count(record.tokens, "token");
  field("status").textContent = `${came}, ${end}${wait}. Seed ${body.seed}.`;
}

/** What there is to say and see of a run that is over. */
function finish(side, body) {
  views.pace(paced.record, bare.record);
  if (side !== paced) return;
  const { record, words, summary } = paced;
  views.legend(record);
  choose = views.passes(record, words);
  if (body.guided_json && !halted) summary.append(whole(record.text));
  if (!record.guesses.size && body.speculation?.budget === undefined) {
    summary.append(
      " Nothing was guessed: here a guess costs more than it saves. ",
      "A number as budget guesses anyway.",
    );
  }
}

function whole(text) {
  try {
    JSON.parse(text);
    return " The JSON is whole.";
  } catch {
    return " It ended before its JSON was whole.";
  }
}

/** Compare both runs. */
function judge() {
  const [one, other] = [paced.record, bare.record];
  let place = difference(one, other);
  const both = Math.min(one.tokens, other.tokens);
  if (place < 0 && !halted && one.tokens !== other.tokens) place = both;
  const verdict = field("verdict");
  verdict.hidden = false;
  verdict.className = `verdict ${place < 0 ? "good" : "bad"}`;
  if (place < 0) {
    const ratio = one.speed && other.speed && (one.speed / other.speed).toFixed(2);
    const fast = ratio ? `, at ${ratio} times the speed` : "";
    verdict.textContent = `The same text, ${count(both, "token")}${fast}.`;
    return;
  }
  const lossy = !known.exact && !field("drafter").value;
  const why = lossy ? "this drafter is lossy." : "this is a bug; please report it.";
  verdict.textContent = `The texts differ from token ${place + 1} on: ${why}`;
  paced.words.wrong(place);
  bare.words.wrong(place);
}

// The form

function showTalk() {
  const turns = talk.map(({ role, content }) => {
    const turn = document.createElement("li");
    const name = document.createElement("b");
    const text = document.createElement("p");
    turn.className = role;
    name.textContent = role === "user" ? "You" : "Model";
    text.textContent = content;
    turn.append(name, text);
    return turn;
  });
  field("talk").replaceChildren(...turns);
}

function changeMode() {
  const chat = chatting();
  const focused = document.activeElement;
  field("stage")[chat ? "append" : "prepend"](field("composer")); // where one looks for it
  focused?.focus();
  field("prompt-label").textContent = chat ? "Message" : "Prompt";
  for (const id of ["system-field", "clear", "talk"]) field(id).hidden = !chat;
  clear();
}

function clear() {
  talk = [];
  asked = null;
  showTalk();
  for (const id of ["answer", "views", "verdict", "problem"]) field(id).hidden = true;
  field("status").textContent = "";
}

function checkSchema() {
  const { wrong, value } = parsed(field("schema").value);
  const hint = field("schema-hint");
  field("schema").setCustomValidity(wrong ?? "");
  field("schema").setAttribute("aria-invalid", String(Boolean(wrong)));
  hint.textContent = wrong ?? `${value ? "A JSON object. " : ""}The answer will follow it.`;
  hint.classList.toggle("bad", Boolean(wrong));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("invalid", () => (field("settings").open = true), true);
for (const radio of form.elements.mode) radio.addEventListener("change", changeMode);
field("schema").addEventListener("input", checkSchema);
field("key").addEventListener("change", meet);
field("clear").addEventListener("click", clear);
field("stop").addEventListener("click", () => control?.abort());
field("compare").addEventListener("change", () => {
  const open = asked && !control && paced.record?.tokens && !bare.record;
  if (field("compare").checked && open) busy(replay);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") control?.abort();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (!control) form.requestSubmit();
});
new ResizeObserver(() => {
  if (paced.record) views.pace(paced.record, bare.record);
}).observe(field("chart"));

const apple = /Mac|iPhone|iPad/.test(navigator.platform);
if (apple) field("run").querySelector("kbd").textContent = "⌘ ⏎";
field("settings").open = matchMedia("(min-width: 900px)").matches;
changeMode(); // a reload may have kept the form
checkSchema();
meet();
