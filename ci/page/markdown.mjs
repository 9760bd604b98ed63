// The page's Markdown against markdown-it, an independent implementation.
import assert from "node:assert/strict";
import MarkdownIt from "markdown-it";

const SAMPLES = [
  "One line\nand another\n\nA second paragraph  \nwith a hard break\\\nand one more",
  "# One\n## Two ##\n###### Six\n#hashtag\n####### seven\n# `code` and *more*",
  "*a* **b** _d_ __e__ ~~f~~ **a *b* c** *a **b** c*",
  "2 * 3 * 4, a*b*c, snake_case_name, __init__, * not *, **not **, _a_b, 5 ** 2 ** 1",
  "**bold**text and text**bold**, *it*s, \"**quoted**\", (*in parentheses*)",
  "a *line\nand* another, **not\n\nclosed** here, *open",
  "`code` ``a ` b`` ` ` `**not bold**` `a\\*b` ``` unclosed `",
  "\\*not emphasis\\* \\# \\[a\\](b) \\\\ \\a 1\\. x",
  "[text](https://a.example/b?c=d&e#f) [*em* `c`](https://a.example \"title\") [x](<https://a.example/y>) [no](javascript:alert(1))",
  "see https://a.example/path_(x)_y. And https://b.example/a_b_c, (https://c.example/) **https://d.example/e**!",
  "[a] (https://a.example) ![pic](https://a.example/c.png) [a [b] c](https://a.example)",
  "- a\n- b\n  - c\n    - d\n- e",
  "* a\n* b\n\n+ c\n+ d",
  "1. one\n2. two\n   1. inner\n   2. more\n3. three",
  "3) three\n4) four\n\nparagraph\n\n10. ten",
  "- a\n\n- b\n\n  second paragraph\n- c",
  "- item\n  goes on\nlazily\n- next\n\nafter",
  "1. Do this:\n\n   ```python\n   print(1)\n\n   print(2)\n   ```\n\n2. Then that.",
  "- code:\n  ```\n  x\n  ```\n- **b**: text",
  "Text before\n- a\n- b\nText after?\n\n1986. A year.\n\nIn\n1986. it goes on",
  "```js\nconst a = `b`; // <b>\n```\nafter\n~~~\n```\n~~~",
  "````md\n```\ninner\n```\n````",
  "```\nunclosed\n\ncode",
  "  ```\n  indented\n    more\n  ```",
  "text\n```\ncode\n```\ntext",
  "> quote\n> **b**\n> > inner\n\nafter",
  "> - a\n> - b\n>\n> p\n\n> other",
  "a\n\n---\n\n***\n_ _ _\nb",
  "| a | b | c |\n| --- | :---: | ---: |\n| 1 | **2** | `x\\|y` |\n| 3 | 4 |\n\nafter",
  "a | b\n-|-\n1 | 2\n\n| no table |\nnext",
  "text\n| a | b |\n|---|---|\n| 1 | 2 |",
  "<b>html</b> &amp; & < > <!-- c --> <script>alert(1)</script>",
  "Line with trailing spaces   \n\n\n\nnext",
  "**Steps:**\n1. a\n2. b\n\n**Notes:**\n- c",
  "### Title\nText under it\n- a\n  1. b\n  2. c\n- d",
  "-\n- a\n-  b\n-not a list\n+",
  "a  \n",
  "",
  "emoji **🙂** _ü_ ü_ü_ü 日本**語**です",
];
const HOSTILE = ["*", "**a ", "[", "![](", "`", "` `` ", "> ", "- ", "| a ", "\\", "_a", "~~a", "(https://a", "1. ", "# ", "```\n", "-\n", "|-|\n"];

/** The elements of pieces of HTML as texts that do not depend on spaces between blocks; `below` renames headings. */
function shapesOf(htmls, below) {
  const shape = node => {
    if (node.nodeType === Node.TEXT_NODE) {
      return node.parentElement.closest("pre") ? node.textContent : node.textContent.replace(/\s+/g, " ");
    }
    if (node.classList.contains("code")) return shape(node.querySelector("pre"));
    if (node.matches("div.scrollable")) return shape(node.firstElementChild);
    const tag = below[node.tagName] ?? node.tagName;
    const told = [tag, node.href, node.start > 1 ? node.start : "", node.align || node.style.textAlign].filter(Boolean);
    const inner = [...node.childNodes].map(shape).join("");
    return `<${told.join(" ")}>${/^(A|EM|STRONG|S|CODE)$/.test(tag) ? inner : inner.trim()}</>`;
  };
  return htmls.map(html => shape(new DOMParser().parseFromString(html, "text/html").body)
    .replace(/\s*(<BR><\/>)\s*/g, "$1").replace(/> </g, "><").replace(/ (<(?:UL|OL|PRE|BLOCKQUOTE|P)\b)/g, "$1"));
}

/** The page's HTML of each sample, shown at once, and as it grows letter by letter. */
async function htmlOfPage(samples) {
  const { growing } = await import("/page/markdown.js");
  return samples.map(sample => {
    const [whole, grown] = [document.createElement("div"), document.createElement("div")];
    growing(whole)(sample);
    const show = growing(grown);
    for (let end = 0; end <= sample.length; end += 1) show(sample.slice(0, end));
    return [whole.innerHTML, grown.innerHTML];
  });
}

/** The longest milliseconds of a frame while an answer of 40,000 characters comes in pieces of 100. */
async function longestFrame(sample) {
  const { growing } = await import("/page/markdown.js");
  const talk = document.querySelector("#talk");
  const body = document.createElement("div");
  body.className = "body";
  talk.append(body);
  const show = growing(body);
  const text = sample.repeat(40_000 / sample.length);
  let longest = 0;
  for (let end = 100; end <= text.length; end += 100) {
    const started = performance.now();
    show(text.slice(0, end));
    body.offsetHeight; // lays it out
    longest = Math.max(longest, performance.now() - started);
  }
  body.remove();
  return Math.round(longest);
}

/** Renders all samples on a page that has the server's files. */
export async function checkMarkdown(page) {
  const oracle = new MarkdownIt({ html: false, breaks: true, linkify: true }).disable(["image", "entity", "code", "lheading", "reference"]);
  oracle.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
  oracle.validateLink = target => /^https?:/.test(target);
  const blank = await page.browser().newPage(); // the server's page may not parse HTML
  const made = await page.evaluate(htmlOfPage, SAMPLES);
  assert.deepEqual(made.map(([, grown]) => grown), made.map(([whole]) => whole));
  const ours = await blank.evaluate(shapesOf, made.map(([whole]) => whole), {});
  const below = { H1: "H3", H2: "H4", H3: "H5", H4: "H6", H5: "H6" };
  const theirs = await blank.evaluate(shapesOf, SAMPLES.map(sample => oracle.render(sample)), below);
  await blank.close();
  const found = SAMPLES.map((sample, i) => ({ sample, ours: ours[i], theirs: theirs[i] }));
  assert.deepEqual(found.filter(each => each.ours !== each.theirs), []);
  const times = await page.evaluate(async begins => {
    const { growing } = await import("/page/markdown.js");
    return begins.map(begin => {
      const started = performance.now();
      growing(document.createElement("div"))(begin.repeat(40_000 / begin.length));
      return Math.round(performance.now() - started);
    });
  }, HOSTILE);
  const frame = await page.evaluate(longestFrame, `${SAMPLES.join("\n\n")}\n\n`);
  console.log(`markdown: ${SAMPLES.length} samples as markdown-it; 40,000 characters: hostile ones ${Math.max(...times)} ms at most, a frame of an answer ${frame} ms at most`);
}
