"""Agents of kind `claude`: Claude, or any server that speaks the Anthropic Messages API.

The official SDK does the requests (auth, base URL, aiohttp transport); the stream's raw lines are decoded by
messages_api.py, which costs a fraction of the SDK's typed path per token. Retrying is done here and not by the
SDK: it must also cover a stream that breaks before its first token, and must not sleep through a long Retry-After while
a client waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache

import anthropic
import httpx2
import msgspec
from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]

from agent_chat.agents import AgentError, Ended, Part, Reasoning, Run, Text, Tool, ToolCompleted, ToolStarted, ToolUse
from agent_chat.agents.claude.attachments import Attached, attached
from agent_chat.agents.claude.blocks import text_block
from agent_chat.agents.claude.history import Turn, has_tools, history, merged, model_name, turns_of, without_images
from agent_chat.agents.claude.messages_api import Answer, Failure, Use, failure_of_status
from agent_chat.agents.model_http import RedirectRefused, model_client
from agent_chat.agents.rounds import separator
from agent_chat.stores.models import Agent, JSONObject, Message, ToolCall

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "claude-sonnet-5-5"
MAX_TOKENS = 8192
MAX_ROUNDS = 16
CONTEXT_TOKENS = 160_000
STALL_SECONDS = 60.0
ATTEMPTS = 3
RETRY_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""The longest Retry-After that is waited out; a longer one is passed on to the client."""

ANTHROPIC_KEPT_SECONDS = 60.0
KEPT_SECONDS = 4.0
"""How long an idle connection may be used again. Servers on uvicorn (vLLM, many gateways) close it after 5 s, and a
request that is sent just then is lost."""

_LINGER_SECONDS = 0.5
_UNPACKED = {"Accept-Encoding": "identity"}
_SHRINK = 3
_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CALLING = ("tool_use", "end_turn")
"""Stop reasons with which calls are complete; some local servers say the second."""
_TITLE = (
    "Write a title of at most six words for the chat below, in its language. Answer with the title alone, without "
    "quotes and without a full stop.\n\n"
)
_NO_TOOL: JSONObject = {
    "name": "none",
    "description": "There are no tools now. Don't call this.",
    "input_schema": {"type": "object"},
}


