// What test_openai_node.py asks of the package `openai`: prints one JSON object of the answers.
import OpenAI from "openai";

const { baseURL, apiKey, model, talk } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const options = { model, temperature: 0, max_tokens: 16 };
const tools = [talk.tool];
const found = {};

const ask = async (fields) =>
  (await client.chat.completions.create({ ...options, ...fields })).choices[0].message;

found.models = (await client.models.list()).data.map((each) => each.id);
found.chat = (await ask({ messages: talk.messages })).content;

found.pieces = [];
for await (const chunk of await client.chat.completions.create({
  ...options,
  messages: talk.tale,
  stream: true,
})) {
  const piece = chunk.choices[0]?.delta?.content;
  if (piece) found.pieces.push(piece);
}

const json_schema = { name: "city", strict: true, schema: talk.schema };
found.structured = (
  await client.chat.completions.parse({
    ...options,
    max_tokens: 60,
    messages: talk.messages,
    response_format: { type: "json_schema", json_schema },
  })
).choices[0].message.parsed;

const messages = [{ role: "user", content: talk.weather }];
const longer = { max_tokens: 40, tools };
const message = await ask({ ...longer, messages, tool_choice: "required" });
const [call] = message.tool_calls;
found.call = [call.function.name, JSON.parse(call.function.arguments)];
messages.push(message, { role: "tool", tool_call_id: call.id, content: talk.report });
found.answer = (await ask({ ...longer, messages, tool_choice: "none" })).content;
found.said = messages;

const response = { model, temperature: 0, max_output_tokens: 16, input: talk.messages };
found.response = (await client.responses.create(response)).output_text;
found.response_pieces = [];
for await (const event of await client.responses.create({
  ...response,
  input: talk.tale,
  stream: true,
})) {
  if (event.type === "response.output_text.delta") found.response_pieces.push(event.delta);
}

const refusal = async (asked) => {
  try {
    await asked();
  } catch (error) {
    return [error.constructor.name, error.status, error.code ?? null];
  }
  return null;
};
found.errors = [
  await refusal(() => ask({ messages: [{ role: "user", content: talk.long }] })),
  await refusal(() => ask({ messages, model: "another" })),
  await refusal(() => new OpenAI({ baseURL, apiKey: "wrong" }).models.list()),
];
console.log(JSON.stringify(found));
