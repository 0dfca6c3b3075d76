// The Idempotency-Keys of the messages that this browser has sent. A failed run that may be retried frees its key: the
// same request with the same key then runs again on the same message, instead of adding a second one.

const NAME = "sent-keys";
const MOST = 100;
const VALID_MS = 23 * 3600_000; // the server deletes a key after 24 hours

/** The key of a message; undefined if it is too old or was sent by another browser. */
export function keyOf(messageId) {
  const found = read().find(({ id }) => id === messageId);
  return found && Date.now() - found.time < VALID_MS ? found.key : undefined;
}

export function rememberKey(messageId, key) {
  const others = read().filter(({ id }) => id !== messageId);
  try {
    localStorage.setItem(NAME, JSON.stringify([{ id: messageId, key, time: Date.now() }, ...others].slice(0, MOST)));
  } catch {
    // storage is full or forbidden: a retry posts the message a second time
  }
}

function read() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? [];
  } catch {
    return [];
  }
}
