// One tool call on the page: a card that unfolds, with the images of the result below it.

import { h } from "./elements.js";

const IMAGES = /^image\/(png|jpeg|gif|webp|avif)$/; // no SVG: it is a document, not a picture
const BASE64 = /^[A-Za-z0-9+/]+={0,2}$/;
const LARGEST = 8 * 2 ** 20; // characters of base64
const MAX_IMAGES = 8; // images of a card

/** One tool call: name, arguments in a line, progress, result or error and duration; details when it is opened. */
export class ToolCard {
  constructor() {
    this.state = h("span.state", { role: "img" });
    this.name = h("span.name");
    this.brief = h("span.brief");
    this.time = h("span.time");
    this.progress = h("progress");
    this.note = h("span.note");
    this.track = h("span.track", { hidden: true }, this.progress, this.note);
    this.outcome = h("span.outcome", { hidden: true });
    this.given = h("pre", { tabIndex: 0 });
    this.got = h("pre", { tabIndex: 0 });
    this.gotLabel = h("p.label");
    this.images = h("div.images", { hidden: true });
    const summary = h("summary", {}, this.state, this.name, this.brief, this.time, this.track, this.outcome);
    const details = h("details", {}, summary, h("p.label", {}, "Arguments"), this.given, this.gotLabel, this.got);
    this.element = h("div.tool", { dir: "ltr" }, details, this.images);
  }

  show(call, live) {
    if (call === this.call && live === this.live) return;
    const changed = call !== this.call;
    this.call = call;
    this.live = live;
    const open = !call.end_time;
    const status = open ? "Running" : call.error != null ? "Failed" : "Done";
    this.element.dataset.status = status.toLowerCase();
    this.state.ariaLabel = status;
    this.name.textContent = call.tool_name;
    this.progress.ariaLabel = `Progress of ${call.tool_name}`;
    this.brief.textContent = Object.entries(call.arguments).map(([key, value]) => `${key}: ${brief(value)}`).join(", ");
    this.given.textContent = JSON.stringify(call.arguments, null, 2);
    this.track.hidden = !open || live.progress === undefined;
    if (live.total) Object.assign(this.progress, { max: live.total, value: live.progress });
    else this.progress.removeAttribute("value");
    this.note.textContent = live.message ?? (live.progress === undefined ? "" : String(live.progress));
    this.outcome.textContent = open ? "" : (call.error ?? brief(call.result));
    this.outcome.hidden = open || !this.outcome.textContent;
    this.gotLabel.textContent = call.error != null ? "Error" : "Result";
    this.gotLabel.hidden = this.got.hidden = open;
    this.got.textContent = open ? "" : (call.error ?? resultText(call.result));
    if (changed) this.showImages(call);
    this.tick();
  }

  showImages({ tool_name, result }) {
    const found = blocksOf(result).filter(isImage).slice(0, MAX_IMAGES);
    const images = found.map(({ mimeType, data }, index) => {
      const alt = `Image ${index + 1} of ${found.length} from ${tool_name}`;
      const image = h("img", { alt, decoding: "async", src: `data:${mimeType};base64,${data}` });
      image.onerror = () => image.replaceWith(h("p.label", {}, `${alt}: it can’t be shown.`));
      return image;
    });
    this.images.replaceChildren(...images);
    this.images.hidden = !images.length;
  }

  tick() {
    const { start_time: start, end_time: end } = this.call;
    const seconds = Math.max(0, (end ? Date.parse(end) : Date.now()) - Date.parse(start)) / 1000;
    const text = end && seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
    if (this.time.textContent !== text) this.time.textContent = text;
  }
}

/** The content blocks of an MCP result. */
function blocksOf(result) {
  const blocks = result?.content;
  return Array.isArray(blocks) && blocks.every((block) => typeof block?.type === "string") ? blocks : [];
}

function isImage({ type, mimeType, data }) {
  return type === "image" && IMAGES.test(mimeType) && data?.length <= LARGEST && BASE64.test(data);
}

/** A value in one line. */
function brief(value) {
  if (typeof value === "string") return value;
  if (value && typeof value === "object" && !Array.isArray(value)) {
    const blocks = blocksOf(value);
    if (!blocks.length) return pairs(value);
    const { structuredContent = "" } = value;
    return [brief(structuredContent), ...blocks.map(({ text, type }) => text ?? type)].filter(Boolean).join(", ");
  }
  return JSON.stringify(value) ?? "";
}

const pairs = (object) => Object.entries(object).map(([key, value]) => `${key}: ${brief(value)}`).join(", ");

/** The plain text where a result is only text, else JSON, in which encoded files are abridged. */
function resultText(result) {
  const blocks = blocksOf(result);
  const onlyText = blocks.length && blocks.every(({ type }) => type === "text") && Object.keys(result).length === 1;
  if (onlyText) return blocks.map((block) => block.text).join("\n");
  return JSON.stringify(result, abridged, 2) ?? "";
}

function abridged(key, value) {
  const encoded = typeof value === "string" && value.length > 200 && (key === "data" || key === "blob");
  return encoded && BASE64.test(value) ? `${value.slice(0, 20)}… (${value.length} characters of base64)` : value;
}
