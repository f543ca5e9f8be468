// From the form to a request's body.

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];
const field = (id) => document.getElementById(id);

/** Where to ask, and what; a seed is always among it, so that the same can be asked again. */
export function ask(talk) {
  const body = { seed: crypto.getRandomValues(new Uint32Array(1))[0] };
  for (const name of NUMBERS) {
    if (field(name).value !== "") body[name] = field(name).valueAsNumber;
  }
  const stops = field("stops").value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops.map((stop) => stop.replaceAll("\\n", "\n"));
  const { value } = parsed(field("schema").value);
  if (value !== undefined) body.guided_json = value;
  const speculation = {};
  if (field("drafter").value) speculation.drafter = field("drafter").value;
  if (field("budget").value !== "") speculation.budget = field("budget").valueAsNumber;
  if (Object.keys(speculation).length) body.speculation = speculation;
  if (!talk) return ["v1/completions", { ...body, prompt: field("prompt").value }];
  const system = field("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...talk] : talk;
  return ["v1/chat/completions", { ...body, messages }];
}

/** The same, but decoded plainly. */
export function plain([path, body]) {
  return [path, { ...body, speculation: { budget: 0 } }];
}

/** A schema's text: its `value`, or what is wrong with it; neither where it is empty. */
export function parsed(text) {
  if (!text.trim()) return {};
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return { wrong: `This is no JSON: ${error.message}` };
  }
  const object = typeof value === "object" && value !== null && !Array.isArray(value);
  return object ? { value } : { wrong: "A schema is a JSON object: {…}" };
}
