"""An MCP server written by hand, in the older protocol: starts in a blink and does whatever a test needs of it.

It imports nothing but the standard library: what the SDK's own server can't be made to do (die in mid-call, hang, tell
of a wrong schema) is easy here. Run by tests/units/test_mcp.py over stdio.
"""

import functools
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JSON = dict[str, Any]

writing = threading.Lock()
cancelled: dict[object, threading.Event] = {}
meetings: dict[int, threading.Barrier] = {}
beside = threading.Barrier(2)
grown: list[str] = []
answers: dict[object, "queue.Queue[JSON]"] = {}


def send(message: JSON) -> None:
    with writing:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def text(words: str, **more: object) -> JSON:
    return {"content": [{"type": "text", "text": words}], **more}


def pid(call: JSON) -> JSON:
    return text("", structuredContent={"pid": os.getpid()})


def echo(call: JSON) -> JSON:
    return text(call["arguments"]["text"])


def environment(call: JSON) -> JSON:
    return text("", structuredContent={"greeting": os.environ.get("GREETING"), "cwd": os.getcwd()})


def die(call: JSON) -> JSON:
    os._exit(1)


def kill_caller(call: JSON) -> JSON:
    with Path(os.environ["RAN"]).open("a") as ran:
        ran.write("ran\n")
    os.kill(os.getppid(), signal.SIGKILL)
    return text("killed")


def both(call: JSON) -> JSON:
    """Structured content, the same as text, and a picture."""
    structured = {"rows": [1, 2]}
    picture = {"type": "image", "mimeType": "image/png", "data": call["arguments"]["picture"]}
    own = {"type": "text", "text": json.dumps(structured, indent=2)}
    blocks = [own, picture] if call["arguments"].get("own") else [{"type": "text", "text": "Two rows."}, picture]
    return {"content": blocks, "structuredContent": structured}


def huge(call: JSON) -> JSON:
    return text("x" * call["arguments"]["bytes"])


def complain(call: JSON) -> JSON:
    for line in call["arguments"]["lines"]:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    return text("complained")


def elicit(call: JSON) -> JSON:
    """Asks the client to ask its user, and fails as its client does; with `beside`, during a call of `fail_beside`."""
    if call["arguments"].get("beside"):
        beside.wait(timeout=5)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    ask = f"ask-{call['id']}"
    waiting = answers[ask] = queue.Queue()
    params = {"message": "Who?", "requestedSchema": schema}
    send({"id": ask, "method": "elicitation/create", "params": params})
    answer = waiting.get(timeout=5)
    if call["arguments"].get("beside"):
        beside.wait(timeout=5)
    return text(f"The client said: {answer['error']['message']}", isError=True)


def meta(call: JSON) -> JSON:
    said = {key: value for key, value in call["_meta"].items() if key != "progressToken"}
    return text("", structuredContent=said)


def fail(call: JSON) -> JSON:
    return text("It went wrong.", isError=True)


def fail_beside(call: JSON) -> JSON:
    """Fails of itself while `elicit` asks the client."""
    beside.wait(timeout=5)
    beside.wait(timeout=5)
    return fail(call)


def big(call: JSON) -> JSON:
    return text('é"\n' * call["arguments"]["times"])


def picture(call: JSON) -> JSON:
    data = "A" * call["arguments"]["size"]
    file = {"uri": "harbour://map", "mimeType": "image/png", "blob": data}
    blocks = [{"type": "image", "mimeType": "image/png", "data": data}, {"type": "resource", "resource": file}]
    return {"content": [{"type": "text", "text": "Seen."}, *blocks]}


def meet(call: JSON) -> JSON:
    """Returns only when as many calls as `guests` are in it at the same time."""
    guests = call["arguments"]["guests"]
    with writing:
        barrier = meetings.setdefault(guests, threading.Barrier(guests))
    barrier.wait(timeout=5)
    return text("met")


def wait(call: JSON) -> JSON:
    time.sleep(call["arguments"]["seconds"])
    return text("waited")


def until_cancelled(call: JSON) -> JSON:
    """Tells its progress once, waits to be cancelled, and writes that to a file."""
    progress(call, 1)
    if cancelled[call["id"]].wait(timeout=10):
        Path(call["arguments"]["file"]).write_text("cancelled")
    return text("over")


