// Functions that create elements.

/** Make an element: `h("p.note", { title: "…" }, "text", child)`. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = Object.assign(document.createElement(tag), properties);
  if (classes.length) element.className = classes.join(" ");
  element.append(...children.filter((child) => child != null));
  return element;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Set the children without moving those in place, so that open cards, the selection and the focus are preserved. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  const focused = document.activeElement;
  for (const child of [...parent.childNodes]) if (!wanted.has(child)) child.remove();
  nodes.forEach((node, index) => {
    if (parent.childNodes[index] !== node) parent.insertBefore(node, parent.childNodes[index] ?? null);
  });
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}
