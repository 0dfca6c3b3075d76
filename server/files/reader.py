"""The reader of uploaded files: the program of the workers of `extraction.py`, in a bare interpreter.

A file's content decides its type, else its name, else the declared type. Text is decoded without changes, since
kreuzberg would reflow it: source code keeps its indentation, a csv its commas. kreuzberg reads pdf, the office formats
and epub. Two formats are prepared for it: HTML is decoded here and loses its head, which kreuzberg would turn into a
heading and whose charset it ignores; mail is parsed by the standard library, because kreuzberg joins the paragraphs of
an HTML mail and drops the names of attached files.

Large libraries are imported when a file first needs them.
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
    ExtractedFields,
    decode_latin1,
    decode_start,
    empty_result,
    failed_result,
    guess_encoding,
    media_type_of,
    suffix_of,
    text_result,
    text_type,
)
from agent_chat.server.files.worker_process import RequestContext

MAIL_BYTES = 25 * 2**20
PAGES = 1_000
"""The largest number of pages read of a PDF. The other formats have no pages before layout."""
PIXELS = 100_000_000
"""Larger images are not decoded."""
LONG_EDGE = 1568
"""In pixels. The Messages API itself shrinks larger images to this, and refuses those over 8,000.

https://platform.claude.com/docs/en/build-with-claude/vision
"""
PICTURE_BYTES = 2**20
"""So that the twenty images of a request fit into its limit of 32 MB, as base64."""


_CHARSET = re.compile(rb"<meta[^>]{1,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_HEAD = re.compile(r"<head\b", re.IGNORECASE)
_HEAD_END = re.compile(r"</head\s*>|(?=<body\b)", re.IGNORECASE)
_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")


class Unreadable(Exception):
    """A file of a supported kind cannot be read. Its text is a sentence for the client."""


def read(path: Path, filename: str, declared: str | None, chars: int, report: Callable[[str], None]) -> ExtractedFields:
    """Return the fields of `Extracted`. The type is reported before parsing, in case the parser crashes.

    Raises:
        OSError: the file cannot be opened.
    """
    suffix = suffix_of(filename)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return empty_result(suffix)
        content_type = signature_type(head)
        text, cut = decode_start(head, file, chars) if content_type is None else (None, False)
    if content_type is None and text is None and TEXTS.get(suffix) in (HTML, EML):
        text = decode_latin1(head)  # the parts of a mail may have different charsets: they are decoded later
    if text is not None:
        content_type = text_type(text, suffix, media_type_of(declared))
        if content_type not in (HTML, EML):
            return text_result(content_type, text, chars, cut)
    if content_type == ZIP:
        content_type = zip_type(path)
    if content_type == ZIP and suffix in DOCUMENTS and not zipfile.is_zipfile(path):
        return failed_result(DOCUMENTS[suffix], "The file is damaged.")
    content_type = content_type or _unknown_type(head)
    report(content_type)
    try:
        return read_document(path, content_type, chars) or unsupported_result(path, content_type, suffix)
    except Unreadable as error:
        return failed_result(content_type, str(error))


def _unknown_type(head: bytes) -> str:
    import chardet

    detected = chardet.detect(head)
    return (not detected.get("encoding") and detected.get("mime_type")) or BINARY


def read_document(path: Path, content_type: str, chars: int) -> ExtractedFields | None:
    """Read a file that needs more than decoding; None for an unsupported kind.

    Raises:
        Unreadable.
    """
    if content_type in IMAGES.values():
        return {"content_type": content_type, "status": "ready", "small": check_image(path)}
    cut = False
    if content_type == HTML:
        text = extract_html_text(decode_html(path))
    elif content_type == EML:
        text = extract_mail_text(path)
    elif content_type == PDF:
        text, cut = extract_pdf_text(path)
    elif content_type in DOCUMENTS.values():
        text = extract_document_text(path, content_type)
    else:
        return None
    return text_result(content_type, text, chars, cut)  # no text: a scan, or nested deeper than kreuzberg goes


def unsupported_result(path: Path, content_type: str, suffix: str) -> ExtractedFields:
    """Build the result for a file that cannot be read, with the reason for the client."""
    named = f" ({content_type})" if content_type != BINARY else ""
    if content_type == OLE:
        if _ENCRYPTED in path.read_bytes():
            return failed_result(DOCUMENTS.get(suffix, OLE), "The file is protected with a password.")
        client_sentence = "Files of the old Office formats can't be read. Save it as docx, xlsx or pptx."
    elif suffix in DOCUMENTS or suffix in IMAGES or suffix in TEXTS:
        client_sentence = f"The file is not what its name says, but of a kind{named} that can't be read."
    else:
        client_sentence = f"Files of this kind{named} can't be read."
    return {"content_type": content_type, "status": "unsupported", "error": client_sentence}


def check_image(path: Path) -> bool:
    """Decode an image completely: one that a model refuses would make every later turn of its thread fail.

    Returns:
        True if it is larger than models accept or use. A smaller copy, upright, as PNG or JPEG, then lies beside it.

    Raises:
        Unreadable: the image is damaged or has over 100,000,000 pixels.
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
                path.with_name(path.name + ".small").write_bytes(shrink_image(image))
            return large
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        raise Unreadable("The image is damaged.") from error