def flood(call: JSON) -> JSON:
    for step in range(1000):
        progress(call, step)
    return text("flooded")


def grow(call: JSON) -> JSON:
    grown.append("grown")
    send({"method": "notifications/tools/list_changed"})
    return text("grown")


def progress(call: JSON, step: int) -> None:
    token = call["_meta"]["progressToken"]
    send({"method": "notifications/progress", "params": {"progressToken": token, "progress": step, "total": 1000}})


ANYTHING: JSON = {"type": "object"}
ANNOTATIONS: dict[str, JSON] = {
    "read": {"readOnlyHint": True},
    "put": {"idempotentHint": True},
    "claims": {"readOnlyHint": False, "destructiveHint": False},
}
OLDER: JSON = {"type": "object", "properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}}}
TOOLS: dict[str, tuple[Callable[[JSON], JSON], JSON]] = {
    "pid": (pid, ANYTHING),
    **dict.fromkeys(ANNOTATIONS, (pid, ANYTHING)),
    "both": (both, ANYTHING),
    "huge": (huge, ANYTHING),
    "complain": (complain, ANYTHING),
    "elicit": (elicit, ANYTHING),
    "meta": (meta, ANYTHING),
    "kill_caller": (kill_caller, ANYTHING),
    "echo": (echo, {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}),
    "environment": (environment, ANYTHING),
    "die": (die, ANYTHING),
    "fail": (fail, ANYTHING),
    "fail_beside": (fail_beside, ANYTHING),
    "big": (big, ANYTHING),
    "picture": (picture, ANYTHING),
    "meet": (meet, ANYTHING),
    "wait": (wait, ANYTHING),
    "until_cancelled": (until_cancelled, ANYTHING),
    "flood": (flood, ANYTHING),
    "grow": (grow, ANYTHING),
    "wrong_schema": (fail, {"type": "object", "properties": {"x": {"type": "nonsense"}}}),
    "bottomless": (fail, functools.reduce(lambda inner, _: {**ANYTHING, "not": inner}, range(180), ANYTHING)),
    "older_dialect": (echo, {"$schema": "http://json-schema.org/draft-04/schema#", **OLDER}),
}

ODD: list[Any] = [
    {"name": "typeless", "inputSchema": {"properties": {"a": {"type": "integer"}}}},
    {"name": "schemaless", "description": 5, "annotations": "none", "outputSchema": {"type": "string"}},
    {"name": 7, "inputSchema": ANYTHING},
    "not a tool",
]


def listed() -> list[JSON]:
    """All tools there are now; `tools/list` gives six a page."""
    return (
        [
            {"name": name, "inputSchema": schema, "annotations": ANNOTATIONS.get(name, {})}
            for name, (_, schema) in TOOLS.items()
        ]
        + ODD
        + [{"name": name, "inputSchema": ANYTHING} for name in grown]
    )


def answer(message: JSON) -> None:
    params = message.get("params", {})
    match message["method"]:
        case "initialize":
            result: JSON = {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {"listChanged": True}},
                "serverInfo": {"name": "raw", "version": "1"},
            }
        case "tools/list":
            start = int(params.get("cursor", 0))
            result = {"tools": listed()[start : start + 6]}
            if start + 6 < len(listed()):
                result["nextCursor"] = str(start + 6)
        case "tools/call":
            result = TOOLS[params["name"]][0]({"id": message["id"], **params})
        case _:
            send({"id": message["id"], "error": {"code": -32601, "message": "Method not found"}})
            return
    send({"id": message["id"], "result": result})
    if "ends-when-listed" in sys.argv and message["method"] == "tools/list" and "nextCursor" not in result:
        os._exit(0)


def main() -> None:
    if "stays" in sys.argv:
        Path(os.environ["PID"]).write_text(str(os.getpid()))
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("method") == "notifications/cancelled":
            cancelled[message["params"]["requestId"]].set()
        elif message.get("id") in answers:
            answers[message["id"]].put(message)
        elif "id" in message:
            cancelled[message["id"]] = threading.Event()
            threading.Thread(target=answer, args=[message], daemon=True).start()
    while "stays" in sys.argv:
        time.sleep(60)
    os._exit(0)


if __name__ == "__main__":
    main()
