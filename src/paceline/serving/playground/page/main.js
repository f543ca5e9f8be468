// The page: what happens when.

import { Chat } from "./chat.js";
import { colour } from "./colours.js";
import { Composer } from "./composer.js";
import { byId } from "./dom.js";
import { showPace } from "./inspector.js";
import { showMachine } from "./machine.js";
import { Panels } from "./panels.js";
import { preference, setPreference } from "./preferences.js";
import { completionRequest, keepSettings, parseSchema, parseTools, restoreDrafter } from "./request.js";
import { Runs } from "./runs.js";
import { Conversation } from "./conversation.js";
import { Refused, facts, machine } from "./server.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";

const FIRST_PROMPT = "Once upon a time";
const FIRST_LENGTH = "200"; // tokens of a completion
const form = byId("form");
const drafts = new WeakMap(); // conversation -> what is not yet sent
let known = null; // what the server is
let prompt = FIRST_PROMPT; // of completions, while a chat is shown

const store = new Store();
const panels = new Panels();
const runs = new Runs(() => known, showBusy);
const chat = new Chat(runs, store, {
  changed: () => sidebar.draw(),
  inspect: () => panels.show("inspector", true, true),
  refused: complain,
});
const sidebar = new Sidebar(chat, store, openConversation);
const composer = new Composer(isChat);

function isChat() {
  return form.elements.mode.value === "chat";
}

// The server

/** Ask what the server is; while it loads its model, ask again. */
async function meet() {
  clearTimeout(meet.timer);
  try {
    known = await facts(byId("key").value);
  } catch (error) {
    if (error instanceof Refused && error.loading) meet.timer = setTimeout(meet, 1000 * (error.wait ?? 2));
    return complain(error);
  }
  byId("problem").hidden = true;
  showFacts();
  const own = new Option(`default: ${known.drafter}`, "");
  byId("drafter").replaceChildren(own, ...known.drafters.map((name) => new Option(name, name)));
  restoreDrafter();
  showPicture();
  known.drafters.forEach(colour);
  const [chatMode, completion] = form.elements.mode;
  chatMode.disabled = !known.chat;
  chatMode.parentElement.title = known.chat ? "" : "This model has no chat template.";
  if (!known.chat && isChat()) {
    completion.checked = true;
    changeMode();
  }
  return undefined;
}

function showFacts() {
  const { model, format, memory, context } = known;
  byId("model").textContent = model;
  byId("welcome-model").textContent = model;
  const room = `${context.toLocaleString("en")} tokens of context`;
  const details = [format, memory && `${size(memory)} of memory`, room];
  byId("facts").textContent = details.filter(Boolean).join(" · ");
  byId("facts").title = byId("facts").textContent;
}

/** Ask once what the machine can do; a server that does not know leaves the section out. */
function showPicture() {
  if (!known?.machine || byId("inspector").hidden || !byId("machine").hidden) return;
  machine(byId("key").value).then(showMachine, () => {});
}

