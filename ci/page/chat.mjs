// Drives the page as a person would: attaches, drops, records, asks, stops, retries, reloads; reads the answers, writes
// screenshots, and compares its Markdown with markdown-it's. Fails on a wrong answer, a request to another host, an error
// in the console, and a serious finding of axe-core. The microphone is Chromium's fake one, which plays the sound.
//
//     node chat.mjs URL GUARDED_URL KEY MEDIA_FOLDER SCREENSHOTS
import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { launch } from "./browser.mjs";
import { checkMarkdown } from "./markdown.mjs";

const [url, guarded, key, media, screenshots] = process.argv.slice(2);
const [picture, sound, film, broken, notes] = ["picture.png", "sound.wav", "film.webm", "broken.png", "notes.pdf"]
  .map(name => resolve(media, name));
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

const SHAPES = "A red circle, a yellow star and a blue square.";
const BEEPS = "Three high beeps.";
const SUM = "3 plus 4 is 7.";
const COUNTED = "40, 41, 42, 43, 44, 45, 46.";
const RICH = `Here is a **short plan** with \`code\`:

1. Read the file
2. Count the words
   - split at spaces
   - leave out *empty* ones

\`\`\`python
from collections import Counter
from pathlib import Path

words = Counter(Path("notes.txt").read_text().split())
for word, count in words.most_common(10):  # the ten most frequent words, each with the number of times that it occurs
    print(f"{count:6} {word}")
\`\`\`

| word | count |
| --- | ---: |
| the | 12 |
| and | 7 |

| month | January | February | March | April | May | June | July | August | September | October | November | December |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| words | 1200 | 980 | 1430 | 770 | 1010 | 890 | 1320 | 640 | 1180 | 1250 | 930 | 1100 |

- שלום עולם, 3 ועוד 4 הם 7

> See [the documentation](https://docs.python.org/3/library/collections.html) for more.`;
const HOSTILE = `<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script>
[a](javascript:window.hacked=3) [b](data:text/html,<script>hacked=4</script>) ![c](https://attacker.example/c.png)
<svg onload="window.hacked=5"></svg> \`<b onclick=x>\`

<iframe srcdoc="<script>parent.hacked=6</script>"></iframe>

\`\`\`html" onmouseover="window.hacked=7
</code></pre><img src=y onerror="window.hacked=8">
\`\`\``;

const browser = await launch(
  "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
  `--use-file-for-fake-audio-capture=${sound}%noloop`,
);
const page = await browser.newPage();
const problems = [];
const sent = []; // bodies of the questions
let canned = null; // the answer that the next question gets instead of the server's
let isCut = false; // whether that answer ends too early
page.on("pageerror", error => problems.push(String(error)));
page.on("console", message => {
  const expected = /the server responded with a status of 4\d\d/.test(message.text());
  if (message.type() === "error" && !expected) problems.push(message.text());
});
await page.setRequestInterception(true);
page.on("request", request => {
  const { protocol, origin, pathname } = new URL(request.url());
  if (protocol.startsWith("http") && origin !== url && origin !== guarded) problems.push(`asked ${request.url()}`);
  if (pathname !== "/v1/chat/completions") return request.continue();
  request.fetchPostData().then(data => {
    sent.push(JSON.parse(data));
    if (canned === null) return request.continue();
    const chunks = [
      ...canned.split(/(?<= )/).map(content => ({ choices: [{ delta: { content }, finish_reason: null }] })),
      { choices: [{ delta: {}, finish_reason: "stop" }] },
      { choices: [], usage: { completion_tokens: 60, total_tokens: 400 } },
    ];
    canned = null;
    const body = chunks.map(chunk => `data: ${JSON.stringify(chunk)}\n\n`).join("") + (isCut ? "" : "data: [DONE]\n\n");
    return request.respond({ contentType: "text/event-stream", body });
  });
});

async function open(address = url) {
  await page.goto(address);
  await page.waitForSelector("body[data-ready]");
}

