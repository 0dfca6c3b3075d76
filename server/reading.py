"""The reader of uploaded files: what a worker of `extraction.py` runs, alone in a bare interpreter.

The content decides what a file is, then its name, then what the client declared. What is text is decoded and left as
it is, since kreuzberg would reflow it: source code keeps its indentation, a csv its commas. kreuzberg reads pdf, the
office formats and epub. Two formats are prepared for it. HTML is decoded here and loses its head, which kreuzberg
shows as a heading in the text and whose charset it overlooks. Mail is taken apart by the standard library, because
kreuzberg joins the paragraphs of an HTML mail and drops the names of what is attached.

Imports nothing of ours, and what is large only once a file needs it.
"""

from __future__ import annotations

import codecs
import email
import email.policy
import io
import json
import os
import re
import signal
import struct
import sys
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any, BinaryIO

import chardet

Found = dict[str, Any]
"""The fields of an Extracted."""

HEAD_BYTES = 64 * 2**10
DETECT_BYTES = 256 * 2**10
MAIL_BYTES = 25 * 2**20
PAGES = 1_000
"""Of a PDF. The other formats have no pages until somebody lays them out."""
PIXELS = 100_000_000
"""Larger pictures are not decoded."""
LONG_EDGE = 1568
"""In pixels; what is larger is shrunk to that by the Messages API itself, and over 8,000 refused.

https://platform.claude.com/docs/en/build-with-claude/vision
"""
PICTURE_BYTES = 2**20
"""So that the twenty pictures of a request fit into its 32 MB, as base64."""

PDF = "application/pdf"
HTML = "text/html"
EML = "message/rfc822"
BINARY = "application/octet-stream"
ZIP = "application/zip"
OLE = "application/x-ole-storage"
OFFICE = "application/vnd.openxmlformats-officedocument."
DOCX = f"{OFFICE}wordprocessingml.document"
XLSX = f"{OFFICE}spreadsheetml.sheet"
PPTX = f"{OFFICE}presentationml.presentation"
ODT = "application/vnd.oasis.opendocument.text"
EPUB = "application/epub+zip"

DOCUMENTS = {".pdf": PDF, ".docx": DOCX, ".xlsx": XLSX, ".pptx": PPTX, ".odt": ODT, ".epub": EPUB}
IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
TEXTS = {
    ".txt": "text/plain",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".json": "application/json",
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
    ".eml": EML,
    ".xml": "application/xml",
    ".svg": "application/xml",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".py": "text/x-python",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".toml": "application/toml",
    ".sql": "application/sql",
}
"""By name; every other text is text/plain."""

