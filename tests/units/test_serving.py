"""What a server process sets up once it listens."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

_REPORTS_ITS_COLLECTOR = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count(), gc.get_threshold()[0], flush=True))
from agent_chat.server.command_line import main
main()
"""


async def test_objects_of_the_start_are_excluded_from_garbage_collection(tmp_path: Path) -> None:
    environment = {**os.environ, "CHAT_DATA_DIR": str(tmp_path), "PORT": "0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _REPORTS_ITS_COLLECTOR, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert b"Listening" in await process.stdout.readline()
        process.terminate()
        frozen, threshold = (await process.stdout.readline()).split()
        assert await process.wait() == 0
    assert int(frozen) > 50_000
    assert int(threshold) == 10_000
