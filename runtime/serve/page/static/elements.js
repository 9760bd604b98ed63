// Finds and makes DOM elements.

export const at = id => document.getElementById(id);

/** An element with properties and children; strings become text. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  const button = element("button", { type: "button", className: "icon", title: label, onclick }, icon(name));
  button.setAttribute("aria-label", label);
  return button;
}

/** A button that copies `text()`; empty where browsers have no clipboard (plain http from another machine). */
export function copyButton(text) {
  if (!navigator.clipboard) return "";
  const button = iconButton("copy", "Copy", async () => {
    await navigator.clipboard.writeText(text());
    button.title = "Copied";
    button.classList.add("done");
    setTimeout(() => {
      button.title = "Copy";
      button.classList.remove("done");
    }, 1500);
  });
  return button;
}
