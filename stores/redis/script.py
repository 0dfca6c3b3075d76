"""The scripts that run in Redis.

`append.lua` appends, publishes, bounds and expires a thread's log in one step. Separate XADD and PUBLISH commands were
refused: two processes would publish in another order than they append, and a crash between the two would leave an
entry that no reader is notified of.

No script parses events: what it has to know of them are arguments.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from string import Template

from agent_chat.stores.buffer import RETAINED_BYTES, RETAINED_EVENTS, RETAINED_SECONDS

_DELETED_SECONDS = 60.0


def _read(name: str) -> str:
    """Return the script with its constants filled in."""
    return Template(files(__package__).joinpath(name).read_text("utf-8")).substitute(
        RETAINED_EVENTS=RETAINED_EVENTS,
        RETAINED_BYTES=RETAINED_BYTES,
        RETAINED_MS=int(RETAINED_SECONDS * 1000),
        DELETED_MS=int(_DELETED_SECONDS * 1000),
    )


APPEND = _read("append.lua")
APPEND_SHA = hashlib.sha1(APPEND.encode()).hexdigest()
RESET = _read("reset.lua")
