// Vercel's AI SDK with three providers: chat completions, responses, and Anthropic's messages.
import assert from "node:assert";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, streamText, tool } from "ai";
import { z } from "zod";
import {
  addSchema, base, checksOf, collect, count, hear, isSum, isTrip, key, model, picture, see, sound, sum, tripSchema,
  versionOf,
} from "./checks.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const where = { baseURL: base, apiKey: key };
const compatible = createOpenAICompatible({
  name: "local", includeUsage: true, supportsStructuredOutputs: true, ...where,
});

async function run(packageName, provider, { parallel, audio }) {
  const { cannot, check } = checksOf(packageName, `${versionOf(packageName)}, ai ${versionOf("ai")}`);
  const asked = (messages, options) =>
    ({ model: provider(model), messages, temperature: 0, maxRetries: 0, maxOutputTokens: 200, ...options });
  const ask = (messages, options) => generateText(asked(messages, options));
  const user = (...content) => ({ role: "user", content });
  const text = text => ({ type: "text", text });
  const file = (data, mediaType) => ({ type: "file", data, mediaType });
  const image = file(picture, "image/png");
  const question = [user(text(sum.ask))];
  const add = tool({ description: "Adds", inputSchema: jsonSchema(addSchema) });

  await check("text", async () => {
    const answer = await ask(question, { instructions: "Be brief." });
    assert(answer.text && answer.usage.outputTokens > 1);
    assert.equal((await ask(question)).text, sum.answer);
  });

  await check("stream", async () => {
    const answer = streamText(asked(question));
    assert.equal((await collect(answer.textStream)).join(""), sum.answer);
    assert((await answer.usage).outputTokens > 3 && (await answer.finishReason) === "stop");
  });

  await check("image", async () => assert.equal((await ask([user(image, text(see.ask))])).text, see.answer));

  if (audio) {
    await check("audio", async () => {
      assert.equal((await ask([user(file(sound, "audio/wav"), text(hear.ask))])).text, hear.answer);
    });
  } else {
    cannot("audio", "the provider sends no sound");
  }

  await check("tools offered", async () => {
    const answer = await ask(question, { tools: { add } });
    assert(answer.text && !answer.toolCalls.length);
  });

  await check("tools forced", async () => {
    for (const toolChoice of ["required", { type: "tool", toolName: "add" }]) {
      const { toolCalls: [call], finishReason } = await ask(question, { tools: { add }, toolChoice });
      assert(isSum(call.input) && finishReason === "tool-calls");
      const [streamed] = await streamText(asked(question, { tools: { add }, toolChoice })).toolCalls;
      assert(isSum(streamed.input));
    }
  });

  await check("parallel tools", async () => {
    const { toolCalls } = await ask(question, { tools: { add }, toolChoice: "required", providerOptions: parallel });
    assert(toolCalls.length && toolCalls.every(call => isSum(call.input)));
  });

  await check("nested tools", async () => {
    const plan = tool({ description: "Plans", inputSchema: jsonSchema(tripSchema) });
    const { toolCalls: [call] } = await ask(question, { tools: { plan }, toolChoice: "required" });
    assert(isTrip(call.input));
  });

  await check("structured", async () => {
    const digit = z.literal([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    const options = { output: Output.object({ schema: z.object({ a: digit, b: digit }) }) };
    assert(isSum((await ask(question, options)).output));
    assert(isSum((await collect(streamText(asked(question, options)).partialOutputStream)).at(-1)));
  });

  await check("errors", async () => {
    const status = code => error => APICallError.isInstance(error) && error.statusCode === code;
    await assert.rejects(ask(question, { model: provider("other") }), status(404));
    await assert.rejects(ask(question, { topP: -1 }), status(400));
    const answer = streamText(asked(question, { model: provider("other"), onError() {} }));
    const failed = (await collect(answer.fullStream)).find(part => part.type === "error");
    assert(status(404)(failed.error));
  });

  await check("history", async () => {
    const seen = [user(image, text(see.ask)), { role: "assistant", content: see.answer }];
    assert.equal((await ask([...seen, user(text(count.ask))])).text, count.answer);
    const called = await ask(question, { tools: { add }, toolChoice: "required" });
    const { toolCallId, toolName } = called.toolCalls[0];
    const result = { type: "tool-result", toolCallId, toolName, output: { type: "json", value: { sum: 7 } } };
    const after = [...question, ...called.response.messages, { role: "tool", content: [result] }];
    assert.equal((await ask(after, { tools: { add } })).finishReason, "stop");
    assert.equal((await ask([...after, user(image, text(see.ask))])).text, see.answer);
  });
}

await run("@ai-sdk/openai-compatible", compatible, { parallel: { local: { parallel_tool_calls: true } }, audio: true });
await run("@ai-sdk/openai", createOpenAI(where), { parallel: { openai: { parallelToolCalls: true } } });
await run("@ai-sdk/anthropic", createAnthropic(where), { parallel: { anthropic: { disableParallelToolUse: false } } });
