// The thread in the middle: one that is watched, or (without an id) one that its first message or first file will make.

import { EMPTY, randomKey } from "./client.js";
import { Drafts } from "./drafts.js";
import { learnName } from "./names.js";
import { keyOf, rememberKey } from "./sent_keys.js";

// What was begun in each thread and not sent yet, for whoever comes back to it: files, and half-written text. A new
// thread's text is its agent's.
const drafts = new Map();
const texts = new Map();
const titled = new Set();

export class OpenThread {
  /**
   *   onChange()           something to draw
   *   onThread(thread)     the thread has changed: its title, that it is archived, that somebody answered
   *   onMade()             it has an id now
   *   onUnsent()           a message was refused: its text and files are here again
   *   onEnded(error)       it can't be watched any more; without an error, it was deleted
   *   onError(error)
   */
  constructor(chat, agentId, id, calls) {
    Object.assign(this, { chat, agentId, id, ...calls });
    Object.assign(this, { state: EMPTY, older: [], more: true, pending: [], status: "none" });
    const { onChange, onError } = this;
    this.drafts = drafts.get(id) ?? new Drafts(chat, { makeThread: () => this.made(), onChange, onError });
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

  /** All that is to be shown, what is on its way too: until it comes back over the stream. */
  get messages() {
    const said = ({ content, attachments }) => JSON.stringify([content, attachments.map(({ id }) => id)]);
    const arrived = (one) => ({ id, role, ...message }) =>
      id === one.storedAs || (role === "user" && said(message) === said(one) && !one.known.has(id));
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
    const now = new Date().toISOString(); // a run moves its thread up; the list will bring the exact time
    this.onThread(thread ? this.thread : { ...this.thread, updated_at: now });
    const answered = this.state.messages.some((message) => message.metadata.run?.status === "completed");
    if (this.thread.title === "" && answered && !this.running && !titled.has(this.id)) this.makeTitle();
  }

  /** Ask for a title, once; of several tabs, one. */
  async makeTitle() {
    titled.add(this.id);
    const ask = async (lock) => {
      if (!lock || this.thread.title !== "") return;
      await this.chat.request("POST", `${this.path}/generate_title`).catch(() => {}); // it can do without
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

  /** The path of the thread, once there is one. */
  async made() {
    if (!this.id) await (this.making ??= this.make());
    return this.path;
  }

  async make() {
    try {
      const made = await (await this.chat.request("POST", `/api/v1/chat/${this.agentId}/threads`, { body: {} })).json();
      const { text } = this;
      if (!this.closed) this.text = "";
      this.id = made.id;
      if (!this.closed) this.text = text;
      drafts.set(this.id, this.drafts);
      this.onThread(made);
    } catch (error) {
      this.making = null;
      throw error;
    }
    if (this.closed) return;
    this.watch();
    this.onMade();
  }

  /** Send a message, if none is being sent. A run in progress makes it fail, unless `interrupt` stops that first. */
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

  /** Post it and remember its key; the id that it is stored with. */
  async post({ content, attachments }, key, ifBusy) {
    const body = { content, attachments: attachments.map(({ id }) => ({ id })) };
    const answer = await this.chat.post(await this.made(), body, { key, ifBusy });
    const id = answer.metadata.run?.in_reply_to;
    rememberKey(id, key);
    return id;
  }

  /** Whether `retry` runs again on the same question: no tool stands against it, and its key is known here. */
  isRepeatable(failed) {
    const { error, in_reply_to: id } = failed.metadata.run;
    return Boolean(error?.retryable && keyOf(id));
  }

  /** Answer the question of a failed answer again, or else ask it a second time. */
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
