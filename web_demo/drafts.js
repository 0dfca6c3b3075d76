// The files of the next message. Each is uploaded immediately and is shown above the text as a chip with its progress,
// its result or the server's error. There is one `Drafts` for each thread, until the page is closed.

import { fileLine, inBytes, picture, describe, upload } from "./attachments.js";
import { ChatError } from "./client.js";
import { arrange, h, icon } from "./elements.js";

const MAX_FILES = 10; // per message: the server's limit
const MAX_UPLOADS = 3; // browsers allow six connections per site, and each tab needs one to watch

export class Drafts {
  /**
   *   ensureThread()    creates the thread if there is none; promises its path
   *   onChange()        a chip was added or removed, or its upload has ended
   *   onError(error)    an upload failed; the chip shows the error too
   */
  constructor(chat, { ensureThread, onChange, onError }) {
    Object.assign(this, { chat, ensureThread, onChange, onError });
    this.chips = [];
  }

  /** True until every file is uploaded or refused. */
  get busy() {
    return this.chips.some(({ status }) => status === "waiting" || status === "uploading");
  }

  /** The uploaded attachments. */
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
    const room = MAX_FILES - this.chips.filter(({ status }) => status !== "refused").length;
    for (const file of files.slice(0, room)) this.put(new Chip(this.chat.base, file.name, file));
    if (files.length > room) this.onError(new ChatError(422, { detail: `A message has at most ${MAX_FILES} files.` }));
    this.proceed();
  }

  /** Restore the attachments of a message that was not sent. */
  restore(attachments, thread) {
    for (const attachment of attachments) {
      this.put(new Chip(this.chat.base, attachment.filename)).done(attachment, thread);
    }
    this.onChange();
  }

  /** Return the attachments for a message and remove all chips. Uploads in progress are aborted. */
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
    for (const chip of waiting.slice(0, Math.max(0, MAX_UPLOADS - running))) this.upload(chip);
    this.onChange();
  }

  async upload(chip) {
    chip.uploading(0);
    const { signal } = chip.abort;
    try {
      const thread = await this.ensureThread();
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

/** One file. Its status is waiting, uploading (at the end of which the server reads it), done or refused. */
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
    this.show("done", describe(attachment), attachment.status);
  }

  refused(error) {
    const sentence = error.status ? error.message : "The connection broke.";
    const detail = sentence.replace(/^files\[0\]/, this.name).replace(/(\d{4,}) bytes/, (_, size) => inBytes(Number(size)));
    this.error = error.status ? new ChatError(error.status, { detail, code: error.code }) : error;
    this.element.querySelector(".picture").replaceChildren(icon("warning"));
    this.show("refused", `Not uploaded. ${detail}`);
    this.again.hidden = Boolean(error.status) && ![429, 503].includes(error.status);
  }

  /** `shown` is the status for the style: it differs for a file that was stored but not read. */
  show(status, note, shown = status) {
    this.status = status;
    this.element.dataset.status = shown;
    Object.assign(this.element.querySelector(".note"), { textContent: note, title: note });
    this.progress.hidden = status !== "uploading";
    this.again.hidden = true;
  }
}

/**
 * Call `onFiles` with files that are dropped on `place` (covered by `veil` meanwhile), pasted anywhere or chosen with
 * `input`, if `ready()` is true.
 */
export function collect({ place, veil, input, ready, onFiles }) {
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  const give = (files) => files.length && ready() && onFiles(files);
  place.addEventListener("dragenter", (event) => (veil.hidden = veil.hidden && !(carriesFiles(event) && ready())));
  veil.addEventListener("dragleave", () => (veil.hidden = true));
  for (const type of ["dragover", "drop"]) {
    document.addEventListener(type, (event) => carriesFiles(event) && event.preventDefault()); // else it is opened
  }
  document.addEventListener("drop", () => (veil.hidden = true));
  place.addEventListener("drop", (event) => carriesFiles(event) && give(filesOf(event.dataTransfer)));
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const isText = types.includes("text/plain") && types.includes("text/html"); // office programs add a picture
    if (!files.length || isText || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    give([...files]);
  });
  input.addEventListener("change", () => {
    give([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}

/** The dropped files, without folders. */
function filesOf({ files, items }) {
  const folders = [...items].map((item) => item.webkitGetAsEntry?.()?.isDirectory);
  return [...files].filter((_, index) => !folders[index]);
}
