// From messages to the page: one element a message, its text, its tool calls in their places, and how its run went.
//
// While an answer is written its text is shown as it came; once it is complete the server's HTML, sanitized there, takes
// its place. A message that hasn't changed (reducers make new objects only for what changed) isn't touched.

import { fileList } from "/attachments.js";
import { arrange, h } from "/elements.js";

/** The messages of a thread, kept in step with a container's children. */
export class MessageList {
  /** `onRetry(message)`: the person wants a failed answer tried again. `urlOf(attachment)`: where it is. */
  constructor(container, { onRetry, urlOf }) {
    Object.assign(this, { container, onRetry, urlOf });
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
    if (message.content_html) this.body.replaceChildren(rendered(message.content_html));
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
    const offsets = message.tool_calls.map((_, index) => told[index]?.offset ?? run.tool_calls?.[index]?.offset ?? Infinity);
    if (message.content_html) this.showRendered(message, offsets);
    else this.showPlain(message, offsets);
    this.showEnding(run);
    const files = this.files ? null : fileList(message.attachments, urlOf); // it may have been posted with some
    if (files) this.ending.before((this.files = files));
  }

  /** Text pieces and cards by turns. Pieces only ever grow, so that a selection in them survives. */
  showPlain(message, offsets) {
    const characters = offsets.length ? Array.from(message.content) : null;
    const nodes = [];
    let begin = 0;
    const piece = (end) => {
      const text = characters ? characters.slice(begin, end).join("") : message.content;
      begin = end;
      const node = (this.texts[nodes.length] ??= h("div.plain", {}, ""));
      const shown = nodes.length ? text.replace(/^\n+/, "") : text;
      if (node.firstChild?.data !== shown) node.replaceChildren(shown);
      node.classList.remove("writing");
      node.hidden = !shown.trim() && end !== undefined;
      nodes.push(node);
    };
    offsets.forEach((offset, index) => {
      piece(offset);
      nodes.push(this.cards[index].element);
    });
    piece(undefined);
    const last = nodes.at(-1);
    const running = message.metadata.run?.status === "in_progress";
    last.classList.toggle("writing", running);
    last.hidden = !running && !last.textContent.trim();
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

/** One tool call: name, arguments in a line, progress, result or error, how long it took; all of it on demand. */
class ToolCard {
  constructor() {
    this.name = h("span.name");
    this.brief = h("span.brief");
    this.time = h("span.time");
    this.progress = h("progress");
    this.note = h("span.note");
    this.track = h("div.track", { hidden: true }, this.progress, this.note);
    this.outcome = h("div.outcome", { hidden: true });
    this.given = h("pre");
    this.got = h("pre");
    this.gotLabel = h("h4");
    this.element = h(
      "details.tool",
      {},
      h("summary", {}, h("span.state"), this.name, this.brief, this.time, this.track, this.outcome),
      h("h4", {}, "Arguments"),
      this.given,
      this.gotLabel,
      this.got,
    );
  }

  show(call, told) {
    if (call === this.call && told === this.told) return;
    this.call = call;
    this.told = told;
    const open = !call.end_time;
    this.element.dataset.status = open ? "running" : call.error != null ? "failed" : "done";
    this.name.textContent = call.tool_name;
    this.brief.textContent = Object.entries(call.arguments).map(([key, value]) => `${key}: ${brief(value)}`).join(", ");
    this.given.textContent = JSON.stringify(call.arguments, null, 2);
    this.track.hidden = !open || told.progress === undefined;
    if (told.total) Object.assign(this.progress, { max: told.total, value: told.progress });
    else this.progress.removeAttribute("value");
    this.note.textContent = told.message ?? (told.progress === undefined ? "" : String(told.progress));
    const text = call.error ?? resultText(call.result);
    this.outcome.textContent = open ? "" : call.error ?? brief(call.result);
    this.outcome.hidden = open || !this.outcome.textContent;
    this.gotLabel.textContent = call.error != null ? "Error" : "Result";
    this.gotLabel.hidden = this.got.hidden = open;
    this.got.textContent = open ? "" : text;
    this.tick();
  }

  tick() {
    const { start_time: start, end_time: end } = this.call;
    const seconds = Math.max(0, (end ? Date.parse(end) : Date.now()) - Date.parse(start)) / 1000;
    const text = end && seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
    if (this.time.textContent !== text) this.time.textContent = text;
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

function brief(value) {
  if (typeof value === "string") return value;
  if (value && typeof value === "object" && !Array.isArray(value)) {
    if (isBlocks(value)) return resultText(value);
    return Object.entries(value).map(([key, inner]) => `${key}: ${brief(inner)}`).join(", ");
  }
  return JSON.stringify(value) ?? "";
}

/** Plain words where a result is only text, else JSON. */
function resultText(result) {
  if (isBlocks(result)) return result.content.map((block) => block.text).join("\n");
  return JSON.stringify(result, null, 2) ?? "";
}

function isBlocks(result) {
  const blocks = result?.content;
  return Array.isArray(blocks) && blocks.length > 0 && blocks.every((block) => block?.type === "text");
}
