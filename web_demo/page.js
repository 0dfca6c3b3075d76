// The demo page: agents and their threads at the side, one watched thread in the middle.
//
// The address contains what is shown (`#/agent/thread`), so that a reload or a second tab shows the same. Everything
// about the open thread comes from watching it; the agents and the list are fetched, with retries.

import { ChatClient } from "./client.js";
import { agentDialog, confirmDialog, renameDialog } from "./dialogs.js";
import { collect } from "./drafts.js";
import { h } from "./elements.js";
import { onChoice, opensMenu } from "./menu.js";
import { MessageList } from "./messages.js";
import { nameOf } from "./names.js";
import { OpenThread } from "./open_thread.js";
import { Following } from "./scrolling.js";
import { coverPage, isSignedOut } from "./signed_out.js";
import { ThreadList } from "./threads.js";
import { drawWelcome, makeStarters } from "./welcome.js";

const LIGHTS = { connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", offline: "Offline" };
const SENTENCES = {
  agent_not_found: "There is no such agent.",
  agent_deleted: "This agent was deleted.",
  thread_not_found: "There is no such thread.",
};
const UNREACHABLE = "The server can’t be reached.";
const REFRESH_MS = 15_000;

const $ = (id) => document.getElementById(id);
const chat = new ChatClient({ base: new URL(".", document.baseURI).pathname.slice(0, -1) }); // it may be under a prefix
const list = new ThreadList(chat, { onError: report, onLost: leaveUnknownAgent });
const following = new Following({ scroll: $("scroll"), column: $("column"), button: $("latest") });
const messages = new MessageList($("messages"), {
  onRetry: (message) => open.retry(message),
  isRepeatable: (message) => open.isRepeatable(message),
  urlOf: (attachment) => `${chat.base}${open.path}/attachments/${attachment.id}`,
  nameOf: ({ role }) => ({ user: "You", system: "System" })[role] ?? agent()?.name ?? "Agent",
});

const hasUnknownKey = new URLSearchParams(location.search).has("key"); // the server redirects a valid key
if (hasUnknownKey) history.replaceState(null, "", location.pathname + location.hash);

let agents = null; // null until they are loaded
let loadError = ""; // why loading failed
let agentId = null;
let open = openThread(null);
let confirming = false; // the user wants to send while a run is in progress

const agent = () => agents?.find((each) => each.id === agentId);
const isGone = () => Boolean(agents && agentId && !agent());
const isTouch = () => matchMedia("(pointer: coarse)").matches;

// Requests

async function api(method, path, body) {
  const response = await chat.request(method, path, { body });
  return response.status === 204 ? null : response.json();
}

/** Send a request. Returns its JSON, or undefined after an error, which a toast shows. */
function call(method, path, body) {
  return api(method, path, body).catch(report);
}

function report(error) {
  if (error.status === 401) return lock();
  toast(error.status ? (SENTENCES[error.code] ?? error.message) : `${UNREACHABLE} Try again in a moment.`);
  if (error.code === "agent_deleted") loadAgents();
}

let toastTimer;
function toast(text) {
  $("toast").querySelector("span").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 7000);
}

function lock() {
  open.close();
  const reason = hasUnknownKey ? "This key is not known here" : "Not signed in";
  if (!isSignedOut()) coverPage(location.origin + chat.base, reason);
}

/** End the session and reload the page, so that nothing remains in memory or in the address. */
async function signOut() {
  if ((await call("POST", "/logout")) === null) location.replace(location.pathname);
}

/** Load the list again: by the timer, and when the user comes back to the page. */
async function refresh({ all = false } = {}) {
  if (isSignedOut()) return;
  list.load();
  if (all || !agents) await loadAgents();
}

// Agents

/** Fetch all agents, page by page: the header `Link` means that there are more. */
async function listAgents(found = []) {
  const response = await chat.request("GET", `/api/v1/agents?limit=100&offset=${found.length}`);
  found.push(...(await response.json()));
  return response.headers.has("Link") ? listAgents(found) : found;
}

/** Load the agents. After a failure the page shows why, and the timer tries again. */
async function loadAgents() {
  const first = !agents;
  try {
    agents = await listAgents();
    loadError = "";
  } catch (error) {
    if (error.status === 401) lock();
    loadError = error.status ? error.message : UNREACHABLE;
    return drawSoon();
  }
  drawAgents();
  if (first && hasUnknownKey) toast("The key in the address is not known here. You are signed in with another one.");
  if (first && !agentId) follow();
  drawSoon();
}

