// The name of a thread: its title or, without one, its first words.

const WORDS = 80; // characters
const known = new Map(); // by thread id: its first words, "" if it had no messages when it was updated `at`

export function nameOf(thread) {
  return thread.title || known.get(thread.id)?.words || "New thread";
}

/** Whether messages of this thread are needed to name it. */
export function isNameless(thread) {
  const found = known.get(thread.id);
  return !thread.title && !found?.words && found?.at !== thread.updated_at;
}

/** Store the first words of a thread, given its messages from the first one on. */
export function learnName({ id, updated_at }, messages) {
  if (known.get(id)?.words) return;
  const first = messages.find(({ role }) => role === "user") ?? messages[0];
  const text = first?.content.trim() || first?.attachments?.[0]?.filename || "";
  known.set(id, { words: Array.from(text.split("\n", 1)[0]).slice(0, WORDS).join(""), at: updated_at });
}
