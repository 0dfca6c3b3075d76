// An answer's text while it is being written: its Markdown as nodes, a little more of it with every delta.
//
// Finished blocks are made once; only the last ones are read again, and grown in place: it stays cheap however long the
// answer gets, and a selection survives. In the end the server's HTML takes the place of all this.

import { h } from "/elements.js";
import { blocks } from "/markdown.js";

const BLOCK = /^(P|H[1-6]|UL|OL|LI|BLOCKQUOTE|PRE|DIV|TABLE|TBODY|TR|TD)$/;

/** A text that grows, in `element`. */
export class GrowingText {
  constructor() {
    this.element = h("div.plain");
    this.finished = ""; // the part of the text that is in blocks which no later letter changes
    this.count = 0; // of their nodes
  }

  show(given) {
    const text = given.replaceAll("\r\n", "\n");
    if (text === this.text) return;
    this.text = text;
    if (!text.startsWith(this.finished)) Object.assign(this, { finished: "", count: 0 });
    const lines = text.slice(this.finished.length).split("\n");
    const found = [...blocks(lines)];
    found.forEach(({ node }, index) => grow(this.element, node, this.count + index));
    while (this.element.childNodes.length > this.count + found.length) this.element.lastChild.remove();
    this.markTip();
    const open = found.findLastIndex(({ begin }) => begin < lines.length - 1); // the last line may become anything
    if (open < 1) return;
    this.finished += lines.slice(0, found[open].begin).join("\n") + "\n";
    this.count += open;
  }

  /** The innermost block at the end has the class `tip`: the place for a cursor. */
  markTip() {
    let tip = this.element;
    while (tip.lastChild && BLOCK.test(tip.lastChild.nodeName)) tip = tip.lastChild;
    if (tip === this.tip) return;
    this.tip?.classList.remove("tip");
    this.tip = tip;
    tip.classList.add("tip");
  }
}

/** Make the child at `index` like `fresh`, changing no more than what is new. */
function grow(parent, fresh, index) {
  const old = parent.childNodes[index];
  if (!old) return parent.append(fresh);
  if (old.nodeName !== fresh.nodeName || old.start !== fresh.start) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) {
    if (fresh.data === old.data) return;
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
    return;
  }
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, each) => grow(old, node, each));
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}
