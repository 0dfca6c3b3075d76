// A client of the chat server, whole: post, watch, cancel, and the reducer that turns events into a thread.
//
// It runs in browsers (the login cookie is enough) and in Node 20 and newer (give it a base URL and a key):
//
//     const chat = new ChatClient({ base: "http://localhost:8000", key: "…" });
//     const thread = "/api/v1/chat/default/threads/" + id;
//     const watching = chat.watch(thread, { onState: (state) => show(state.messages) });
//     const answer = await chat.post(thread, { content: "Hello" });
//     await chat.cancel(thread, answer.id);
//     watching.close();
//
// The one idea: posting and watching are separate. A post only says what you want; what becomes of it, in this
// window and in any other, comes over the one stream that watches the thread. That is server-sent events read with
// fetch: EventSource can't send a key and gives up for good on a 503, and a WebSocket can't tell a 404 from a cut.

const FINAL = new Set([401, 404, 410]); // no key, no such thread, deleted: waiting won't help. All else heals.
const SILENCE_MS = 45_000; // the server says something every 15 s; after three turns of silence the line is dead
const HIDDEN_MS = 30_000; // browsers allow six connections to a site: a tab that nobody sees gives its own back
const LONGEST_WAIT_MS = 20_000;

/** What the server refused: `status`, the stable `code`, and a sentence. https://www.rfc-editor.org/rfc/rfc9457 */
export class ChatError extends Error {
  constructor(status, problem, retryAfter) {
    super(problem.detail ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: problem.code ?? "http_error", problem, retryAfter });
  }
}

export class ChatClient {
  constructor({ base = "", key = null } = {}) {
    Object.assign(this, { base, key });
  }

  /** Send one request; the response, or a ChatError. A network that fails is a TypeError, as with fetch. */
  async request(method, path, { body, headers = {}, signal } = {}) {
    const sent = { ...headers };
    if (this.key) sent.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    const response = await fetch(this.base + path, { method, headers: sent, signal, body: JSON.stringify(body) });
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    throw new ChatError(response.status, problem, Number(response.headers.get("Retry-After")) * 1000 || 0);
  }

  /** The same, and the JSON of the answer (null if there is none). */
  async json(method, path, body) {
    const response = await this.request(method, path, { body });
    return response.status === 204 ? null : response.json();
  }

  /**
   * Post a message; the assistant's message, in progress. It is safe to repeat, because the Idempotency-Key stays the
   * same: when the network fails, nobody knows whether the first attempt arrived, so it is simply sent again.
   */
  async post(thread, message, { key = randomKey(), attempts = 5 } = {}) {
    const headers = { "Idempotency-Key": key, Prefer: "respond-async" };
    for (let failures = 1; ; failures++) {
      try {
        return await (await this.request("POST", `${thread}/messages`, { body: message, headers })).json();
      } catch (error) {
        const passing = !(error instanceof ChatError) || error.status === 503;
        if (!passing || failures >= attempts) throw error;
        await new Promise((resolve) => setTimeout(resolve, backOff(failures, error.retryAfter)));
      }
    }
  }

  /** Stop the run that writes this message; the message as kept. */
  cancel(thread, messageId) {
    return this.json("POST", `${thread}/messages/${messageId}/cancel`);
  }

