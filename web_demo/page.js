// The demo page: agents and threads at the side, one watched thread in the middle.
//
// The address names what is shown (`#/agent/thread`), so a reload or a second tab shows the same. Everything about the
// open thread comes from `watch`; the list at the side is fetched again when something may have changed it.

import { ChatClient, EMPTY, randomKey } from "/client.js";
import { agentDialog, confirmDialog, renameDialog } from "/dialogs.js";
import { Drafts, collect } from "/drafts.js";
import { h, icon } from "/elements.js";
import { MessageList } from "/messages.js";

const STARTERS = [
  "What time is it in Tokyo?",
  "Roll 3d6 and compute 17*23",
  "Show me something slow",
  "Tell me about this server",
];
const LIGHTS = { live: "Live", reconnecting: "Reconnecting", offline: "Offline", none: "" };
const PAGE = 30;
const REFRESH_MS = 15_000;

const $ = (id) => document.getElementById(id);
const chat = new ChatClient();
const list = new MessageList($("messages"), {
  onRetry: (message) => retry(message),
  urlOf: (attachment) => `${pathIn(open)}/attachments/${attachment.id}`,
  nameOf: ({ role }) => ({ user: "You", system: "System" })[role] ?? agent()?.name ?? "Agent",
});

let agents = [];
let agentId = null;
let threads = [];
let listings = 0;
let pages = 1;
let archived = false;
let menuThread = null;
/** What is in the middle: a thread that is watched, or (id null) one that its first message will make. */
const drafts = new Map(); // by thread, so that whoever comes back finds the files that were not sent yet
let open = blank();
const titled = new Set();

function blank(id = null) {
  const shown = { id, agentId, state: EMPTY, older: [], more: true, pending: [], status: "none", watching: null };
  const makeThread = () => made(shown);
  shown.drafts = drafts.get(id) ?? new Drafts(chat, { makeThread, onChange: () => drawSoon(), onError: tell });
  if (id) drafts.set(id, shown.drafts);
  return shown;
}

const threadsPath = () => `/api/v1/chat/${agentId}/threads`;
const pathOf = (id) => `${threadsPath()}/${id}`;
const pathIn = (shown) => `/api/v1/chat/${shown.agentId}/threads/${shown.id}`;
const agent = () => agents.find((each) => each.id === agentId);
const running = () => open.state.messages.findLast((message) => message.metadata.run?.status === "in_progress");

// Asking the server

/** One call; its JSON. What goes wrong is told in a toast, and gives undefined. */
async function call(method, path, body) {
  try {
    return await api(method, path, body);
  } catch (error) {
    tell(error);
  }
}

async function api(method, path, body) {
  const response = await chat.request(method, path, { body });
  return response.status === 204 ? null : response.json();
}

function tell(error) {
  if (error.status === 401) return lock();
  toast(error.status ? error.message : "The server can’t be reached. Try again in a moment.");
}

let toastTimer;
function toast(text) {
  $("toast").querySelector("span").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 7000);
}

function lock() {
  open.watching?.close();
  $("locked-url").textContent = `${location.origin}/?key=…`;
  $("locked").hidden = false;
}

// Agents

async function loadAgents() {
  const found = await call("GET", "/api/v1/agents");
  if (!found) return;
  agents = found;
  const options = agents.map((each) => h("option", { value: each.id }, each.name + (each.is_default ? " · default" : "")));
  if (agentId && !agent()) options.push(h("option", { value: agentId }, "Deleted agent"));
  $("agent").replaceChildren(...options);
  if (agentId) $("agent").value = agentId;
  $("edit-agent").disabled = !agent();
}

function firstAgent() {
  const last = localStorage.getItem("agent");
  return (agents.find((each) => each.id === last) ?? agents.find((each) => each.is_default) ?? agents[0])?.id ?? null;
}

async function editAgent(edited) {
  const kinds = new Set(["demo", "claude", ...agents.map((each) => each.kind)]);
  const result = await agentDialog(edited, [...kinds], (fields) =>
    edited ? api("PATCH", `/api/v1/agents/${edited.id}`, fields) : api("POST", "/api/v1/agents", fields),
  );
  if (result === "delete") return deleteAgent(edited);
  if (!result) return;
  await loadAgents();
  if (edited) draw();
  else go(result.id);
}

async function deleteAgent(edited) {
  const text = "Its threads stay readable, but nobody will answer in them.";
  if (!(await confirmDialog(`Delete ${edited.name}?`, text))) return;
  if ((await call("DELETE", `/api/v1/agents/${edited.id}`)) === undefined) return;
  agentId = null;
  await loadAgents();
  go(firstAgent());
}

