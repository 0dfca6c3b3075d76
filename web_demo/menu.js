// The "…" menu of a thread, next to the button that opened it, with the keyboard behavior of menus.

const menu = document.getElementById("menu-popover");
const items = [...menu.querySelectorAll("[role=menuitem]")];
let [opener, thread] = [null, null];

/** Let a button open and close the menu for its current thread. */
export function opensMenu(button, threadOf) {
  button.ariaHasPopup = "menu";
  button.popoverTargetElement = menu; // else pressing it counts as outside of the menu and closes it before the click
  button.onclick = (event) => {
    event.preventDefault();
    const again = menu.matches(":popover-open") && opener === button;
    menu.hidePopover();
    if (again) return;
    [opener, thread] = [button, threadOf()];
    menu.querySelector("[data-do=archive]").textContent = thread.archived ? "Unarchive" : "Archive";
    menu.showPopover();
    const box = button.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(box.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8))}px`;
    menu.style.top = `${Math.min(box.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
    items[0].focus();
  };
}

/** `choose(action, thread)` is called with the chosen action, after the focus has returned to the button. */
export function onChoice(choose) {
  menu.onclick = ({ target }) => {
    if (!target.dataset.do) return;
    menu.hidePopover();
    opener.focus();
    choose(target.dataset.do, thread);
  };
}

menu.addEventListener("keydown", (event) => {
  const at = items.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
  if (event.key === "Tab") menu.hidePopover();
  if (to === undefined) return;
  event.preventDefault();
  items.at(to % items.length).focus();
});

menu.addEventListener("toggle", ({ newState }) => {
  const nowhere = document.activeElement === document.body || menu.contains(document.activeElement);
  if (newState === "closed" && nowhere) opener.focus();
});
