// The open thread: it is watched or, without an id, will be created by its first message or first file.

import { EMPTY, randomKey } from "./client.js";
import { Drafts } from "./drafts.js";
import { learnName } from "./names.js";
import { keyOf, rememberKey } from "./sent_keys.js";

// The files and the text of each thread that are not sent yet, by thread id. The text of a new thread is stored by its
// agent's id.
const drafts = new Map();
const texts = new Map();
const titled = new Set();

export class OpenThread {
  /**
   *   onChange()           something must be drawn
   *   onThread(thread)     the thread has changed: its title, whether it is archived, a new answer
   *   onCreated()          it has an id now
   *   onUnsent()           a message was refused: its text and files are unsent again
   *   onEnded(error)       it cannot be watched any more; without an error it was deleted
   *   onError(error)
   */
  constructor(chat, agentId, id, calls) {
    Object.assign(this, { chat, agentId, id, ...calls });
    Object.assign(this, { state: EMPTY, older: [], more: true, pending: [], status: "none" });
    const { onChange, onError } = this;
    this.drafts = drafts.get(id) ?? new Drafts(chat, { ensureThread: () => this.ensureCreated(), onChange, onError });
    if (!id) return;
    drafts.set(id, this.drafts);
    this.watch();
  }

  get path() {
    return `/api/v1/chat/${this.agentId}/threads/${this.id}`;
  }

  get thread() {
    return this.state.thread;
  }

  get running() {
    return this.state.messages.findLast((message) => message.metadata.run?.status === "in_progress");
  }

  get text() {
    return texts.get(this.id ?? this.agentId) ?? "";
  }

  set text(text) {
    texts.set(this.id ?? this.agentId, text);
  }

  /** All messages to show. Sent ones are pending until the stream returns them. */
  get messages() {
    const contentOf = ({ content, attachments }) => JSON.stringify([content, attachments.map(({ id }) => id)]);
    const arrived = (one) => ({ id, role, ...message }) =>
      id === one.storedAs || (role === "user" && contentOf(message) === contentOf(one) && !one.known.has(id));
    this.pending = this.pending.filter((one) => !this.state.messages.some(arrived(one)));
    return [...this.older, ...this.state.messages, ...this.pending];
  }

  watch() {
    this.status = "connecting";
    this.watching = this.chat.watch(this.path, {
      onState: (state, event) => {
        if (event.type === "thread.snapshot") Object.assign(this, { older: [], more: true });
        this.state = state;
        if (this.thread?.title === "") learnName(this.thread, state.messages);
        if (/^(thread|run)\./.test(event.type)) this.changed(event);
        this.onChange();
      },
      onStatus: (status, error) => {
        this.status = status;
        if (status === "ended") this.ended(error);
        this.onChange();
      },
    });
  }

  close() {
    this.watching?.close();
    this.closed = true;
  }

  changed({ type, thread }) {
    if (!this.thread || type === "thread.deleted") return;
    const now = new Date().toISOString(); // a run moves its thread up; the list loads the exact time later
    this.onThread(thread ? this.thread : { ...this.thread, updated_at: now });
    const answered = this.state.messages.some((message) => message.metadata.run?.status === "completed");
    if (this.thread.title === "" && answered && !this.running && !titled.has(this.id)) this.makeTitle();
  }

  /** Let the server generate a title, once, and from one of several tabs only. */
  async makeTitle() {
    titled.add(this.id);
    const ask = async (lock) => {
      if (!lock || this.thread.title !== "") return;
      await this.chat.request("POST", `${this.path}/generate_title`).catch(() => {}); // the title is optional
    };
    if (navigator.locks) await navigator.locks.request(`title ${this.id}`, { ifAvailable: true }, ask);
    else await ask(true);
  }

  ended(error) {
    if (error?.status !== 401) {
      this.drafts.take();
      drafts.delete(this.id);
      texts.delete(this.id);
    }
    if (!this.closed) this.onEnded(error);
  }

  /** Create the thread, if there is none. Returns its path. */
  async ensureCreated() {
    if (!this.id) await (this.creating ??= this.create());
    return this.path;
  }

  async create() {
    try {
      const path = `/api/v1/chat/${this.agentId}/threads`;
      const created = await (await this.chat.request("POST", path, { body: {} })).json();
      const { text } = this;
      if (!this.closed) this.text = "";
      this.id = created.id;
      if (!this.closed) this.text = text;
      drafts.set(this.id, this.drafts);
      this.onThread(created);
    } catch (error) {
      this.creating = null;
      throw error;
    }
    if (this.closed) return;
    this.watch();
    this.onCreated();
  }

  /** Send a message, unless one is being sent. It fails during a run, unless `interrupt` cancels the run first. */
  async send(content, attachments = [], { interrupt = false } = {}) {
    if ((!content.trim() && !attachments.length) || this.pending.length) return;
    const known = new Set(this.state.messages.map((message) => message.id));
    const pending = { id: randomKey(), role: "user", content, attachments, pending: true, known, metadata: {} };
    this.pending = [pending];
    this.onChange();
    try {
      pending.storedAs = await this.post(pending, randomKey(), interrupt ? "interrupt" : "reject");
    } catch (error) {
      this.pending = [];
      this.text ||= content;
      if (attachments.length) this.drafts.restore(attachments, this.path);
      this.onUnsent();
      this.onError(error);
    }
    this.onChange();
  }

  /** Post it and store its key. Returns the id of the stored message. */
  async post({ content, attachments }, key, ifBusy) {
    const body = { content, attachments: attachments.map(({ id }) => ({ id })) };
    const answer = await this.chat.post(await this.ensureCreated(), body, { key, ifBusy });
    const id = answer.metadata.run?.in_reply_to;
    rememberKey(id, key);
    return id;
  }

  /** Whether `retry` runs again on the same message: the server allows it, and this browser has the message's key. */
  isRepeatable(failed) {
    const { error, in_reply_to: id } = failed.metadata.run;
    return Boolean(error?.retryable && keyOf(id));
  }

  /** Run again on the message of a failed answer, or else post that message a second time. */
  async retry(failed) {
    const question = this.state.messages.find((message) => message.id === failed.metadata.run.in_reply_to);
    if (!question || this.running || this.retrying) return;
    if (!this.isRepeatable(failed)) return this.send(question.content, question.attachments);
    this.retrying = true;
    await this.post(question, keyOf(question.id), "reject").catch(this.onError);
    this.retrying = false;
  }

  async stop() {
    if (this.running) await this.chat.cancel(this.path, this.running.id).catch(this.onError);
  }

  async showEarlier() {
    const first = this.older[0] ?? this.state.messages[0];
    const found = await (await this.chat.request("GET", `${this.path}/messages?before=${first.id}&limit=50`)).json();
    this.older = [...found, ...this.older];
    this.more = found.length === 50;
    this.onChange();
  }
}
