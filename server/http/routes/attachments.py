"""…/attachments: uploading files to a thread and downloading them."""

from __future__ import annotations

import re
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agent_chat.server.errors import InvalidRequest, RangeNotSatisfiable, StorageFull, UnsupportedMediaType
from agent_chat.server.http.auth import principal_of
from agent_chat.server.http.operations import APIRoute, Header, Operation, ResponseType
from agent_chat.server.http.requests import RANGE, as_json, service_of
from agent_chat.server.http.routes.threads import THREAD
from agent_chat.server.http.schemas import Binary, UploadForm
from agent_chat.server.http.uploads import is_multipart, read_form
from agent_chat.stores.models import Attachment

ATTACHMENTS = THREAD + "/attachments"


async def upload(request: Request) -> Response:
    """Upload files to a thread, for messages that are posted later."""
    if not is_multipart(request):
        raise UnsupportedMediaType(request.headers.get("content-type", ""), "multipart/form-data")
    agent_id, thread_id = request.path_params["agent_id"], request.path_params["thread_id"]
    service = service_of(request)
    await service.find_thread(principal_of(request), agent_id, thread_id)
    async with read_form(request) as form:
        if form.fields:
            raise InvalidRequest(next(iter(form.fields)), "An upload has no other field than `files`.")
        if not form.files:
            raise InvalidRequest("files", "An upload needs at least one file in the field `files`.")
        return as_json(await service.add_files(principal_of(request), agent_id, thread_id, form.files), 201)


async def download(request: Request) -> Response:
    """Download a file as it was uploaded, or one range of its bytes."""
    path = request.path_params
    principal, service = principal_of(request), service_of(request)
    attachment = await service.get_attachment(principal, path["agent_id"], path["thread_id"], path["attachment_id"])
    start, end = parse_range(request.headers.get("range"), attachment.size)
    headers = {
        "Content-Type": _media_type(attachment),
        "Content-Disposition": content_disposition(attachment.filename),
        "Content-Length": str(end - start),
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "ETag": f'"{attachment.sha256}"',
    }
    partial = (start, end) != (0, attachment.size)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{attachment.size}"
    if request.method == "HEAD":
        return Response(status_code=206 if partial else 200, headers=headers)
    pieces = await service.read_attachment(principal, path["thread_id"], attachment, start, end)
    return StreamingResponse(pieces, 206 if partial else 200, headers)


def _media_type(attachment: Attachment) -> str:
    """Return the media type that was detected at the upload, without a charset: it was not stored."""
    return attachment.content_type if attachment.content_type.isascii() else "application/octet-stream"


def parse_range(header: str | None, size: int) -> tuple[int, int]:
    """Parse the Range header into the first byte and the one after the last; the whole file for several ranges.

    https://www.rfc-editor.org/rfc/rfc9110#section-14

    Raises: RangeNotSatisfiable.
    """
    found = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", (header or "").replace(" ", ""), re.ASCII)
    if found is None or found[0] == "bytes=-":
        return 0, size
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return 0, size
    if start >= end:
        raise RangeNotSatisfiable(size)
    return start, end


def content_disposition(filename: str) -> str:
    """Return the Content-Disposition of a download: the name in ASCII for old clients, and in UTF-8.

    https://www.rfc-editor.org/rfc/rfc6266
    """
    plain = re.sub(r"[^ !#-\[\]-~]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


_FILE = "application/octet-stream"
_FILE_HEADERS = (
    Header("Content-Disposition", "`attachment` with the file's name (RFC 6266)."),
    Header("ETag", "The SHA-256 of the file."),
    Header("Accept-Ranges", "`bytes`."),
)
_CONTENT_RANGE = Header("Content-Range", "Which bytes these are (RFC 9110).")
ROUTES = [
    APIRoute(
        "POST",
        ATTACHMENTS,
        upload,
        Operation(
            tag="attachments", responses=(ResponseType(list[Attachment], 201),), form=UploadForm, raises=(StorageFull,)
        ),
    ),
    APIRoute(
        "GET",
        ATTACHMENTS + "/{attachment_id}",
        download,
        Operation(
            tag="attachments",
            responses=(
                ResponseType(
                    Binary, 200, _FILE, "The file; its media type is the attachment's `content_type`.", _FILE_HEADERS
                ),
                ResponseType(Binary, 206, _FILE, "The range of the file.", (*_FILE_HEADERS, _CONTENT_RANGE)),
            ),
            headers=(RANGE,),
            raises=(RangeNotSatisfiable,),
        ),
    ),
]
