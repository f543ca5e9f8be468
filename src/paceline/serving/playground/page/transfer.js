// Takes conversations out of the browser and in again: JSON, which can be imported, and Markdown.

import { InvalidConversation, newId, readConversation } from "./conversation.js";
import { make } from "./dom.js";

const FORMAT = "paceline-conversations";
const VERSION = 1;
const MAX_BYTES = 50e6;

/** Return conversations as the text of a file that `importText` reads. */
export function exportJson(conversations) {
  const data = conversations.map((each) => each.data());
  return `${JSON.stringify({ format: FORMAT, version: VERSION, conversations: data }, null, 1)}\n`;
}

/** Return the shown turns of a conversation as Markdown. */
export function exportMarkdown({ title, system, path }) {
  const parts = [`# ${title}`];
  if (system.trim()) parts.push(`## System\n\n${system.trim()}`);
  for (const turn of path) parts.push(`## ${NAMES[turn.role]}\n\n${body(turn)}`);
  return `${parts.join("\n\n")}\n`;
}

const NAMES = { user: "You", assistant: "Model", tool: "Tool" };

function body({ content, reasoning, attachments = [], calls = [] }) {
  const parts = attachments.map(({ name, text }) => `*${name}*\n\n${fenced(text)}`);
  if (reasoning) parts.push(`<details><summary>Reasoning</summary>\n\n${reasoning}\n\n</details>`);
  parts.push(content);
  parts.push(...calls.map(({ name, text }) => `Call of \`${name}\`:\n\n${fenced(text)}`));
  return parts.filter(Boolean).join("\n\n");
}

function fenced(text) {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

/** Return a file's conversations. Throws InvalidConversation with what is wrong, in one sentence. */
export async function importFile(file) {
  if (file.size > MAX_BYTES) {
    throw new InvalidConversation(`${file.name} has ${file.size} bytes, expected at most ${MAX_BYTES}.`);
  }
  return importText(await file.text(), file.name);
}

function importText(text, name) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new InvalidConversation(`${name} is no JSON; choose a file that Export has written.`);
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) {
    throw new InvalidConversation(`${name} holds no conversations; choose a file that Export has written.`);
  }
  if (data.version !== VERSION) {
    throw new InvalidConversation(
      `${name} is of version ${JSON.stringify(data.version)}, and this page reads version ${VERSION}; ` +
        "open it with the Paceline that wrote it.",
    );
  }
  return data.conversations.map((each, index) => {
    try {
      return readConversation(each);
    } catch (error) {
      if (!(error instanceof InvalidConversation)) throw error;
      throw new InvalidConversation(`${name}, conversation ${index + 1}: ${error.message}.`);
    }
  });
}

/** Give an imported conversation another id where its own is taken by one that differs. */
export function asNew(conversation, existing) {
  const text = (each) => JSON.stringify(readConversation(each.data()).data());
  const same = existing && text(existing) === text(conversation);
  if (existing && !same) conversation.id = newId();
  return conversation;
}

/** Let the browser save a text as a file. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Return a file name for a title. */
export function fileName(title, ending) {
  const plain = title.normalize("NFKD").replace(/[^\w-]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 50);
  return `${plain.toLowerCase() || "conversation"}.${ending}`;
}
