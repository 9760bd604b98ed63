// Drives the page as a person would: attaches, records, asks, reads the answers; every request must go to the server.
// The microphone is Chromium's fake one, which plays the sound.
import assert from "node:assert";
import { launch } from "./browser.mjs";

const [url, picture, sound, screenshot] = process.argv.slice(2);
const browser = await launch(
  "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
  `--use-file-for-fake-audio-capture=${sound}%noloop`,
);
try {
  const page = await browser.newPage();
  const elsewhere = [];
  page.on("request", request => {
    const { protocol, origin } = new URL(request.url());
    if (protocol.startsWith("http") && origin !== url) elsewhere.push(request.url());
  });
  page.on("pageerror", error => { throw error; });
  await page.goto(url);
  await page.waitForFunction(() => document.querySelector("#model").options.length === 1);

  let answers = 0;
  async function ask(text, file) {
    if (file) {
      await (await page.$("#files")).uploadFile(file);
      await page.waitForSelector("#attached figure");
    }
    await page.type("#text", text);
    await page.click("#send");
    answers += 1;
    await page.waitForFunction(n => document.querySelectorAll("article[data-done]").length === n, { timeout: 60000 }, answers);
    const shown = await page.$$eval("article[data-done]", all => all.at(-1).firstChild.textContent);
    console.log(`${text} ${shown}`);
    return shown;
  }

  assert.equal(await ask("What is in the picture?", picture), "A red circle, a yellow star and a blue square.");
  const counted = "A red circle and a yellow star and a blue square: three shapes.";
  assert.equal(await ask("How many shapes are there?"), counted);
  await page.screenshot({ path: screenshot });
  await page.click("#reset");
  answers = 0;
  assert.equal(await ask("What do you hear?", sound), "Three high beeps.");
  await page.click("#reset");
  answers = 0;
  await page.click("#record");
  await page.waitForSelector("#record.recording");
  await new Promise(resolve => setTimeout(resolve, 4000));
  await page.click("#record");
  await page.waitForSelector("#attached figure");
  assert.equal(await ask("What do you hear?"), "Three high beeps.");
  assert.deepEqual(elsewhere, []);
} finally {
  await browser.close();
}
