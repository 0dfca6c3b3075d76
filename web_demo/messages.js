// Shows messages: one element for each, with its text, its tool calls in their places and the outcome of its run.
//
// The Markdown of an answer in progress is rendered by the page; when it is complete, the server's sanitized HTML
// replaces it. An answer with tool calls remains rendered by the page, each of its texts by itself, so that the cards
// are exactly where the calls were made. Finding these places in the server's HTML was refused, because a list or a
// code block can extend over them. Unchanged messages (the reducer returns the same objects) are not drawn again.

import { fileList } from "./attachments.js";
import { copyButton, handleCopying } from "./copying.js";
import { arrange, h } from "./elements.js";
import { GrowingText } from "./growing_text.js";
import { decorate } from "./markdown.js";
import { ToolCard } from "./tool_card.js";

const ACTIVITIES = { connecting_to_tools: "Connecting to tools…" };

/** Shows the messages of a thread as a container's children. */
export class MessageList {
  /**
   *   onRetry(message)        the user wants a failed answer again
   *   isRepeatable(message)   whether that runs again on the same message, instead of posting it a second time
   *   urlOf(attachment)       its URL
   *   nameOf(message)         the name of its author
   */
  constructor(container, { onRetry, isRepeatable, urlOf, nameOf }) {
    Object.assign(this, { container, onRetry, isRepeatable, urlOf, nameOf });
    this.views = new Map();
    handleCopying(container, (id) => this.views.get(id).message.content);
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
      view.offerRetry?.(index === messages.length - 1 && this);
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

/** A message of a user or the system. */
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
    const html = message.role === "user" ? "" : message.content_html; // users' messages are not Markdown
    if (html) this.body.replaceChildren(decorate(html));
    else this.body.replaceChildren(...(message.content ? [h("p", { dir: "auto" }, message.content)] : []));
    levelHeadings(this.body);
    this.body.hidden = !this.body.firstChild;
    const files = fileList(message.attachments, urlOf);
    if (files) this.element.replaceChildren(this.body, files);
  }
}

/** An answer: reasoning, then text and tool calls in their order, then the outcome. */
class AnswerView {
  constructor(message) {
    this.reasoning = h("div.thoughts");
    this.thinking = h("details.reasoning", { hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.body = h("div.body");
    this.activity = h("p.activity", { hidden: true });
    this.ending = h("div.ending", { hidden: true });
    this.retry = h("button.quiet", { type: "button" });
    this.tools = h("div.tools", { hidden: true }, copyButton("Copy", "Copy this answer"));
    const parts = [this.thinking, this.body, this.activity, this.ending, this.tools];
    this.element = h("article.message.assistant", {}, ...parts);
    this.element.dataset.id = message.id;
    this.cards = [];
    this.texts = [];
  }

  show(message, state, urlOf) {
    const blocks = message.metadata.run?.reasoning ?? state.reasoning[message.id] ?? [];
    const reasoning = blocks.map((block) => block?.text.trim()).filter(Boolean).join("\n\n");
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
    const running = run.status === "in_progress";
    this.element.ariaBusy = running;
    message.tool_calls.forEach((call, index) => {
      this.cards[index] ??= new ToolCard();
      this.cards[index].show(call, told[index] ?? {});
    });
    const known = (index) => told[index]?.offset ?? run.tool_calls?.[index]?.offset ?? Infinity;
    const offsets = message.tool_calls.map((_, index) => known(index));
    if (message.content_html && !offsets.length) arrange(this.body, [...decorate(message.content_html).childNodes]);
    else this.showTexts(message.content, offsets, running);
    if (!running) levelHeadings(this.body);
    this.showActivity(running ? run.activity : null);
    this.showEnding(run);
    this.tools.hidden = running || !message.content.trim();
    const files = this.files ? null : fileList(message.attachments, urlOf); // it may have been posted with some
    if (files) this.ending.before((this.files = files));
  }

  /** Texts and cards alternately; `offsets` are those of the calls, in characters. */
  showTexts(content, offsets, running) {
    const characters = offsets.length ? Array.from(content) : null;
    const nodes = [];
    let begin = 0;
    [...offsets, undefined].forEach((end, index) => {
      const text = characters ? characters.slice(begin, end).join("") : content;
      const last = end === undefined;
      begin = end;
      const piece = (this.texts[index] ??= new GrowingText());
      piece.show(text, running && last);
      piece.element.classList.toggle("writing", running && last);
      if (text.trim() || (running && last)) nodes.push(piece.element);
      if (!last) nodes.push(this.cards[index].element);
    });
    arrange(this.body, nodes);
  }

  /** What the run does before its first text. */
  showActivity(activity) {
    this.activity.hidden = !activity;
    this.activity.textContent = activity ? (ACTIVITIES[activity] ?? activity.replaceAll("_", " ")) : "";
  }

  showEnding(run) {
    this.error = run.status === "failed" ? (run.error ?? { detail: "The agent failed." }) : null;
    const text = this.error ? this.error.detail : run.status === "cancelled" ? "Stopped" : "";
    this.ending.replaceChildren(h("span", {}, text));
    this.ending.hidden = !text;
    this.ending.classList.toggle("failed", Boolean(this.error));
  }

  /** Show the button for a retry, on the last message only: `list` is its list, or false for other messages. */
  offerRetry(list) {
    if (!list || !this.error) return this.retry.remove();
    const repeatable = list.isRepeatable(this.message);
    const title = repeatable ? "" : "Sends the question once more, as a new message";
    const onclick = () => list.onRetry(this.message);
    Object.assign(this.retry, { textContent: repeatable ? "Try again" : "Ask again", title, onclick });
    if (!this.retry.parentNode) this.ending.append(this.retry);
  }

  tick() {
    if (this.message?.metadata.run?.status === "in_progress") for (const card of this.cards) card.tick();
  }
}

/** The levels of an answer's headings for screen readers: below the page's own, and without gaps. */
function levelHeadings(body) {
  let level = 1;
  for (const heading of body.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    level = Math.min(Number(heading.tagName[1]) + 1, level + 1);
    heading.ariaLevel = String(level);
  }
}
