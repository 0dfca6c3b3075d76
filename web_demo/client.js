// A complete client of the chat server: post, watch, cancel, and the reducer that turns events into a thread.
// It runs in browsers, where the session cookie is enough, and in Node 20, with a base URL and a key:
//     const chat = new ChatClient({ base: "http://localhost:8000", key: "…" });
//     const { id } = await (await chat.request("POST", "/api/v1/chat/default/threads")).json();
//     const thread = `/api/v1/chat/default/threads/${id}`;
//     const watching = chat.watch(thread, { onState: ({ messages }) => console.log(messages.at(-1)?.content) });
//     const answer = await chat.post(thread, { content: "Tell me about this server" });
//     setTimeout(() => chat.cancel(thread, answer.id).then(watching.close), 2000); // watchers see all of it
//
// Posting and watching are separate. A post only starts a run; its events arrive, in every window, on the stream that
// watches the thread: server-sent events, read with fetch: EventSource sends no key and gives up after a 503.

const FINAL = [401, 404, 410]; // no key, no such thread, gone: reconnecting is useless. Everything else is temporary.
const SILENCE_MS = 45_000; // the server sends something every 15 s: after this time the connection is dead

/** A problem: `status`, stable `code`, a sentence, seconds until a retry. https://www.rfc-editor.org/rfc/rfc9457 */
export class ChatError extends Error {
  constructor(status, problem, retryAfter = 0) {
    super(problem.detail ?? `The server responded with ${status}.`);
    Object.assign(this, { status, code: problem.code ?? "http_error", retryAfter });
  }
}

export class ChatClient {
  constructor({ base = "", key = null } = {}) {
    this.base = base;
    this.auth = key ? { Authorization: `Bearer ${key}` } : {};
  }

  /** Send a request. Returns the response; throws a ChatError, or a TypeError for a network failure, as fetch does. */
  async request(method, path, { body, headers = {}, signal } = {}) {
    const all = { ...this.auth, ...(body && { "Content-Type": "application/json" }), ...headers };
    const response = await fetch(this.base + path, { method, headers: all, signal, body: JSON.stringify(body) });
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    throw new ChatError(response.status, problem, Number(response.headers.get("Retry-After")) || 0);
  }

  /** Post a message, after a network failure again with the same key. Returns the assistant's message, in progress. */
  async post(thread, message, { key = randomKey(), attempts = 5, ifBusy = "reject" } = {}) {
    const path = `${thread}/messages?if_busy=${ifBusy}`; // "interrupt" cancels a run in progress first
    const headers = { "Idempotency-Key": key, Prefer: "respond-async" };
    for (let failures = 1; ; failures++) {
      try {
        return await (await this.request("POST", path, { body: message, headers })).json();
      } catch (error) {
        if ((error.status && error.status !== 503) || failures === attempts) throw error;
        await new Promise((resolve) => setTimeout(resolve, backOff(failures, error.retryAfter)));
      }
    }
  }

  /** Cancel the run of this message. Returns the stored message. */
  async cancel(thread, messageId) {
    return (await this.request("POST", `${thread}/messages/${messageId}/cancel`)).json();
  }

  /**
   * Watch a thread until `close()` is called, through failures of the network and restarts of the server.
   *
   *   onState(state, event)    the new state of the thread, and the event that caused it
   *   onStatus(status, error)  "live", "reconnecting", "offline"; at last "ended", without an error if deleted
   */
  watch(thread, { onState = () => {}, onStatus = () => {} }) {
    let state = EMPTY; // the result of all events up to `position`, after which the next connection resumes
    let position = "";
    let failures = 0;
    let connection = new AbortController();
    let [timer, proceed] = [0, () => {}]; // of the current wait
    const closed = new AbortController();
    const read = async () => {
      connection = new AbortController();
      let heard = Date.now();
      const watchdog = setInterval(() => Date.now() - heard > SILENCE_MS && connection.abort(), 5_000);
      try {
        const path = `${thread}/events${position && `?after=${encodeURIComponent(position)}`}`;
        const response = await this.request("GET", path, { signal: connection.signal });
        notify(onStatus, "live");
        for await (const { event, id } of eventStream(response.body)) {
          heard = Date.now();
          failures = 0;
          if (!event || closed.signal.aborted) continue;
          state = reduce(state, event);
          position = state.hole ? "" : id; // without a position, the server begins with a snapshot
          notify(onState, state, event);
          if (state.deleted) end();
          if (state.hole) return;
        }
      } catch (error) {
        if (FINAL.includes(error.status)) end(error); // all others are temporary: reconnect
        return error.retryAfter; // seconds
      } finally {
        clearInterval(watchdog);
        connection.abort();
      }
    };
    const wait = (ms) => new Promise((resolve) => (timer = setTimeout((proceed = resolve), ms)));
    const keepReading = async () => {
      while (!closed.signal.aborted) {
        const least = await read();
        const status = globalThis.navigator?.onLine === false ? "offline" : "reconnecting";
        if (!closed.signal.aborted) notify(onStatus, status);
        if (!closed.signal.aborted) await wait(backOff(++failures, least));
        while (globalThis.document?.hidden && !closed.signal.aborted) await wait(60_000); // six connections per site
      }
    };
    const reconnect = () => [(failures = 0), connection.abort(), proceed()]; // immediately
    const close = () => [closed.abort(), connection.abort(), clearTimeout(timer), proceed()];
    const end = (error) => [close(), notify(onStatus, "ended", error)];
    // After a change of the network or of the tab's visibility the old connection is not reliable.
    for (const [source, type] of [["window", "online"], ["window", "offline"], ["document", "visibilitychange"]]) {
      globalThis[source]?.addEventListener(type, reconnect, { signal: closed.signal });
    }
    keepReading();
    return { close };
  }
}

