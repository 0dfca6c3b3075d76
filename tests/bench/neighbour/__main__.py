"""`python -m tests.bench.neighbour [ATTACK …]`: what one organization notices of another that does its worst.

The model, the server, the victim and the neighbour are processes of their own. The neighbour's clients run at low
priority (nice 10), because they would be on a machine of their own: only what it costs *the server* is to be seen. The
victim is measured alone and beside each attack, in turn, three times. From all samples: the p99 of tokens and reads,
and the median of uploads and of messages that are rendered, of which there are a few dozen. Passed: each within twice
what it is alone, or 20 ms if that is larger; no token missing, nothing failed.
Exit status 1 if an attack did not pass.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import uvicorn

from agent_chat.server.serving import listening_socket
from tests.bench.neighbour.attacks import ATTACKS, Neighbour
from tests.bench.neighbour.model import app
from tests.bench.neighbour.victim import STREAMS, Noticed, notice

SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
_SETTLE_SECONDS = 3.5
"""The server counts a neighbour as present for three seconds after its last request: alone begins behind that."""
_KEY = "key-of-the-operator-for-this-bench"
_SHARES = {"token": 0.99, "read": 0.99, "upload": 0.5, "render": 0.5}


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


@asynccontextmanager
async def _process(*arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def _line(process: asyncio.subprocess.Process, seconds: float = 120) -> bytes:
    assert process.stdout is not None
    async with asyncio.timeout(seconds):
        return await process.stdout.readline()


async def _key(organization: str, environment: dict[str, str]) -> str:
    arguments = ("server", "keys", "create", "--organization", organization, "--user", "u")
    async with _process(*arguments, **environment) as process:
        return (await process.communicate())[0].split()[-1].decode()


async def _measure(url: str, key: str) -> Noticed:
    """The victim's figures, from a process of its own."""
    async with _process("tests.bench.neighbour", "victim", url, key) as process:
        return msgspec.json.decode((await process.communicate())[0], type=Noticed)


def _memory(pid: int) -> int:
    """Resident megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def _row(name: str, alone: Noticed, beside: Noticed, server: int, seen: str) -> bool:
    cells, passed = [], not beside.failed and not beside.missing_tokens
    for what, share in _SHARES.items():
        before, after = alone.percentile(what, share), beside.percentile(what, share)
        good = after <= max(2 * before, 20.0)
        passed = passed and good
        cells.append(f"{before:.0f} → {after:.0f}{'' if good else ' !'}")
    lost = f"{beside.failed} / {beside.missing_tokens}"
    show(f"| {name} | {' | '.join(cells)} | {lost} | {_memory(server)} | {seen} | {'yes' if passed else 'NO'} |")
    return passed


async def _attacked(name: str, url: str, victim: str, attacker: str, server: int) -> bool:
    alone, beside, seen = list[Noticed](), list[Noticed](), ""
    for _ in range(ROUNDS):
        await asyncio.sleep(_SETTLE_SECONDS)
        alone.append(await _measure(url, victim))
        async with _process("tests.bench.neighbour", "attack", name, url, attacker) as process:
            assert await _line(process) == b"ready\n"
            beside.append(await _measure(url, victim))
            assert process.stdin is not None
            process.stdin.write(b"stop\n")
            seen = (await _line(process)).decode().strip()
    return _row(name, Noticed.together(alone), Noticed.together(beside), server, seen)


async def main(names: list[str]) -> int:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = f"http://127.0.0.1:{port}"
        async with _process("tests.bench.neighbour", "model") as model:
            environment = {
                "CHAT_DATA_DIR": folder,
                "CHAT_API_KEY": _KEY,
                "PORT": str(port),
                "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{int(await _line(model))}",
                "ANTHROPIC_API_KEY": "a-key",
                "CHAT_LOG_LEVEL": "error",
            }
            victim, attacker = await _key("victim", environment), await _key("neighbour", environment)
            async with _process("server", **environment) as server:
                assert b"Listening" in await _line(server)
                await _measure(url, victim)  # warm
                show(
                    f"{STREAMS} streams of 50 tokens a second, {ROUNDS} times {SECONDS:g} s each; ms, alone → beside it"
                )
                show(f"| attack | {' | '.join(_SHARES)} | failed / lost | server MB | the last answers | passed |")
                show("|---|" + "---|" * (len(_SHARES) + 4))
                passed = [await _attacked(name, url, victim, attacker, server.pid) for name in names]
    return 0 if all(passed) else 1


async def _attack(name: str, url: str, key: str) -> None:
    """Prepare, say so, and go on until there is a line on stdin; what was answered is the last line."""
    os.nice(10)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    headers = {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as http:
        us = Neighbour(http, url, key)
        attack = ATTACKS[name](us)
        await anext(attack)
        us.seen.clear()
        show("ready")
        going = asyncio.ensure_future(anext(attack))
        stopping = asyncio.ensure_future(reader.readline())
        await asyncio.wait({going, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if going.done():
            going.result()
        show(", ".join(f"{count} × {what}" for what, count in us.seen.most_common(4)) or "-")
        os._exit(0)  # what is still on its way doesn't matter


def _model() -> None:
    sock = listening_socket("127.0.0.1", 0)
    sock.listen()
    show(str(sock.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False)).run([sock])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["model"]:
            _model()
        case ["victim", url, key]:
            show(msgspec.json.encode(asyncio.run(notice(url, key, SECONDS))).decode())
        case ["attack", name, url, key]:
            asyncio.run(_attack(name, url, key))
        case names if set(names) <= set(ATTACKS):
            sys.exit(asyncio.run(main(names or list(ATTACKS))))
        case _:
            sys.exit(f"attacks: {', '.join(ATTACKS)}")
