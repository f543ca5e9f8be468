// Runs requests, shows them in both cards and the inspector, and compares them.

import { byId } from "./dom.js";
import { showDrafters, showNothing, showPace, showPasses } from "./inspector.js";
import { difference } from "./record.js";
import { withoutSpeculation } from "./request.js";
import { RunCard, count } from "./run_card.js";
import { pieces } from "./server.js";

const DRAW_MS = 100; // between drawings: they take time from a server on the same machine

export class Runs {
  control = null; // of the run under way
  stopped = false; // by the user
  last = null; // path and body of the last run

  /** `known()` is what the server is, or null; `busyChanged` is called when a run begins or ends. */
  constructor(known, busyChanged) {
    this.known = known;
    this.busyChanged = busyChanged;
    this.choose = () => {};
    this.onChoose = () => {}; // called with the number of the pass that is shown
    this.paced = new RunCard(byId("paced"), (number) => this.choose(number));
    this.plain = new RunCard(byId("plain"), () => {});
  }

  get busy() {
    return this.control !== null;
  }

  stop() {
    this.control?.abort();
  }

  /** Do work that can be stopped. */
  async during(work) {
    this.control = new AbortController();
    this.stopped = false;
    byId("verdict").hidden = true;
    this.busyChanged();
    try {
      await work();
    } finally {
      this.control = null;
      this.busyChanged();
    }
  }

  /** Run a request and, where that is wanted, again without speculation. */
  async run(request, onPiece) {
    this.last = request;
    byId("answer").hidden = false;
    this.plain.hide();
    try {
      await this.stream(this.paced, request, onPiece);
      if (byId("compare").checked && !this.stopped) await this.replay();
    } finally {
      if (!this.paced.record?.tokens) this.clear();
    }
  }

  /** Run the last request without speculation, and compare. */
  async replay() {
    await this.stream(this.plain, withoutSpeculation(this.last), () => {}).finally(
      () => this.plain.record.tokens || this.plain.hide(),
    );
    if (this.plain.record) this.judge();
  }

  /** Whether the last run can be replayed now. */
  get replayable() {
    return this.last && !this.busy && this.paced.record?.tokens && !this.plain.record;
  }

  /** Show the run of an earlier answer. */
  show(record, request) {
    if (this.busy) return;
    this.last = request;
    this.plain.hide();
    byId("verdict").hidden = true;
    byId("answer").hidden = false;
    this.paced.show(record);
    this.inspect();
  }

  /** Show no run. */
  clear() {
    this.paced.hide();
    this.plain.hide();
    this.last = null;
    byId("answer").hidden = byId("verdict").hidden = true;
    showNothing();
  }

  /** Run one request, shown as it comes. */
  async stream(card, [path, body], onPiece) {
    const record = card.begin();
    const start = performance.now();
    let first = null;
    let timer = 0;
    const draw = () => {
      timer = 0;
      card.draw();
      showPace(this.paced.record, this.plain.record);
    };
    const plain = card === this.plain;
    byId("status").textContent = plain ? "Running with the pace line off." : "Running.";
    try {
      for await (const piece of pieces(path, body, byId("key").value, this.control.signal)) {
        record.finish = piece.choices[0]?.finish_reason ?? record.finish;
        if (piece.paceline) {
          first ??= performance.now() - start;
          record.add(piece.paceline);
          timer ||= setTimeout(draw, DRAW_MS);
        }
        onPiece(piece, record);
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.stopped = true;
    } finally {
      clearTimeout(timer);
      card.end();
      if (record.passes.length) this.finish(card, body);
    }
    const end = this.stopped ? "stopped" : `ended by ${record.finish}`;
    const wait = first === null ? "" : `, the first after ${Math.round(first)} ms`;
    byId("status").textContent = `${count(record.tokens, "token")}, ${end}${wait}. Seed ${body.seed}.`;
  }

  /** Show what there is to see of a run that is over. */
  finish(card, body) {
    showPace(this.paced.record, this.plain.record);
    if (card !== this.paced) return;
    this.inspect();
    const { record, summary } = this.paced;
    if (body.guided_json && !this.stopped) summary.append(completeness(record.text));
    if (!record.drafted.size && body.speculation?.budget === undefined) {
      summary.append(
        " Nothing was drafted: here a draft costs more than it saves. ",
        "A number as budget drafts anyway.",
      );
    }
  }

  inspect() {
    const { record, text } = this.paced;
    showPace(record, null);
    showDrafters(record);
    this.choose = showPasses(record, (number) => {
      text.choose(number);
      this.onChoose(number);
    });
  }

  /** Compare both runs. */
  judge() {
    const [one, other] = [this.paced.record, this.plain.record];
    let place = difference(one, other);
    const both = Math.min(one.tokens, other.tokens);
    if (place < 0 && !this.stopped && one.tokens !== other.tokens) place = both;
    const verdict = byId("verdict");
    verdict.hidden = false;
    verdict.className = `verdict ${place < 0 ? "good" : "bad"}`;
    if (place < 0) {
      const ratio = one.speed && other.speed && (one.speed / other.speed).toFixed(2);
      const fast = ratio ? `, at ${ratio} times the speed` : "";
      verdict.textContent = `The same text, ${count(both, "token")}${fast}.`;
      return;
    }
    const lossy = !this.known()?.exact && !byId("drafter").value;
    const why = lossy ? "this drafter is lossy." : "this is a bug; please report it.";
    verdict.textContent = `The texts differ from token ${place + 1} on: ${why}`;
    this.paced.text.wrong(place);
    this.plain.text.wrong(place);
  }
}

function completeness(text) {
  try {
    JSON.parse(text);
    return " The JSON is whole.";
  } catch {
    return " It ended before its JSON was whole.";
  }
}
