// The list of conversations: open, search, rename, export, delete, import.

import { InvalidConversation } from "./conversation.js";
import { byId, iconButton, make } from "./dom.js";
import { askText, openMenu } from "./menu.js";
import { notify } from "./notices.js";
import { count } from "./run_card.js";
import { asNew, download, exportJson, exportMarkdown, fileName, importFile } from "./transfer.js";

const JSON_TYPE = "application/json";

export class Sidebar {
  /** `open(conversation)` shows one; null: a new one. */
  constructor(chat, store, open) {
    Object.assign(this, { chat, store, open });
    byId("new").addEventListener("click", () => open(null));
    byId("search").addEventListener("input", () => this.draw());
    byId("export-all").addEventListener("click", () => this.exportAll());
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", async (event) => {
      const [file] = event.target.files;
      event.target.value = "";
      if (file) await this.import(file);
    });
  }

  draw() {
    const query = byId("search").value.trim().toLowerCase();
    const found = this.store.latest.filter((each) => matches(each, query));
    byId("conversations").replaceChildren(...found.map((each) => this.row(each)));
    const none = byId("no-conversations");
    none.hidden = found.length > 0;
    none.textContent = query ? "None holds these words." : "What you write is kept here, in this browser.";
    byId("export-all").disabled = !this.store.conversations.size;
    this.drawUnreadable();
  }

  row(conversation) {
    const { title, id } = conversation;
    const current = id === this.chat.conversation.id;
    const button = make(
      "button",
      { type: "button", class: "open", "aria-current": current ? "true" : null, title },
      title,
    );
    button.addEventListener("click", () => this.open(conversation));
    const attributes = { class: "ghost options", "aria-haspopup": "menu", "aria-expanded": "false" };
    const open = () => openMenu(more, this.options(conversation));
    const more = iconButton("menu", `Options of ${title}`, open, attributes);
    return make("li", { "data-conversation": id }, button, more);
  }

  options(conversation) {
    const { title } = conversation;
    const saveJson = () => download(fileName(title, "json"), exportJson([conversation]), JSON_TYPE);
    const saveMarkdown = () =>
      download(fileName(title, "md"), exportMarkdown(conversation), "text/markdown");
    return [
      ["Rename", () => this.rename(conversation)],
      ["Export as JSON", saveJson],
      ["Export as Markdown", saveMarkdown],
      ["Delete", () => this.remove(conversation)],
    ];
  }

  async rename(conversation) {
    const title = await askText("Title", conversation.title);
    if (title === null) return;
    conversation.title = title;
    this.chat.keep(conversation);
    this.draw();
  }

  remove(conversation) {
    if (this.chat.answering?.conversation === conversation) this.chat.runs.stop();
    this.chat.discarded.add(conversation);
    this.store.remove(conversation.id);
    if (conversation === this.chat.conversation) this.open(null);
    this.draw();
    const undo = () => {
      this.chat.discarded.delete(conversation);
      this.chat.keep(conversation);
      this.draw();
    };
    notify(`“${conversation.title}” is deleted.`, { action: ["Undo", undo] });
    byId("new").focus();
  }

  exportAll() {
    const day = new Date().toISOString().slice(0, 10);
    download(`paceline-conversations-${day}.json`, exportJson(this.store.latest), JSON_TYPE);
  }

  async import(file) {
    let conversations;
    try {
      conversations = await importFile(file);
    } catch (error) {
      if (!(error instanceof InvalidConversation)) throw error;
      notify(error.message, { bad: true });
      return;
    }
    for (const each of conversations) {
      this.chat.keep(asNew(each, this.store.conversations.get(each.id)));
    }
    if (conversations.length) this.open(this.store.conversations.get(conversations[0].id));
    this.draw();
    notify(`${count(conversations.length, "conversation")} imported.`);
  }

  drawUnreadable() {
    const { unreadable } = this.store;
    const box = byId("unreadable");
    box.hidden = !unreadable.length;
    if (box.hidden) return;
    const discard = () => {
      this.store.discardUnreadable();
      this.draw();
    };
    const found = `${count(unreadable.length, "conversation")} in this browser cannot be read`;
    const text = `${found}: damaged, or of a newer Paceline.`;
    const button = make("button", { type: "button", class: "small", onclick: discard }, "Delete");
    box.replaceChildren(make("span", {}, text), button);
  }
}

function matches({ title, turns }, query) {
  if (!query || title.toLowerCase().includes(query)) return true;
  return [...turns.values()].some(({ content }) => content.toLowerCase().includes(query));
}
