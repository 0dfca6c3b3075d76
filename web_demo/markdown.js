// A small Markdown: lines in, nodes out, without innerHTML.
//
// It only has to look like the server's HTML until that takes its place (growing_text.js). So it knows what answers are
// made of, shows anything else as text, and keeps the letters in their order.

import { h } from "/elements.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3}(?:([-*+])|(\d{1,9})([.)])))(?:( {1,4})(?=\S)| |$)/;
const DEEPEST = 8; // quotes in lists in quotes
const LONGEST = 5_000; // a longer paragraph is shown as it is: no delta may cost a visible moment

const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<ticks>`+)(?<code>[^`](?:[^]*?[^`])?)\k<ticks>(?!`)/,
    /\*\*(?=\S)(?<strong>(?:[^*\\]|\\[^]|\*[^*]+\*)+?)(?<=\S)\*\*/,
    /\*(?=[^\s*])(?<em>(?:[^*\\]|\\[^]|\*\*(?=\S)[^*]+\*\*)+?)(?<=\S)\*/,
    /(?<![\p{L}\p{N}_])__(?=\S)(?<strong_>[^_]+)(?<=\S)__(?![\p{L}\p{N}_])/,
    /(?<![\p{L}\p{N}_])_(?=\S)(?<em_>[^_]+)(?<=\S)_(?![\p{L}\p{N}_])/,
    /~~(?=\S)(?<s>[^~]+)(?<=\S)~~/,
    /!?\[(?<a>[^[\]\n]{1,300})\]\([^()\n]{0,2000}\)/,
    /<(?<url>https?:\/\/[^<>\s]{1,2000})>/,
    /(?: {2,}|\\)(?<br>\n)/,
  ].map((each) => each.source).join("|"),
  "gu",
);

/** The blocks of some lines: each a node, and the line it begins with. `growing`: the last line is the text's last. */
export function* blocks(lines, growing = true, depth = 0) {
  let at = 0;
  const take = (fits) => {
    const begin = at;
    while (at < lines.length && fits(lines[at])) at++;
    return lines.slice(begin, at);
  };
  const atEnd = () => growing && at >= lines.length;
  const nodes = (inner) => [...blocks(inner, atEnd(), depth + 1)].map(({ node }) => node);
  while (at < lines.length) {
    const begin = at;
    const line = lines[at];
    const first = (each) => at === begin || !starts(each, lines[at + 1]);
    if (!line.trim()) {
      at++;
    } else if (FENCE.test(line)) {
      at++;
      const [, fence] = line.match(FENCE);
      const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
      yield { begin, node: h("pre", {}, h("code", {}, take((each) => !closing.test(each)).join("\n"))) };
      at++;
    } else if (HEADING.test(line)) {
      at++;
      const [, { length }, title = ""] = line.match(HEADING);
      yield { begin, node: h(`h${length}`, {}, ...inline(title.trim().replace(/(^|\s)#+$/, ""), atEnd())) };
    } else if (RULE.test(line)) {
      at++;
      yield { begin, node: h("hr") };
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const quoted = take((each) => QUOTE.test(each) || first(each)).map((each) => each.replace(QUOTE, ""));
      yield { begin, node: h("blockquote", {}, ...nodes(quoted)) };
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const items = [];
      while (at < lines.length && inSameList(lines[at], line)) {
        const { inner, gap } = item(take);
        items.push({ children: nodes(inner), gap });
      }
      const loose = items.some(({ gap }, index) => gap && (index < items.length - 1 || gap === "within"));
      const bare = (node) => (node.nodeName === "P" && !loose ? [...node.childNodes] : [node]);
      const [, , , number] = line.match(ITEM);
      const list = number ? h("ol", { start: Number(number) }) : h("ul");
      list.append(...items.map(({ children }) => h("li", {}, ...children.flatMap(bare))));
      yield { begin, node: list };
    } else if (isTable(line, lines[at + 1])) {
      const [head, , ...rows] = take((each) => at < begin + 2 || !starts(each)).map(cells);
      const row = (tag, texts) => h("tr", {}, ...head.map((_, index) => h(tag, {}, ...inline(texts[index] ?? ""))));
      const body = h("tbody", {}, ...rows.map((texts) => row("td", texts)));
      yield { begin, node: h("div.table", {}, h("table", {}, h("thead", {}, row("th", head)), body)) };
    } else {
      const text = take(first).map((each) => each.trimStart()).join("\n");
      yield { begin, node: h("p", {}, ...inline(text, atEnd())) };
    }
  }
}

/** Take an item of a list: its lines without their indent, and whether there are empty ones `within` it or `after`. */
function item(take) {
  let [width, blank] = [0, false];
  const taken = take((line) => {
    if (!width) {
      const [, marker, , , , space = " "] = line.match(ITEM);
      width = marker.length + space.length;
      return true;
    }
    const fits = !line.trim() || line.startsWith(" ".repeat(width)) || (!blank && !starts(line) && !ITEM.test(line));
    blank = !line.trim();
    return fits;
  });
  const end = taken.findLastIndex((line) => line.trim()) + 1;
  const indent = (line, index) => (index ? Math.min(width, line.search(/\S|$/)) : width);
  const inner = taken.slice(0, end).map((line, index) => line.slice(indent(line, index)));
  const gap = inner.slice(1).some((line) => !line.trim()) ? "within" : end < taken.length && "after";
  return { inner, gap };
}

const kindOf = (line) => line.match(ITEM)?.[2] ?? line.match(ITEM)?.[4];
const inSameList = (line, first) => ITEM.test(line) && kindOf(line) === kindOf(first) && !RULE.test(line);
const isTable = (line, next) => line.includes("|") && /^[\s|:-]*-[\s|:-]*$/.test(next ?? "") && next.includes("|");
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((each) => each.trim());

/** Whether a line can't go on with the paragraph before it. */
function starts(line, next) {
  if (!line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const [, , bullet, number, , space] = line.match(ITEM) ?? [];
  return Boolean(space && (bullet || number === "1")) || isTable(line, next);
}

/** What stands in a line: texts and nodes. Of a growing one, what has begun is ended, so that no marks flash up. */
function inline(text, growing = false) {
  if (text.length > LONGEST) return [text];
  const whole = growing ? ended(text) : text;
  const parts = [];
  let [plain, end] = ["", 0];
  for (const { 0: match, index, groups: found } of whole.matchAll(INLINE)) {
    plain += whole.slice(end, index) + (found.escaped ?? "");
    end = index + match.length;
    if (found.escaped) continue;
    parts.push(plain, element(found));
    plain = "";
  }
  return [...parts, plain + whole.slice(end)].filter((part) => part !== "");
}

function element({ ticks, ...found }) {
  const [tag, inner] = Object.entries(found).find(([, each]) => each !== undefined);
  if (tag === "br") return h("br");
  if (tag === "url") return h("a", {}, inner);
  if (tag === "code") return h("code", {}, inner.replaceAll("\n", " ").replace(/^ (.*\S.*) $/, "$1"));
  return h(tag.replace("_", ""), {}, ...inline(inner));
}

function ended(text) {
  const bare = text.replace(/[*_`]{1,3}$/, "");
  const odd = (mark) => bare.split(mark).length % 2 === 0;
  if (odd("`")) return `${bare}\``;
  return odd("**") && /\*\*(?=\S)[^*]*$/.test(bare) ? `${bare.trimEnd()}**` : bare;
}