function drawAgents() {
  const option = ({ id, name, is_default }) => h("option", { value: id }, name + (is_default ? " · default" : ""));
  const options = agents.map(option);
  if (isGone()) options.push(option({ id: agentId, name: "Deleted agent" }));
  const shown = [...$("agent").options];
  const same = shown.length === options.length && shown.every((each, index) => each.isEqualNode(options[index]));
  if (!same) $("agent").replaceChildren(...options);
}

function firstAgent() {
  const last = localStorage.getItem("agent");
  const found = agents?.find((each) => each.id === last) ?? agents?.find((each) => each.is_default) ?? agents?.[0];
  return found?.id ?? null;
}

/** Leave the agent of the address, if it does not exist. */
async function leaveUnknownAgent() {
  await loadAgents();
  if (isGone()) go(firstAgent());
}

async function editAgent(edited) {
  const model = agent() ?? agents.find((each) => each.is_default);
  const kinds = new Set(agents.map((each) => each.kind));
  const result = await agentDialog(edited, { kinds, servers: model?.mcp_servers ?? [] }, (fields) =>
    edited ? api("PATCH", `/api/v1/agents/${edited.id}`, fields) : api("POST", "/api/v1/agents", fields),
  );
  if (result === "delete") return deleteAgent(edited);
  if (!result) return;
  await loadAgents();
  if (!edited) go(result.id);
}

async function deleteAgent(edited) {
  const text = "Nobody will answer in its threads any more. They leave the page, but can be read at their addresses.";
  if (!(await confirmDialog(`Delete ${edited.name}?`, text))) return;
  if ((await call("DELETE", `/api/v1/agents/${edited.id}`)) === undefined) return;
  await loadAgents();
  go(firstAgent());
}

// What is shown

/** Show an agent's thread, or a new one, through the address, so that a reload shows it again. */
function go(agent_id, thread_id) {
  const hash = agent_id ? `#/${agent_id}${thread_id ? `/${thread_id}` : ""}` : "#/";
  if (location.hash === hash) follow();
  else location.hash = hash;
}

/** Show what the address contains. */
async function follow() {
  const { hash } = location;
  const [, agent_id, thread_id] = hash.split("/");
  document.body.classList.remove("sidebar-open");
  const wanted = agent_id || firstAgent();
  const moved = wanted !== agentId;
  agentId = wanted;
  list.show(agentId);
  if (moved || !open.id || open.id !== thread_id) show(thread_id || null);
  if (isGone()) await loadAgents(); // it may have been created in another tab
  if (agentId) localStorage.setItem("agent", agentId);
}

function show(id) {
  open.close();
  open = openThread(id);
  list.mark(id);
  write(open.text);
  following.restart();
  if (!isTouch() && !document.querySelector("dialog[open]")) $("input").focus();
}

function openThread(id) {
  const shown = new OpenThread(chat, agentId, id, {
    onChange: drawSoon,
    onThread: (thread) => list.patch(thread),
    onCreated() {
      list.mark(shown.id);
      history.pushState(null, "", `#/${shown.agentId}/${shown.id}`);
    },
    onUnsent() {
      if (shown === open && !$("input").value) write(shown.text);
    },
    onEnded(error) {
      if (error?.status === 401) return lock();
      if (!shown.leaving) toast(error ? SENTENCES.thread_not_found : "This thread was deleted.");
      list.remove(shown.id);
      go(agentId);
    },
    onError: report,
  });
  return shown;
}

// Actions on a thread

const pathOf = (thread) => `/api/v1/chat/${thread.agent_id}/threads/${thread.id}`;

const actions = {
  async rename(thread) {
    const title = await renameDialog(thread.title);
    if (title !== null) patch(await call("PATCH", pathOf(thread), { title }));
  },
  async archive(thread) {
    const changed = await call("PATCH", pathOf(thread), { archived: !thread.archived });
    patch(changed);
    if (changed) toast(changed.archived ? "Archived. It is under Archived now." : "It is active again.");
  },
  async delete(thread) {
    const text = "All of its messages go with it. There is no way back.";
    if (!(await confirmDialog(`Delete “${nameOf(thread)}”?`, text))) return;
    const shown = thread.id === open.id ? open : null;
    if (shown) shown.leaving = true;
    if ((await call("DELETE", pathOf(thread))) === undefined) return;
    list.remove(thread.id);
    if (shown && shown === open) go(agentId);
    else if (document.activeElement === document.body) $("new-thread").focus();
  },
};

const patch = (thread) => thread && list.patch(thread);

/** Send the input. While a run is in progress, ask the user whether to cancel it (`interrupt`). */
function submit({ interrupt = false } = {}) {
  const text = $("input").value;
  if (!sendable()) return;
  if (open.pending.length) return toast("The last message is still being sent.");
  confirming = Boolean(open.running) && !interrupt;
  if (confirming) return draw();
  write("");
  following.on = true;
  open.send(text.trim() ? text : "", open.drafts.take(), { interrupt });
  if (!isTouch()) $("input").focus();
}

