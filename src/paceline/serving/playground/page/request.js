// Turns the settings into the body of a request, and keeps them between visits.

import { byId } from "./dom.js";
import { preference, setPreference } from "./preferences.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];
const KEPT = [...NUMBERS, "stops", "schema", "tools", "drafter", "budget"];

/** Return the fields that both endpoints take. A seed is always among them, so that a run can be repeated. */
export function settingsBody() {
  const body = { seed: crypto.getRandomValues(new Uint32Array(1))[0] };
  for (const name of NUMBERS) {
    if (byId(name).value !== "") body[name] = byId(name).valueAsNumber;
  }
  const stops = byId("stops").value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops.map((stop) => stop.replaceAll("\\n", "\n"));
  const { value } = parseSchema(byId("schema").value);
  if (value !== undefined) body.guided_json = value;
  const speculation = {};
  if (byId("drafter").value) speculation.drafter = byId("drafter").value;
  if (byId("budget").value !== "") speculation.budget = byId("budget").valueAsNumber;
  if (Object.keys(speculation).length) body.speculation = speculation;
  return body;
}

/** Return path and body of a completion. */
export function completionRequest(prompt) {
  return ["v1/completions", { ...settingsBody(), prompt }];
}

/** Return path and body of a chat. `continued`: the answer continues the last message. */
export function chatRequest(messages, continued = false) {
  const body = { ...settingsBody(), messages, stream_options: { include_usage: true } };
  if (continued) body.continue_final_message = true;
  const { value } = parseTools(byId("tools").value);
  if (value?.length) body.tools = value;
  return ["v1/chat/completions", body];
}

/** Return the same request, decoded without speculation. */
export function withoutSpeculation([path, body]) {
  return [path, { ...body, speculation: { budget: 0 } }];
}

/** Return a schema's `value`, or what is `wrong` with its text; neither where it is empty. */
export function parseSchema(text) {
  if (!text.trim()) return {};
  const { value, wrong } = parseJson(text);
  if (wrong) return { wrong };
  return isObject(value) ? { value } : { wrong: "A schema is a JSON object: {…}" };
}

/** Return the `value` of a list of tools, or what is `wrong` with its text. */
export function parseTools(text) {
  if (!text.trim()) return {};
  const { value, wrong } = parseJson(text);
  if (wrong) return { wrong };
  const known = Array.isArray(value) && value.every((tool) => typeof tool?.function?.name === "string");
  return known ? { value } : { wrong: 'Tools are a JSON list of {"type": "function", "function": {…}}' };
}

function parseJson(text) {
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    return { wrong: `This is no JSON: ${error.message}` };
  }
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Fill the form with what was set at the last visit, and keep what is set from now on. */
export function keepSettings() {
  const kept = preference("settings", {});
  for (const name of KEPT) {
    const field = byId(name);
    if (typeof kept[name] === "string") field.value = kept[name];
    field.addEventListener("change", () => {
      const values = KEPT.map((each) => [each, byId(each).value]);
      setPreference("settings", Object.fromEntries(values));
    });
  }
}

/** Choose the drafter of the last visit, once the server has named those that it has. */
export function restoreDrafter() {
  const { drafter } = preference("settings", {});
  if ([...byId("drafter").options].some(({ value }) => value === drafter)) byId("drafter").value = drafter;
}
