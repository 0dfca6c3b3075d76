"""multipart/form-data as a stream: files are written to disk as they arrive, so that memory does not grow with them.

https://www.rfc-editor.org/rfc/rfc7578
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from agent_chat.server.errors import DiskFull, InvalidRequest, MalformedBody, TooLarge
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.bodies import BODY_BYTES
from agent_chat.server.http.body_stream import receive_body
from agent_chat.server.inputs import FILE_BYTES, FILES, Upload, clean_name
from agent_chat.server.limits import Limits, Slots

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FORM_BYTES = FILES * FILE_BYTES + 2 * BODY_BYTES
"""The limit of a whole form, with its boundaries and headers."""
_FIELDS = 50
_BOUNDARY_BYTES = 200
"""RFC 2046 allows 70; the parser raises above 256."""


class Form(msgspec.Struct, frozen=True):
    """A form's text fields and its files."""

    fields: dict[str, str]
    files: list[Upload]


def is_multipart(request: Request) -> bool:
    """Whether the body of the request is a multipart form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


class Uploads:
    """The uploads in progress in this process.

    Attributes:
        folder: contains their files until their request ends.
        slots: how many each organization has at the same time.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.slots = Slots("uploads at once", limits.uploads)


@asynccontextmanager
async def read_form(request: Request) -> AsyncIterator[Form]:
    """Read the form. Its files exist until the context is left.

    Raises:
        RateLimited: the organization has reached its limit of uploads in progress.
        MalformedBody: the body is not valid multipart/form-data.
        BodyStalled: nothing arrived for 60 s.
        DiskFull: the disk is full.
        TooLarge: a file exceeds 25 MB, the fields together exceed 2 MB, or the whole body is too large.
        InvalidRequest: there are more than 10 files, a field occurs twice or is not UTF-8, or a file's field is not
            named `files`.
    """
    uploads = cast(Uploads, request.state.uploads)
    slot = uploads.slots.reserve(principal_of(request).organization_id)
    folder: Path | None = None
    try:
        with _disk_full_errors():
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=uploads.folder))
            form = await _read(request, folder)
        yield form
    finally:
        slot.release()
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _read(request: Request, folder: Path) -> Form:
    total = 0
    with closing(_Reader(_boundary(request.headers["content-type"]), folder)) as reader:
        async for data in receive_body(request):
            total += len(data)
            if total > _FORM_BYTES:
                raise TooLarge("body", _FORM_BYTES)
            await asyncio.to_thread(reader.feed, data)
        return await asyncio.to_thread(reader.form)


@contextmanager
def _disk_full_errors() -> Iterator[None]:
    """Turn the system's errors about a full disk into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull from error
        raise


def _boundary(content_type: str) -> bytes:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary or len(boundary) > _BOUNDARY_BYTES:
        raise MalformedBody("The multipart body has no boundary, or one that is too long.")
    return boundary


class _Reader:
    """Parses the body piece by piece. Called in a thread, because it writes to disk."""

    def __init__(self, boundary: bytes, folder: Path) -> None:
        self._folder = folder
        self._fields: dict[str, str] = {}
        self._field_bytes = 0
        self._files: list[Upload] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._text = bytearray()
        self._file: tuple[BinaryIO, hashlib._Hash] | None = None
        self._ended = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._more_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more_header(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise MalformedBody("The multipart body's boundary is too long.") from error

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise MalformedBody("The body is not valid multipart/form-data.") from error

    def form(self) -> Form:
        """Return the form. Raises: MalformedBody if the body is incomplete."""
        if not self._ended:
            raise MalformedBody("The multipart body is incomplete.")
        return Form(self._fields, self._files)

    def _part_begin(self) -> None:
        self._headers = {}
        self._text = bytearray()

    def _more_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options:
            if len(self._fields) >= _FIELDS:
                raise InvalidRequest(self._name, f"A form may have at most {_FIELDS} fields.")
            return
        if self._name != "files":
            raise InvalidRequest(self._name or "body", "Send files in the field `files`.")
        if len(self._files) >= FILES:
            raise InvalidRequest("files", f"A form may have at most {FILES} files.")
        path = self._folder / str(len(self._files))
        kind = self._headers.get(b"content-type", b"").decode("latin-1").strip() or None
        self._files.append(Upload(_filename(options[b"filename"].decode("utf-8", "replace")), kind, path))
        self._file = (path.open("wb"), hashlib.sha256())

    def _data(self, data: bytes) -> None:
        if self._file is None:
            self._field_bytes += len(data)
            if self._field_bytes > BODY_BYTES:
                raise TooLarge(self._name or "body", BODY_BYTES)
            self._text += data
            return
        upload = self._files[-1]
        upload.size += len(data)
        if upload.size > FILE_BYTES:
            raise TooLarge(f"files[{len(self._files) - 1}]", FILE_BYTES)
        self._file[0].write(data)
        self._file[1].update(data)

    def _part_end(self) -> None:
        if self._file is not None:
            self.close()
            return
        if self._name in self._fields:
            raise InvalidRequest(self._name or "body", f"The field {self._name} occurs twice.")
        try:
            self._fields[self._name] = self._text.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(self._name or "body", f"The field {self._name} is not UTF-8.") from error

    def close(self) -> None:
        """Close the file that is being written, if there is one."""
        if self._file is not None:
            self._file[0].close()
            self._files[-1].sha256 = self._file[1].hexdigest()
            self._file = None

    def _end(self) -> None:
        self._ended = True


def _filename(written: str) -> str:
    """Decode and clean a file name as browsers write it in a form: they escape these three characters and no others.

    https://html.spec.whatwg.org/multipage/form-control-infrastructure.html#multipart-form-data
    """
    return clean_name(written.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n"))