function start(text) {
  following.on = true;
  open.send(text);
  if (!isTouch()) $("input").focus();
}

async function stop() {
  $("stop").disabled = true;
  await open.stop();
  $("stop").disabled = false;
  if (document.activeElement === document.body && !isTouch()) $("input").focus();
}

async function showEarlier() {
  const fromBottom = $("scroll").scrollHeight - $("scroll").scrollTop;
  await open.showEarlier().catch(report);
  draw();
  $("scroll").scrollTop = $("scroll").scrollHeight - fromBottom;
}

/** Set the text of the input. */
function write(text) {
  open.text = text;
  $("input").value = text;
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight, innerHeight * 0.4)}px`;
  draw();
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
  const { thread, state } = open;
  messages.show(open.messages, state);

  const title = thread ? nameOf(thread) : open.id ? "" : "New thread";
  Object.assign($("title"), { textContent: title || "…", title });
  document.title = thread ? `${title} – Agent chat` : "Agent chat";
  $("thread-menu").hidden = !thread;
  $("light").dataset.status = open.status;
  $("light").textContent = LIGHTS[open.status] ?? "";
  $("earlier").hidden = !(open.more && state.messages.length >= 50);

  if (agentId && $("agent").value !== agentId) $("agent").value = agentId;
  $("edit-agent").disabled = !agent();
  $("new-agent").disabled = !agents;

  const isNew = !open.id || open.creating; // created in this tab: it is empty, no need to load it
  const hasMessages = state.messages.length + open.pending.length > 0;
  $("loading").hidden = hasMessages || (open.id ? Boolean(thread || isNew) : Boolean(agents || loadError));
  $("welcome").hidden = hasMessages || (open.id ? !thread && !isNew : !agents && !loadError);
  drawWelcome(agents, agent(), loadError);

  const busy = Boolean(open.running);
  const [why, placeholder] = inputState();
  if (!busy && document.activeElement === $("stop")) $("input").focus();
  $("stop").hidden = !busy;
  $("send").hidden = busy && !sendable();
  $("send").disabled = !sendable() || open.pending.length > 0;
  confirming &&= busy && sendable();
  $("busy").hidden = !confirming;
  $("busy-text").textContent = confirming ? `${agent()?.name ?? "The agent"} is still answering.` : "";
  $("input").disabled = $("attach").disabled = why !== null;
  $("input").placeholder = placeholder;
  $("hint").textContent = why ?? hint();
  open.drafts.show($("drafts"));
  following.keepUp();
}

/** Why the input is disabled (null if it is not), and its placeholder. */
function inputState() {
  if (isGone()) return ["Its threads can still be read.", "This agent was deleted"];
  if (open.thread?.archived) return ["Unarchive it to write.", "This thread is archived"];
  return [agentId ? null : "", `Message ${agent()?.name ?? "the agent"}`];
}

function hint() {
  if (open.drafts.busy) return "It can be sent once its files are uploaded.";
  return "Enter sends · Shift+Enter for a new line · Esc stops";
}

function sendable() {
  const there = Boolean($("input").value.trim()) || open.drafts.attachments.length > 0;
  return there && !open.drafts.busy && inputState()[0] === null;
}

// User input

$("input").addEventListener("input", () => write($("input").value));
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch()) return;
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
collect({
  place: document.querySelector("main"),
  veil: $("veil"),
  input: $("files"),
  ready: () => !$("attach").disabled,
  onFiles(files) {
    open.drafts.add(files);
    if (!isTouch()) $("input").focus();
  },
});
$("attach").onclick = () => $("files").click();
$("stop").onclick = stop;
$("earlier").onclick = showEarlier;
$("new-thread").onclick = () => (open.id ? go(agentId) : follow());
$("agent").onchange = () => go($("agent").value);
$("edit-agent").onclick = () => editAgent(agent());
$("new-agent").onclick = () => editAgent(null);
opensMenu($("thread-menu"), () => open.thread);
onChoice((action, thread) => actions[action](thread));
$("show-sidebar").onclick = () => document.body.classList.add("sidebar-open");
$("hide-sidebar").onclick = $("shade").onclick = () => document.body.classList.remove("sidebar-open");
$("toast").querySelector("button").onclick = () => ($("toast").hidden = true);
makeStarters(start);
$("interrupt").onclick = () => submit({ interrupt: true });
$("sign-out").onclick = signOut;

window.addEventListener("hashchange", follow);
for (const type of ["focus", "online"]) window.addEventListener(type, () => refresh({ all: true }));
setInterval(() => document.hidden || refresh(), REFRESH_MS);

follow();
loadAgents();
