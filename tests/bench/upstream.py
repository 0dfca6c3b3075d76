"""`python -m tests.bench.upstream`: a model that streams tokens with the index and the time of each, on a free port.

It speaks the Messages API. The question says how: `tokens COUNT every MILLISECONDS`; 0 writes them all at once. A token
is `INDEX:MICROSECONDS ` of fixed width, so that only these digits are put into bytes that are made beforehand, and one
core serves 10,000 tokens a second beside the server that is measured.
"""

from __future__ import annotations

import re
import time

import uvloop

from tests.bench.http import Connection, serve

TOKEN = re.compile(rb"(\d{5}):(\d{16}) ")
_QUESTION = re.compile(rb"tokens (\d+) every (\d+)")
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nrequest-id: req_bench\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_BEGIN = _chunk(
    _event(
        "message_start",
        '{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"bench-1",'
        '"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":10,"output_tokens":1}}}',
    )
    + _event(
        "content_block_start",
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
    )
)
_DELTA, _REST = _event(
    "content_block_delta",
    '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"@"}}',
).split(b"@")
_TOKEN_HEAD = b"%x\r\n" % (len(_DELTA) + 23 + len(_REST)) + _DELTA
_TOKEN_REST = _REST + b"\r\n"
_END = (
    _chunk(
        _event("content_block_stop", '{"type":"content_block_stop","index":0}')
        + _event(
            "message_delta",
            '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
            '"usage":{"output_tokens":100}}',
        )
        + _event("message_stop", '{"type":"message_stop"}')
    )
    + b"0\r\n\r\n"
)


def _token(index: int) -> bytes:
    return b"%s%05d:%016d %s" % (_TOKEN_HEAD, index, time.time_ns() // 1000, _TOKEN_REST)


class Upstream(Connection):
    """Answers one request after the other on a connection."""

    def request_received(self, head: bytes, body: bytes) -> None:
        found = _QUESTION.findall(body)
        count, every = (int(found[-1][0]), int(found[-1][1]) / 1000) if found else (1, 0.0)
        if every:
            self.write(_HEAD + _BEGIN + _token(0))
            self._next(1, count, self.loop.time() + every, every)
        else:
            self.write(_HEAD + _BEGIN + b"".join(map(_token, range(count))) + _END)

    def _next(self, index: int, count: int, due: float, every: float) -> None:
        if self.transport.is_closing():
            return
        if index == count:
            self.write(_END)
        else:
            self.loop.call_at(due, self._write_token, index, count, due, every)

    def _write_token(self, index: int, count: int, due: float, every: float) -> None:
        self.write(_token(index))
        self._next(index + 1, count, due + every, every)


if __name__ == "__main__":
    uvloop.run(serve(Upstream))
