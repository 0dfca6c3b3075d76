// Scrolls with a growing text, unless the user has scrolled up.

/** `scroll` scrolls and contains `column`, which grows; `button`, shown after scrolling up, returns to the end. */
export class Following {
  constructor({ scroll, column, button }) {
    Object.assign(this, { scroll, button, on: true, lastTop: 0 });
    scroll.addEventListener("scroll", () => this.scrolled());
    button.onclick = () => this.restart();
    for (const each of [column, scroll]) new ResizeObserver(() => this.keepUp()).observe(each);
  }

  restart() {
    this.on = true;
    this.keepUp();
  }

  keepUp() {
    if (this.on) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.button.hidden = this.on;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    if (scrollHeight - scrollTop - clientHeight < 40) this.on = true;
    else if (scrollTop < this.lastTop) this.on = false;
    this.lastTop = scrollTop;
    this.button.hidden = this.on;
  }
}
