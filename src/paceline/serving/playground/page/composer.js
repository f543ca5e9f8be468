// The field that one writes in, and the text files that go with it.

import { byId, icon, iconButton, make } from "./dom.js";
import { notify } from "./notices.js";

const MAX_BYTES = 262_144; // of a file

export class Composer {
  attachments = []; // {name, text}

  /** `isChat()` tells whether files can be attached, and whether Enter sends. */
  constructor(isChat) {
    this.isChat = isChat;
    this.field = byId("prompt");
    this.field.addEventListener("keydown", (event) => this.key(event));
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", async (event) => {
      await this.attach([...event.target.files]);
      event.target.value = ""; // so that the same file can be chosen again
    });
    this.field.addEventListener("paste", (event) => {
      if (!this.isChat() || !event.clipboardData.files.length) return;
      event.preventDefault();
      this.attach([...event.clipboardData.files]);
    });
    this.acceptDrops(byId("stage"));
  }

  key(event) {
    if (event.key !== "Enter" || event.isComposing || event.shiftKey || event.altKey) return;
    if (!this.isChat() || event.ctrlKey || event.metaKey) return; // these send everywhere
    event.preventDefault();
    byId("form").requestSubmit();
  }

  acceptDrops(place) {
    const files = (event) => this.isChat() && event.dataTransfer?.types.includes("Files");
    place.addEventListener("dragover", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      place.classList.add("dropping");
    });
    place.addEventListener("dragleave", (event) => {
      if (!place.contains(event.relatedTarget)) place.classList.remove("dropping");
    });
    place.addEventListener("drop", (event) => {
      place.classList.remove("dropping");
      if (!files(event)) return;
      event.preventDefault();
      this.attach([...event.dataTransfer.files]);
    });
  }

  /** Attach files; those that are no text, or too large, are named. */
  async attach(files) {
    for (const file of files) {
      try {
        this.attachments.push({ name: file.name.slice(0, 200), text: await textOf(file) });
      } catch (error) {
        notify(error.message, { bad: true });
      }
    }
    this.draw();
    this.field.focus();
  }

  draw() {
    const chips = this.attachments.map((attachment) => {
      const remove = () => {
        this.attachments = this.attachments.filter((each) => each !== attachment);
        this.draw();
        this.field.focus();
      };
      const { name } = attachment;
      const button = iconButton("close", `Remove ${name}`, remove);
      return make("li", {}, icon("file"), make("span", {}, name), button);
    });
    byId("attachments").replaceChildren(...chips);
    byId("attachments").hidden = !chips.length;
  }

  /** Return what was written, and start anew. */
  take() {
    const taken = { content: this.field.value };
    if (this.attachments.length) taken.attachments = this.attachments;
    this.clear();
    return taken;
  }

  clear() {
    this.put({ content: "" });
  }

  /** Show what was taken before. */
  put({ content, attachments = [] }) {
    this.field.value = content;
    this.attachments = attachments;
    this.draw();
  }

  get empty() {
    return !this.field.value.trim() && !this.attachments.length;
  }
}

/** Return a file's text. Throws an Error that names the file and what is wrong with it. */
async function textOf(file) {
  if (file.size > MAX_BYTES) {
    const found = `${file.name} has ${file.size} bytes`;
    throw new Error(`${found}, expected at most ${MAX_BYTES}; attach a part of it.`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is no text in UTF-8; only text files can be attached.`);
  }
  if (text.includes("\0")) throw new Error(`${file.name} is binary; only text files can be attached.`);
  return text.replaceAll("\r\n", "\n");
}
