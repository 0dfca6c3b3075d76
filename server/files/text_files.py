"""Text files: decoded without changes, and their media types.

The server calls `plain_text` in a thread: it reads UTF-8 and takes a few milliseconds at most, whatever the file
contains, so that a text never waits behind another organization's document. Other encodings have to be guessed, which
is done by a worker (`reader.py`).
"""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from agent_chat.server.files.file_types import DOCUMENTS, EML, HTML, IMAGES, TEXTS, signature_type

ExtractedFields = dict[str, Any]
"""The fields of an Extracted."""

HEAD_BYTES = 64 * 2**10
DETECT_BYTES = 256 * 2**10
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS = bytes([*range(7), *range(14, 27), *range(28, 32), 127])
_NONCHARACTERS = ("\ufffe", "\uffff")
_HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_MAIL = re.compile(r"(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*){2,}\r?\n")
_MAIL_HEADERS = re.compile(r"^(from|date|received|message-id|mime-version|return-path):", re.IGNORECASE | re.MULTILINE)


def plain_text(path: Path, filename: str, declared: str | None, chars: int) -> ExtractedFields | None:
    """Return the fields of `Extracted` for a UTF-8 text or an empty file; None for a file that needs a worker.

    Raises:
        OSError: the file cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    suffix = suffix_of(filename)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return empty_result(suffix)
        if signature_type(head) is not None:
            return None
        data = head + file.read(_max_bytes(chars) - len(head))
        cut = bool(file.read(1))
    text = _utf8(data, cut)
    if text is None:
        return None
    content_type = text_type(text, suffix, media_type_of(declared))
    return None if content_type in (HTML, EML) else text_result(content_type, text, chars, cut)


def suffix_of(filename: str) -> str:
    """Return the suffix of a file name, in lower case and with its dot."""
    return Path(filename.replace("\\", "/")).suffix.lower()


def media_type_of(declared: str | None) -> str:
    """Return a media type without its parameters, in lower case."""
    return (declared or "").partition(";")[0].strip().lower()


def empty_result(suffix: str) -> ExtractedFields:
    """Build the result for an empty file."""
    content_type = DOCUMENTS.get(suffix) or IMAGES.get(suffix) or TEXTS.get(suffix) or "text/plain"
    return failed_result(content_type, "The file is empty.")


def failed_result(content_type: str, client_sentence: str) -> ExtractedFields:
    """Build the result for a file that could not be read, with the reason for the client."""
    return {"content_type": content_type, "status": "failed", "error": client_sentence}


def text_result(content_type: str, text: str, chars: int, cut: bool = False) -> ExtractedFields:
    """Return the fields of `Extracted` for a text; failed if it contains only white space."""
    kept = text[:chars]
    if not kept.strip():
        return failed_result(content_type, "No text was found in the file.")
    return {"content_type": content_type, "status": "ready", "text": kept, "truncated": cut or len(text) > chars}


def decode_start(head: bytes, file: BinaryIO, chars: int) -> tuple[str | None, bool]:
    """Decode the beginning of a text file, at least `chars` characters if it has them.

    Only as much of the file is read as that takes, so that a csv of any size costs the same.

    Returns:
        The text, None if the file is not a text; and whether the file has more.
    """
    data = head + file.read(max(0, _max_bytes(chars) - len(head)))
    cut = bool(file.read(1))
    for bom, name in BOMS:
        if data.startswith(bom):
            return _try_decode(data[len(bom) :], name, cut), cut
    text = _utf8(data, cut)
    if text is None and (encoding := guess_encoding(data)):
        text = _try_decode(data, encoding, cut)
    if text is None and cut and (lines := data.rpartition(b"\n")[0]):
        text = _utf8(lines, cut)  # the only undecodable bytes may be those of the truncated last line
    return text, cut


def guess_encoding(data: bytes) -> str | None:
    """Guess the encoding of a text; None if none is likely."""
    import chardet

    return chardet.detect(sample_for_detection(data)).get("encoding")


def sample_for_detection(data: bytes) -> bytes:
    """Return the lines of a long text that are not ASCII: the detector learns nothing from English lines."""
    if len(data) <= DETECT_BYTES or b"\0" in data:
        return data[:DETECT_BYTES]
    lines = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    return lines[:DETECT_BYTES] or data[:DETECT_BYTES]


def decode_latin1(data: bytes) -> str | None:
    """Decode a text as Latin-1; None if the result is no text."""
    return _try_decode(data, "latin-1", False)


def _max_bytes(chars: int) -> int:
    return 4 * chars + 4


def _utf8(data: bytes, cut: bool) -> str | None:
    """Decode UTF-8; None also for data that may be ISO-2022-JP, whose bytes are valid ASCII."""
    if b"\0" in data or b"\x1b$" in data:
        return None
    return _try_decode(data.removeprefix(codecs.BOM_UTF8), "utf-8", cut)


def _try_decode(data: bytes, encoding: str, cut: bool) -> str | None:
    """Decode strictly; None if the bytes are invalid in this encoding. A truncated last character is dropped."""
    try:
        text = codecs.getincrementaldecoder(encoding)("strict").decode(data, final=not cut)
        coded = text.encode()
    except (UnicodeError, LookupError):
        return None
    controls = len(coded) - len(coded.translate(None, _CONTROLS)) + sum(map(text.count, _NONCHARACTERS))
    return None if "\0" in text or controls > len(text) // 500 else text


def text_type(text: str, suffix: str, declared: str) -> str:
    """Return the media type of a text. Content cannot tell a csv from a program, so a known suffix comes first."""
    named = TEXTS.get(suffix, "text/plain")
    if named == EML and not looks_like_mail(text):
        return "text/plain"
    if named != "text/plain":
        return named
    if (
        suffix in ("", ".txt") or suffix in DOCUMENTS or suffix in IMAGES
    ):  # any other suffix is some programming language: plain text
        if _HTML.match(text[:4096]):
            return HTML
        if suffix != ".txt" and looks_like_mail(text):
            return EML
    if suffix not in TEXTS and declared in TEXTS.values() and declared not in (HTML, EML):
        return declared
    return "text/plain"


def looks_like_mail(text: str) -> bool:
    """Whether a text begins with at least two headers of a mail."""
    found = _MAIL.match(text[:HEAD_BYTES].replace("\r\n", "\n"))
    return found is not None and len(set(map(str.lower, _MAIL_HEADERS.findall(found[0])))) >= 2
