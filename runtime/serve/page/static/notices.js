// Messages above the composer, and announcements to screen readers.
import { at, element, iconButton } from "./elements.js";

/** Shows a message, with a button `action` if given, until the next one; an empty message removes it. */
export function notify(message, action = "") {
  at("notice").replaceChildren();
  if (message) at("notice").append(element("span", {}, message), action, iconButton("close", "Dismiss", () => notify("")));
}

export function announce(message) {
  at("status").textContent = message;
}
