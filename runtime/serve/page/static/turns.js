// The turns of a conversation as elements.
import { copyButton, element, icon, iconButton } from "./elements.js";
import { growing } from "./markdown.js";

/** A preview of an attachment; its name, where the browser cannot show it. */
export function preview({ kind, name, blob }) {
  const source = URL.createObjectURL(blob);
  const chip = () => element("span", { className: "chip" }, icon(kind === "audio" ? "sound" : "image"), name);
  const media = kind === "image"
    ? element("img", { src: source, alt: name })
    : element(kind, { src: source, controls: true, title: name });
  if (kind !== "image") media.setAttribute("aria-label", name);
  media.onerror = () => media.replaceWith(chip());
  return media;
}

/** A message of the user's. */
export function userTurn({ text, media }) {
  const article = element("article", { className: "user" }, heading("You"));
  if (media.length) article.append(element("div", { className: "media" }, ...media.map(preview)));
  article.append(element("p", { dir: "auto" }, text));
  return article;
}

/** An answer, which `update` shows anew; `retry` is called by its button. */
export class AnswerView {
  constructor(retry) {
    this.body = element("div", { className: "body" });
    this.tools = element("div", { className: "tools" });
    this.element = element("article", { className: "assistant" }, heading("Gemma"), this.body, this.tools);
    this.showText = growing(this.body);
    this.below = []; // elements that follow the text
    this.retry = retry;
  }

  /** `text` begins with what it was before. */

  update({ text, state, error, note }) {
    this.element.dataset.state = state;
    for (const shown of this.below) shown.remove();
    this.showText(text);
    this.below = [];
    if (state === "running" && !text) this.below.push(waiting());
    if (error) this.below.push(element("p", { className: "error" }, error));
    this.body.append(...this.below);
    this.tools.replaceChildren();
    if (state === "running") return;
    if (text) this.tools.append(copyButton(() => text));
    const again = iconButton("retry", "Retry", this.retry);
    again.classList.add("retry");
    this.tools.append(again, element("small", {}, note ?? ""));
  }
}

const heading = who => element("h2", { className: "hidden" }, who);

function waiting() {
  const dots = element("span", { className: "waiting" }, element("i"), element("i"), element("i"));
  dots.setAttribute("role", "img");
  dots.setAttribute("aria-label", "Waiting for the answer");
  return dots;
}
