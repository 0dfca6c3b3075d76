// Watches a thread through web_demo/client.js, posts into it, and prints what it had just before the terminal event.
//
//     node watch.mjs BASE KEY THREAD_PATH CONTENT [cancel]
import { ChatClient } from "../../web_demo/client.js";

// Promises wait a twentieth of their time: the client's patience. Timers of Node's own fetch stay as they are.
const { setTimeout: timeout } = globalThis;
const isResolve = (run) => /native code/.test(run);
globalThis.setTimeout = (run, ms, ...given) => timeout(run, isResolve(run) ? ms / 20 : ms, ...given);

const [base, key, thread, content, cancel] = process.argv.slice(2);
const chat = new ChatClient({ base, key });
const statuses = [];
let before = null;
let snapshots = 0;
const done = new Promise((resolve) => {
  const watching = chat.watch(thread, {
    onState(state, event) {
      if (event.type === "thread.snapshot") snapshots += 1;
      const final = /^run\.(completed|failed|cancelled)$/.test(event.type);
      const answer = state.messages.at(-1);
      if (final) resolve(watching);
      else if (answer?.role === "assistant") before = answer;
    },
    onStatus: (status, error) => {
      statuses.push(status);
      if (status === "ended") resolve(error ?? null);
    },
  });
});
if (content) {
  const answer = await chat.post(thread, { content }, { attempts: 50 });
  if (cancel) await chat.cancel(thread, answer.id);
}
const outcome = await done;
outcome?.close?.();
process.stdout.write(JSON.stringify({ before, snapshots, statuses, error: outcome?.code ?? null }));