const isIdle = () => document.querySelector("#talk[aria-busy=false]");

async function attach(...files) {
  const before = await count("#attached li");
  await (await page.$("#files")).uploadFile(...files);
  await page.waitForFunction(n => document.querySelectorAll("#attached li").length === n, {}, before + files.length);
}

/** The text of the answer. */
async function ask(text, ...files) {
  if (files.length) await attach(...files);
  await page.focus("#text");
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
  return answer(text);
}

async function answer(text) {
  await page.waitForFunction(isIdle, { timeout: 60000 });
  const shown = await page.$eval("#talk > :last-child .body", body => body.innerText.trim());
  console.log(`${text.slice(0, 40)} -> ${shown.split("\n")[0]}`);
  return shown;
}

const count = selector => page.$$eval(selector, all => all.length);
const press = name => page.click(`#talk > :last-child [aria-label=${name}]`);
const state = () => page.$eval("#talk > :last-child", last => last.dataset.state);

async function startOver() {
  await page.click("#new");
  await page.waitForFunction(() => !document.querySelector("#talk").childElementCount);
}

/** Looks at the page in both colour schemes, wide and narrow; `heights` of both are in pixels. */
async function inspect(name, heights = [900, 780]) {
  for (const [i, width] of [1200, 380].entries()) {
    const height = heights[i];
    for (const scheme of ["light", "dark"]) {
      await page.setViewport({ width, height });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.screenshot({ path: join(screenshots, `${name}-${width}-${scheme}.png`) });
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => axe.run());
      for (const { id, impact, nodes } of violations) {
        console.log(`axe: ${name} ${width} ${scheme}: ${impact} ${id}: ${nodes[0].html.slice(0, 120)}`);
        if (["serious", "critical"].includes(impact)) problems.push(`axe: ${id} in ${name}, ${width}, ${scheme}`);
      }
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(overflow <= 0, `${name} is ${overflow} px too wide at ${width}`);
    }
  }
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
}

