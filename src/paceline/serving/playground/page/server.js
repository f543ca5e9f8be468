// Talks to the server: the facts about it, and the pieces of an answer as they come.

/**
 * A request that the server did not take, or did not bring to its end.
 *
 * `status` is HTTP's, 0 where there was no answer; `wait` are seconds after which to try again, null
 * where the server named none.
 */
export class Refused extends Error {
  constructor(message, status = 0, wait = null) {
    super(message);
    this.status = status;
    this.wait = wait;
  }

  /** Whether the server is there, but its model is still being loaded. */
  get loading() {
    return this.status === 503;
  }
}

/** Return what the server is and offers. */
export async function facts(key) {
  return (await request("v1/playground", { headers: headers(key) })).json();
}

/** Return what the server's machine can do with the model. */
export async function machine(key) {
  return (await request("v1/machine", { headers: headers(key) })).json();
}

/** Yield the pieces of a streamed answer; leaving early, or `signal`, cancels it. */
export async function* pieces(path, body, key, signal) {
  const text = JSON.stringify({ ...body, stream: true, trace: true });
  const reply = await request(path, { method: "POST", headers: headers(key), body: text, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done && complete) return;
      if (done) throw new Refused("The server broke the answer off.");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        complete = data === "[DONE]";
        if (complete) continue;
        const piece = JSON.parse(data);
        if (piece.error) throw new Refused(piece.error.message);
        yield piece;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The connection to the server was lost.");
  }
}

function headers(key) {
  const fields = { "Content-Type": "application/json" };
  if (key) fields.Authorization = `Bearer ${key}`;
  return fields;
}

async function request(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const answer = await reply.json().catch(() => null);
  const wait = Number.parseInt(reply.headers.get("Retry-After") ?? "", 10);
  const message = answer?.error?.message ?? `The server answered ${reply.status}.`;
  throw new Refused(message, reply.status, Number.isNaN(wait) ? null : wait);
}
