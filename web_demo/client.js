// A client of the chat server, whole: post, watch, cancel, and the reducer that turns events into a thread.
// It runs in browsers, where the login cookie is enough, and in Node 20, with a base URL and a key:
//     const chat = new ChatClient({ base: "http://localhost:8000", key: "…" });
//     const { id } = await (await chat.request("POST", "/api/v1/chat/default/threads")).json();
//     const thread = `/api/v1/chat/default/threads/${id}`;
//     const watching = chat.watch(thread, { onState: ({ messages }) => console.log(messages.at(-1)?.content) });
//     const answer = await chat.post(thread, { content: "Tell me about this server" });
//     setTimeout(() => chat.cancel(thread, answer.id).then(watching.close), 2000); // enough; whoever waits sees it all
//
// The one idea: posting and watching are separate. A post only says what is wanted; what becomes of it, here and in
// every other window, comes over the stream that watches the thread: server-sent events, read with fetch, because
// EventSource can't send a key and gives up for good on a 503.

const FINAL = [401, 404, 410]; // no key, no such thread, gone: coming back won't help. All else heals.
const SILENCE_MS = 45_000; // the server says something every 15 s: after this long the line is dead

/** What was refused: `status`, stable `code`, a sentence, seconds to wait. https://www.rfc-editor.org/rfc/rfc9457 */
export class ChatError extends Error {
  constructor(status, problem, retryAfter = 0) {
    super(problem.detail ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: problem.code ?? "http_error", retryAfter });
  }
}

export class ChatClient {
  constructor({ base = "", key = null } = {}) {
    this.base = base;
    this.auth = key ? { Authorization: `Bearer ${key}` } : {};
  }

  /** Send a request; the response, or a ChatError. A network that fails is a TypeError, as with fetch. */
  async request(method, path, { body, headers = {}, signal } = {}) {
    const all = { ...this.auth, ...(body && { "Content-Type": "application/json" }), ...headers };
    const response = await fetch(this.base + path, { method, headers: all, signal, body: JSON.stringify(body) });
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    throw new ChatError(response.status, problem, Number(response.headers.get("Retry-After")) || 0);
  }

