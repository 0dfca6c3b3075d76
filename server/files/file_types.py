"""Media types of files: by name, by the first bytes, and by the directory of a zip file.

Imports only the standard library, because the workers that read files pay for it at each start.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

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
"""By suffix; every other text is text/plain."""

_ZIPPED = {"word/document.xml": DOCX, "xl/workbook.xml": XLSX, "ppt/presentation.xml": PPTX}


def signature_type(head: bytes) -> str | None:
    """Return the media type by the file's first bytes (`ZIP` for every zip file); None for text and unknown types."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZIP
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return OLE
    if head.startswith(b"{\\rtf"):
        return "application/rtf"
    return PDF if head.lstrip(b"\xef\xbb\xbf\t\n\r ").startswith(b"%PDF-") else None


def zip_type(path: Path) -> str:
    """Return the media type of a zip file: by the names in it, or as an OpenDocument or epub file states it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            for name, content_type in _ZIPPED.items():
                if name in names and "[Content_Types].xml" in names:
                    return content_type
            if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
                stated = archive.read("mimetype").decode("ascii").strip()
                if re.fullmatch(r"application/[\w.+-]+", stated):
                    return stated
    except Exception:  # zipfile raises many kinds of exceptions for a hostile directory
        pass
    return ZIP
