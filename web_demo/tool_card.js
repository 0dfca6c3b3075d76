// One tool call on the page: a card that unfolds.

import { h } from "/elements.js";

/** One tool call: name, arguments in a line, progress, result or error, how long it took; all of it on demand. */
export class ToolCard {
  constructor() {
    this.state = h("span.state", { role: "img" });
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
      h("summary", {}, this.state, this.name, this.brief, this.time, this.track, this.outcome),
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
    const status = open ? "Running" : call.error != null ? "Failed" : "Done";
    this.element.dataset.status = status.toLowerCase();
    this.state.ariaLabel = status;
    this.name.textContent = call.tool_name;
    this.progress.ariaLabel = `Progress of ${call.tool_name}`;
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
