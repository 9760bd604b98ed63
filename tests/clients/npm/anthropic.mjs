// Anthropic's client.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";
import {
  addSchema, checksOf, collect, count, isSum, isTrip, key, model, picture, see, sum, tripSchema, url, versionOf,
} from "./checks.mjs";

const { cannot, check } = checksOf("@anthropic-ai/sdk", versionOf("@anthropic-ai/sdk"));
const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
const source = { type: "base64", media_type: "image/png", data: picture.toString("base64") };
const image = { type: "image", source };
const user = (...content) => ({ role: "user", content });
const text = text => ({ type: "text", text });
const tool = (name, input_schema) => ({ name, description: name, input_schema });
const asked = (messages, options) => ({ model, max_tokens: 200, messages, temperature: 0, ...options });
const ask = (messages, options) => client.messages.create(asked(messages, options));
const textOf = message => message.content.map(block => block.text ?? "").join("");
const question = [user(text(sum.ask))];

await check("text", async () => {
  const answer = await ask([{ role: "user", content: sum.ask }]);
  assert.equal(textOf(answer), sum.answer);
  assert(answer.stop_reason === "end_turn" && answer.usage.output_tokens > 3);
  assert((await client.messages.countTokens({ model, messages: question })).input_tokens > 3);
  assert((await collect(client.models.list())).some(each => each.id === model));
});

await check("stream", async () => {
  assert.equal(await client.messages.stream(asked(question)).finalText(), sum.answer);
  assert.equal((await collect(await ask(question, { stream: true }))).at(-1).type, "message_stop");
});

await check("image", async () => assert.equal(textOf(await ask([user(image, text(see.ask))])), see.answer));

cannot("audio", "Anthropic's API takes no sound");

await check("tools offered", async () => {
  const answer = await ask(question, { tools: [tool("add", addSchema)] });
  assert(textOf(answer) && answer.stop_reason !== "tool_use");
});

await check("tools forced", async () => {
  for (const tool_choice of [{ type: "any" }, { type: "tool", name: "add" }]) {
    const options = { tools: [tool("add", addSchema)], tool_choice };
    const { content: [call], stop_reason } = await ask(question, options);
    assert(isSum(call.input) && stop_reason === "tool_use");
    const { content: [streamed] } = await client.messages.stream(asked(question, options)).finalMessage();
    assert(isSum(streamed.input));
  }
});

await check("parallel tools", async () => {
  const tool_choice = { type: "any", disable_parallel_tool_use: false };
  const { content } = await ask(question, { tools: [tool("add", addSchema)], tool_choice });
  assert(content.length && content.every(call => isSum(call.input)));
});

await check("nested tools", async () => {
  const { content: [call] } = await ask(question, { tools: [tool("plan", tripSchema)], tool_choice: { type: "any" } });
  assert(isTrip(call.input));
});

await check("structured", async () => {
  // Its helper turns bounds into words, so these are enums.
  const digit = z.literal([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  const format = zodOutputFormat(z.object({ a: digit, b: digit }));
  const { parsed_output } = await client.messages.parse(asked(question, { output_config: { format } }));
  assert(isSum(parsed_output));
});

await check("errors", async () => {
  for (const stream of [false, true]) {
    await assert.rejects(ask(question, { model: "other", stream }), Anthropic.NotFoundError);
    await assert.rejects(ask(question, { temperature: -1, stream }), Anthropic.BadRequestError);
  }
  const stranger = new Anthropic({ baseURL: url, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.messages.create(asked(question)), Anthropic.AuthenticationError);
});

await check("history", async () => {
  const seen = [user(image, text(see.ask)), { role: "assistant", content: see.answer }];
  assert.equal(textOf(await ask([...seen, user(text(count.ask))])), count.answer);
  const tools = [tool("add", addSchema)];
  const called = await ask(question, { tools, tool_choice: { type: "any" } });
  const before = [...question, { role: "assistant", content: called.content }];
  const result = { type: "tool_result", tool_use_id: called.content[0].id };
  assert.equal((await ask([...before, user({ ...result, content: "7" })], { tools })).stop_reason, "end_turn");
  assert.equal(textOf(await ask([...before, user({ ...result, content: [image] }, text(see.ask))])), see.answer);
});
