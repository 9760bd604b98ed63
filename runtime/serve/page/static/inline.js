// What Markdown has inside a line: `code`, **strong**, *emphasis*, ~~struck~~, [links](https://...) and addresses.
import { element } from "./elements.js";

const ATOM = "\uE000"; // stands for a node that is already made
const ATOMS = new RegExp([
  /\\(?<escaped>[!-/:-@[-`{-~])/,
  /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]+?)(?<!`)\k<ticks>(?!`)/,
  /\[(?<label>(?:[^[\]]|\[[^[\]]*\])*)\]\(\s*<?(?<target>https?:\/\/(?:[^\s()<>]|\([^\s()<>]*\))+)>?(?:\s+"[^"]*")?\s*\)/,
  /(?<address>https?:\/\/(?:[^\s()<>"`*]|\([^\s()<>"`*]*\))*[^\s()<>"`*.,:;!?'_~])/,
].map(rule => rule.source).join("|"), "g");
const MARKS = { "**": "strong", "__": "strong", "~~": "s", "*": "em", "_": "em" };
const DEEPEST = 8;

/** Nodes and strings of a text of one or more lines. */
export function inline(text) {
  const atoms = [];
  const held = text.replaceAll(ATOM, "").replace(ATOMS, (...found) => {
    atoms.push(atom(found.at(-1)));
    return ATOM;
  });
  return marked(held.replaceAll("\\\n", "\n"), atoms, 0);
}

function atom({ escaped, code, label, target, address }) {
  if (escaped) return escaped;
  if (code) {
    const line = code.replaceAll("\n", " ");
    return element("code", {}, /^ .*[^ ].* $/.test(line) ? line.slice(1, -1) : line);
  }
  const link = { href: target ?? address, target: "_blank", rel: "noopener noreferrer" };
  return element("a", link, ...(target ? inline(label) : [address]));
}

function marked(text, atoms, depth) {
  const nodes = [];
  const unclosed = new Set(); // from here to the end
  let from = 0, i = 0;
  while (depth < DEEPEST && i < text.length) {
    const mark = Object.keys(MARKS).find(each => !unclosed.has(each) && opens(text, i, each));
    if (!mark) {
      i += 1;
      continue;
    }
    const begin = i + mark.length;
    const end = closing(text, begin, mark);
    if (end < 0) {
      unclosed.add(mark);
      continue;
    }
    nodes.push(...plain(text.slice(from, i), atoms));
    nodes.push(element(MARKS[mark], {}, ...marked(text.slice(begin, end), atoms, depth + 1)));
    from = i = end + mark.length;
  }
  return [...nodes, ...plain(text.slice(from), atoms)];
}

const isWord = character => /[\p{L}\p{N}]/u.test(character ?? "");
const isSpace = character => character === undefined || /\s/.test(character);

function opens(text, i, mark) {
  if (!text.startsWith(mark, i) || isSpace(text[i + mark.length])) return false;
  return mark[0] !== "_" || !isWord(text[i - 1]);
}

/** Where `mark` closes what it opened before `begin`; -1 if it does not. */
function closing(text, begin, mark) {
  const [letter] = mark;
  for (let i = text.indexOf(mark, begin); i >= 0; i = text.indexOf(mark, i)) {
    let end = i;
    while (text[end] === letter) end += 1;
    const matches = mark.length === 2 || (end - i) % 2 === 1;
    if (i > begin && matches && !isSpace(text[i - 1]) && (letter !== "_" || !isWord(text[end]))) return end - mark.length;
    i = end;
  }
  return -1;
}

/** Text with its line breaks, and the nodes that atoms stand for. */
function plain(text, atoms) {
  return text.split(/(\uE000|\n)/).filter(Boolean).map(part => {
    if (part === "\n") return element("br");
    return part === ATOM ? atoms.shift() : part;
  });
}
