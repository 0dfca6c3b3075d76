// The three dialogs: each opens a <dialog> of the page and promises the user's decision.

const $ = (id) => document.getElementById(id);

for (const button of document.querySelectorAll("[data-cancel]")) {
  button.onclick = () => button.closest("dialog").close("");
}

/** Show it until it closes. Returns its return value, "" if it was cancelled. */
function shown(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

/** The new title, or null. */
export async function renameDialog(title) {
  const input = $("rename-dialog").querySelector("input");
  input.value = title;
  const decided = shown($("rename-dialog"));
  input.select();
  return (await decided) === "save" ? input.value.trim() : null;
}

export async function confirmDialog(title, text) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  return (await shown($("confirm-dialog"))) === "yes";
}

/**
 * Create (`agent` null) or edit an agent. Returns the result of `save(fields)`, "delete", or null. It stays open and
 * shows the error while the server refuses the fields. `kinds` are suggestions; `servers` are those for a new agent.
 */
export async function agentDialog(agent, { kinds, servers }, save) {
  const dialog = $("agent-dialog");
  const form = dialog.querySelector("form");
  const problem = form.querySelector(".problem");
  const { name, kind, model, instructions, mcp_servers, is_default } = form.elements;
  $("agent-title").textContent = agent ? "Edit agent" : "New agent";
  $("delete-agent").hidden = !agent;
  $("kinds").replaceChildren(...[...kinds].map((each) => new Option(each, each)));
  name.value = agent?.name ?? "";
  kind.value = agent?.kind ?? "";
  model.value = agent?.model ?? "";
  instructions.value = agent?.instructions ?? "";
  mcp_servers.value = (agent?.mcp_servers ?? servers).join(", ");
  is_default.checked = is_default.disabled = agent?.is_default ?? false; // there is always one default
  problem.hidden = true;

  let saved = null;
  form.onsubmit = async (event) => {
    event.preventDefault();
    const names = mcp_servers.value.split(",").map((each) => each.trim());
    const fields = {
      name: name.value.trim(),
      model: model.value.trim() || null,
      instructions: instructions.value,
      mcp_servers: names.filter(Boolean),
    };
    if (kind.value.trim()) fields.kind = kind.value.trim();
    if (is_default.checked && !is_default.disabled) fields.is_default = true;
    try {
      saved = await save(fields);
      dialog.close("save");
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  };
  $("delete-agent").onclick = () => dialog.close("delete");
  const decided = await shown(dialog);
  return decided === "save" ? saved : decided || null;
}
