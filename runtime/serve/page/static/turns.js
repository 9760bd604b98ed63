// The turns of a conversation as elements.
import { copyButton, element, icon, iconButton } from "./elements.js";
import { rendered } from "./markdown.js";

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
  article.append(element("p", {}, text));
  return article;
}

/** An answer, which `update` shows anew; `retry` is called by its button. */
export class AnswerView {
  constructor(retry) {
    this.body = element("div", { className: "body" });
    this.tools = element("div", { className: "tools" });
    this.element = element("article", { className: "assistant" }, heading("Gemma"), this.body, this.tools);
    this.retry = retry;
  }

  update({ text, state, error, note }) {
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(state === "running"));
    this.body.replaceChildren(rendered(text));
    if (state === "running" && !text) this.body.append(waiting());
    if (error) this.body.append(element("p", { className: "error" }, error));
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
