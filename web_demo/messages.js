// From messages to the page: one element a message, its text, its tool calls in their places, and how its run went.
//
// While an answer is written its Markdown is rendered in the page; once it is complete the server's HTML, sanitized
// there, takes its place. A message that hasn't changed (a reducer makes no new objects then) isn't touched.

import { fileList } from "/attachments.js";
import { arrange, h } from "/elements.js";
import { GrowingText } from "/growing_text.js";
import { ToolCard } from "/tool_card.js";

/** The messages of a thread, kept in step with a container's children. */
export class MessageList {
  /**
   *   onRetry(message)     the person wants a failed answer tried again
   *   urlOf(attachment)    where it is
   *   nameOf(message)      who says it
   */
  constructor(container, { onRetry, urlOf, nameOf }) {
    Object.assign(this, { container, onRetry, urlOf, nameOf });
    this.views = new Map();
    setInterval(() => this.tick(), 200);
  }

  show(messages, state) {
    const kept = new Map();
    let place = this.container.firstChild;
    messages.forEach((message, index) => {
      const View = message.role === "assistant" ? AnswerView : TextView;
      const old = this.views.get(message.id);
      const view = old instanceof View ? old : new View(message);
      view.show(message, state, this.urlOf);
      const name = this.nameOf(message);
      if (view.element.ariaLabel !== name) view.element.ariaLabel = name;
      view.last?.(index === messages.length - 1, () => this.onRetry(message));
      kept.set(message.id, view);
      if (view.element === place) place = place.nextSibling;
      else this.container.insertBefore(view.element, place);
    });
    for (const [id, view] of this.views) if (kept.get(id) !== view) view.element.remove();
    this.views = kept;
  }

  tick() {
    for (const view of this.views.values()) view.tick?.();
  }
}

/** A person's message, or the system's. */
class TextView {
  constructor(message) {
    this.body = h("div.body");
    this.element = h(`article.message.${message.role}`, {}, this.body);
    this.element.dataset.id = message.id;
  }

  show(message, state, urlOf) {
    if (message === this.message) return;
    this.message = message;
    this.element.classList.toggle("pending", Boolean(message.pending));
    const html = message.role === "user" ? "" : message.content_html; // people's own words are no Markdown
    if (html) this.body.replaceChildren(rendered(html));
    else this.body.replaceChildren(...(message.content ? [h("p", {}, message.content)] : []));
    this.body.hidden = !this.body.firstChild;
    const files = fileList(message.attachments, urlOf);
    if (files) this.element.replaceChildren(this.body, files);
  }
}

/** An answer: reasoning, then text and tool calls in their order, then how it ended. */
class AnswerView {
  constructor(message) {
    this.reasoning = h("div.thoughts");
    this.thinking = h("details.reasoning", { hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.body = h("div.body");
    this.ending = h("div.ending", { hidden: true });
    this.element = h("article.message.assistant", {}, this.thinking, this.body, this.ending);
    this.element.dataset.id = message.id;
    this.cards = [];
    this.texts = [];
  }

  show(message, state, urlOf) {
    const reasoning = state.reasoning[message.id]?.text ?? "";
    if (reasoning !== this.shownReasoning) {
      this.shownReasoning = reasoning;
      this.reasoning.textContent = reasoning;
      this.thinking.hidden = !reasoning;
    }
    const told = message.tool_calls.map((_, index) => state.calls[`${message.id}/${index}`]);
    const same = message === this.message && told.every((each, index) => each === this.told[index]);
    if (same) return;
    this.message = message;
    this.told = told;
    const run = message.metadata.run ?? { status: "completed", tool_calls: [] };
    this.element.dataset.status = run.status;
    this.element.ariaBusy = run.status === "in_progress";
    message.tool_calls.forEach((call, index) => {
      this.cards[index] ??= new ToolCard();
      this.cards[index].show(call, told[index] ?? {});
    });
    const known = (index) => told[index]?.offset ?? run.tool_calls?.[index]?.offset ?? Infinity;
    const offsets = message.tool_calls.map((_, index) => known(index));
    if (message.content_html) this.showRendered(message, offsets);
    else this.showWriting(message, offsets);
    this.showEnding(run);
    const files = this.files ? null : fileList(message.attachments, urlOf); // it may have been posted with some
    if (files) this.ending.before((this.files = files));
  }

  /** Text pieces and cards by turns. */
  showWriting(message, offsets) {
    const characters = offsets.length ? Array.from(message.content) : null;
    const running = message.metadata.run?.status === "in_progress";
    const nodes = [];
    let begin = 0;
    [...offsets, undefined].forEach((end, index) => {
      const text = characters ? characters.slice(begin, end).join("") : message.content;
      const last = end === undefined;
      begin = end;
      const piece = (this.texts[index] ??= new GrowingText());
      piece.show(text);
      piece.element.classList.toggle("writing", running && last);
      if (text.trim() || (running && last)) nodes.push(piece.element);
      if (!last) nodes.push(this.cards[index].element);
    });
    arrange(this.body, nodes);
  }

  /** The server's HTML, and each card at the block border nearest to its place in the text: letters are counted. */
  showRendered(message, offsets) {
    const blocks = [...rendered(message.content_html).childNodes];
    const nodes = [];
    const characters = offsets.length ? Array.from(message.content) : [];
    const wanted = offsets.map((offset) => letters(characters.slice(0, offset).join("")));
    let seen = 0;
    let next = 0;
    for (const block of blocks) {
      const size = letters(block.textContent);
      while (next < wanted.length && wanted[next] - seen < size / 2) nodes.push(this.cards[next++].element);
      nodes.push(block);
      seen += size;
    }
    while (next < wanted.length) nodes.push(this.cards[next++].element);
    arrange(this.body, nodes);
  }

  showEnding(run) {
    this.error = run.status === "failed" ? (run.error ?? { detail: "The agent failed." }) : null;
    const text = this.error ? this.error.detail : run.status === "cancelled" ? "Stopped" : "";
    this.ending.replaceChildren(h("span", {}, text));
    this.ending.hidden = !text;
    this.ending.classList.toggle("failed", Boolean(this.error));
    this.retry = null;
  }

  /** Offer another try, on the last message only. */
  last(isLast, onRetry) {
    const offer = isLast && this.error?.retryable;
    if (offer && !this.retry) this.ending.append((this.retry = h("button.quiet", { onclick: onRetry }, "Try again")));
    if (!offer && this.retry) this.retry = this.retry.remove();
  }

  tick() {
    if (this.message?.metadata.run?.status === "in_progress") for (const card of this.cards) card.tick();
  }
}

/** The server's HTML as nodes, links opening elsewhere, wide tables able to scroll. */
function rendered(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  for (const link of template.content.querySelectorAll("a[href]")) link.target = "_blank";
  for (const table of template.content.querySelectorAll("table")) {
    const frame = h("div.table");
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const node of [...template.content.childNodes]) {
    if (node.nodeType === Node.TEXT_NODE && !node.data.trim()) node.remove();
  }
  return template.content;
}

function letters(text) {
  return text.match(/\p{L}/gu)?.length ?? 0;
}
