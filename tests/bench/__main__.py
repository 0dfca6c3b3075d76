"""`python -m tests.bench`: what the server costs, beside relays that do the least a server in front of a model can do.

    python -m tests.bench                 everything, 20 minutes
    python -m tests.bench --short         50 streams, one round, with generous bounds (CI)
    python -m tests.bench --only streams --streams 50,200 --rounds 5 --also before=/an/other/clone

The model (`upstream`), the relays, the servers and the clients (`load`) are processes of their own, on loopback, with
SQLite and the log of the data folder. Each round measures every contender once, in turn, so that ratios are of the same
minutes. `--also NAME=FOLDER` adds the server of another clone (an absolute path), with its `.venv`.

Each token of each stream is checked: once, in order, and stored. CPU is what the kernel counts for the process that
serves, without its workers. Exit status 1 if anything was wrong, or if `--short` finds a ratio beyond its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from tests.bench.load import Job, Result

_HERE = Path(__file__).parents[2]
_KEYS = 8
"""Organizations: requests are limited to 6,000 a minute in each."""
_SHORT_BOUNDS = {"sdk": 3.0, "raw": 15.0}
"""The most that the server's CPU per token may be, relative to these relays, in the short form."""
_REQUESTS = ("create", "list 20", "read 50", "post")


class Contender(msgspec.Struct):
    """Something that relays a model's tokens. `keys`: of a server; the relays need none."""

    name: str
    url: str
    pid: int
    keys: list[str] = []
    turn: int = 0

    def key(self) -> str:
        """The next organization's key."""
        self.turn += 1
        return self.keys[self.turn % len(self.keys)] if self.keys else ""


def _show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


