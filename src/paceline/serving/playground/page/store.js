// Keeps conversations in this browser (localStorage), one entry each, in a format with a version.

import { readConversation } from "./conversation.js";

const PREFIX = "paceline.conversation.";

/** A conversation could not be kept; the message says why and what to do. */
export class StoreError extends Error {}

export class Store {
  conversations = new Map(); // id -> Conversation
  unreadable = []; // keys of entries that are left as they are

  constructor() {
    this.load();
  }

  /** Read every entry again. */
  load() {
    this.conversations.clear();
    this.unreadable = [];
    for (const key of keys()) this.read(key);
  }

  /** Read one entry; called too when another window has changed it. */
  read(key) {
    const id = key.slice(PREFIX.length);
    const text = localStorage.getItem(key);
    this.unreadable = this.unreadable.filter((each) => each !== key);
    if (text === null) {
      this.conversations.delete(id);
      return;
    }
    try {
      const conversation = readConversation(JSON.parse(text));
      if (conversation.id !== id) throw new Error("another conversation's entry");
      this.conversations.set(id, conversation);
    } catch {
      this.unreadable.push(key);
    }
  }

  /** Return the conversations, the latest first. */
  get latest() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  /**
   * Keep a conversation, here and in the browser.
   *
   * Throws StoreError where the browser does not take it; it then lasts until the page is closed.
   */
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation.data()));
    } catch (error) {
      const full = error.name === "QuotaExceededError";
      throw new StoreError(
        full
          ? "The browser's storage is full, so this conversation is kept only until the page is " +
            "closed; export it, or delete others."
          : "This browser stores nothing for this page, so conversations are kept only until it is " +
            "closed; export those that you need.",
      );
    }
  }

  /** Delete a conversation. */
  remove(id) {
    this.conversations.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch { /* storage is off */ }
  }

  /** Delete the entries that cannot be read. */
  discardUnreadable() {
    for (const key of this.unreadable) localStorage.removeItem(key);
    this.unreadable = [];
  }

  /** Call `changed(id)` when another window changes a conversation. */
  watch(changed) {
    addEventListener("storage", ({ key }) => {
      if (key === null) this.load();
      else if (key.startsWith(PREFIX)) this.read(key);
      else return;
      changed(key?.slice(PREFIX.length) ?? null);
    });
  }
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return []; // storage is off
  }
}
