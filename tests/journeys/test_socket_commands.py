"""The commands of one socket: stored in their order, and no noise when its client goes before they are done."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.support.servers import Live
from tests.support.sockets import Socket, socket


async def acknowledged(connection: Socket, count: int) -> list[str]:
    """The request_ids of the next acknowledgements."""
    return [(await connection.until("ack"))[-1]["request_id"] for _ in range(count)]


async def test_messages_of_a_socket_are_stored_in_their_order(live: Live) -> None:
    thread = await live.scripted_thread()
    slow = "x *y* " * 4_000  # long enough to be rendered elsewhere
    contents = [f"{number} {slow if number % 3 == 0 else ''}" for number in range(12)]
    async with socket(live.url, thread) as connection:
        for number, content in enumerate(contents):
            message = {"content": content, "role": "system"}
            await connection.send(type="message.create", request_id=str(number), message=message)
        assert await acknowledged(connection, 12) == [str(number) for number in range(12)]
    stored = (await live.get(thread))["messages"]
    assert [message["content"] for message in stored] == contents


async def test_a_waiting_message_delays_neither_a_cancel_nor_a_ping(live: Live) -> None:
    thread = await live.scripted_thread()
    async with socket(live.url, thread) as connection:
        await connection.create("hold it\nsay done")
        await live.gates.reached("it")
        run_id = (await connection.until("ack"))[-1]["message_id"]
        refused = await connection.create("say next")
        last = await connection.create("say last", if_busy="interrupt")
        await connection.send(type="ping")
        await connection.send(type="run.cancel", request_id="c", message_id=run_id)
        frames = await connection.until("run.completed")
        answers = [frame.get("request_id", "ping") for frame in frames if frame["type"] in ("ack", "error", "pong")]
        assert sorted(answers) == sorted([refused, last, "ping", "c"])


async def test_commands_of_a_client_that_closes_without_waiting_are_done(live: Live) -> None:
    thread = await live.scripted_thread()
    contents = [str(number) for number in range(100)]
    async with socket(live.url, thread, max_queue=None) as connection:
        for content in contents:
            message = {"content": content, "role": "system"}
            await connection.send(type="message.create", request_id=content, message=message)
    async with asyncio.timeout(10):
        while serving := set(live.server.server_state.tasks):
            await asyncio.wait(serving)
    stored = (await live.get(thread, message_limit=100))["messages"]
    assert [message["content"] for message in stored] == contents


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Everything that is logged as an error, also by uvicorn, whose loggers do not propagate."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(caplog.handler)

    def logged() -> list[str]:
        gc.collect()  # what nobody asked a task for is told when the task goes
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]

    yield logged
    for logger in loggers:
        logger.removeHandler(caplog.handler)


async def test_a_client_that_leaves_with_commands_pending_is_no_error(
    live: Live, errors: Callable[[], list[str]]
) -> None:
    thread = await live.scripted_thread()
    await live.http.patch(thread, json={"archived": True})
    serving = live.server.server_state.tasks
    for _ in range(10):
        async with socket(live.url, thread) as connection:
            for number in range(20):
                await connection.create(f"{number}" + "x" * 3_000)
                await connection.send(type="ping")
                await connection.connection.send("{")
            connection.connection.transport.abort()
    async with asyncio.timeout(10):
        while serving:
            await asyncio.wait(set(serving))
    assert errors() == []