@asynccontextmanager
async def _process(
    *command: str, folder: Path | None = None, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=folder, env={**os.environ, **environment}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def _module(name: str, *arguments: str) -> AsyncIterator[tuple[str, int]]:
    """A module of this package that serves: its URL and its pid."""
    async with _process(sys.executable, "-m", f"tests.bench.{name}", *arguments) as process:
        yield f"http://127.0.0.1:{int(await _line(process))}", process.pid


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@asynccontextmanager
async def _server(name: str, clone: Path, model_url: str, organizations: int) -> AsyncIterator[Contender]:
    """The server of a clone, with a data folder of its own."""
    python, port = sys.executable if clone == _HERE else str(clone / ".venv/bin/python"), _free_port()
    with tempfile.TemporaryDirectory() as data:
        environment = {
            "CHAT_DATA_DIR": data,
            "PORT": str(port),
            "ANTHROPIC_BASE_URL": model_url,
            "ANTHROPIC_API_KEY": "a-key",
            "CHAT_LOG_LEVEL": "error",
            "CHAT_MCP_CONFIG": str(Path(data) / "mcp.json"),
        }
        (Path(data) / "mcp.json").write_text('{"mcpServers": {}}')
        keys = []
        for number in range(organizations):
            arguments = ("-m", "server", "keys", "create", "--organization", f"bench {number}", "--user", "u")
            async with _process(python, *arguments, folder=clone, **environment) as process:
                keys.append((await process.communicate())[0].decode().split()[-1])
        async with _process(python, "-m", "server", folder=clone, **environment) as process:
            while "istening" not in (line := await _line(process)):
                assert line, "the server ended"
            yield Contender(name, f"http://127.0.0.1:{port}", process.pid, keys)


async def _run(contender: Contender, what: str, count: int, **options: object) -> Result:
    job = Job(contender.url, contender.pid, contender.key(), what, count, **options)  # type: ignore[arg-type]
    arguments = msgspec.json.encode(job).decode()
    async with _process(sys.executable, "-m", "tests.bench.load", arguments) as process:
        output, _ = await process.communicate()
    return msgspec.json.decode(output, type=Result)


def _median(results: Sequence[Result], name: str) -> float:
    return float(statistics.median(getattr(result, name) for result in results))


class Bench:
    """Runs the parts and counts what was wrong."""

    def __init__(self, contenders: Sequence[Contender], rounds: int) -> None:
        self.wrong = 0
        self._contenders = contenders
        self._servers = [each for each in contenders if each.keys]
        self._rounds = rounds

    async def _rounds_of(
        self, contenders: Sequence[Contender], what: str, count: int, **options: object
    ) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {each.name: [] for each in contenders}
        for _ in range(self._rounds):
            for each in contenders:
                result = await _run(each, what, count, **options)
                self.wrong += result.wrong
                found[each.name].append(result)
        return found

    async def streams(self, count: int, *, tokens: int, every: int) -> dict[str, float]:
        """Show a table; the CPU per token of each contender, in microseconds."""
        within = 1.0 if every else 0.0
        found = await self._rounds_of(self._contenders, "streams", count, tokens=tokens, every=every, within=within)
        pace = f"a token every {every} ms" if every else "as fast as they can"
        _show(f"\n{count} streams of {tokens} tokens, {pace}, begun within {within:g} s; medians of {self._rounds}")
        relays = [each.name for each in self._contenders if not each.keys]
        _show(
            "| | CPU ms per 1,000 tokens | "
            + " | ".join(f"× {name}" for name in relays)
            + " | delay p50 / p99 / p99 after 2 s, ms | first token p50, ms | tokens/s | wrong |"
        )
        _show("|---" * (6 + len(relays)) + "|")
        cost = {name: [each.cpu * 1e6 / max(1, each.done) for each in results] for name, results in found.items()}
        for name, results in found.items():
            ratios = [
                f"{statistics.median(own / other for own, other in zip(cost[name], cost[relay], strict=True)):.2f}"
                for relay in relays
            ]
            delays = (
                f"{_median(results, 'p50'):.1f} / {_median(results, 'p99'):.0f} / {_median(results, 'steady_p99'):.0f}"
            )
            rate = statistics.median(each.done / each.seconds for each in results)
            wrong = sum(each.wrong for each in results)
            _show(
                f"| {name} | {statistics.median(cost[name]):.0f} | {' | '.join(ratios)} | {delays}"
                f" | {_median(results, 'first_token'):.0f} | {rate:,.0f} | {wrong} |"
            )
        return {name: statistics.median(values) for name, values in cost.items()}

    async def viewers(self, count: int) -> None:
        """What each viewer of one answer costs, per event, beyond the answer itself."""
        _show(f"\n{count} viewers of one answer, 10 events/s; medians of {self._rounds}")
        _show("| | SSE, CPU µs per viewer and event | WebSocket | idle SSE, KB | wrong |")
        _show("|---|---|---|---|---|")
        for each in self._servers:
            cells, before = [], self.wrong
            for socket_ in (False, True):
                costs = []
                for _ in range(self._rounds):
                    alone = await _run(each, "viewers", 0, tokens=50, every=100)
                    seen = await _run(each, "viewers", count, tokens=50, every=100, socket=socket_)
                    self.wrong += seen.wrong
                    costs.append((seen.cpu - alone.cpu) * 1e6 / seen.done)
                cells.append(f"{statistics.median(costs):.1f}")
            _show(f"| {each.name} | {' | '.join(cells)} | {self.wrong - before} |")

    async def requests(self, count: int) -> None:
        """Requests per second, 16 at a time, and the CPU of each."""
        _show(f"\n{count} requests, 16 at a time; per second (CPU ms of each); medians of {self._rounds}")
        _show("| | " + " | ".join(_REQUESTS) + " | wrong |")
        _show("|---" * (len(_REQUESTS) + 2) + "|")
        cells: dict[str, list[str]] = {each.name: [] for each in self._servers}
        wrong = dict.fromkeys(cells, 0)
        for what in _REQUESTS:
            for name, results in (await self._rounds_of(self._servers, what, count)).items():
                rate = statistics.median(each.done / each.seconds for each in results)
                cells[name].append(f"{rate:,.0f} ({_median(results, 'cpu') * 1000 / count:.2f})")
                wrong[name] += sum(each.wrong for each in results)
        for name, row in cells.items():
            _show(f"| {name} | {' | '.join(row)} | {wrong[name]} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="streams,unpaced,viewers,requests")
    parser.add_argument("--streams", default="50,200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--relays", default="sdk,aiohttp,raw")
    return parser.parse_args()


async def _main(options: argparse.Namespace) -> int:
    parts = ["streams"] if options.short else options.only.split(",")
    async with AsyncExitStack() as stack:
        model_url, _ = await stack.enter_async_context(_module("upstream"))
        servers = [
            ("server", _HERE),
            *((name, Path(folder)) for name, folder in (each.split("=") for each in options.also)),
        ]
        contenders = [
            await stack.enter_async_context(_server(name, clone, model_url, 1 if options.short else _KEYS))
            for name, clone in servers
        ]
        for name in filter(None, options.relays.split(",")):
            url, pid = await stack.enter_async_context(_module("relays", name, model_url))
            contenders.append(Contender(name, url, pid))
        for each in contenders:
            await _run(each, "streams", 10, tokens=100, every=5)  # warm
        bench = Bench(contenders, 1 if options.short else options.rounds)
        costs: dict[str, float] = {}
        if "streams" in parts:
            for count in [50] if options.short else map(int, options.streams.split(",")):
                costs = await bench.streams(count, tokens=150, every=20)
        if "unpaced" in parts:
            await bench.streams(20, tokens=5000, every=0)
        if "viewers" in parts:
            await bench.viewers(100)
        if "requests" in parts:
            await bench.requests(1000)
    beyond = [
        f"{costs['server'] / costs[name]:.1f} times the CPU of the {name} relay, {bound:g} are allowed"
        for name, bound in _SHORT_BOUNDS.items()
        if options.short and costs["server"] > bound * costs[name]
    ]
    for line in beyond:
        _show(line)
    if bench.wrong:
        _show(f"{bench.wrong} answers were wrong")
    return 1 if beyond or bench.wrong else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(_main(_arguments())))
