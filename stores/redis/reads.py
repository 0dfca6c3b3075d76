"""Asking the log in Redis: one connection's questions, in pipelines, with a bound on how long anybody waits.

A Redis that has not answered for two seconds is asked by a ping until it does; meanwhile every question fails
immediately, so that a request with several of them waits once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from agent_chat.stores.errors import LogUnavailable
from agent_chat.stores.redis.room import Room
from agent_chat.stores.redis.writer import Answer, Away, Backoff, Command, Exchange, Refusal

logger = logging.getLogger(__name__)

READ_SECONDS = 2.0
"""How long anybody waits for Redis to answer a question."""

_READS_AT_ONCE = 100


class _Question:
    def __init__(self, command: Command) -> None:
        self.command = command
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()


class Reads:
    """Questions to Redis: all that wait go in one pipeline, in a task that no reader's leaving cancels."""

    def __init__(self, exchange: Exchange, room: Room) -> None:
        self._exchange = exchange
        self._room = room
        self._asked: deque[_Question] = deque()
        self._some = asyncio.Event()
        self._unanswered_since: float | None = None
        self._task = asyncio.create_task(self._serve(), name="log reads")

    async def ask(self, *command: str | bytes) -> Answer:
        """Raises: LogUnavailable after two seconds without an answer, immediately while Redis is known to be silent."""
        if self._is_silent:
            raise LogUnavailable(f"no answer for over {READ_SECONDS:g} seconds")
        question = _Question(command)
        self._asked.append(question)
        self._some.set()
        try:
            async with asyncio.timeout(READ_SECONDS):
                return await question.answer
        except TimeoutError as error:
            raise LogUnavailable(f"no answer within {READ_SECONDS:g} seconds") from error

    @property
    def _is_silent(self) -> bool:
        return self._unanswered_since is not None and time.monotonic() - self._unanswered_since >= READ_SECONDS

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._give_up("it is closed")

    async def _serve(self) -> None:
        backoff = Backoff()
        while True:
            if self._unanswered_since is None:
                await self._some.wait()
                self._unanswered_since = time.monotonic()
            try:
                failure = await self._put()
            except Exception as error:
                logger.exception("the log could not be read")
                failure = repr(error)
            if not self._asked:
                self._some.clear()
            if failure is None:
                backoff.reset()
                self._unanswered_since = None
                continue
            if self._is_silent:
                self._give_up(failure)
            await backoff.wait()

    async def _put(self) -> str | None:
        """Put a pipeline of questions, or a ping if there are none; why some stay unanswered, or None."""
        questions: list[_Question] = []
        while self._asked and len(questions) < _READS_AT_ONCE:
            question = self._asked.popleft()
            if not question.answer.done():
                questions.append(question)
        failure = None
        answers: list[Answer] = []
        try:
            answers = await self._exchange([question.command for question in questions] or [("PING",)])
        except Away as away:
            answers, failure = list(away.answers), str(away)
        again = questions[len(answers) :]
        for question, answer in zip(questions, answers, strict=False):
            if isinstance(answer, Refusal):
                failure = answer.reason
                again.append(question)
            elif not question.answer.done():
                question.answer.set_result(answer)
        self._asked.extendleft(reversed(again))
        if any(isinstance(answer, Refusal) and answer.full for answer in answers):
            await self._room.make(self._exchange)
        return failure

    def _give_up(self, reason: str) -> None:
        while self._asked:
            question = self._asked.popleft()
            if not question.answer.done():
                question.answer.set_exception(LogUnavailable(reason))
        self._some.clear()