  /**
   * Post a message; the assistant's message, in progress. After a network failure it is unknown whether the post
   * arrived, so it is sent again with the same Idempotency-Key. `ifBusy: "interrupt"` stops a run in progress first.
   */
  async post(thread, message, { key = randomKey(), attempts = 5, ifBusy = "reject" } = {}) {
    const path = `${thread}/messages?if_busy=${ifBusy}`;
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

  /** Stop the run that writes this message; the message as kept. */
  async cancel(thread, messageId) {
    return (await this.request("POST", `${thread}/messages/${messageId}/cancel`)).json();
  }

  /**
   * Watch a thread until `close()`, whatever happens to the network, the server or the laptop.
   *
   *   onState(state, event)    the thread, and the event that brought it there
   *   onStatus(status, error)  "live", "reconnecting", "offline"; at last "ended", with an error or, deleted, with none
   */
  watch(thread, { onState = () => {}, onStatus = () => {} }) {
    let state = EMPTY; // all that was said up to `position`, from where the next connection goes on
    let position = "";
    let failures = 0;
    let connection = new AbortController();
    let [timer, proceed] = [0, () => {}]; // of the present waiting
    const closed = new AbortController();
    const read = async () => {
      connection = new AbortController();
      let heard = Date.now();
      const watchdog = setInterval(() => Date.now() - heard > SILENCE_MS && connection.abort(), 5_000);
      try {
        const path = `${thread}/events${position && `?after=${encodeURIComponent(position)}`}`;
        const response = await this.request("GET", path, { signal: connection.signal });
        tell(onStatus, "live");
        for await (const { event, id } of eventStream(response.body)) {
          heard = Date.now();
          failures = 0;
          if (!event || closed.signal.aborted) continue;
          state = reduce(state, event);
          position = state.hole ? "" : id; // without a position, the server begins with a snapshot
          tell(onState, state, event);
          if (state.deleted) end();
          if (state.hole) return;
        }
      } catch (error) {
        if (FINAL.includes(error.status)) end(error); // anything else was the network: come back
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
        if (!closed.signal.aborted) tell(onStatus, globalThis.navigator?.onLine === false ? "offline" : "reconnecting");
        if (!closed.signal.aborted) await wait(backOff(++failures, least));
        while (globalThis.document?.hidden && !closed.signal.aborted) await wait(60_000); // a site gets six connections
      }
    };
    const look = () => [(failures = 0), connection.abort(), proceed()]; // begin anew
    const close = () => [closed.abort(), connection.abort(), clearTimeout(timer), proceed()];
    const end = (error) => [close(), tell(onStatus, "ended", error)];
    // The network came or went, the tab was shown or hidden: the old connection is worth nothing.
    for (const [source, type] of [["window", "online"], ["window", "offline"], ["document", "visibilitychange"]]) {
      globalThis[source]?.addEventListener(type, look, { signal: closed.signal });
    }
    keepReading();
    return { close };
  }
}

export const EMPTY = { thread: null, messages: [], reasoning: {}, calls: {}, hole: false, deleted: false };

/**
 * The thread after one more event; pure, and an event applied twice does no harm. `reasoning` is by message id;
 * `calls`, by message id and index, has what is told of a call and not kept: offset, progress, total, message.
 * A `hole` means that something was missed: ask for a snapshot.
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
  const aside = (told) => ({ calls: { ...state.calls, [key]: { ...state.calls[key], ...told } } });
  switch (type) {
    case "message.delta":
      if (event.offset > lengthOf(content)) return { ...state, hole: true };
      return put({ ...found, content: content + skip(event.text, lengthOf(content) - event.offset) });
    case "reasoning.delta": {
      const { text, end } = state.reasoning[id] ?? { text: "", end: 0 }; // who comes late reads only the rest of it
      const read = { text: text + skip(event.text, end - event.offset), end: event.offset + lengthOf(event.text) };
      return { ...state, reasoning: { ...state.reasoning, [id]: read.end > end ? read : { text, end } } };
    }
    case "tool_call.started": {
      if (index !== calls.length) return index < calls.length ? state : { ...state, hole: true };
      const call = { tool_name, arguments: given, result: null, error: null, start_time, end_time: null };
      return put({ ...found, tool_calls: [...calls, call] }, aside({ offset: lengthOf(content) }));
    }
    case "tool_call.progress": return { ...state, ...aside({ progress: event.progress, total: event.total, message }) };
    case "tool_call.completed":
      if (index >= calls.length) return { ...state, hole: true };
      return calls[index].end_time ? state : put({ ...found, tool_calls: calls.with(index, event.tool_call) });
  }
  return state; // an event of a later version
}

// Offsets count characters as Unicode does; a JavaScript string counts most emoji twice.
const lengthOf = (text) => text.length - (text.match(/[\ud800-\udbff][\udc00-\udfff]/g)?.length ?? 0);
const skip = (text, count) => (count > 0 ? Array.from(text).slice(count).join("") : text);
/** Milliseconds to wait: doubling, with a limit, and with jitter, so that a thousand clients don't return as one. */
const backOff = (failed, least = 0) => least * 1000 + Math.min(20_000, 500 * 2 ** failed) * (0.5 + Math.random() / 2);

/** Call what the caller gave: what that throws is reported (as an unhandled rejection), and the watching goes on. */
const tell = async (callback, ...told) => callback(...told);

/** Not crypto.randomUUID, which is missing on pages that came over plain http. */
export const randomKey = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

/** The frames of an event stream, and an empty one for each comment: a sign of life. */
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
      yield frame; // an empty line ends a frame; one that was cut short never counts
      frame = {};
    }
  }
}