function size(bytes) {
  return bytes < 1e9 ? `${Math.max(1, Math.round(bytes / 1e6))} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

function complain(error) {
  if (!(error instanceof Refused)) console.error(error);
  byId("problem-text").textContent =
    error instanceof Refused ? error.message : `The page failed: ${error.message}`;
  byId("problem").hidden = false;
  byId("status").textContent = "";
  if (error.status === 401) {
    panels.show("settings", true);
    byId("key-field").hidden = false;
    byId("key").focus();
  }
}

// Runs

async function submit() {
  if (runs.busy || (isChat() && composer.empty)) return;
  if (!known) await meet();
  if (!known && !isChat()) return;
  if (isChat()) {
    await chat.send(composer.take());
    byId("prompt").focus();
  } else {
    await complete();
  }
  if (known) facts(byId("key").value).then((now) => showFacts((known = now)), () => {});
}

async function complete() {
  byId("problem").hidden = true;
  try {
    await runs.during(() => runs.run(completionRequest(byId("prompt").value), () => {}));
  } catch (error) {
    complain(error);
  }
}

function showBusy() {
  const [start, stop] = [byId("run"), byId("stop")];
  const { busy } = runs;
  const focused = document.activeElement;
  stop.hidden = stop.disabled = !busy;
  start.disabled = busy;
  start.hidden = busy;
  byId("modes").disabled = busy;
  if (busy && focused === start) stop.focus();
  if (!busy && focused === stop) start.focus();
}

// Conversations

function openConversation(conversation) {
  if (!isChat()) {
    if (runs.busy || form.elements.mode[0].disabled) return;
    form.elements.mode.value = "chat";
    changeMode();
  }
  drafts.set(chat.conversation, composer.take());
  chat.open(conversation ?? new Conversation());
  composer.put(drafts.get(chat.conversation) ?? { content: "" });
  panels.closeAll();
  byId("prompt").focus();
}

/** Show what another window has changed. */
function changedElsewhere(id) {
  const { conversation } = chat;
  if ((id === null || id === conversation.id) && !runs.busy && store.conversations.has(conversation.id)) {
    chat.open(store.conversations.get(conversation.id));
  } else {
    sidebar.draw();
  }
}

// The form

function changeMode() {
  const chatting = isChat();
  const focused = document.activeElement;
  byId("stage")[chatting ? "append" : "prepend"](byId("dock")); // where one looks for it
  byId(chatting ? "chat-run" : "scroller").append(byId("answer"));
  focused?.focus();
  document.body.dataset.mode = chatting ? "chat" : "completion";
  byId("prompt-label").textContent = chatting ? "Message" : "Prompt";
  byId("run-label").textContent = chatting ? "Send" : "Run";
  byId("prompt").required = !chatting;
  byId("prompt").placeholder = chatting ? "Write a message" : "";
  if (chatting) prompt = byId("prompt").value || prompt;
  byId("prompt").value = chatting ? "" : prompt;
  byId("attach").hidden = byId("talk").hidden = byId("system-field").hidden = !chatting;
  byId("welcome").hidden = !chatting || chat.conversation.turns.size > 0;
  const length = byId("max_tokens");
  if (length.value === (chatting ? FIRST_LENGTH : "")) length.value = chatting ? "" : FIRST_LENGTH;
  runs.clear();
  byId("problem").hidden = Boolean(known);
  byId("status").textContent = byId("usage").textContent = "";
  showColours();
}

function showColours() {
  const on = preference(isChat() ? "chatColours" : "completionColours", !isChat());
  byId("colours").setAttribute("aria-pressed", String(on));
  document.body.classList.toggle("colourless", !on);
  chat.setColours(on && isChat());
}

function switchColours() {
  const on = byId("colours").getAttribute("aria-pressed") === "true";
  setPreference(isChat() ? "chatColours" : "completionColours", !on);
  showColours();
}

function checkJson(name, parse, rightText) {
  const { wrong, value } = parse(byId(name).value);
  const hint = byId(`${name}-hint`);
  byId(name).setCustomValidity(wrong ?? "");
  byId(name).setAttribute("aria-invalid", String(Boolean(wrong)));
  hint.textContent = wrong ?? rightText(value);
  hint.classList.toggle("bad", Boolean(wrong));
}

function checkSettings() {
  checkJson("schema", parseSchema, (value) => `${value ? "A JSON object. " : ""}The answer will follow it.`);
  checkJson("tools", parseTools, (value) =>
    value ? `${value.length} that the model may call.` : "Functions that the model may call in a chat.",
  );
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
const showInvalid = ({ target }) => byId("settings").contains(target) && panels.show("settings", true);
document.addEventListener("invalid", showInvalid, true); // before the browser moves the focus there
for (const radio of form.elements.mode) radio.addEventListener("change", changeMode);
for (const name of ["schema", "tools"]) byId(name).addEventListener("input", checkSettings);
byId("key").addEventListener("change", meet);
byId("retry").addEventListener("click", meet);
byId("show-inspector").addEventListener("click", showPicture);
byId("stop").addEventListener("click", () => runs.stop());
byId("colours").addEventListener("click", switchColours);
byId("system").addEventListener("input", (event) => chat.setSystem(event.target.value));
byId("compare").addEventListener("change", () => {
  if (byId("compare").checked && runs.replayable) runs.during(() => runs.replay()).catch(complain);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !panels.closeAll()) runs.stop();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.defaultPrevented) return;
  event.preventDefault();
  if (!runs.busy) form.requestSubmit();
});
new ResizeObserver(() => {
  if (runs.paced.record?.passes.length) showPace(runs.paced.record, runs.plain.record);
}).observe(byId("chart"));
store.watch(changedElsewhere);

keepSettings();
if (matchMedia("(hover: hover)").matches) byId("prompt").focus();
changeMode(); // a reload may have kept the form
checkSettings();
showBusy();
chat.open(store.latest[0] ?? chat.conversation);
meet();