class Claude:
    """The `claude` kind on one API: its `reply` and its `title`.

    An agent's metadata may hold `context_tokens`, where its model reads less (or more) than the default, and
    `thinking`, which is passed on as it is.

    Args:
        api_key: null for servers that want none.
        base_url: null for Anthropic's.
        model: for agents that name none.
        max_tokens: the most for agents that set none; MAX_TOKENS if that is less.
        title_model: for titles; null for the agent's own.
        stall_seconds: how long the stream may say nothing.
        context_tokens: how much history is sent, roughly.
        retry_seconds: before the second attempt; twice that before the third.
    """

    def __init__(
        self,
        api_key: str | None,
        base_url: str | None = None,
        *,
        model: str | None = None,
        max_tokens: int = MAX_TOKENS,
        title_model: str | None = None,
        stall_seconds: float = STALL_SECONDS,
        context_tokens: int = CONTEXT_TOKENS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._model = model or DEFAULT_MODEL
        self._max_tokens = min(max_tokens, MAX_TOKENS)
        self._title_model = title_model
        self._context_tokens = context_tokens
        self._retry_seconds = retry_seconds
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key or "none",
            base_url=base_url,
            max_retries=0,
            http_client=model_client(
                anthropic.DefaultAioHttpClient,
                stall_seconds=stall_seconds,
                idle_seconds=KEPT_SECONDS if base_url else ANTHROPIC_KEPT_SECONDS,
            ),
        )

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, run: Run) -> AsyncGenerator[Part, None]:
        """Speak, call tools, speak on, for at most 16 rounds of tools."""
        tools = await run.tools.available() if run.agent.mcp_servers else []
        tools = [tool for tool in tools if _acceptable(msgspec.json.encode(tool.parameters))]
        names = {model_name(tool.name): tool.name for tool in tools}
        budget = self._budget(run.agent)
        told = _Told(run, self._request(run, tools), budget, await attached(run, budget))
        for number in range(MAX_ROUNDS + 1):
            last = number == MAX_ROUNDS
            try:
                async with aclosing(self._spoken(told, last=last)) as parts:
                    begun = False
                    async for part in parts:
                        if not begun:
                            begun = True
                            yield told.ended()  # should the run be cancelled, it still tells what it cost
                        told.add(part)
                        yield part
            except AgentError:
                yield told.ended()
                raise
            answer = told.answer
            if last or not answer.uses or answer.stop_reason not in _CALLING:
                break
            yield told.ended()
            told.think(number, answer.thinking)
            async with aclosing(_called(run, number, answer.uses, names)) as calls:
                async for call in calls:
                    told.add(call)
                    yield call
        yield told.ended(answer.stop_reason)

    def _budget(self, agent: Agent) -> int:
        wanted = agent.metadata.get("context_tokens")
        return wanted if isinstance(wanted, int) and wanted > 0 else self._context_tokens

    def _request(self, run: Run, tools: Sequence[Tool]) -> JSONObject:
        """The request without its messages: the stable prefix is marked, and so, by the API itself, is the end.

        What tools are not there now is said behind the instructions. In the messages, where nothing of it is stored,
        it would change what the next run sends before its own question.
        """
        agent = run.agent
        request: JSONObject = {
            "model": agent.model or self._model,
            "max_tokens": agent.max_tokens or self._max_tokens,
            "cache_control": {"type": "ephemeral"},
        }
        stable: list[JSONObject] = []
        if tools:
            request["tools"] = stable = [_described(tool) for tool in sorted(tools, key=lambda tool: tool.name)]
        if agent.instructions.strip():
            request["system"] = stable = [text_block(agent.instructions)]
        if stable:
            stable[-1] = {**stable[-1], "cache_control": {"type": "ephemeral"}}
        if run.tools.missing:
            request["system"] = [*request.get("system", []), text_block(_unreachable(run.tools.missing))]
        if isinstance(thinking := agent.metadata.get("thinking"), dict):
            request["thinking"] = thinking
        return request

    async def _spoken(self, told: _Told, *, last: bool) -> AsyncGenerator[Text | Reasoning, None]:
        """One answer's text as it comes, asked for again as long as nothing of it was shown. Raises: AgentError."""
        attempt = 1
        while True:
            answer = told.begin()
            try:
                async with aclosing(self._streamed(told.request(last=last), answer)) as parts:
                    async for part in parts:
                        yield part
                return
            except Failure as failure:
                logger.info("run %s: attempt %d failed: %s", told.run.id, attempt, failure)
                wait = self._wait(failure, attempt)
                if answer.spoke or (wait is None and not told.lighter(failure)):
                    raise failure.error from failure
                if wait is not None:
                    await asyncio.sleep(wait)
                    attempt += 1
            finally:
                told.count(answer)

    def _wait(self, failure: Failure, attempt: int) -> float | None:
        """Seconds until the same request is worth another attempt; null if it isn't."""
        wait = failure.error.retry_after
        if wait is None:
            wait = self._retry_seconds * 2 ** (attempt - 1) * (0.75 + random.random() / 2)
        return wait if failure.again and attempt < ATTEMPTS and wait <= PATIENCE_SECONDS else None

    async def _streamed(self, request: JSONObject, answer: Answer) -> AsyncGenerator[Text | Reasoning, None]:
        """One request. Silence is measured by the transport's own read timer. Raises: Failure."""
        try:
            messages = self._client.messages.with_streaming_response
            async with messages.create(stream=True, extra_headers=_UNPACKED, **request) as response:
                raw = response.http_response  # aiter_bytes costs a tenth more, and is for packed ones
                received = raw.aiter_bytes() if "content-encoding" in raw.headers else raw.aiter_raw()
                async for data in received:
                    for part in answer.take(data):
                        yield part
                    if answer.failure is not None:
                        raise answer.failure
                    if answer.ended:
                        with contextlib.suppress(TimeoutError, httpx2.HTTPError):  # its end frees the connection
                            async with asyncio.timeout(_LINGER_SECONDS):
                                await anext(received, None)
                        return
            raise Failure("The model's stream ended before its message did.", again=True)
        except anthropic.APIStatusError as error:
            logger.warning("the model's service answered %d: %s", error.status_code, error.message)
            said, wait = str(error.api_message or error.message), error.response.headers.get("retry-after")
            raise failure_of_status(error.status_code, said, wait) from error
        except (anthropic.APITimeoutError, httpx2.TimeoutException) as error:
            raise Failure("The model stopped answering.", code="agent_timeout", again=True) from error
        except (anthropic.APIConnectionError, httpx2.HTTPError, OSError) as error:
            if isinstance(error.__cause__, RedirectRefused | httpx2.TooManyRedirects):
                logger.warning("Request to the model's service failed: %s", error.__cause__)
                raise Failure("The model's service redirects the request; this server does not follow.") from error
            raise Failure("The connection to the model was lost.", again=True) from error

    async def title(self, run: Run) -> str:
        """Generate a title; "" if the model generates none."""
        said = [f"{message.role}: {message.content[:2000]}" for message in run.messages[:6] if message.content.strip()]
        if not said:
            return ""
        try:
            async with asyncio.timeout(20):
                answer = await self._client.messages.create(
                    model=self._title_model or run.agent.model or self._model,
                    max_tokens=50,
                    messages=[{"role": "user", "content": _TITLE + "\n".join(said)}],
                )
            text = "".join(block.text for block in answer.content if block.type == "text")
            return text.strip().strip(" \"'.")
        except Exception as error:  # any server may be behind the URL, and there is a title without it
            logger.warning("The model generated no title: %s", error)
            return ""