try {
  // An empty page has hints, and a starter fills in a question.
  await open();
  await checkMarkdown(page);
  assert.ok(await page.$eval("#hints", hints => hints.checkVisibility()));
  assert.equal(await page.$eval("link[rel=icon]", async link => (await fetch(link.href)).status), 200);
  await inspect("hints");
  await page.click("#starters button:last-child");
  await page.keyboard.press("Enter");
  assert.equal(await answer("What is 3 plus 4?"), SUM);
  await startOver();

  // Pictures, sounds and films, and questions that follow them.
  assert.equal(await ask("What is in the picture?", picture), SHAPES);
  const counted = await ask("How many shapes are there?");
  assert.equal(counted, "A red circle and a yellow star and a blue square: three shapes.");
  assert.equal(await ask("What do you hear?", sound), BEEPS);
  assert.equal(await page.$eval("#talk img", image => image.naturalWidth > 0), true);
  await page.setViewport({ width: 900, height: 940 });
  await page.screenshot({ path: join(screenshots, "page.png") });

  // A reload keeps all of it, and what follows knows it.
  const before = await page.$eval("#talk", talk => talk.innerText);
  await open();
  assert.equal(await page.$eval("#talk", talk => talk.innerText), before);
  await page.waitForFunction(() => document.querySelector("#talk img").naturalWidth > 0);
  await press("Retry");
  assert.equal(await answer("What do you hear?"), BEEPS);
  assert.equal(sent.at(-1).messages.length, 5);
  assert.equal(sent.at(-1).messages[0].content[0].type, "image_url");

  // A rich answer and an error.
  canned = RICH;
  await ask("How do I count the words of a file?");
  const tags = ["strong", "em", "ol li ul li", "pre code", "td", "blockquote a[href^='https:']", ":not(pre) > code"];
  for (const tag of tags) assert.ok(await count(`#talk > :last-child .body ${tag}`), tag);
  const styleOf = (selector, name) => page.$eval(selector, (node, each) => getComputedStyle(node)[each], name);
  assert.deepEqual(await Promise.all([styleOf("th", "textAlign"), styleOf("td + td", "textAlign")]), ["start", "-webkit-right"]);
  assert.equal(await styleOf(".body > ul", "direction"), "rtl");
  assert.match(await ask("And this one?", broken), /^broken\.png: .* not an image/);
  assert.equal(await state(), "failed");
  await inspect("talk", [2000, 2100]);
  await ask("What is 3 plus 4?");
  assert.ok(!JSON.stringify(sent.at(-1)).includes("And this one?"), "a question that failed is not sent again");

  // Another tab has the same conversation, and follows it.
  const other = await browser.newPage();
  await other.goto(url);
  await other.waitForSelector("body[data-ready]");
  const inOther = () => other.$$eval("article", all => all.length);
  assert.equal(await inOther(), await count("article"));
  await page.bringToFront();
  await page.$eval("#text", field => { field.value = "word ".repeat(2100); });
  assert.match(await ask("What?"), /longer than the 2,048 tokens/);
  await other.waitForFunction(n => document.querySelectorAll("article").length === n, {}, await count("article"));

  // Only one tab answers at a time.
  other.evaluate(() => navigator.locks.request("gemma3n", () => new Promise(() => {}))).catch(() => {}); // until it closes
  await other.waitForFunction(async () => (await navigator.locks.query()).held.length === 1);
  await page.focus("#text");
  await page.keyboard.type("And now?");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#notice").textContent.includes("Another tab is answering"));
  await other.close();
  await page.waitForFunction(async () => !(await navigator.locks.query()).held.length);
  await page.$eval("#text", field => { field.value = ""; });

  // A new chat can be taken back.
  const shown = await count("article");
  await startOver();
  await page.click("#notice button:not(.icon)");
  assert.equal(await count("article"), shown);
  await startOver();

  // Files that are neither picture nor sound nor video, and an attachment that is removed.
  await (await page.$("#files")).uploadFile(notes);
  await page.waitForFunction(() => document.querySelector("#notice").textContent.includes("notes.pdf is neither"));
  await attach(picture, sound);
  await inspect("attached");
  await page.click("#attached button[aria-label='Remove sound.wav']");
  assert.equal(await count("#attached li"), 1);
  await page.click("#attached button");

  // Pasting a picture, and dropping several files at once.
  const dropped = [picture, sound].map(path => [path.split("/").at(-1), readFileSync(path).toString("base64")]);
  await page.evaluate(files => {
    const dataTransfer = new DataTransfer();
    for (const [name, data] of files) {
      const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
      dataTransfer.items.add(new File([bytes], name, { type: name.endsWith("png") ? "image/png" : "audio/wav" }));
    }
    const copied = new DataTransfer();
    copied.items.add(dataTransfer.files[0]);
    document.querySelector("#text").dispatchEvent(new ClipboardEvent("paste", { clipboardData: copied }));
    for (const type of ["dragenter", "dragover", "drop"]) {
      document.body.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
    }
  }, dropped);
  await page.waitForFunction(() => document.querySelectorAll("#attached li").length === 3);
  await page.click("#attached button");
  assert.equal(await ask("What do you see and hear?"), "I see a red circle, a yellow star and a blue square. I hear three high beeps.");
  await startOver();

  assert.equal(await ask("What is in the picture?", film), SHAPES);
  assert.equal(sent.at(-1).messages[0].content[0].type, "video_url");
  await startOver();

  await page.click("#record");
  await page.waitForSelector("#record[aria-pressed=true]");
  await new Promise(resolve => setTimeout(resolve, 4000));
  await page.click("#record");
  await page.waitForSelector("#attached li");
  assert.equal(await ask("What do you hear?"), BEEPS);
  await startOver();

  // Stopping an answer after its first words, and retrying it.
  await page.evaluate(() => {
    new MutationObserver((_, observer) => {
      if (!document.querySelector("#talk > :last-child .body")?.textContent) return;
      observer.disconnect();
      document.querySelector("#send[aria-label=Stop]").click();
    }).observe(document.querySelector("#talk"), { childList: true, subtree: true });
  });
  const part = await ask("Count from 40 to 46.");
  assert.equal(await state(), "stopped");
  assert.ok(COUNTED.startsWith(part) && part !== COUNTED, part);
  await press("Retry");
  assert.equal(await answer("Count from 40 to 46."), COUNTED);
  assert.equal(await count("article"), 2);
  await startOver();

  // Nothing of a hostile answer becomes more than text.
  canned = HOSTILE;
  const harmless = await ask("Attack me.");
  assert.ok(harmless.includes('<img src=x onerror="window.hacked=1">') && harmless.includes("<iframe"));
  assert.equal(await page.evaluate(() => window.hacked), undefined);
  assert.equal(await count(".body :is(img, script, svg[onload], iframe, [onclick], [onmouseover], [onerror])"), 0);
  assert.deepEqual(await page.$$eval(".body a", all => all.map(link => link.protocol)), ["https:"]);
  await page.reload();
  await page.waitForSelector("body[data-ready]");
  assert.equal(await page.evaluate(() => window.hacked), undefined);
  await startOver();

  // An answer whose connection ends early.
  [canned, isCut] = ["Three high", true];
  assert.match(await ask("What do you hear?"), /^Three high\s+The connection ended before the answer did/);
  assert.equal(await state(), "failed");
  isCut = false;
  await startOver();

  // Settings reach the request, and survive a reload.
  assert.ok(!("temperature" in sent.at(-1)) && !("max_tokens" in sent.at(-1)), "the server's defaults hold");
  await page.click("#settings");
  await page.type("#system", "Your name is Ada.");
  await page.focus("#temperature");
  for (let i = 0; i < 8; i++) await page.keyboard.press("ArrowRight");
  await page.type("#length", "64");
  await inspect("settings");
  await page.click("#close");
  await page.reload();
  await page.waitForSelector("body[data-ready]");
  await ask("What is your name?");
  const { temperature, max_tokens: limit, messages } = sent.at(-1);
  assert.deepEqual([temperature, limit, messages[0]], [0.7, 64, { role: "system", content: "Your name is Ada." }]);
  await page.click("#settings");
  await page.focus("#temperature");
  await page.keyboard.press("Home");
  await page.click("#length", { count: 3 });
  await page.keyboard.type("2");
  await page.keyboard.press("Escape");
  await press("Retry");
  const cut = await answer("What is your name?");
  assert.ok("My name is Ada.".startsWith(cut) && cut.length < 15, cut);
  assert.match(await page.$eval("#talk > :last-child small", note => note.textContent), /cut at the longest length/);
  assert.deepEqual(sent.at(-1).messages.map(({ role }) => role), ["system", "user"]);
  assert.ok(!("temperature" in sent.at(-1)));

  // A browser that keeps nothing.
  const forgetful = await page.evaluateOnNewDocument(() => {
    IDBFactory.prototype.open = () => { throw new DOMException("", "SecurityError"); };
  });
  await open();
  await ask("What is 3 plus 4?");
  assert.match(await page.$eval("#notice", notice => notice.textContent), /cannot keep the conversation/);
  await page.removeScriptToEvaluateOnNewDocument(forgetful.identifier);

  // A server with a key asks for it.
  await open(guarded);
  await page.waitForSelector("#dialog[open]");
  await page.type("#key", "wrong");
  await page.click("#close");
  await page.waitForFunction(() => document.querySelector("#key-problem").textContent === "The server refuses this key.");
  await page.click("#key", { count: 3 });
  await page.type("#key", key);
  await page.click("#close");
  await page.waitForFunction(() => document.querySelector("#model").options.length === 1);
  assert.equal(await ask("What is 3 plus 4?"), SUM);

  assert.deepEqual(problems, []);
} finally {
  await browser.close();
}
