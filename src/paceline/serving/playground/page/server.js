// Talks to the server: the facts, and the pieces of an answer as they come.

/** A request that the server did not take, or did not bring to its end. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** What the server is and offers. */
export async function facts(key) {
  return (await reached("v1/playground", { headers: headers(key) })).json();
}

/** The pieces of a streamed answer; leaving early, or `signal`, cancels it. */
export async function* pieces(path, body, key, signal) {
  const asked = JSON.stringify({ ...body, stream: true, trace: true });
  const reply = await reached(path, { method: "POST", headers: headers(key), body: asked, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let whole = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done && whole) return;
      if (done) throw new Refused("The server broke the answer off.");
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        whole = data === "[DONE]";
        if (whole) continue;
        const piece = JSON.parse(data);
        if (piece.error) throw new Refused(piece.error.message);
        yield piece;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function reached(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached.");
  }
  if (reply.ok) return reply;
  const found = await reply.json().catch(() => null);
  throw new Refused(found?.error?.message ?? `The server answered ${reply.status}.`, reply.status);
}
