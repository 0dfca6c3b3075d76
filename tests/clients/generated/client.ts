// Uploads a file, posts a message with it and reads the thread, with nothing but the generated types.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { argv: string[] };

const [, , baseUrl, key] = process.argv;
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${key}` } });

function dataOf<T>(result: { data?: T; error?: unknown }): T {
  if (result.data === undefined) throw new Error(JSON.stringify(result.error));
  return result.data;
}

const [agent] = dataOf(await client.GET("/api/v1/agents"));
const thread = dataOf(
  await client.POST("/api/v1/chat/{agent_id}/threads", {
    params: { path: { agent_id: agent.id } },
    body: { title: "Generated", metadata: { any: { depth: 1 } } },
  }),
);
const path = { agent_id: agent.id, thread_id: thread.id };
const [attachment] = dataOf(
  await client.POST("/api/v1/chat/{agent_id}/threads/{thread_id}/attachments", {
    params: { path },
    body: { files: [new Blob(["some text"], { type: "text/plain" })] },
    bodySerializer: (body) => {
      const form = new FormData();
      for (const file of body.files) form.append("files", file, "note.txt");
      return form;
    },
  }),
);
const posted = dataOf(
  await client.POST("/api/v1/chat/{agent_id}/threads/{thread_id}/messages", {
    params: { path, query: { if_busy: "interrupt" }, header: { "Idempotency-Key": "once" } },
    body: { content: "Hello", attachments: [{ id: attachment.id }] },
  }),
);
if (typeof posted === "string") throw new Error("an event stream, which was not requested");
const run: components["schemas"]["Run"] | undefined = posted.metadata.run;
const read = dataOf(
  await client.GET("/api/v1/chat/{agent_id}/threads/{thread_id}", { params: { path, query: { message_limit: 10 } } }),
);
const file = dataOf(
  await client.GET("/api/v1/chat/{agent_id}/threads/{thread_id}/attachments/{attachment_id}", {
    params: { path: { ...path, attachment_id: attachment.id } },
    parseAs: "text",
  }),
);
const missing = await client.GET("/api/v1/agents/{agent_id}", { params: { path: { agent_id: thread.id } } });

export function positionOf(event: components["schemas"]["Event"]): string {
  return event.type === "message.delta" ? `${event.message_id}@${event.offset}` : event.type;
}

console.log(
  JSON.stringify({
    status: run?.status,
    last: read.messages.at(-1)?.id === posted.id,
    attached: read.messages[0].attachments[0].filename,
    file,
    missing: missing.error?.code,
  }),
);
