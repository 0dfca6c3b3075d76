// The notice that covers the page without a session.

const $ = (id) => document.getElementById(id);

export const isSignedOut = () => !$("signed-out").hidden;

/** Cover the page, with `reason` as the heading. `base` is the URL of the page, to which a key is added. */
export function coverPage(base, reason) {
  $("signed-out-title").textContent = reason;
  $("signed-out-url").textContent = `${base}/?key=…`;
  for (const each of document.querySelectorAll("dialog[open]")) each.close("");
  for (const each of [$("sidebar"), document.querySelector("main")]) each.inert = true;
  $("signed-out").hidden = false;
  $("signed-out-title").focus();
}
