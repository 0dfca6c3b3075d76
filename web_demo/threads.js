// The list of an agent's threads at the side.
//
// It is fetched when it is first shown, periodically, and when the user comes back to the page; in between, the events
// of the watched thread update its row. Rows are reused, so that the focus is preserved.

import { arrange, h, icon } from "./elements.js";
import { opensMenu } from "./menu.js";
import { isNameless, learnName, nameOf } from "./names.js";

const $ = (id) => document.getElementById(id);
const PAGE = 50;
const PATIENCE_MS = 20_000;
const NAMING = 10; // latest messages of each thread, fetched to name those without a title by the first of them

export class ThreadList {
  /** `onError(error)`; `onLost()`: there is no such agent. */
  constructor(chat, { onError, onLost }) {
    Object.assign(this, { chat, onError, onLost, agentId: null, current: null, archived: false });
    this.rows = new Map();
    $("more-threads").onclick = () => {
      this.pages += 1;
      this.load();
    };
    for (const button of [$("show-active"), $("show-archived")]) {
      button.onclick = () => this.show(this.agentId, button.id === "show-archived");
    }
    this.clear();
  }

  /** Show the threads of an agent, or, with null, nothing. */
  show(agentId, archived = this.archived) {
    if (agentId === this.agentId && archived === this.archived) return;
    Object.assign(this, { agentId, archived });
    $("show-active").ariaPressed = String(!archived);
    $("show-archived").ariaPressed = String(archived);
    this.clear();
    this.load();
  }

  clear() {
    this.connection?.abort();
    Object.assign(this, { threads: null, more: false, pages: 1, failed: false });
    this.draw();
  }

  /** Mark the thread that is open. */
  mark(id) {
    this.current = id;
    this.draw();
  }

  /** Fetch the list. Any number of calls during a fetch cause one further fetch. */
  async load() {
    this.wanted = true;
    if (this.busy) return;
    this.busy = true;
    while (this.wanted) {
      this.wanted = false;
      if (this.agentId) await this.fetch();
    }
    this.busy = false;
  }

  async fetch() {
    this.connection = new AbortController();
    const signal = AbortSignal.any([this.connection.signal, AbortSignal.timeout(PATIENCE_MS)]);
    const found = [];
    let more = true;
    try {
      for (let page = 0; page < this.pages && more; page++) {
        const response = await this.page(page, 0, signal);
        const threads = await response.json();
        more = response.headers.has("Link");
        if (threads.some(isNameless)) {
          const named = await (await this.page(page, NAMING, signal)).json();
          for (const thread of named) learnName(thread, thread.messages);
        }
        found.push(...threads);
        if (signal.aborted) return;
      }
      Object.assign(this, { threads: found, more, failed: false });
    } catch (error) {
      if (this.connection.signal.aborted) return;
      this.failed = true;
      if (error.code === "agent_not_found") this.onLost();
      else if (error.status) this.onError(error); // the light shows network failures
    }
    this.draw();
  }

  page(number, messages, signal) {
    const query = `?limit=${PAGE}&offset=${number * PAGE}&message_limit=${messages}&archived=${this.archived}`;
    return this.chat.request("GET", `/api/v1/chat/${this.agentId}/threads${query}`, { signal });
  }

  /** Insert or update a thread. */
  patch(thread) {
    if (!this.threads || thread.agent_id !== this.agentId) return;
    if (this.busy) this.wanted = true; // the fetch in progress may return older data
    const others = this.threads.filter(({ id }) => id !== thread.id);
    const reached = !this.more || others.length < this.threads.length || thread.updated_at > others.at(-1)?.updated_at;
    const changed = thread.archived === this.archived && reached ? [...others, thread] : others;
    this.threads = changed.sort((one, other) => (one.updated_at < other.updated_at ? 1 : -1));
    this.draw();
  }

  remove(id) {
    if (this.busy) this.wanted = true;
    this.threads = this.threads?.filter((thread) => thread.id !== id) ?? null;
    this.draw();
  }

  draw() {
    const kept = new Map();
    for (const thread of this.threads ?? []) {
      const row = this.rows.get(thread.id) ?? new Row();
      row.show(thread, thread.id === this.current);
      kept.set(thread.id, row);
    }
    this.rows = kept;
    arrange($("threads"), [...kept.values()].map(({ element }) => element));
    const none = this.archived ? "Nothing is archived." : "No threads yet.";
    const waiting = this.failed ? "Not loaded. Trying again…" : "Loading…";
    $("no-threads").hidden = !this.agentId || kept.size > 0;
    $("no-threads").textContent = this.threads ? none : waiting;
    $("no-threads").classList.toggle("late", !this.threads && !this.failed);
    $("more-threads").hidden = !this.more;
  }
}

class Row {
  constructor() {
    this.name = h("span.name", { dir: "auto" });
    this.when = h("span.when");
    this.link = h("a", {}, this.name, this.when);
    this.button = h("button.icon", {}, icon("more"));
    this.element = h("li", {}, this.link, this.button);
    opensMenu(this.button, () => this.thread);
  }

  show(thread, current) {
    this.thread = thread;
    const name = nameOf(thread);
    this.name.textContent = name;
    this.when.textContent = ago(thread.updated_at);
    Object.assign(this.link, { href: `#/${thread.agent_id}/${thread.id}`, title: name });
    this.link.ariaCurrent = current ? "page" : null;
    this.button.ariaLabel = `What to do with ${name}`;
    this.element.dataset.id = thread.id;
  }
}

function ago(time) {
  const minutes = (Date.now() - Date.parse(time)) / 60_000;
  if (minutes < 1) return "now";
  if (minutes < 60) return `${Math.floor(minutes)} min`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h`;
  return new Date(time).toLocaleDateString(undefined, { month: "short", day: "numeric" });
}
