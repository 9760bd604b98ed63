// The requests of Together's page about google/gemma-3n-E4B-it in TypeScript; only addresses and keys are other ones.
import assert from "node:assert";
import Together from "together-ai";
import { base, checksOf, filesUrl, key, versionOf } from "./checks.mjs";

Object.assign(process.env, { TOGETHER_BASE_URL: base, TOGETHER_API_KEY: key });
const { check } = checksOf("Together's page, TypeScript", versionOf("together-ai"));
const together = new Together();
const model = "google/gemma-3n-E4B-it";

await check("text", async () => {
  const messages = [{ role: "user", content: "What are some fun things to do in New York?" }];
  const completion = await together.chat.completions.create({ model, messages });
  assert.equal(completion.choices[0].message.role, "assistant");
});

await check("image", async () => {
  const content = [
    { type: "text", text: "Describe what you see in this image." },
    { type: "image_url", image_url: { url: `${filesUrl}/picture.png` } },
  ];
  const completion = await together.chat.completions.create({ model, messages: [{ role: "user", content }] });
  assert(completion.usage.prompt_tokens > 200);
});
