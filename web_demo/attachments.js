// Attachments: uploading a file to a thread, and showing a file with a picture, a description and a link.

import { ChatError } from "./client.js";
import { h, icon } from "./elements.js";

/**
 * Upload a file to a thread (its path). Returns the attachment. Uses XMLHttpRequest, because fetch does not report the
 * progress of uploads. Throws a ChatError, a TypeError for a network failure, or an AbortError after `signal`.
 */
export function upload(chat, thread, file, { onProgress = () => {}, signal } = {}) {
  const request = new XMLHttpRequest();
  const form = new FormData();
  form.append("files", file);
  return new Promise((resolve, reject) => {
    request.open("POST", `${chat.base}${thread}/attachments`);
    for (const [name, value] of Object.entries(chat.auth)) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => onProgress(loaded / total);
    request.onload = () => {
      const answer = parsed(request.responseText);
      if (request.status === 201) resolve(answer[0]);
      else reject(new ChatError(request.status, answer));
    };
    request.onerror = () => reject(new TypeError("The connection broke."));
    request.onabort = () => reject(new DOMException("Given up.", "AbortError"));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    return {}; // a proxy's page, not the server's problem
  }
}

/** The attachments of a message as download links; null if there are none. `urlOf(attachment)` returns the URL. */
export function fileList(attachments, urlOf) {
  if (!attachments?.length) return null;
  const links = attachments.map((each) => {
    const link = fileLine("a", each.filename, describe(each), picture(each, urlOf(each)), icon("download"));
    Object.assign(link, { href: urlOf(each), download: each.filename, title: `Download ${each.filename}` });
    link.dataset.status = each.status;
    return link;
  });
  return h("div.files", {}, ...links);
}

/** An element with a picture or an icon, a name and a description. */
export function fileLine(tag, name, note, image, ...more) {
  const about = h("span.about", {}, h("span.name", {}, name), h("span.note", {}, note));
  return h(`${tag}.file`, {}, h("span.picture", {}, image), about, ...more);
}

/** A thumbnail for images, else an icon. The thumbnail's URL is the download's. */
export function picture({ content_type, status }, url) {
  if (!/^image\//.test(content_type) || status !== "ready") return icon(status === "ready" ? "file" : "warning");
  const image = h("img", { src: url, alt: "", decoding: "async" });
  image.onerror = () => image.replaceWith(icon("file"));
  return image;
}

/** What the server extracted, in one line. */
export function describe({ content_type, status, text_chars, truncated, error, size }) {
  if (status !== "ready") return `Not read. ${error ?? ""}`;
  if (/^image\//.test(content_type)) return `${kindOf(content_type)} picture · ${inBytes(size)}`;
  const count = text_chars.toLocaleString("en");
  const characters = text_chars === 1 ? "character" : "characters";
  return `${kindOf(content_type)} · ${truncated ? "cut after " : ""}${count} ${characters}`;
}

const KINDS = [
  [/wordprocessing/, "Word"],
  [/spreadsheet/, "Excel"],
  [/presentation/, "PowerPoint"],
  [/opendocument/, "OpenDocument"],
  [/rfc822/, "Mail"],
  [/plain/, "Text"],
  [/markdown/, "Markdown"],
  [/javascript/, "JavaScript"],
  [/python/, "Python"],
  [/tab-separated/, "TSV"],
];

function kindOf(contentType) {
  const known = KINDS.find(([pattern]) => pattern.test(contentType));
  return known?.[1] ?? contentType.split("/")[1].replace(/^x-|[+;].*$/g, "").toUpperCase();
}

export function inBytes(size) {
  if (size < 1000) return `${size} ${size === 1 ? "byte" : "bytes"}`;
  const [number, unit] = size < 1024 * 1000 ? [size / 1024, "KB"] : [size / 1024 ** 2, "MB"];
  return `${number < 10 ? Number(number.toFixed(1)) : Math.round(number)} ${unit}`;
}
