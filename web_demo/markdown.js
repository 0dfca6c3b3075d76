// Markdown to nodes, with the same parser (markdown-it; the server uses its Python port) and rules as the server. So an
// answer in progress looks like the server's HTML, which replaces it at the end.
//
// server/files/markdown.py explains these rules: raw HTML is shown as text, links have http, https or mailto, an image
// becomes a link, footnotes have no links.

import { copyButton } from "./copying.js";
import { h } from "./elements.js";
import MarkdownIt from "./vendor/markdown-it.js";
import "./vendor/markdown-it-footnote.js"; // defines globalThis.markdownitFootnote

const LONGEST = 20_000; // characters; a longer paragraph stays plain text, so that no delta takes noticeably long
const TASK = /^\[([ xX])\][ \t\n]+(?=\S)/;
const LANGUAGE = /^language-([\w+#.-]{1,40})$/;
const SAFE_LINK = /^(https?|mailto):/i;
const LIST = /^(bullet|ordered)_list_(open|close)$/;
const DIRECTED = /^(paragraph|heading|table|bullet_list|ordered_list)_open$/;

const markdown = new MarkdownIt("commonmark", { html: false, linkify: true });
markdown.enable(["table", "strikethrough", "linkify"]).use(globalThis.markdownitFootnote).disable("footnote_inline");
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }).add("ftp:", null).add("mailto:", null).add("//", null);
markdown.core.ruler.before("inline", "limit", limitInline);
markdown.core.ruler.after("inline", "task_list", markTasks);
markdown.core.ruler.push("attributes", setAttributes);
Object.assign(markdown.renderer.rules, {
  footnote_ref: (tokens, index) => `<sup>[${tokens[index].meta.id + 1}]</sup>`,
  footnote_block_open: () => '<hr><ol class="footnotes">',
  footnote_block_close: () => "</ol>",
  footnote_open: () => "<li>",
  footnote_close: () => "</li>",
  footnote_anchor: () => "", // the link back
});
markdown.renderer.rules.image = (tokens, index, options, env, renderer) => {
  const source = tokens[index].attrGet("src");
  const text = renderer.renderInlineAsText(tokens[index].children, options, env).trim() || source;
  return `<a href="${markdown.utils.escapeHtml(source)}">${markdown.utils.escapeHtml(text)}</a>`;
};

/**
 * Parse a text into blocks, each with its node and its first line. `growing`: more text will follow the last line.
 * `references` collects link definitions, for a text that is parsed in several parts.
 */
export function blocks(text, growing, references) {
  const env = { references, growing };
  const tokens = markdown.parse(text, env);
  const found = [];
  for (let at = 0; at < tokens.length; ) {
    const first = at;
    let depth = 0;
    do depth += tokens[at++].nesting;
    while (depth);
    const html = markdown.renderer.render(tokens.slice(first, at), markdown.options, env);
    const begin = tokens[first].map?.[0] ?? Infinity; // footnotes are last, wherever they are defined
    for (const node of decorate(html).children) found.push({ begin, node });
  }
  return found;
}

/** Turn HTML into nodes: links open a new tab, code and tables scroll, code has its language and a copy button. */
export function decorate(html) {
  const { content } = Object.assign(document.createElement("template"), { innerHTML: html });
  for (const link of content.querySelectorAll("a[href]")) {
    const url = link.getAttribute("href");
    link.rel = "noopener noreferrer";
    if (SAFE_LINK.test(url)) link.target = "_blank";
    else link.removeAttribute("href"); // a relative URL belongs to another page
  }
  for (const table of content.querySelectorAll("table")) {
    const frame = h("div.table", { tabIndex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of content.querySelectorAll("pre")) {
    const language = code.firstElementChild?.className.match(LANGUAGE)?.[1] ?? "";
    if (!language) code.firstElementChild?.removeAttribute("class");
    const frame = h("div.code", { dir: "ltr" }, h("div.bar", {}, h("span", {}, language), copyButton("Copy")));
    Object.assign(code, { tabIndex: 0, dir: "ltr" });
    code.replaceWith(frame);
    frame.append(code);
  }
  for (const node of [...content.childNodes]) {
    if (node.nodeType === Node.TEXT_NODE && !node.data.trim()) node.remove();
  }
  return content;
}

/** Before the inline parsing: close what is open at the end of a growing text, and skip long paragraphs. */
function limitInline({ tokens, env, Token }) {
  const last = tokens.findLast(({ type }) => type === "inline" || type === "fence");
  if (env.growing && last?.type === "inline") last.content = closed(last.content);
  for (const token of tokens) {
    if (token.type !== "inline" || token.content.length <= LONGEST) continue;
    token.children.push(Object.assign(new Token("text", "", 0), { content: token.content }));
    token.content = "";
  }
}

/** Close an open code span or bold text, so that its marks are not visible for a moment. */
function closed(text) {
  const bare = text.replace(/[*_`]{1,3}$/, "");
  const odd = (mark) => bare.split(mark).length % 2 === 0;
  if (odd("`")) return `${bare}\``;
  return odd("**") && /\*\*(?=\S)[^*]*$/.test(bare) ? `${bare.trimEnd()}**` : bare;
}

/** `[ ]` and `[x]` at the beginning of a list item become checkboxes. */
function markTasks({ tokens, Token }) {
  tokens.forEach((token, index) => {
    if (token.type !== "inline" || tokens[index - 2]?.type !== "list_item_open") return;
    const first = token.children[0];
    const task = token.content.match(TASK);
    if (!task || first?.type !== "text" || !first.content.startsWith(task[0].slice(0, 3))) return;
    first.content = first.content.slice(3);
    const box = new Token("checkbox", "input", 0);
    const state = task[1] === " " ? [["aria-label", "To do"]] : [["checked", ""], ["aria-label", "Done"]];
    box.attrs = [["type", "checkbox"], ["disabled", ""], ...state];
    token.children.unshift(box);
    tokens[index - 2].attrSet("class", "task-list-item");
  });
}

/** Set the direction of blocks and lists. A column's alignment is an attribute: the page's policy forbids styles. */
function setAttributes({ tokens }) {
  let depth = 0; // of lists
  for (const token of tokens) {
    if (!depth && DIRECTED.test(token.type)) token.attrSet("dir", "auto");
    if (LIST.test(token.type)) depth += token.nesting;
    const style = token.attrGet("style");
    if (!style) continue;
    token.attrs = token.attrs.filter(([name]) => name !== "style");
    token.attrSet("align", style.replace("text-align:", ""));
  }
}