  /**
   * Watch a thread until `close()`, whatever happens to the network, the server or the laptop.
   *
   *   onState(state, events)  the thread after the events that brought it there, once per piece that arrived
   *   onStatus(status)        "connecting", "live", "reconnecting", "offline" or "ended"
   *   onEnd(error)            it is over: a ChatError with a final status, or null when the thread was deleted
   */
  watch(thread, { onState = () => {}, onStatus = () => {}, onEnd = () => {} } = {}) {
    let state = EMPTY; // everything that was said up to `position`, which is where a new connection goes on
    let position = "";
    let failures = 0;
    let atLeast = 0; // milliseconds: the server's own wish for when to come back
    let closed = false;
    let lastHeard = 0;
    let connection = new AbortController();
    let proceed = () => {}; // ends the present waiting

    const readOnce = async () => {
      connection = new AbortController();
      const heard = () => ((lastHeard = Date.now()), clearTimeout(deaf), (deaf = setTimeout(hangUp, SILENCE_MS)));
      let deaf = setTimeout(hangUp, SILENCE_MS);
      try {
        const query = position ? `?after=${encodeURIComponent(position)}` : "";
        const options = { headers: { Accept: "text/event-stream" }, signal: connection.signal };
        const response = await this.request("GET", `${thread}/events${query}`, options);
        onStatus("live");
        for await (const frames of eventStream(response.body)) {
          heard();
          failures = 0;
          for (const { event, id, retry } of frames) {
            if (retry !== undefined) atLeast = retry;
            if (event) state = reduce(state, event);
            if (state.hole) break;
            if (id) position = id;
          }
          if (closed) return;
          if (frames.some(({ event }) => event)) onState(state, frames.flatMap(({ event }) => event ?? []));
          if (state.deleted) return finish(null);
          if (state.hole) return void (position = ""); // without a position the server begins with a snapshot
        }
      } finally {
        clearTimeout(deaf);
        connection.abort();
      }
    };

    const keepReading = async () => {
      onStatus("connecting");
      while (!closed) {
        await readOnce().catch((error) => {
          if (FINAL.has(error.status)) finish(error);
          atLeast = error.retryAfter || atLeast;
        });
        while (!closed && asleep) await new Promise((resolve) => (proceed = resolve));
        if (closed) return;
        onStatus(globalThis.navigator?.onLine === false ? "offline" : "reconnecting");
        const pause = backOff(++failures, atLeast);
        atLeast = 0;
        await new Promise((resolve) => ((proceed = resolve), setTimeout(resolve, pause)));
      }
    };

    const hangUp = () => connection.abort(); // readOnce ends, and keepReading goes on from the position
    const again = () => ((failures = 0), hangUp(), proceed());
    const finish = (error) => (close(), onStatus("ended"), onEnd(error));
    let asleep = false;
    let dozing;
    const onVisibility = () => {
      clearTimeout(dozing);
      if (document.hidden) return void (dozing = setTimeout(() => ((asleep = true), hangUp()), HIDDEN_MS));
      const stale = asleep || Date.now() - lastHeard > SILENCE_MS / 2;
      asleep = false;
      if (stale) again();
    };
    const listen = (change) => {
      globalThis.window?.[change]("online", again);
      globalThis.window?.[change]("offline", hangUp);
      globalThis.document?.[change]("visibilitychange", onVisibility);
    };
    const close = () => ((closed = true), listen("removeEventListener"), clearTimeout(dozing), hangUp(), proceed());
    listen("addEventListener");
    keepReading();
    return { close };
  }
}

/** Milliseconds to wait: doubling from half a second, with jitter, so that a thousand clients don't return as one. */
function backOff(failures, atLeast = 0) {
  const longest = Math.min(LONGEST_WAIT_MS, 500 * 2 ** (failures - 1));
  return atLeast + longest * (0.5 + Math.random() / 2);
}

/** Not crypto.randomUUID: that one is missing on pages that came over plain http. */
export function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");
}

/** The frames of an event stream, as many at a time as arrived together. Comments only show that the line lives. */
async function* eventStream(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let frame = {};
  for (let part; !(part = await reader.read()).done; ) {
    rest += part.value;
    const lines = part.value.includes("\n") ? rest.split("\n") : [rest];
    rest = lines.pop(); // the line that hasn't ended yet
    const frames = [];
    for (const line of lines) {
      if (line.startsWith("data: ")) frame.event = JSON.parse(line.slice(6));
      else if (line.startsWith("id: ")) frame.id = line.slice(4);
      else if (line.startsWith("retry: ")) frame.retry = Number(line.slice(7));
      else if (line === "") frame = (frames.push(frame), {}); // a frame cut short before this counts for nothing
    }
    yield frames;
  }
}
