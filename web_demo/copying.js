// Copy buttons for code blocks, and for a whole answer as Markdown.

import { h, icon } from "./elements.js";

/** A button that copies; its clicks are handled by `handleCopying`. */
export function copyButton(text, label = text) {
  return h("button.copy", { type: "button", ariaLabel: label, title: label }, icon("copy"), h("span", {}, text));
}

/** Handle the copy buttons in `container`. `contentOf(messageId)` is the Markdown of a message. */
export function handleCopying(container, contentOf) {
  if (!navigator.clipboard) return container.classList.add("no-copy"); // a page loaded over plain http
  container.addEventListener("click", async ({ target }) => {
    const button = target.closest("button.copy");
    if (!button) return;
    const code = button.closest(".code")?.querySelector("pre");
    await navigator.clipboard.writeText(code ? code.textContent : contentOf(button.closest("article").dataset.id));
    const label = button.lastChild;
    const { textContent } = label;
    if (textContent === "Copied") return;
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = textContent), 1500);
  });
}
