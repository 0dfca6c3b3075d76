"""What a worker runs that does not do what it should."""

import json
import os
import resource
import socket
import sys
from pathlib import Path

from agent_chat.server.files import worker_process
from agent_chat.server.files.worker_process import DONE, NOTE, REPLY, RequestContext


def _frames() -> int:
    """The descriptor that frames are written to: the only pipe besides stdin, stdout and stderr."""
    return next(
        fd
        for fd in range(3, 64)
        if os.path.exists(f"/proc/self/fd/{fd}") and "pipe" in os.readlink(f"/proc/self/fd/{fd}")
    )


def handle(request: bytes, context: RequestContext) -> bytes:
    match request:
        case b"print":
            sys.stdout.write("a library's remark\n")
            sys.stdout.flush()
        case b"raise":
            raise ValueError("the content of the request")
        case b"long":
            return b"x" * 2**20
        case b"announce":  # a length that is not followed by as much
            os.write(_frames(), REPLY.pack(DONE, 2**62))
        case b"notes":
            for _ in range(1000):
                context.note(b"a note")
        case b"long note":
            os.write(_frames(), REPLY.pack(NOTE, 2**40))
        case b"kind":
            os.write(_frames(), REPLY.pack(77, 0))
        case b"memory":
            return b"x" * 2**40
        case b"busy":
            while True:
                pass
        case b"limits":
            names = ("AS", "FSIZE", "NOFILE", "NPROC", "CORE")
            limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in names}
            return json.dumps({"limits": limits, "environment": sorted(os.environ)}).encode()
        case b"write":
            Path("/tmp/never").write_bytes(b"x")
        case b"files":
            kept = [socket.socket() for _ in range(1000)]
            return str(len(kept)).encode()
    return request


def main() -> None:
    worker_process.serve(handle)
