"""Text files: decoded as they are, and which kind of text they are.

`plain_text` is called by the server itself, in a thread: it reads UTF-8 and takes a few milliseconds at most, whatever
the file holds, so that a text never waits behind another's document. Every other encoding has to be guessed, which a
worker does (`reading.py`).
"""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from agent_chat.server.files.file_types import DOCUMENTS, EML, HTML, IMAGES, TEXTS, signature_type

Found = dict[str, Any]
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


def plain_text(path: Path, filename: str, declared: str | None, chars: int) -> Found | None:
    """All fields of the Extracted of a UTF-8 text or of an empty file; None for a file that needs a worker.

    Raises: OSError if there is no such file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    suffix = suffix_of(filename)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            return empty(suffix)
        if signature_type(head) is not None:
            return None
        data = head + file.read(_most_bytes(chars) - len(head))
        cut = bool(file.read(1))
    text = _utf8(data, cut)
    if text is None:
        return None
    content_type = text_type(text, suffix, plain_type(declared))
    return None if content_type in (HTML, EML) else text_found(content_type, text, chars, cut)


def suffix_of(filename: str) -> str:
    return Path(filename.replace("\\", "/")).suffix.lower()


def plain_type(declared: str | None) -> str:
    """A media type without its parameters."""
    return (declared or "").partition(";")[0].strip().lower()


def empty(suffix: str) -> Found:
    content_type = DOCUMENTS.get(suffix) or IMAGES.get(suffix) or TEXTS.get(suffix) or "text/plain"
    return failed(content_type, "The file is empty.")


def failed(content_type: str, reason: str) -> Found:
    return {"content_type": content_type, "status": "failed", "error": reason}


def text_found(content_type: str, text: str, chars: int, cut: bool = False) -> Found:
    """A text that is ready, if there is more in it than white space."""
    kept = text[:chars]
    if not kept.strip():
        return failed(content_type, "No text was found in the file.")
    return {"content_type": content_type, "status": "ready", "text": kept, "truncated": cut or len(text) > chars}


def decoded(head: bytes, file: BinaryIO, chars: int) -> tuple[str | None, bool]:
    """The first characters of a text file, at least `chars` of them, and whether there is more. None: not a text.

    No more of the file is read than that takes, so that a csv of any size costs the same.
    """
    data = head + file.read(max(0, _most_bytes(chars) - len(head)))
    cut = bool(file.read(1))
    for bom, name in BOMS:
        if data.startswith(bom):
            return _attempt(data[len(bom) :], name, cut), cut
    text = _utf8(data, cut)
    if text is None and (encoding := guessed_encoding(data)):
        text = _attempt(data, encoding, cut)
    if text is None and cut and (lines := data.rpartition(b"\n")[0]):
        text = _utf8(lines, cut)  # its only odd bytes may be the few that were read of its last line
    return text, cut


def guessed_encoding(data: bytes) -> str | None:
    import chardet

    return chardet.detect(evidence(data)).get("encoding")


def evidence(data: bytes) -> bytes:
    """What a detector needs of a long text: the lines that are not ASCII. A first half in English shows nothing."""
    if len(data) <= DETECT_BYTES or b"\0" in data:
        return data[:DETECT_BYTES]
    lines = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    return lines[:DETECT_BYTES] or data[:DETECT_BYTES]


def latin_text(data: bytes) -> str | None:
    return _attempt(data, "latin-1", False)


def _most_bytes(chars: int) -> int:
    return 4 * chars + 4


def _utf8(data: bytes, cut: bool) -> str | None:
    """None also for what may be ISO-2022-JP, which is ASCII too."""
    if b"\0" in data or b"\x1b$" in data:
        return None
    return _attempt(data.removeprefix(codecs.BOM_UTF8), "utf-8", cut)


def _attempt(data: bytes, encoding: str, cut: bool) -> str | None:
    """The text, if the bytes are valid in this encoding; a last character that was cut off is left out."""
    try:
        text = codecs.getincrementaldecoder(encoding)("strict").decode(data, final=not cut)
        coded = text.encode()
    except (UnicodeError, LookupError):
        return None
    controls = len(coded) - len(coded.translate(None, _CONTROLS)) + sum(map(text.count, _NONCHARACTERS))
    return None if "\0" in text or controls > len(text) // 500 else text


def text_type(text: str, suffix: str, declared: str) -> str:
    """Which text it is. The content does not show a csv from a program, so a known suffix comes first."""
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
