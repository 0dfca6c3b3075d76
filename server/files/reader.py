"""The reader of uploaded files: what a worker of `extraction.py` runs, alone in a bare interpreter.

The content decides what a file is, then its name, then what the client declared. What is text is decoded and left as
it is, since kreuzberg would reflow it: source code keeps its indentation, a csv its commas. kreuzberg reads pdf, the
office formats and epub. Two formats are prepared for it. HTML is decoded here and loses its head, which kreuzberg
shows as a heading in the text and whose charset it overlooks. Mail is taken apart by the standard library, because
kreuzberg joins the paragraphs of an HTML mail and drops the names of what is attached.

What is large is only imported once a file needs it.
"""

from __future__ import annotations

import email
import email.policy
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from agent_chat.server.files import worker_process
from agent_chat.server.files.file_types import (
    BINARY,
    DOCUMENTS,
    EML,
    HTML,
    IMAGES,
    ODT,
    OLE,
    PDF,
    TEXTS,
    ZIP,
    signature_type,
    zip_type,
)
from agent_chat.server.files.text_files import (
    BOMS,
    HEAD_BYTES,
    Found,
    decoded,
    empty,
    failed,
    guessed_encoding,
    latin_text,
    plain_type,
    suffix_of,
    text_found,
    text_type,
)
from agent_chat.server.files.worker_process import Job

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


_CHARSET = re.compile(rb"<meta[^>]{1,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_HEAD = re.compile(r"<head\b", re.IGNORECASE)
_HEAD_END = re.compile(r"</head\s*>|(?=<body\b)", re.IGNORECASE)
_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")


class Unreadable(Exception):
    """Why a file of a kind that is read can't be."""


def read(path: Path, filename: str, declared: str | None, chars: int, report: Callable[[str], None]) -> Found:
    """All fields of the Extracted. The type is reported before parsing, so that it survives a parser that crashes.

    Raises: OSError if there is no such file.
    """
    suffix = suffix_of(filename)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return empty(suffix)
        content_type = signature_type(head)
        text, cut = decoded(head, file, chars) if content_type is None else (None, False)
    if content_type is None and text is None and TEXTS.get(suffix) in (HTML, EML):
        text = latin_text(head)  # a mail may have a charset for each part: they are decoded later
    if text is not None:
        content_type = text_type(text, suffix, plain_type(declared))
        if content_type not in (HTML, EML):
            return text_found(content_type, text, chars, cut)
    if content_type == ZIP:
        content_type = zip_type(path)
    if content_type == ZIP and suffix in DOCUMENTS and not zipfile.is_zipfile(path):
        return failed(DOCUMENTS[suffix], "The file is damaged.")
    content_type = content_type or _unknown_type(head)
    report(content_type)
    try:
        return document(path, content_type, chars) or unsupported(path, content_type, suffix)
    except Unreadable as error:
        return failed(content_type, str(error))


def _unknown_type(head: bytes) -> str:
    import chardet

    detected = chardet.detect(head)
    return (not detected.get("encoding") and detected.get("mime_type")) or BINARY


def document(path: Path, content_type: str, chars: int) -> Found | None:
    """Read what needs more than decoding; None for a kind that is not read. Raises: Unreadable."""
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
    return text_found(content_type, text, chars, cut)  # without text: a scan, or nested deeper than kreuzberg follows


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
    """HTML decoded as a browser would: by its BOM, as UTF-8, as it declares, or by a guess."""
    data = path.read_bytes()
    for bom, name in BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(name, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    declared = _CHARSET.search(data[:4096])
    for charset in (declared[1].decode() if declared else None, guessed_encoding(data)):
        if charset:
            try:
                # Everybody who says latin-1 means Windows' extension of it: https://encoding.spec.whatwg.org
                latin = charset.lower() in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii")
                return data.decode("cp1252" if latin else charset, "replace")
            except (LookupError, UnicodeError):
                pass
    return data.decode(errors="replace")


def html_text(source: str) -> str:
    return kreuzberg_text(without_head(source).encode(errors="replace"), HTML)


def without_head(source: str) -> str:
    """HTML without its first head, if that has an end. Linear: a pattern for both would start over at every `<head`."""
    begin = _HEAD.search(source)
    end = _HEAD_END.search(source, begin.end()) if begin else None
    return source[: begin.start()] + source[end.end() :] if begin and end else source


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
    for name in (part.get_content_charset(), "utf-8", guessed_encoding(data)):
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
        pass  # kreuzberg reports what is wrong with it
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
            pass  # kreuzberg reports it
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


def reason(message: str) -> str:
    """A sentence for clients in place of kreuzberg's message, which describes its own internals."""
    low = message.lower()
    if "password" in low or "encrypted" in low:
        return "The file is protected with a password."
    if "security limit" in low or "exceeds limit" in low:
        return "The file unpacks to more than can be read."
    return "The file is damaged."


def handle(request: bytes, job: Job) -> bytes:
    path, filename, declared, chars, document_seconds = json.loads(request)

    def report(content_type: str) -> None:
        job.note(content_type.encode())
        if content_type in DOCUMENTS.values():
            job.allow(document_seconds)

    return json.dumps(read(Path(path), filename, declared, chars, report)).encode()


def main() -> None:
    """What a worker runs."""
    worker_process.serve(handle)
