// The turns of a conversation on the page, and its scrolling.

import { byId } from "./dom.js";
import { Message } from "./message.js";

const NEAR = 80; // pixels from the end within which the end is followed

export class Thread {
  constructor(chat) {
    this.chat = chat;
    this.messages = new Map(); // id of a turn -> Message
    this.scroller = byId("scroller");
    this.following = true;
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      this.following = scrollHeight - scrollTop - clientHeight < NEAR;
      byId("to-end").hidden = this.following || byId("talk").hidden;
    });
    byId("to-end").addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.following && this.toEnd()).observe(this.scroller);
  }

  /** Show the conversation's path; what had the focus keeps it. */
  render() {
    const { path } = this.chat.conversation;
    const active = document.activeElement;
    const list = byId("talk");
    const place = [...list.children].findIndex((item) => item.contains(active));
    const { action } = active?.dataset ?? {};
    this.messages = new Map(path.map((turn) => [turn.id, new Message(turn, this.chat)]));
    list.replaceChildren(...[...this.messages.values()].map(({ element }) => element));
    byId("welcome").hidden = path.length > 0;
    if (place >= 0 && action) this.focus(list.children[place], action);
    if (this.following) this.toEnd();
  }

  focus(item, action) {
    const buttons = [...(item?.querySelectorAll("[data-action]") ?? [])];
    const enabled = buttons.filter((button) => !button.disabled);
    (enabled.find((button) => button.dataset.action === action) ?? enabled[0])?.focus();
  }

  /** Show a turn that has changed. */
  update(turn) {
    this.messages.get(turn.id)?.draw();
    if (this.following) this.toEnd();
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    byId("to-end").hidden = true;
  }
}