export const EMPTY = { thread: null, messages: [], reasoning: {}, calls: {}, hole: false, deleted: false };

/**
 * Return the state after one more event. Pure; applying an event twice changes nothing. `calls`, by message id and
 * index, has facts of calls that were seen: id, offset, progress, total, message. `reasoning`, by message id, has blocks
 * that the server does not store, blank where they were missed. A `hole` means missing events: a snapshot is needed.
 */
export function reduce(state, event) {
  const { type, message, thread, message_id: id, index, tool_name, arguments: given, start_time } = event;
  const found = state.messages.find((each) => each.id === (id ?? message?.id));
  const running = found?.metadata.run?.status === "in_progress";
  const others = state.messages.filter((each) => each !== found);
  const place = (changed) => others.findLastIndex((each) => each.created_at <= changed.created_at) + 1;
  const put = (changed, more) => ({ ...state, messages: others.toSpliced(place(changed), 0, changed), ...more });
  switch (type) {
    case "thread.snapshot": return { ...state, thread, messages: thread.messages, hole: false };
    case "thread.updated": return state.thread?.updated_at > thread.updated_at ? state : { ...state, thread };
    case "thread.deleted": return { ...state, deleted: true };
    case "run.started": case "message.snapshot": return found && !running ? state : put(message);
    case "message.created": case "run.completed": case "run.failed": case "run.cancelled": return put(message);
  }
  if (!running) return state;
  const { content, tool_calls: calls } = found;
  const key = `${id}/${index}`;
  const facts = (changed) => ({ calls: { ...state.calls, [key]: { ...state.calls[key], ...changed } } });
  switch (type) {
    case "message.delta":
      if (event.offset > lengthOf(content)) return { ...state, hole: true };
      return put({ ...found, content: content + skip(event.text, lengthOf(content) - event.offset) });
    case "reasoning.delta": {
      const { run } = found.metadata; // it has `reasoning` if the server stores it
      const blocks = [...(run.reasoning ?? state.reasoning[id] ?? [])];
      const block = blocks[index] ?? { index, after: event.after, calls: calls.length, text: "" };
      const missed = event.offset - lengthOf(block.text);
      const early = index > blocks.length || event.after > lengthOf(content) || missed > 0;
      if (run.reasoning && early) return { ...state, hole: true };
      blocks[index] = { ...block, text: block.text + " ".repeat(Math.max(0, missed)) + skip(event.text, -missed) };
      if (!run.reasoning) return { ...state, reasoning: { ...state.reasoning, [id]: blocks } };
      return put({ ...found, metadata: { ...found.metadata, run: { ...run, reasoning: blocks } } });
    }
    case "tool_call.started": {
      if (index !== calls.length) return index < calls.length ? state : { ...state, hole: true };
      const call = { tool_name, arguments: given, result: null, error: null, start_time, end_time: null };
      return put({ ...found, tool_calls: [...calls, call] }, facts({ id: event.id, offset: lengthOf(content) }));
    }
    case "tool_call.progress": return { ...state, ...facts({ progress: event.progress, total: event.total, message }) };
    case "tool_call.completed":
      if (index >= calls.length) return { ...state, hole: true };
      return calls[index].end_time ? state : put({ ...found, tool_calls: calls.with(index, event.tool_call) });
  }
  return state; // an event of a later version
}

// Offsets count characters as Unicode does; a JavaScript string counts most emoji twice.
const lengthOf = (text) => text.length - (text.match(/[\ud800-\udbff][\udc00-\udfff]/g)?.length ?? 0);
const skip = (text, count) => (count > 0 ? Array.from(text).slice(count).join("") : text);
/** Milliseconds to wait: exponential, limited, with jitter, so that many clients do not reconnect at the same time. */
const backOff = (failed, least = 0) => least * 1000 + Math.min(20_000, 500 * 2 ** failed) * (0.5 + Math.random() / 2);

const notify = async (callback, ...values) => callback(...values); // what it throws is reported and stops nothing

export const randomKey = () => crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID requires HTTPS

/** Yield the frames of an event stream, and an empty frame for each comment, as a sign of life. */
async function* eventStream(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, frame] = ["", {}];
  for (let part; !(part = await reader.read()).done; ) {
    rest += part.value;
    const lines = part.value.includes("\n") ? rest.split("\n") : [rest];
    rest = lines.pop(); // the line that has not ended yet
    for (const line of lines) {
      if (line.startsWith("data: ")) frame.event = JSON.parse(line.slice(6));
      if (line.startsWith("id: ")) frame.id = line.slice(4);
      if (line.startsWith(":")) yield {};
      if (line !== "") continue;
      yield frame; // an empty line ends a frame; an incomplete frame is ignored
      frame = {};
    }
  }
}