// The list of threads

async function loadThreads() {
  const asked = ++listings;
  if (!agentId) return drawThreads([], false);
  const found = [];
  let more = true;
  for (let page = 0; page < pages && more; page++) {
    const query = `?limit=${PAGE}&offset=${page * PAGE}&message_limit=0&archived=${archived}`;
    const response = await chat.request("GET", threadsPath() + query).catch((error) => error);
    if (response instanceof Error) return response.status ? tell(response) : undefined; // the light tells of the network
    found.push(...(await response.json()));
    more = response.headers.has("Link");
  }
  if (asked === listings) drawThreads(found, more); // of several answers on their way, only the last asked for counts
}

function drawThreads(found, more) {
  threads = found;
  $("threads").replaceChildren(
    ...threads.map((thread) => {
      const row = h(
        "li",
        {},
        h("a", { href: `#/${thread.agent_id}/${thread.id}` }, h("span.name", {}, nameOf(thread)), h("span.when", {}, ago(thread.updated_at))),
        h("button.icon", { ariaLabel: `What to do with ${nameOf(thread)}`, onclick: (event) => showMenu(event, thread) }, icon("more")),
      );
      row.dataset.id = thread.id;
      if (thread.id === open.id) row.firstChild.ariaCurrent = "page";
      return row;
    }),
  );
  $("no-threads").hidden = threads.length > 0;
  $("no-threads").textContent = archived ? "Nothing is archived." : "No threads yet.";
  $("more-threads").hidden = !more;
}

function nameOf(thread) {
  return thread.title || "New thread";
}

function ago(time) {
  const minutes = (Date.now() - Date.parse(time)) / 60_000;
  if (minutes < 1) return "now";
  if (minutes < 60) return `${Math.floor(minutes)} min`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h`;
  return new Date(time).toLocaleDateString(undefined, { month: "short", day: "numeric" });
}

function showMenu(event, thread) {
  menuThread = thread;
  const menu = $("menu-popover");
  menu.querySelector("[data-do=archive]").textContent = thread.archived ? "Unarchive" : "Archive";
  menu.showPopover();
  const box = event.currentTarget.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(box.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${Math.min(box.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
}

const menuActions = {
  async rename(thread) {
    const title = await renameDialog(thread.title);
    if (title !== null) await call("PATCH", pathOf(thread.id), { title });
  },
  async archive(thread) {
    const changed = await call("PATCH", pathOf(thread.id), { archived: !thread.archived });
    if (changed) toast(changed.archived ? "Archived. It is under Archived now." : "It is active again.");
  },
  async delete(thread) {
    if (!(await confirmDialog(`Delete “${nameOf(thread)}”?`, "All of its messages go with it. There is no way back."))) return;
    if (thread.id === open.id) open.leaving = true;
    if ((await call("DELETE", pathOf(thread.id))) !== undefined && thread.id === open.id) go(agentId);
  },
};

// The open thread

/** Show an agent's thread, or a new one: by the address, so that a reload comes back here. */
function go(agent_id, thread_id) {
  const hash = agent_id ? `#/${agent_id}${thread_id ? `/${thread_id}` : ""}` : "#/";
  if (location.hash === hash) follow();
  else location.hash = hash;
}

/** Bring the page to what its address says. */
async function follow() {
  const [, agent_id, thread_id] = location.hash.split("/");
  document.body.classList.remove("sidebar-open");
  const wanted = agent_id || firstAgent();
  if (wanted !== agentId) {
    agentId = wanted;
    pages = 1;
    drawThreads([], false);
    await loadAgents();
    loadThreads();
  }
  if (agentId) localStorage.setItem("agent", agentId);
  if (open.id === (thread_id || null) && open.id) return;
  show(thread_id || null);
}

function show(id) {
  open.watching?.close();
  open = blank(id);
  following = true;
  if (id) watch(open);
  for (const row of $("threads").children) row.firstChild.ariaCurrent = row.dataset.id === id ? "page" : null;
  draw();
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
}

function watch(shown) {
  shown.watching = chat.watch(pathOf(shown.id), {
    onState(state, event) {
      if (event.type === "thread.snapshot") Object.assign(shown, { older: [], more: true });
      shown.state = state;
      if (/^(thread\.|run\.)/.test(event.type)) changed(shown, event);
      drawSoon();
    },
    onStatus(status, error) {
      shown.status = status;
      if (status === "ended" && shown === open) ended(shown, error);
      drawSoon();
    },
  });
}

