// Pages of other origins in a headless Chromium: the allowed one reads answers, another one does not.
import assert from "node:assert";
import { createServer } from "node:http";
import { launch } from "./browser.mjs";
import { base, checksOf, key, model, sum } from "./checks.mjs";

const origin = process.env.CLIENTS_ORIGIN;

async function serve(port) {
  const server = createServer((_, response) => response.end("<!doctype html><title>A page</title>"));
  await new Promise(resolve => server.listen(port, "localhost", resolve));
  return server;
}

const allowed = await serve(new URL(origin).port);
const other = await serve(0);
const browser = await launch();
const { check } = checksOf("a page of another origin", await browser.version());

// Asks in a page of this origin: the status and the text of each chunk that came, or the name of the error.
async function ask(from, options) {
  const page = await browser.newPage();
  await page.goto(from);
  try {
    return await page.evaluate(async ({ base, key, model, content, stream }) => {
      try {
        const response = await fetch(`${base}/chat/completions`, {
          method: "POST",
          headers: { "Authorization": `Bearer ${key}`, "Content-Type": "application/json" },
          body: JSON.stringify({ model, messages: [{ role: "user", content }], temperature: 0, stream }),
        });
        const chunks = [];
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let read; !(read = await reader.read()).done;) chunks.push(read.value);
        return { status: response.status, chunks };
      } catch (error) {
        return { error: error.name };
      }
    }, { base, key, model, content: sum.ask, ...options });
  } finally {
    await page.close();
  }
}

try {
  await check("text", async () => {
    const { status, chunks } = await ask(origin, { stream: false });
    assert.equal(status, 200);
    assert.equal(JSON.parse(chunks.join("")).choices[0].message.content, sum.answer);
  });

  await check("stream", async () => {
    const { status, chunks } = await ask(origin, { stream: true });
    assert.equal(status, 200);
    const events = chunks.join("").split("\n\n").filter(line => line.startsWith("data: {"));
    const texts = events.map(line => JSON.parse(line.slice(6)).choices[0].delta.content ?? "");
    assert.equal(texts.join(""), sum.answer);
    assert(chunks.length > 1);
  });

  await check("errors", async () => {
    assert.deepEqual(await ask(`http://localhost:${other.address().port}`, {}), { error: "TypeError" });
    for (const [options, status] of [[{ key: "wrong" }, 401], [{ model: "other" }, 404]]) {
      const answer = await ask(origin, options);
      assert.equal(answer.status, status);
      assert(JSON.parse(answer.chunks.join("")).error.message);
    }
  });
} finally {
  await browser.close();
  allowed.close();
  other.close();
}
