// What an empty thread shows: the agent, its tools and, for the demo agent, messages to try.

import { h } from "./elements.js";

const $ = (id) => document.getElementById(id);
const STARTERS = [
  "What time is it in Tokyo?",
  "Roll 3d6 and compute 17*23",
  "Show me something slow",
  "Tell me about this server",
];

/** Create the demo agent's starting messages; `onStart(text)` sends one. */
export function makeStarters(onStart) {
  $("starters").append(...STARTERS.map((text) => h("button", { type: "button", onclick: () => onStart(text) }, text)));
}

/** Show it. `agents` is null until loaded, `agent` undefined if it is deleted; `loadError`: why loading failed. */
export function drawWelcome(agents, agent, loadError) {
  const [name, text] = sentences(agents, agent, loadError);
  $("welcome-name").textContent = name;
  $("welcome-text").textContent = text;
  $("starters").hidden = agent?.kind !== "demo";
}

function sentences(agents, agent, loadError) {
  if (!agents) return loadError ? [loadError, "Trying again…"] : ["", ""];
  if (!agents.length) return ["Make an agent to begin", ""];
  if (!agent) return ["This agent was deleted", ""];
  const { name, kind, model, mcp_servers: servers } = agent;
  const tools = servers.length ? "and real tools" : "and no tools";
  if (kind === "demo") return [name, `An offline agent with no model behind it ${tools}. Try one of these.`];
  return [name, [model, servers.length ? `tools: ${servers.join(", ")}` : ""].filter(Boolean).join(" · ")];
}