/** Something that the list shows, or that asks for a title. */
function changed(shown, event) {
  if (event.type !== "thread.snapshot") loadThreads();
  const { thread, messages } = shown.state;
  const answered = messages.some((message) => message.metadata.run?.status === "completed");
  const busy = messages.some((message) => message.metadata.run?.status === "in_progress");
  if (thread && thread.title === "" && answered && !busy && !titled.has(thread.id)) makeTitle(shown);
}

/** Ask for a title, once; of several tabs, one. */
async function makeTitle(shown) {
  titled.add(shown.id);
  const path = pathOf(shown.id);
  const ask = async (lock) => {
    if (lock && shown.state.thread.title === "") await api("POST", `${path}/generate_title`).catch(() => {});
  };
  if (navigator.locks) await navigator.locks.request(`title ${shown.id}`, { ifAvailable: true }, ask);
  else await ask(true);
}

function ended(shown, error) {
  if (error?.status === 401) return lock();
  shown.drafts.take();
  drafts.delete(shown.id);
  if (!shown.leaving) toast(error ? error.message : "This thread was deleted.");
  loadThreads();
  go(agentId);
}

/** The path of the thread, which its first message or its first file makes. */
async function made(shown) {
  shown.making ??= shown.id ? null : make(shown);
  await shown.making;
  return pathIn(shown);
}

async function make(shown) {
  try {
    shown.id = (await api("POST", `/api/v1/chat/${shown.agentId}/threads`, {})).id;
  } catch (error) {
    shown.making = null;
    throw error;
  }
  drafts.set(shown.id, shown.drafts);
  loadThreads();
  if (shown !== open) return;
  watch(shown);
  history.pushState(null, "", `#/${shown.agentId}/${shown.id}`);
}

async function send(content, attachments = []) {
  if ((!content.trim() && !attachments.length) || running() || open.pending.length) return;
  if (!open.agentId) return toast("Make an agent first.");
  const sent = open;
  const known = new Set(sent.state.messages.map((message) => message.id));
  const pending = { id: randomKey(), role: "user", content, attachments, pending: true, known, metadata: {} };
  sent.pending = [pending];
  following = true;
  draw();
  try {
    const body = { content, attachments: attachments.map(({ id }) => ({ id })) };
    const answer = await chat.post(await made(sent), body);
    pending.storedAs = answer.metadata.run?.in_reply_to;
  } catch (error) {
    sent.pending = [];
    if (sent === open && !$("input").value) write(content);
    if (attachments.length) sent.drafts.restore(attachments, pathIn(sent));
    tell(error);
  }
  draw();
}

/** A message on its way is shown until it comes back over the stream. */
function unsent({ pending, state }) {
  const said = ({ content, attachments }) => JSON.stringify([content, attachments.map(({ id }) => id)]);
  const arrived = (one) => (message) =>
    message.id === one.storedAs || (message.role === "user" && said(message) === said(one) && !one.known.has(message.id));
  return pending.filter((one) => !state.messages.some(arrived(one)));
}

function retry(failed) {
  const question = open.state.messages.find((message) => message.id === failed.metadata.run.in_reply_to);
  if (question) send(question.content, question.attachments);
}

async function stop() {
  const message = running();
  if (!message) return;
  $("stop").disabled = true;
  await chat.cancel(pathOf(open.id), message.id).catch(tell);
  $("stop").disabled = false;
}

async function showEarlier() {
  const shown = open;
  const first = shown.older[0] ?? shown.state.messages[0];
  const found = await call("GET", `${pathOf(shown.id)}/messages?before=${first.id}&limit=50`);
  if (!found) return;
  const fromBottom = $("scroll").scrollHeight - $("scroll").scrollTop;
  shown.older = [...found, ...shown.older];
  shown.more = found.length === 50;
  draw();
  $("scroll").scrollTop = $("scroll").scrollHeight - fromBottom;
}

// Drawing

let drawing = false;
function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(draw);
}