_ZIPPED = {"word/document.xml": DOCX, "xl/workbook.xml": XLSX, "ppt/presentation.xml": PPTX}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = re.compile(r"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f\ufffe\uffff]")
_HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_HEAD = re.compile(r"<head\b.*?(</head\s*>|(?=<body\b))", re.IGNORECASE | re.DOTALL)
_CHARSET = re.compile(rb"<meta[^>]{1,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_MAIL = re.compile(r"(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*){2,}\r?\n")
_MAIL_HEADERS = re.compile(r"^(from|date|received|message-id|mime-version|return-path):", re.IGNORECASE | re.MULTILINE)
_SIZE = struct.Struct("!Q")
_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")


class Unreadable(Exception):
    """Why a file of a kind that is read can't be."""


def read(path: Path, filename: str, declared: str | None, chars: int, tell: Callable[[str], None]) -> Found:
    """All fields of the Extracted. The type is told as soon as it is known, lest the rest end this process.

    Raises: OSError if there is no such file.
    """
    suffix = Path(filename.replace("\\", "/")).suffix.lower()
    declared = (declared or "").partition(";")[0].strip().lower()
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return empty(DOCUMENTS.get(suffix) or IMAGES.get(suffix) or TEXTS.get(suffix) or "text/plain")
        content_type = binary_type(head, path)
        text, cut = decoded(head, file, chars) if content_type is None else (None, False)
    if content_type is None and text is None and TEXTS.get(suffix) in (HTML, EML):
        text = attempt(head, "latin-1", False)  # a mail may have a charset for each part: they are read later
    if text is not None:
        content_type = text_type(text, suffix, declared)
        if content_type not in (HTML, EML):
            return ready(content_type, text, chars, cut)
    if content_type == ZIP and suffix in DOCUMENTS and not zipfile.is_zipfile(path):
        return failed(DOCUMENTS[suffix], "The file is damaged.")
    if content_type is None:
        told = chardet.detect(head)
        content_type = (not told.get("encoding") and told.get("mime_type")) or BINARY
    tell(content_type)
    try:
        return document(path, content_type, chars) or unsupported(path, content_type, suffix)
    except Unreadable as error:
        return failed(content_type, str(error))


def document(path: Path, content_type: str, chars: int) -> Found | None:
    """Read what needs more than decoding; null for a kind that isn't read. Raises: Unreadable."""
    if content_type in IMAGES.values():
        return {"content_type": content_type, "status": "ready", "small": shrunk(path)}
    cut = False
    if content_type == HTML:
        text = html_text(html_source(path))
    elif content_type == EML:
        text = mail_text(path)
    elif content_type == PDF:
        text, cut = pdf_text(path)
    elif content_type in DOCUMENTS.values():
        text = document_text(path, content_type)
    else:
        return None
    if not text.strip():  # a scan, most often; or more deeply nested than kreuzberg follows
        raise Unreadable("No text was found in the file.")
    return ready(content_type, text, chars, cut)


def ready(content_type: str, text: str, chars: int, cut: bool = False) -> Found:
    truncated = cut or len(text) > chars
    return {"content_type": content_type, "status": "ready", "text": text[:chars], "truncated": truncated}


def failed(content_type: str, reason: str) -> Found:
    return {"content_type": content_type, "status": "failed", "error": reason}


def unsupported(path: Path, content_type: str, suffix: str) -> Found:
    named = f" ({content_type})" if content_type != BINARY else ""
    if content_type == OLE:
        if _ENCRYPTED in path.read_bytes():
            return failed(DOCUMENTS.get(suffix, OLE), "The file is protected with a password.")
        reason = "Files of the old Office formats can't be read. Save it as docx, xlsx or pptx."
    elif suffix in DOCUMENTS or suffix in IMAGES or suffix in TEXTS:
        reason = f"The file is not what its name says, but of a kind{named} that can't be read."
    else:
        reason = f"Files of this kind{named} can't be read."
    return {"content_type": content_type, "status": "unsupported", "error": reason}


def empty(content_type: str) -> Found:
    """No bytes are a text, but no document and no image."""
    if content_type in DOCUMENTS.values() or content_type in IMAGES.values():
        return failed(content_type, "The file is empty.")
    return ready(content_type, "", 0)


def binary_type(head: bytes, path: Path) -> str | None:
    """The type of what has a signature; null for text and for what is unknown."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return zip_type(path)
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return OLE
    if head.startswith(b"{\\rtf"):
        return "application/rtf"
    return PDF if head.lstrip(b"\xef\xbb\xbf\t\n\r ").startswith(b"%PDF-") else None


def zip_type(path: Path) -> str:
    """What a zip file holds, by the names in its directory, or by what an OpenDocument or epub says of itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            for name, content_type in _ZIPPED.items():
                if name in names and "[Content_Types].xml" in names:
                    return content_type
            if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
                told = archive.read("mimetype").decode("ascii").strip()
                if re.fullmatch(r"application/[\w.+-]+", told):
                    return told
    except Exception:  # whatever zipfile makes of a hostile directory
        pass
    return ZIP


def decoded(head: bytes, file: BinaryIO, chars: int) -> tuple[str | None, bool]:
    """The first characters of a text file, at least `chars` of them, and whether there is more. Null: no text.

    No more of the file is read than that takes, so that a csv of any size costs the same.
    """
    data = head + file.read(max(0, 4 * chars + 4 - len(head)))
    cut = bool(file.read(1))
    for bom, name in _BOMS:
        if data.startswith(bom):
            return attempt(data[len(bom) :], name, cut), cut
    text = None
    if b"\0" not in data and b"\x1b$" not in data:  # else utf-16 and its like, or ISO-2022-JP, which is ASCII too
        text = attempt(data, "utf-8", cut)
    if text is None and (detected := chardet.detect(evidence(data)).get("encoding")):
        text = attempt(data, detected, cut)
    if text is None and cut:  # its only odd bytes may be the few that were read of its last line
        text = attempt(data.rpartition(b"\n")[0], "utf-8", cut)
    return text, cut


def evidence(data: bytes) -> bytes:
    """What a detector needs of a long text: the lines that aren't ASCII. A first half in English tells nothing."""
    if len(data) <= DETECT_BYTES or b"\0" in data:
        return data[:DETECT_BYTES]
    telling = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    return telling[:DETECT_BYTES] or data[:DETECT_BYTES]


def attempt(data: bytes, encoding: str, cut: bool) -> str | None:
    """The text, if the bytes are one in this encoding; a last character that was cut off is left out."""
    try:
        text = codecs.getincrementaldecoder(encoding)("strict").decode(data, final=not cut)
    except (UnicodeError, LookupError):
        return None
    if "\0" in text or len(_CONTROLS.findall(text)) > len(text) // 500:
        return None
    return text


def text_type(text: str, suffix: str, declared: str) -> str:
    """Which text it is. Content can't tell a csv from a program, so a name that knows has its say first."""
    named = TEXTS.get(suffix, "text/plain")
    if named == EML and not looks_like_mail(text):
        return "text/plain"
    if named != "text/plain":
        return named
    if suffix in ("", ".txt") or suffix in DOCUMENTS or suffix in IMAGES:  # any other is some language: as it is
        if _HTML.match(text[:4096]):
            return HTML
        if suffix != ".txt" and looks_like_mail(text):
            return EML
    if suffix not in TEXTS and declared in TEXTS.values() and declared not in (HTML, EML):
        return declared
    return "text/plain"


def looks_like_mail(text: str) -> bool:
    found = _MAIL.match(text[:HEAD_BYTES].replace("\r\n", "\n"))
    return found is not None and len(set(map(str.lower, _MAIL_HEADERS.findall(found[0])))) >= 2


def shrunk(path: Path) -> bool:
    """Decode a picture whole: one that a model refuses would spoil every later turn of its thread.

    True if it is larger than models take or look at; a smaller copy then lies beside it, upright, as PNG or JPEG.
    """
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path, formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
            if image.width * image.height > PIXELS:
                raise Unreadable(f"The image is too large: {image.width} by {image.height} pixels.")
            large = max(image.size) > LONG_EDGE or path.stat().st_size > PICTURE_BYTES
            image.load()
            if large:
                path.with_name(path.name + ".small").write_bytes(smaller(image))
            return large
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise Unreadable("The image is damaged.") from error


def smaller(image: Any) -> bytes:
    """The picture in at most 1568 pixels a side and 1 MB: with what is see-through, if there is such."""
    from PIL import Image, ImageOps

    kept = image.convert("RGBA" if image.has_transparency_data else "RGB")
    kept.thumbnail((LONG_EDGE, LONG_EDGE))
    kept.info["exif"] = image.info.get("exif", b"")
    kept = ImageOps.exif_transpose(kept)
    if kept.mode == "RGBA":
        if len(data := encoded(kept, "PNG")) <= PICTURE_BYTES:
            return data
        white = Image.new("RGBA", kept.size, "white")
        kept = Image.alpha_composite(white, kept).convert("RGB")
    for quality in (85, 70, 50):
        if len(data := encoded(kept, "JPEG", quality=quality)) <= PICTURE_BYTES:
            break
    return data


def encoded(image: Any, kind: str, **options: int) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def html_source(path: Path) -> str:
    """HTML decoded as a browser would: by its BOM, as UTF-8, by its own word, or by a guess."""
    data = path.read_bytes()
    for bom, name in _BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(name, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    told = _CHARSET.search(data[:4096])
    for charset in (told[1].decode() if told else None, chardet.detect(evidence(data)).get("encoding")):
        if charset:
            try:
                # Everybody who says latin-1 means Windows' extension of it: https://encoding.spec.whatwg.org
                latin = charset.lower() in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii")
                return data.decode("cp1252" if latin else charset, "replace")
            except (LookupError, UnicodeError):
                pass
    return data.decode(errors="replace")


def html_text(source: str) -> str:
    return kreuzberg_text(_HEAD.sub("", source, count=1).encode(errors="replace"), HTML)


def mail_text(path: Path) -> str:
    """A mail's headers, its text (the HTML only where there is none beside it), and the names of what is attached."""
    with path.open("rb") as file:
        mail = email.message_from_bytes(file.read(MAIL_BYTES), policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    try:
        headers = ("From", "To", "Cc", "Date", "Subject")
        lines = [f"{name}: {value}" for name in headers if (value := mail.get(name))]
        body = mail.get_body(("plain", "html"))
        text: str = part_text(body) if body else ""
        if body and body.get_content_type() == HTML:
            text = html_text(text)
        attached = [name for part in mail.iter_attachments() if (name := part.get_filename())]
    except (LookupError, ValueError, AttributeError, TypeError, IndexError, KeyError) as error:  # its parser's holes
        raise Unreadable("The mail is damaged.") from error
    if attached:
        lines.append(f"Attached: {', '.join(attached)}")
    return ("\n".join(lines) + "\n\n" + text.replace("\r\n", "\n").strip() + "\n").encode(errors="replace").decode()


def part_text(part: Any) -> str:
    data = part.get_payload(decode=True) or b""
    for name in (part.get_content_charset(), "utf-8", chardet.detect(evidence(data)).get("encoding")):
        if name:
            try:
                return str(data.decode(name))
            except (LookupError, UnicodeError):
                pass
    return str(data.decode(errors="replace"))


def pdf_text(path: Path) -> tuple[str, bool]:
    """The text of the first 1,000 pages, and whether there are more."""
    import pypdfium2  # type: ignore[import-untyped]

    data = io.BytesIO()
    try:
        with pypdfium2.PdfDocument(path) as whole, pypdfium2.PdfDocument.new() as part:
            if len(whole) > PAGES:
                part.import_pages(whole, list(range(PAGES)))
                part.save(data)
    except (pypdfium2.PdfiumError, OSError):
        pass  # kreuzberg will say what is wrong with it
    if first := data.getvalue():
        return kreuzberg_text(first, PDF), True
    return kreuzberg_text(path, PDF), False


def document_text(path: Path, content_type: str) -> str:
    if content_type == ODT:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("META-INF/manifest.xml") as manifest:
                if b"encryption-data" in manifest.read(2**20):
                    raise Unreadable("The file is protected with a password.")
        except (KeyError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
            pass  # kreuzberg will say
    return kreuzberg_text(path, content_type)


def kreuzberg_text(source: Path | bytes, content_type: str) -> str:
    """Markdown of a document. Raises: Unreadable.

    No time limit of its own: it would leave a thread at work in a process whose clocks have stopped.
    """
    import kreuzberg

    config = kreuzberg.ExtractionConfig(
        use_cache=False,
        output_format="markdown",
        enable_quality_processing=False,
        ocr=None,
        concurrency=kreuzberg.ConcurrencyConfig(max_threads=1),
    )
    try:
        if isinstance(source, bytes):
            return kreuzberg.extract_bytes_sync(source, content_type, config=config).content
        return kreuzberg.extract_file_sync(source, mime_type=content_type, config=config).content
    except MemoryError as error:
        raise Unreadable("Reading the file took too much memory.") from error
    except Exception as error:
        raise Unreadable(reason(str(error))) from error


def reason(told: str) -> str:
    """What a client is told of kreuzberg's error, whose own words speak of its insides."""
    low = told.lower()
    if "password" in low or "encrypted" in low:
        return "The file is protected with a password."
    if "security limit" in low or "exceeds limit" in low:
        return "The file unpacks to more than can be read."
    return "The file is damaged."


def limit(memory_bytes: int) -> None:
    """Take what limits this process has: its memory, its rank, no core dumps, and its server's life for its own."""
    if sys.platform != "win32":
        import resource

        os.nice(10)
        try:  # where the kernel groups processes by session, it is the group whose rank counts
            Path("/proc/self/autogroup").write_text("10")
        except OSError:
            pass
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        except (ValueError, OSError):  # macOS has none
            pass
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the server dies, at once


def clock(cpu_seconds: float, wall_seconds: float) -> None:
    """Have the kernel end this process after so much time; 0 stops the clocks."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def resident_bytes() -> int:
    """The most that this process ever held. Linux counts what its parent held at the fork into ru_maxrss."""
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 if peak else 0
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def work(limits: dict[str, Any]) -> None:
    """Answer frames on stdin with frames on stdout until stdin ends, or until it is time for a fresh process.

    Two frames for each file: its type, as far as it is known, and all that was found.
    """
    files = 0
    last = False
    while not last and (header := sys.stdin.buffer.read(_SIZE.size)):
        size = _SIZE.unpack(header)[0]
        if len(request := sys.stdin.buffer.read(size)) < size:
            return
        files += 1
        clock(limits["cpu_seconds"], limits["wall_seconds"])
        found, sound = answer(json.loads(request), limits)
        clock(0, 0)
        last = not sound or files >= limits["files"] or resident_bytes() > limits["resident_bytes"]
        send({"extracted": found, "last": last})


def answer(request: list[str], limits: dict[str, Any]) -> tuple[Found, bool]:
    """What was found, and whether this process is still fit for another file."""
    types: list[str] = []

    def tell(content_type: str) -> None:
        types.append(content_type)
        send(content_type)

    path, filename, declared = request
    try:
        found = read(Path(path), filename, declared, limits["text_chars"], tell)
        sound = True
    except MemoryError:
        found, sound = failed(types[0] if types else BINARY, "Reading the file took too much memory."), False
    except BaseException as error:  # a panic in Rust is no Exception
        print(f"reading {path} failed: {error!r}", file=sys.stderr)  # noqa: T201
        found, sound = failed(types[0] if types else BINARY, "The file could not be read."), False
    if not types:
        tell(found["content_type"])
    return found, sound


def send(frame: object) -> None:
    data = json.dumps(frame).encode()
    sys.stdout.buffer.write(_SIZE.pack(len(data)) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    limit(given["memory_bytes"])
    try:
        work(given)
    except (BrokenPipeError, struct.error):  # the server went away in the middle of a frame
        os._exit(1)  # at once: an ordinary exit would flush into the broken pipe, and complain
