// OpenAI's client: chat completions.
import assert from "node:assert";
import { createReadStream } from "node:fs";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  addSchema, base, checksOf, collect, count, hear, isSum, isTrip, key, model, pictureUrl, see, sound, soundPath, sum,
  tripSchema, versionOf,
} from "./checks.mjs";

const { check } = checksOf("openai (npm)", versionOf("openai"));
const client = new OpenAI({ baseURL: base, apiKey: key, maxRetries: 0 });
const image = { type: "image_url", image_url: { url: pictureUrl } };
const user = (...content) => ({ role: "user", content });
const text = text => ({ type: "text", text });
const tool = (name, parameters) => ({ type: "function", function: { name, description: name, parameters } });
const asked = (messages, options) => ({ model, messages, temperature: 0, ...options });
const ask = async (messages, options) =>
  (await client.chat.completions.create(asked(messages, options))).choices[0].message;
const question = [user(text(sum.ask))];
const Add = z.object({ a: z.number().int().min(0).max(9), b: z.number().int().min(0).max(9) });

await check("text", async () => {
  assert.equal((await ask([{ role: "user", content: sum.ask }])).content, sum.answer);
  assert.equal((await client.models.retrieve(model)).id, model);
});

await check("stream", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const events = await collect(await client.chat.completions.create(asked(question, options)));
  assert.equal(events.map(each => each.choices[0]?.delta.content ?? "").join(""), sum.answer);
  assert(events.at(-1).usage.completion_tokens > 3);
  const runner = client.chat.completions.stream(asked(question));
  assert.equal(await runner.finalContent(), sum.answer);
});

await check("image", async () => assert.equal((await ask([user(image, text(see.ask))])).content, see.answer));

await check("audio", async () => {
  const part = { type: "input_audio", input_audio: { data: sound.toString("base64"), format: "wav" } };
  assert.equal((await ask([user(part, text(hear.ask))])).content, hear.answer);
  const file = { model, file: createReadStream(soundPath), prompt: hear.ask };
  assert.equal((await client.audio.transcriptions.create(file)).text, hear.answer);
});

await check("tools offered", async () => {
  const answer = await ask(question, { tools: [tool("add", addSchema)] });
  assert(answer.content && !answer.tool_calls?.length);
});

await check("tools forced", async () => {
  for (const tool_choice of ["required", { type: "function", function: { name: "add" } }]) {
    const { tool_calls } = await ask(question, { tools: [tool("add", addSchema)], tool_choice });
    assert(tool_calls.length === 1 && isSum(tool_calls[0].function.arguments));
  }
  const options = { tools: [zodFunction({ name: "add", parameters: Add })], tool_choice: "required" };
  const parsed = await client.chat.completions.parse(asked(question, options));
  assert(isSum(parsed.choices[0].message.tool_calls[0].function.parsed_arguments));
  const called = await client.chat.completions.stream(asked(question, options)).finalMessage();
  assert(isSum(called.tool_calls[0].function.arguments));
});

await check("parallel tools", async () => {
  const options = { tools: [tool("add", addSchema)], tool_choice: "required", parallel_tool_calls: true };
  const { tool_calls } = await ask(question, options);
  assert(tool_calls.length && tool_calls.every(call => isSum(call.function.arguments)));
});

await check("nested tools", async () => {
  const { tool_calls } = await ask(question, { tools: [tool("plan", tripSchema)], tool_choice: "required" });
  assert(isTrip(tool_calls[0].function.arguments));
});

await check("structured", async () => {
  const Both = z.object({ first: Add, second: Add });
  const options = { response_format: zodResponseFormat(Both, "both", { schemaDefinitions: { Add } }) };
  const parsed = await client.chat.completions.parse(asked(question, options));
  assert(isSum(parsed.choices[0].message.parsed.second));
  assert(isSum(JSON.parse(await client.chat.completions.stream(asked(question, options)).finalContent()).first));
});

await check("errors", async () => {
  for (const stream of [false, true]) {
    await assert.rejects(ask(question, { model: "other", stream }), OpenAI.NotFoundError);
    await assert.rejects(ask(question, { temperature: -1, stream }), OpenAI.BadRequestError);
  }
  await assert.rejects(client.withOptions({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
});

await check("history", async () => {
  const seen = [user(image, text(see.ask)), { role: "assistant", content: see.answer }];
  assert.equal((await ask([...seen, user(text(count.ask))])).content, count.answer);
  const tools = [tool("add", addSchema)];
  const called = await ask(question, { tools, tool_choice: "required" });
  const result = { role: "tool", tool_call_id: called.tool_calls[0].id };
  assert((await ask([...question, called, { ...result, content: "7" }], { tools })).role);
  const shown = [...question, called, { ...result, content: [image] }, user(text(see.ask))];
  assert.equal((await ask(shown)).content, see.answer);
});