function draw() {
  drawing = false;
  const { state, older } = open;
  const thread = state.thread;
  open.pending = unsent(open);
  list.show([...older, ...state.messages, ...open.pending], state);

  const title = thread ? nameOf(thread) : open.id ? "" : "New thread";
  $("title").textContent = title;
  document.title = thread?.title ? `${thread.title} – Agent chat` : "Agent chat";
  $("thread-menu").hidden = !thread;
  $("light").dataset.status = open.status;
  $("light").textContent = LIGHTS[open.status] ?? "";
  $("earlier").hidden = !(open.more && state.messages.length >= 50);

  const empty = !open.id || ((thread || open.making) && !state.messages.length);
  $("welcome").hidden = !empty || open.pending.length > 0;
  $("welcome-name").textContent = agent()?.name ?? (agents.length ? "" : "Make an agent to begin");
  $("welcome-text").textContent = welcome();

  const busy = Boolean(running());
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("send").disabled = !sendable() || open.pending.length > 0;
  $("input").disabled = $("attach").disabled = Boolean(thread?.archived) || !open.agentId;
  open.drafts.show($("drafts"));
  $("input").placeholder = thread?.archived ? "This thread is archived" : `Message ${agent()?.name ?? "the agent"}`;
  $("hint").textContent = hint(thread);
  keepUp();
}

function hint(thread) {
  if (thread?.archived) return "Unarchive it to write.";
  if (open.drafts.busy) return "It can be sent once its files are uploaded.";
  return "Enter sends · Shift+Enter for a new line · Esc stops";
}

function sendable() {
  return !open.drafts.busy && (Boolean($("input").value.trim()) || open.drafts.attachments.length > 0);
}

function welcome() {
  const shown = agent();
  if (!shown) return "";
  if (shown.kind === "demo") return "An offline agent with no model behind it and real tools. Try one of these.";
  return [shown.model, shown.mcp_servers.length ? `tools: ${shown.mcp_servers.join(", ")}` : ""].filter(Boolean).join(" · ");
}

// Staying at the end of the text unless the reader has gone up

let following = true;
let lastTop = 0;
function keepUp() {
  const scroll = $("scroll");
  if (following) scroll.scrollTop = scroll.scrollHeight;
  $("latest").hidden = following;
}

$("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  const atEnd = scrollHeight - scrollTop - clientHeight < 40;
  if (atEnd) following = true;
  else if (scrollTop < lastTop) following = false;
  lastTop = scrollTop;
  $("latest").hidden = following;
});
new ResizeObserver(keepUp).observe($("column"));
new ResizeObserver(keepUp).observe($("scroll"));

// What people do

function write(text) {
  $("input").value = text;
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight, innerHeight * 0.4)}px`;
  draw();
}

function submit() {
  const text = $("input").value;
  if (!sendable() || running() || open.pending.length) return;
  write("");
  send(text.trim() ? text : "", open.drafts.take());
}

$("input").addEventListener("input", () => write($("input").value));
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  submit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) stop();
});
$("attach").onclick = () => $("files").click();
collect({
  place: document.querySelector("main"),
  veil: $("veil"),
  input: $("files"),
  ready: () => !$("attach").disabled,
  onFiles(files) {
    open.drafts.add(files);
    if (!matchMedia("(pointer: coarse)").matches) $("input").focus();
  },
});
$("stop").onclick = stop;
$("latest").onclick = () => {
  following = true;
  keepUp();
};
$("earlier").onclick = showEarlier;
$("new-thread").onclick = () => (open.id ? go(agentId) : follow());
$("agent").onchange = () => go($("agent").value);
$("edit-agent").onclick = () => editAgent(agent());
$("new-agent").onclick = () => editAgent(null);
$("thread-menu").onclick = (event) => showMenu(event, open.state.thread);
$("menu-popover").onclick = async (event) => {
  const action = event.target.dataset.do;
  if (!action) return;
  $("menu-popover").hidePopover();
  await menuActions[action](menuThread);
  loadThreads();
};
$("more-threads").onclick = () => {
  pages += 1;
  loadThreads();
};
for (const button of [$("show-active"), $("show-archived")]) {
  button.onclick = () => {
    archived = button.id === "show-archived";
    pages = 1;
    $("show-active").ariaPressed = String(!archived);
    $("show-archived").ariaPressed = String(archived);
    loadThreads();
  };
}
$("show-sidebar").onclick = () => document.body.classList.add("sidebar-open");
$("hide-sidebar").onclick = $("shade").onclick = () => document.body.classList.remove("sidebar-open");
$("toast").querySelector("button").onclick = () => ($("toast").hidden = true);
$("starters").append(...STARTERS.map((text) => h("button", { onclick: () => send(text) }, text)));

window.addEventListener("hashchange", follow);
window.addEventListener("focus", loadThreads);
window.addEventListener("online", loadThreads);
setInterval(() => document.hidden || loadThreads(), REFRESH_MS);

await loadAgents();
await follow();