class _Told:
    """What one run tells the model: the history, and its own message so far in the form in which it will be stored.

    One function makes the turns of both, so that the prefix a provider has cached stays the same.
    """

    def __init__(self, run: Run, request: JSONObject, budget: int, files: Attached) -> None:
        self.run = run
        self._files = files
        self.answer = Answer()
        self._request = request
        self._budget = budget
        self._images = True
        self._history = self._before()
        self._text: list[str] = []
        self._length = 0
        self._calls: list[ToolCall] = []
        self._known: list[JSONObject] = []
        self._indexes: dict[str, int] = {}
        self._thinking: dict[int, list[JSONObject]] = {}
        self._usage: JSONObject = {}
        self._counted = True
        self._model: str | None = None

    def request(self, *, last: bool) -> JSONObject:
        """All of the next request; in the last round no tools may be called."""
        turns = merged([*self._history, *self._turns()])
        if not self._images:
            turns = without_images(turns)
        request = {**self._request, "messages": turns}
        if "tools" not in request and has_tools(turns):  # the API wants both or neither
            request["tools"] = [_NO_TOOL]
            last = True
        if last and "tools" in request:
            request["tool_choice"] = {"type": "none"}
        return request

    def lighter(self, failure: Failure) -> bool:
        """Make the next request shorter or simpler, if that may help; false if it can't be."""
        if failure.too_long:
            before = self._history
            while self._budget > 1:
                self._budget //= _SHRINK
                self._history = self._before()
                if self._history != before:
                    return True
        if (failure.refused or failure.too_long) and self._images:
            self._images = False
            turns = [*self._history, *self._turns()]
            return without_images(turns) != turns
        return False

    def add(self, part: Part) -> None:
        match part:
            case Text(text=text):
                if text and self._known and self._known[-1]["offset"] == self._length:  # as in the stored message
                    text = separator("".join(self._text)) + text
                self._text.append(text)
                self._length += len(text)
            case ToolStarted():
                self._indexes[part.id] = len(self._calls)
                self._calls.append(ToolCall(part.tool_name, part.arguments))
                self._known.append({"round": part.round, "offset": self._length})
            case ToolCompleted():
                index = self._indexes[part.id]
                self._calls[index] = msgspec.structs.replace(self._calls[index], result=part.result, error=part.error)

    def think(self, number: int, blocks: list[JSONObject]) -> None:
        """Keep a round's thinking: the API wants it back, signed, while the answer goes on."""
        self._thinking[number] = blocks

    def begin(self) -> Answer:
        """Expect an answer, or another attempt at one."""
        self.answer, self._counted = Answer(), False
        return self.answer

    def count(self, answer: Answer) -> None:
        """Sum up what the service counted."""
        self._model = answer.model or self._model
        self._counted = True
        _add(self._usage, answer.usage)

    def ended(self, stop_reason: str | None = None) -> Ended:
        """What is known so far, of the answer that is coming in too."""
        usage = dict(self._usage)
        if not self._counted:
            _add(usage, self.answer.usage)
        return Ended(stop_reason=stop_reason, model=self.answer.model or self._model, usage=usage or None)

    def _before(self) -> list[Turn]:
        return history(self.run.messages, self._budget, earlier=self.run.earlier, files=self._files)

    def _turns(self) -> list[Turn]:
        """This run's own; there is one of the assistant's for each round."""
        run: JSONObject = {"status": "in_progress", "tool_calls": self._known}
        text = "".join(self._text)
        turns = turns_of(Message(self.run.id, "", text, "", "assistant", self._calls, [], {"run": run}, ""))
        spoken = [turn for turn in turns if turn["role"] == "assistant"]
        for number, turn in enumerate(spoken):
            turn["content"] = [*self._thinking.get(number, []), *turn["content"]]
        return turns