def shrink_image(image: Any) -> bytes:
    """Shrink an image to at most 1568 pixels per side and 1 MB, with its transparency if that fits as PNG."""
    from PIL import Image, ImageOps

    kept = image.convert("RGBA" if image.has_transparency_data else "RGB")
    kept.thumbnail((LONG_EDGE, LONG_EDGE))
    kept.info["exif"] = image.info.get("exif", b"")
    kept = ImageOps.exif_transpose(kept)
    if kept.mode == "RGBA":
        if len(data := encode_image(kept, "PNG")) <= PICTURE_BYTES:
            return data
        white = Image.new("RGBA", kept.size, "white")
        kept = Image.alpha_composite(white, kept).convert("RGB")
    for quality in (85, 70, 50):
        if len(data := encode_image(kept, "JPEG", quality=quality)) <= PICTURE_BYTES:
            break
    return data


def encode_image(image: Any, kind: str, **options: int) -> bytes:
    """Encode an image."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decode_html(path: Path) -> str:
    """Decode HTML as a browser does: by its BOM, as UTF-8, by its declared charset, or by a guess."""
    data = path.read_bytes()
    for bom, name in BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(name, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    declared = _CHARSET.search(data[:4096])
    for charset in (declared[1].decode() if declared else None, guess_encoding(data)):
        if charset:
            try:
                # Browsers read latin-1 as windows-1252: https://encoding.spec.whatwg.org/#names-and-labels
                latin = charset.lower() in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii")
                return data.decode("cp1252" if latin else charset, "replace")
            except (LookupError, UnicodeError):
                pass
    return data.decode(errors="replace")


def extract_html_text(source: str) -> str:
    """Extract the text of an HTML page."""
    return extract_with_kreuzberg(strip_head(source).encode(errors="replace"), HTML)


def strip_head(source: str) -> str:
    """Remove the first head, if it has an end. Two searches, so that it is linear: one pattern would be quadratic."""
    begin = _HEAD.search(source)
    end = _HEAD_END.search(source, begin.end()) if begin else None
    return source[: begin.start()] + source[end.end() :] if begin and end else source


def extract_mail_text(path: Path) -> str:
    """Return a mail's headers, its text (from HTML only if there is no plain text), and the names of attached files."""
    with path.open("rb") as file:
        mail = email.message_from_bytes(file.read(MAIL_BYTES), policy=email.policy.default)
    assert isinstance(mail, EmailMessage)
    try:
        headers = ("From", "To", "Cc", "Date", "Subject")
        lines = [f"{name}: {value}" for name in headers if (value := mail.get(name))]
        body = mail.get_body(("plain", "html"))
        text: str = decode_part(body) if body else ""
        if body and body.get_content_type() == HTML:
            text = extract_html_text(text)
        attached = [name for part in mail.iter_attachments() if (name := part.get_filename())]
    except (
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        IndexError,
        KeyError,
    ) as error:  # the parser raises these for damaged mails
        raise Unreadable("The mail is damaged.") from error
    if attached:
        lines.append(f"Attached: {', '.join(attached)}")
    return ("\n".join(lines) + "\n\n" + text.replace("\r\n", "\n").strip() + "\n").encode(errors="replace").decode()


def decode_part(part: Any) -> str:
    """Decode the text of a part of a mail."""
    data = part.get_payload(decode=True) or b""
    for name in (part.get_content_charset(), "utf-8", guess_encoding(data)):
        if name:
            try:
                return str(data.decode(name))
            except (LookupError, UnicodeError):
                pass
    return str(data.decode(errors="replace"))


def extract_pdf_text(path: Path) -> tuple[str, bool]:
    """Return the text of the first 1,000 pages, and whether there are more."""
    import pypdfium2  # type: ignore[import-untyped]

    data = io.BytesIO()
    try:
        with pypdfium2.PdfDocument(path) as whole, pypdfium2.PdfDocument.new() as part:
            if len(whole) > PAGES:
                part.import_pages(whole, list(range(PAGES)))
                part.save(data)
    except (pypdfium2.PdfiumError, OSError):
        pass  # kreuzberg reports the error below
    if first := data.getvalue():
        return extract_with_kreuzberg(first, PDF), True
    return extract_with_kreuzberg(path, PDF), False


def extract_document_text(path: Path, content_type: str) -> str:
    """Extract the text of a document."""
    if content_type == ODT:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("META-INF/manifest.xml") as manifest:
                if b"encryption-data" in manifest.read(2**20):
                    raise Unreadable("The file is protected with a password.")
        except (KeyError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
            pass  # kreuzberg reports the error below
    return extract_with_kreuzberg(path, content_type)


def extract_with_kreuzberg(source: Path | bytes, content_type: str) -> str:
    """Convert a document to Markdown.

    kreuzberg's own time limit is not used: it would leave a thread running after the worker's timers have stopped.

    Raises:
        Unreadable.
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
        raise Unreadable(client_sentence(str(error))) from error


def client_sentence(message: str) -> str:
    """Return a sentence for clients in place of kreuzberg's message, which describes its internals."""
    low = message.lower()
    if "password" in low or "encrypted" in low:
        return "The file is protected with a password."
    if "security limit" in low or "exceeds limit" in low:
        return "The file unpacks to more than can be read."
    return "The file is damaged."


def handle(request: bytes, context: RequestContext) -> bytes:
    """Read one file: what the worker process does for each request."""
    path, filename, declared, chars, document_seconds = json.loads(request)

    def report(content_type: str) -> None:
        context.note(content_type.encode())
        if content_type in DOCUMENTS.values():
            context.set_cpu_seconds(document_seconds)

    return json.dumps(read(Path(path), filename, declared, chars, report)).encode()


def main() -> None:
    """Serve requests in a worker process."""
    worker_process.serve(handle)
