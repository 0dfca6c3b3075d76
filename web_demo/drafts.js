// The files that the next message will bring: each is uploaded at once and stands above the text as a chip, which tells
// how far that is, what was understood, or why the server refused. One `Drafts` for each thread, kept while the page is.

import { fileLine, inBytes, picture, understood, upload } from "./attachments.js";
import { ChatError } from "./client.js";
import { arrange, h, icon } from "./elements.js";

const MOST = 10; // of a message, as the server has it
const AT_ONCE = 3; // a site gets six connections, and each tab watches over one

export class Drafts {
  /**
   *   makeThread()      promises the thread's path, and makes the thread if there is none yet
   *   onChange()        a chip came or went, or its upload has ended
   *   onError(error)    what the chip says too
   */
  constructor(chat, { makeThread, onChange, onError }) {
    Object.assign(this, { chat, makeThread, onChange, onError });
    this.chips = [];
  }

  /** True until every file is uploaded or refused. */
  get busy() {
    return this.chips.some(({ status }) => status === "waiting" || status === "uploading");
  }

  /** What a message would bring now. */
  get attachments() {
    return this.chips.filter(({ status }) => status === "done").map(({ attachment }) => attachment);
  }

  show(list) {
    const more = this.chips.length > list.children.length;
    arrange(list, this.chips.map(({ element }) => element));
    list.hidden = !this.chips.length;
    if (more) list.scrollTop = list.scrollHeight;
  }

  add(files) {
    const room = MOST - this.chips.filter(({ status }) => status !== "refused").length;
    for (const file of files.slice(0, room)) this.put(new Chip(this.chat.base, file.name, file));
    if (files.length > room) this.onError(new ChatError(422, { detail: `A message takes at most ${MOST} files.` }));
    this.proceed();
  }

  /** Bring back what a message that wasn't sent had taken. */
  restore(attachments, thread) {
    for (const attachment of attachments) {
      this.put(new Chip(this.chat.base, attachment.filename)).done(attachment, thread);
    }
    this.onChange();
  }

  /** Give what is there to a message, and begin anew; uploads that still run are given up. */
  take() {
    const { attachments } = this;
    for (const chip of this.chips) chip.abort.abort();
    this.chips = [];
    this.onChange();
    return attachments;
  }

  put(chip) {
    chip.onRemove = () => {
      chip.abort.abort();
      this.chips = this.chips.filter((each) => each !== chip);
      this.proceed();
    };
    chip.onRetry = () => {
      chip.waiting();
      this.proceed();
    };
    this.chips.push(chip);
    return chip;
  }

  proceed() {
    const running = this.chips.filter(({ status }) => status === "uploading").length;
    const waiting = this.chips.filter(({ status }) => status === "waiting");
    for (const chip of waiting.slice(0, Math.max(0, AT_ONCE - running))) this.upload(chip);
    this.onChange();
  }

  async upload(chip) {
    chip.uploading(0);
    const { signal } = chip.abort;
    try {
      const thread = await this.makeThread();
      signal.throwIfAborted();
      const onProgress = (part) => chip.uploading(part);
      chip.done(await upload(this.chat, thread, chip.file, { onProgress, signal }), thread);
    } catch (error) {
      if (signal.aborted) return;
      chip.refused(error);
      this.onError(chip.error);
    }
    this.proceed();
  }
}

/** A file on its way: waiting, uploading (the server reads it at the end of that), done, or refused. */
class Chip {
  constructor(base, name, file = null) {
    Object.assign(this, { base, name, file, abort: new AbortController(), attachment: null });
    this.progress = h("progress", { max: 1, ariaLabel: `Uploading ${name}` });
    this.again = h("button.quiet", { type: "button", onclick: () => this.onRetry() }, "Try again");
    const remove = { type: "button", ariaLabel: `Remove ${name}`, title: "Remove", onclick: () => this.onRemove() };
    this.element = fileLine("li", name, "", icon("file"), this.again, h("button.icon", remove, icon("close")));
    this.element.querySelector(".about").append(this.progress);
    this.waiting();
  }

  waiting() {
    this.show("waiting", "Waiting");
  }

  uploading(part) {
    if (part) this.progress.value = part;
    if (part === 1) this.progress.removeAttribute("value");
    const size = inBytes(this.file.size);
    this.show("uploading", part === 1 ? "Reading…" : `${Math.floor(part * 100)} % of ${size}`);
  }

  done(attachment, thread) {
    this.attachment = attachment;
    const url = `${this.base}${thread}/attachments/${attachment.id}`;
    this.element.querySelector(".picture").replaceChildren(picture(attachment, url));
    this.show("done", understood(attachment), attachment.status);
  }

  refused(error) {
    const sentence = error.status ? error.message : "The connection broke.";
    const detail = sentence.replace(/^files\[0\]/, this.name).replace(/(\d{4,}) bytes/, (_, size) => inBytes(Number(size)));
    this.error = error.status ? new ChatError(error.status, { detail, code: error.code }) : error;
    this.element.querySelector(".picture").replaceChildren(icon("warning"));
    this.show("refused", `Not uploaded. ${detail}`);
    this.again.hidden = Boolean(error.status) && ![429, 503].includes(error.status);
  }

  /** `shown` tells the style of a file that was stored but not read. */
  show(status, note, shown = status) {
    this.status = status;
    this.element.dataset.status = shown;
    Object.assign(this.element.querySelector(".note"), { textContent: note, title: note });
    this.progress.hidden = status !== "uploading";
    this.again.hidden = true;
  }
}

/**
 * Hand over files that are dropped on `place` (`veil` lies over it meanwhile), pasted anywhere, or chosen with `input`.
 * `ready()` says whether there is anything to attach them to.
 */
export function collect({ place, veil, input, ready, onFiles }) {
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  const give = (files) => files.length && ready() && onFiles(files);
  place.addEventListener("dragenter", (event) => (veil.hidden = veil.hidden && !(carriesFiles(event) && ready())));
  veil.addEventListener("dragleave", () => (veil.hidden = true));
  for (const type of ["dragover", "drop"]) {
    document.addEventListener(type, (event) => carriesFiles(event) && event.preventDefault()); // else the page is left
  }
  document.addEventListener("drop", () => (veil.hidden = true));
  place.addEventListener("drop", (event) => carriesFiles(event) && give(dropped(event.dataTransfer)));
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const isText = types.includes("text/plain") && types.includes("text/html"); // office programs add a picture of it
    if (!files.length || isText || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    give([...files]);
  });
  input.addEventListener("change", () => {
    give([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}

/** The files among what was dropped, without folders. */
function dropped({ files, items }) {
  const folders = [...items].map((item) => item.webkitGetAsEntry?.()?.isDirectory);
  return [...files].filter((_, index) => !folders[index]);
}