async def _called(
    run: Run, number: int, uses: Sequence[Use], names: dict[str, str]
) -> AsyncGenerator[ToolStarted | Part, None]:
    """Make the calls of one round; one whose arguments are no JSON object is an error without being made."""
    wanted: list[ToolUse] = []
    for index, use in enumerate(uses):
        call = ToolUse(f"{number}_{index}", names.get(use.name, use.name), use.arguments)
        if use.unreadable:
            yield ToolStarted(call.id, call.name, call.arguments, number, repeatable=True)  # it is not made
            yield ToolCompleted(call.id, error="The arguments were no JSON object.")
        else:
            wanted.append(call)
    calls = run.tools.call(wanted, round=number)
    try:
        async for part in calls:
            yield part
    finally:
        if isinstance(calls, AsyncGenerator):
            await calls.aclose()


def _described(tool: Tool) -> JSONObject:
    """A tool as the API takes it: its schema is of an object, and alternatives may not stand at the top."""
    unwanted = ("$schema", "oneOf", "anyOf", "allOf")
    schema = {key: value for key, value in tool.parameters.items() if key not in unwanted}
    schema["type"] = "object"
    return {"name": model_name(tool.name), "description": tool.description, "input_schema": schema}


def _unreachable(missing: Mapping[str, str]) -> str:
    """What the model is told of servers whose tools are missing. The reasons are ours, never a server's own words."""
    return "\n".join(f"[The tools of the server {name} are not available now. {why}]" for name, why in missing.items())


def _add(usage: JSONObject, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        usage[name] = usage.get(name, 0) + count


@lru_cache(4096)
def _acceptable(schema: bytes) -> bool:
    """Whether the API takes this schema, and not only its server's own dialect: else it refuses the whole request.

    https://platform.claude.com/docs/en/agents-and-tools/tool-use/implement-tool-use
    """
    parameters = {name: value for name, value in msgspec.json.decode(schema).items() if name != "$schema"}
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as error:
        logger.warning("a tool is left out, its schema is none of draft 2020-12: %s", error.message)
        return False
    for name in parameters.get("properties", {}):
        if not _PROPERTY.fullmatch(name):
            logger.warning("a tool is left out, it has a parameter with a name that the API refuses: %r", name)
            return False
    return True
