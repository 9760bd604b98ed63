// Markdown as DOM nodes. Text never becomes HTML, and pictures are not loaded: an address could carry text of the
// conversation to another server. What it reads of CommonMark, and tables, are compared with markdown-it in ci/page.
import { copyButton, element } from "./elements.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +|$)/;
const CELL_RULE = /^\s*:?-+:?\s*$/;
const DEEPEST = 12;

/**
 * A function that shows a text at the end of `parent` as it grows. All blocks but the last two stay as they are: what
 * follows can change the last one, and the one before it, which an incomplete line may have ended.
 */
export function growing(parent) {
  let settled = 0; // lines of the blocks that stay
  let open = []; // [element, the line where it ends] of the others
  return text => {
    for (const [made] of open) made.remove();
    open = [];
    const lines = text.replaceAll("\t", "    ").split("\n");
    const rest = lines.slice(settled);
    while (rest.length) {
      if (rest[0].trim()) open.push([block(rest, 0), lines.length - rest.length]);
      else rest.shift();
    }
    for (const [made] of open) made.dir ||= "auto";
    parent.append(...open.map(([made]) => made));
    while (open.length > 2) settled = open.shift()[1];
  };
}

function blocks(lines, depth) {
  const made = [];
  const rest = [...lines];
  while (rest.length) {
    if (!rest[0].trim()) rest.shift();
    else made.push(block(rest, depth));
  }
  return made;
}

/** Takes the next block from `lines`, which begin with it. */
function block(lines, depth) {
  const [line] = lines;
  const fence = line.match(FENCE);
  if (fence) return fenced(lines, fence[1], fence[2]);
  const heading = line.match(HEADING);
  if (heading) {
    lines.shift();
    const below = Math.min(6, heading[1].length + 2); // the page's own headings
    return element(`h${below}`, {}, ...inline((heading[2] ?? "").trim().replace(/(^|\s+)#+$/, "")));
  }
  if (RULE.test(line)) {
    lines.shift();
    return element("hr");
  }
  if (depth < DEEPEST && QUOTE.test(line)) {
    const quoted = takeWhile(lines, each => QUOTE.test(each)).map(each => each.replace(QUOTE, ""));
    return element("blockquote", {}, ...blocks(quoted, depth + 1));
  }
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, depth);
  if (isTable(lines)) return table(lines);
  const text = [lines.shift(), ...takeWhile(lines, (each, i) => !interrupts(each, lines.slice(i, i + 2)))];
  return element("p", {}, ...inline(text.map(each => each.trim()).join("\n")));
}

function takeWhile(lines, holds) {
  const end = lines.findIndex((line, i) => !holds(line, i));
  return lines.splice(0, end < 0 ? lines.length : end);
}

/** Whether a paragraph ends before this line, the first of `following`. */
function interrupts(line, following) {
  const item = line.match(ITEM);
  if (item) return item[0].length < line.length && !/^\d/.test(item[2]) || /^1[.)]/.test(item[2]);
  return !line.trim() || [FENCE, HEADING, RULE, QUOTE].some(rule => rule.test(line)) || isTable(following);
}

/** Code up to the fence that closes it, or to the end while the answer is still coming. */
function fenced(lines, fence, language) {
  const indent = lines.shift().search(/\S/);
  const closes = line => /^ {0,3}\S/.test(line) && line.trim().length >= fence.length && !line.trim().replaceAll(fence[0], "");
  const code = takeWhile(lines, line => !closes(line)).map(line => line.slice(Math.min(indent, line.search(/\S|$/))));
  const isClosed = lines.shift() !== undefined;
  return codeBlock(code.join("\n") + (isClosed && code.length ? "\n" : ""), language);
}

function codeBlock(code, language) {
  const pre = scrollable("pre", language ? `Code, ${language}` : "Code", element("code", {}, code));
  const bar = element("div", {}, element("span", {}, language), copyButton(() => code));
  return element("div", { className: "code", dir: "ltr" }, bar, pre);
}

/** A list; a blank line between its items or in them makes its paragraphs ones of their own. */
function list(lines, depth) {
  const [, , first] = lines[0].match(ITEM);
  const kind = first.at(-1);
  const items = [];
  let isLoose = false, endsBlank = false;
  for (let found; (found = lines[0]?.match(ITEM)) && found[2].at(-1) === kind && !RULE.test(lines[0]);) {
    const width = found[0].length === lines[0].length ? found[1].length + found[2].length + 1 : found[0].length;
    const item = [lines.shift().slice(width), ...itemLines(lines, width)];
    const end = item.findLastIndex(line => line.trim());
    isLoose ||= endsBlank || item.slice(1, end).some(line => !line);
    endsBlank = item.length > 1 && end < item.length - 1;
    items.push(item);
  }
  const made = element(/\d/.test(first) ? "ol" : "ul");
  if (/\d/.test(first) && Number.parseInt(first, 10) !== 1) made.start = Number.parseInt(first, 10);
  for (const item of items) {
    const children = blocks(item, depth + 1);
    made.append(element("li", {}, ...(isLoose ? children : children.flatMap(child => (child.tagName === "P" ? [...child.childNodes] : [child])))));
  }
  return made;
}

/** The lines after an item's first that belong to it: indented ones, blank ones, and what goes on with its paragraph. */
function itemLines(lines, width) {
  const taken = [];
  while (lines.length) {
    const indent = lines[0].search(/\S/);
    const isBlank = indent < 0;
    const goesOn = !isBlank && indent < width && (taken.at(-1) ?? "x").trim() && !interrupts(lines[0], []) && !ITEM.test(lines[0]);
    if (!isBlank && indent < width && !goesOn) break;
    taken.push(isBlank ? "" : lines[0].slice(Math.min(indent, width)));
    lines.shift();
  }
  return taken;
}

const cells = line => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));

function isTable([head, rule]) {
  if (!head?.includes("|") || !rule?.includes("-")) return false;
  const rules = cells(rule);
  return rules.every(cell => CELL_RULE.test(cell)) && rules.length === cells(head).length;
}

function table(lines) {
  const head = cells(lines.shift());
  const align = cells(lines.shift()).map(rule => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : ""));
  const rows = takeWhile(lines, line => line.trim() && !interrupts(line, [])).map(cells);
  const row = (tag, texts) => element("tr", {}, ...head.map((_, i) => element(tag, { align: align[i] }, ...inline(texts[i] ?? ""))));
  const body = element("tbody", {}, ...rows.map(texts => row("td", texts)));
  const made = element("table", {}, element("thead", {}, row("th", head)), ...(rows.length ? [body] : []));
  return scrollable("div", "Table", made);
}

/** An element that may be wider than the page; the keyboard reaches and scrolls it. */
function scrollable(tag, label, child) {
  const made = element(tag, { className: "scrollable", tabIndex: 0 }, child);
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", label);
  return made;
}
