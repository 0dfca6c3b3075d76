// The text of an answer in progress: its Markdown as nodes, extended with every delta.
//
// Finished blocks are parsed once; only the last ones are parsed again and changed in place. So the cost of a delta
// does not grow with the answer, and a selection is preserved.

import { h } from "./elements.js";
import { blocks } from "./markdown.js";

const CONTAINER = /^(P|H[1-6]|UL|OL|LI|BLOCKQUOTE|PRE|CODE|DIV|TABLE|TBODY|TR|TD)$/;
const MARKS = /(^|\n)[ >]*([-=+*#_~`|:]+|\d{1,9}[.)])?[ \t]*$/; // a last line that may become any kind of block

/** A text that grows, in `element`. */
export class GrowingText {
  constructor() {
    this.element = h("div.plain");
    this.reset();
  }

  reset() {
    this.finished = ""; // the part of the text whose blocks later characters cannot change
    this.count = 0; // number of their nodes
    this.references = {};
  }

  /** Show the text; with `growing` false it is complete, and parsed as a whole. */
  show(given, growing) {
    const text = given.replaceAll("\r\n", "\n");
    if (text === this.text && growing === this.growing) return;
    Object.assign(this, { text, growing });
    if (!growing || !text.startsWith(this.finished)) this.reset();
    this.tip?.removeAttribute("data-tip");
    const tail = text.slice(this.finished.length);
    const found = blocks(growing ? tail.replace(MARKS, "$1") : tail, growing, this.references);
    found.forEach(({ node }, index) => grow(this.element, node, this.count + index));
    while (this.element.childNodes.length > this.count + found.length) this.element.lastChild.remove();
    this.markTip();
    if (growing) this.finish(tail.split("\n"), found);
  }

  /** Exclude from the next parsing what later lines cannot change: all but the last block, which may continue. */
  finish(lines, found) {
    const open = found.findLastIndex(({ begin }) => begin < lines.length - 1); // the last line may become anything
    if (open < 1) return;
    this.finished += lines.slice(0, found[open].begin).join("\n") + "\n";
    this.count += open;
  }

  /** The innermost block at the end is marked: the place for a cursor. */
  markTip() {
    let tip = this.element;
    while (tip.lastElementChild && CONTAINER.test(tip.lastElementChild.nodeName)) tip = tip.lastElementChild;
    this.tip = tip;
    if (this.growing) tip.setAttribute("data-tip", "");
  }
}

/** Make the child at `index` equal to `fresh` with as few changes as possible. */
function grow(parent, fresh, index) {
  const old = parent.childNodes[index];
  if (!old) return parent.append(fresh);
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
    return;
  }
  if (!old.cloneNode().isEqualNode(fresh.cloneNode())) return old.replaceWith(fresh);
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, each) => grow(old, node, each));
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}
