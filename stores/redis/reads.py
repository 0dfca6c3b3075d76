"""Reading from Redis: the requests of all readers in pipelines over one connection, with a bound on the time they wait.

Once Redis has not replied for two seconds, it is pinged until it does; meanwhile every request fails immediately, so
that a caller with several of them waits once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from agent_chat.stores.errors import LogUnavailable
from agent_chat.stores.redis.connection import Backoff, Command, ErrorReply, Exchange, RedisUnreachable, Reply
from agent_chat.stores.redis.eviction import LogEvictor

logger = logging.getLogger(__name__)

_PIPELINE_REQUESTS = 100


class _Request:
    def __init__(self, command: Command) -> None:
        self.command = command
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()


class Reads:
    """Requests to Redis. All that wait go out in one pipeline, in a task that no reader's cancellation ends.

    Args:
        seconds: how long a request waits for Redis (I19).

    Attributes:
        _requests: those without a reply, oldest first.
        _requested: set while there are any.
        _silent_since: since when Redis has not replied; None if nothing is in flight.
    """

    def __init__(self, exchange: Exchange, evictor: LogEvictor, seconds: float) -> None:
        self._seconds = seconds
        self._exchange = exchange
        self._evictor = evictor
        self._requests: deque[_Request] = deque()
        self._requested = asyncio.Event()
        self._silent_since: float | None = None
        self._task = asyncio.create_task(self._serve(), name="log reads")

    async def request(self, *command: str | bytes) -> Reply:
        """Send a command and return the reply.

        Raises: LogUnavailable after two seconds without a reply, immediately while Redis is known to be unreachable.
        """
        if self._is_silent:
            raise LogUnavailable(f"no reply for over {self._seconds:g} seconds")
        request = _Request(command)
        self._requests.append(request)
        self._requested.set()
        try:
            async with asyncio.timeout(self._seconds):
                return await request.reply
        except TimeoutError as error:
            raise LogUnavailable(f"no reply within {self._seconds:g} seconds") from error

    @property
    def _is_silent(self) -> bool:
        return self._silent_since is not None and time.monotonic() - self._silent_since >= self._seconds

    async def close(self) -> None:
        """Fail all requests."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self._fail_requests("it is closed")

    async def _serve(self) -> None:
        backoff = Backoff()
        while True:
            if self._silent_since is None:
                await self._requested.wait()
                self._silent_since = time.monotonic()
            try:
                failure = await self._send_pipeline()
            except Exception as error:
                logger.exception("the log could not be read")
                failure = repr(error)
            if not self._requests:
                self._requested.clear()
            if failure is None:
                backoff.reset()
                self._silent_since = None
                continue
            if self._is_silent:
                self._fail_requests(failure)
            await backoff.wait()

    async def _send_pipeline(self) -> str | None:
        """Send a pipeline of requests, or a ping if there are none. Returns why some have no reply, or None."""
        requests: list[_Request] = []
        while self._requests and len(requests) < _PIPELINE_REQUESTS:
            request = self._requests.popleft()
            if not request.reply.done():
                requests.append(request)
        failure = None
        replies: list[Reply] = []
        try:
            replies = await self._exchange([request.command for request in requests] or [("PING",)])
        except RedisUnreachable as error:
            replies, failure = list(error.replies), str(error)
        unanswered = requests[len(replies) :]
        for request, reply in zip(requests, replies, strict=False):
            if isinstance(reply, ErrorReply):
                failure = reply.reason
                unanswered.append(request)
            elif not request.reply.done():
                request.reply.set_result(reply)
        self._requests.extendleft(reversed(unanswered))
        if any(isinstance(reply, ErrorReply) and reply.full for reply in replies):
            await self._evictor.evict(self._exchange)
        return failure

    def _fail_requests(self, reason: str) -> None:
        while self._requests:
            request = self._requests.popleft()
            if not request.reply.done():
                request.reply.set_exception(LogUnavailable(reason))
        self._requested.clear()
