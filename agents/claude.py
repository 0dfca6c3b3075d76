"""Agents of kind `claude`: Claude, or any server that speaks the Anthropic Messages API.

The official SDK does the requests (auth, base URL, aiohttp transport); the stream's raw lines are decoded with msgspec,
which costs half of the SDK's typed path per token. Retrying is done here and not by the SDK: it must also cover a
stream that breaks before its first token, and must not sleep through a long Retry-After while a client waits.

https://platform.claude.com/docs/en/build-with-claude/streaming
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import anthropic
import httpx2
import msgspec

from agents import AgentError, Ended, Part, Reasoning, Run, Text, Tool, ToolCompleted, ToolStarted, ToolUse, titles
from agents.context import Turn, history, merged, model_name, turns_of
from stores.models import JSONObject, Message, ToolCall

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "claude-sonnet-5-5"
MAX_TOKENS = 8192
MAX_ROUNDS = 16
CONTEXT_TOKENS = 160_000
STALL_SECONDS = 60.0
ATTEMPTS = 3
PATIENCE_SECONDS = 5.0
"""The longest Retry-After that is waited out; a longer one is passed on to the client."""

_TITLE = (
    "Write a title of at most six words for the chat below, in its language. Answer with the title alone, without "
    "quotes and without a full stop.\n\n"
)


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Block(msgspec.Struct):
    type: str = ""
    id: str = ""
    name: str = ""
    text: str = ""
    thinking: str = ""
    data: str = ""
    input: Any = None


class _Start(msgspec.Struct):
    model: str | None = None
    usage: dict[str, Any] | None = None


class _Error(msgspec.Struct):
    type: str = ""
    message: str = ""


class _Event(msgspec.Struct):
    """Any event of the stream; what it doesn't have keeps its default."""

    type: str = ""
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Start | None = None
    usage: dict[str, Any] | None = None
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Event)


class _Failure(Exception):
    """An attempt failed: what the client is told, and whether another attempt may help.

    `too_long`: the history must shrink before another attempt.
    """

    def __init__(self, error: AgentError, *, again: bool, too_long: bool = False) -> None:
        super().__init__(error.detail)
        self.error = error
        self.again = again
        self.too_long = too_long


class _Round:
    """What the model said in one request."""

    def __init__(self) -> None:
        self.spoke = False
        self.ended = False
        self.stop_reason: str | None = None
        self.model: str | None = None
        self.usage: dict[str, int] = {}
        self.uses: list[tuple[str, JSONObject]] = []
        self.thinking: list[JSONObject] = []
        self._open: dict[int, tuple[_Block, list[str], list[str]]] = {}

    def take(self, event: _Event) -> Text | Reasoning | None:
        """Add one event; what of it is to be shown."""
        match event.type:
            case "content_block_delta" if event.delta is not None:
                return self._take_delta(event.index, event.delta)
            case "content_block_start" if event.content_block is not None:
                block = event.content_block
                self._open[event.index] = (block, [], [])
                self.spoke = True
                if block.type == "text" and block.text:
                    return Text(block.text)
            case "content_block_stop":
                self._close(event.index)
            case "message_start" if event.message is not None:
                self.model = event.message.model
                self._count(event.message.usage)
            case "message_delta":
                self.stop_reason = event.delta.stop_reason if event.delta else None
                self._count(event.usage)
            case "message_stop":
                self.ended = True
            case "error":
                kind = event.error.type if event.error else ""
                raise _failure_of_type(kind, None)
        return None

    def _take_delta(self, index: int, delta: _Delta) -> Text | Reasoning | None:
        self.spoke = True
        _, parts, signatures = self._open.setdefault(index, (_Block(), [], []))
        match delta.type:
            case "text_delta":
                return Text(delta.text)
            case "input_json_delta":
                parts.append(delta.partial_json)
            case "thinking_delta":
                parts.append(delta.thinking)
                return Reasoning(delta.thinking)
            case "signature_delta":
                signatures.append(delta.signature)
        return None

    def _close(self, index: int) -> None:
        block, parts, signatures = self._open.pop(index, (_Block(), [], []))
        match block.type:
            case "tool_use":
                self.uses.append((block.name, _arguments("".join(parts), block.input)))
            case "thinking":
                thinking = block.thinking + "".join(parts)
                self.thinking.append({"type": "thinking", "thinking": thinking, "signature": "".join(signatures)})
            case "redacted_thinking":
                self.thinking.append({"type": "redacted_thinking", "data": block.data})

    def _count(self, usage: dict[str, Any] | None) -> None:
        for name, value in (usage or {}).items():
            if name.endswith("_tokens") and isinstance(value, int):
                self.usage[name] = value


class Claude:
    """The `claude` kind on one API: its `reply` and its `title`.

    Args:
        api_key: null for servers that want none.
        base_url: null for Anthropic's.
        model: for agents that name none.
        title_model: for titles; null for the agent's own.
        stall_seconds: how long the stream may say nothing.
        context_tokens: how much history is sent, roughly.
    """

    def __init__(
        self,
        api_key: str | None,
        base_url: str | None = None,
        *,
        model: str | None = None,
        title_model: str | None = None,
        stall_seconds: float = STALL_SECONDS,
        context_tokens: int = CONTEXT_TOKENS,
    ) -> None:
        self._model = model or DEFAULT_MODEL
        self._title_model = title_model
        self._stall_seconds = stall_seconds
        self._context_tokens = context_tokens
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key or "none",
            base_url=base_url,
            max_retries=0,
            http_client=anthropic.DefaultAioHttpClient(timeout=httpx2.Timeout(600.0, connect=10.0)),
        )

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, run: Run) -> AsyncIterator[Part]:
        """Speak, call tools, speak on, for at most 16 rounds of tools."""
        tools = await run.tools.available() if run.agent.mcp_servers else []
        names = {model_name(tool.name): tool.name for tool in tools}
        answer = _Answer(run.id, run.messages[-1])
        ended = Ended()
        for number in range(MAX_ROUNDS + 1):
            said = _Round()
            request = self._request(run, tools, last=number == MAX_ROUNDS)
            async for part in self._spoken(run, request, answer, said):
                answer.add(part)
                yield part
            ended = _summed(ended, said)
            if said.stop_reason != "tool_use" or not said.uses:
                break
            uses = [
                ToolUse(f"{number}_{index}", names.get(name, name), arguments)
                for index, (name, arguments) in enumerate(said.uses)
            ]
            answer.think(number, said.thinking)
            calls = run.tools.call(uses, round=number)
            try:
                async for call in calls:
                    answer.add(call)
                    yield call
            finally:
                if isinstance(calls, AsyncGenerator):
                    await calls.aclose()
        yield ended

    def _request(self, run: Run, tools: Sequence[Tool], *, last: bool) -> JSONObject:
        """The request without its messages: the stable prefix is marked, and so, by the API itself, is the end."""
        agent = run.agent
        request: JSONObject = {
            "model": agent.model or self._model,
            "max_tokens": agent.max_tokens or MAX_TOKENS,
            "cache_control": {"type": "ephemeral"},
        }
        stable: list[JSONObject] = []
        if tools:
            described = sorted(tools, key=lambda tool: tool.name)
            request["tools"] = stable = [
                {"name": model_name(tool.name), "description": tool.description, "input_schema": tool.parameters}
                for tool in described
            ]
            if last:
                request["tool_choice"] = {"type": "none"}
        if agent.instructions.strip():
            request["system"] = stable = [{"type": "text", "text": agent.instructions}]
        if stable:
            stable[-1] = {**stable[-1], "cache_control": {"type": "ephemeral"}}
        if isinstance(thinking := agent.metadata.get("thinking"), dict):
            request["thinking"] = thinking
        return request

    async def _spoken(
        self, run: Run, request: JSONObject, answer: _Answer, said: _Round
    ) -> AsyncIterator[Text | Reasoning]:
        """One request's text as it comes, tried again as long as nothing of it was shown."""
        budget = self._context_tokens
        attempt = 1
        while True:
            turns = merged([*history(run.messages, budget), *_unreachable(run), *answer.turns()])
            try:
                async for part in self._streamed({**request, "messages": turns}, said):
                    yield part
                return
            except _Failure as failure:
                if said.spoke or not failure.again or attempt >= ATTEMPTS:
                    raise failure.error from failure
                wait = failure.error.retry_after or 0.25 * 2**attempt * (0.75 + random.random() / 2)
                if wait > PATIENCE_SECONDS:
                    raise failure.error from failure
                logger.info("run %s: attempt %d failed: %s", run.id, attempt, failure)
                if failure.too_long:
                    budget //= 3
                else:
                    await asyncio.sleep(wait)
                attempt += 1

    async def _streamed(self, request: JSONObject, said: _Round) -> AsyncIterator[Text | Reasoning]:
        """One attempt. No time limit stands open across a `yield`. Raises: _Failure."""
        try:
            async with AsyncExitStack() as stack:
                messages = self._client.messages.with_streaming_response
                async with asyncio.timeout(self._stall_seconds):
                    response = await stack.enter_async_context(messages.create(stream=True, **request))
                received = response.iter_bytes()
                rest = b""
                while not said.ended:
                    async with asyncio.timeout(self._stall_seconds):
                        data = await anext(received, None)
                    if data is None:
                        raise _failed("The model's stream ended before its message did.", again=True)
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:") and (part := said.take(_decoder.decode(line[5:]))) is not None:
                            yield part
        except TimeoutError as error:
            raise _failed("The model stopped answering.", code="agent_timeout", again=True) from error
        except anthropic.APIStatusError as error:
            raise _failure_of_status(error) from error
        except (anthropic.APIConnectionError, httpx2.HTTPError, OSError) as error:
            raise _failed("The connection to the model was lost.", again=True) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _failed("The model's answer can't be read.", again=False) from error

    async def title(self, run: Run) -> str:
        """A title by the model; the first words of the thread if that fails."""
        said = [f"{message.role}: {message.content[:2000]}" for message in run.messages[:6] if message.content.strip()]
        try:
            async with asyncio.timeout(20):
                answer = await self._client.messages.create(
                    model=self._title_model or run.agent.model or self._model,
                    max_tokens=50,
                    messages=[{"role": "user", "content": _TITLE + "\n".join(said)}],
                )
            text = "".join(block.text for block in answer.content if block.type == "text")
            line = " ".join(text.split()).strip(" \"'.")[:100]
            if line:
                return line
        except (anthropic.AnthropicError, httpx2.HTTPError, OSError, TimeoutError) as error:
            logger.warning("no title by the model: %s", error)
        return await titles.from_first_message(run)


class _Answer:
    """This run's own message so far, in the form in which it will be stored, so that one function makes its turns."""

    def __init__(self, run_id: str, question: Message) -> None:
        run: JSONObject = {"status": "in_progress", "tool_calls": []}
        self._empty = Message(run_id, question.thread_id, "", "", "assistant", [], [], {"run": run}, "")
        self._text = ""
        self._calls: list[ToolCall] = []
        self._known: list[JSONObject] = []
        self._ids: dict[str, int] = {}
        self._thinking: dict[int, list[JSONObject]] = {}

    def add(self, part: Part) -> None:
        match part:
            case Text(text=text):
                self._text += text
            case ToolStarted():
                self._ids[part.id] = len(self._calls)
                self._calls.append(ToolCall(part.tool_name, part.arguments))
                self._known.append({"round": part.round, "offset": len(self._text)})
            case ToolCompleted():
                call = self._calls[self._ids[part.id]]
                self._calls[self._ids[part.id]] = msgspec.structs.replace(call, result=part.result, error=part.error)

    def think(self, number: int, blocks: list[JSONObject]) -> None:
        """Keep a round's thinking: the API wants it back, signed, while the answer goes on."""
        self._thinking[number] = blocks

    def turns(self) -> list[Turn]:
        message = msgspec.structs.replace(
            self._empty, content=self._text, tool_calls=self._calls, metadata={"run": {"tool_calls": self._known}}
        )
        turns = turns_of(message)
        spoken = [turn for turn in turns if turn["role"] == "assistant"]
        for number, turn in enumerate(spoken):
            turn["content"] = [*self._thinking.get(number, []), *turn["content"]]
        return turns


def _unreachable(run: Run) -> list[Turn]:
    """What the model is told of tools that it can't have now."""
    if not run.tools.missing:
        return []
    lines = [f"[The tools of {server} are not there now. {why}]" for server, why in run.tools.missing.items()]
    return [{"role": "user", "content": [{"type": "text", "text": "\n".join(lines)}]}]


def _summed(before: Ended, said: _Round) -> Ended:
    usage = dict(before.usage or {})
    for name, count in said.usage.items():
        usage[name] = usage.get(name, 0) + count
    return Ended(stop_reason=said.stop_reason, model=said.model or before.model, usage=usage)


def _arguments(text: str, given: object) -> JSONObject:
    """A call's arguments: the joined JSON, or what stood in the block's start where no deltas came."""
    try:
        found = msgspec.json.decode(text) if text.strip() else given
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = {"unreadable": text}
    return found if isinstance(found, dict) else {}


def _failed(
    detail: str,
    *,
    again: bool,
    code: str = "agent_failed",
    retry_after: float | None = None,
    too_long: bool = False,
) -> _Failure:
    error = AgentError(detail, code=code, retryable=again and not too_long, retry_after=retry_after)
    return _Failure(error, again=again, too_long=too_long)


def _failure_of_status(error: anthropic.APIStatusError) -> _Failure:
    """What a refusal means. The service's own text stays in our log: it may name accounts and limits."""
    logger.warning("the model's service answered %d: %s", error.status_code, error.message)
    said = str(error.api_message or error.message).lower()
    match error.status_code:
        case 401 | 403:
            return _failed("The model's service refused this server's key.", again=False)
        case 404:
            return _failed("The model's service doesn't know this agent's model.", again=False)
        case 413:
            return _failed("The thread is longer than the model can read.", again=True, too_long=True)
        case 400 if "too long" in said or "context" in said or "too many tokens" in said:
            return _failed("The thread is longer than the model can read.", again=True, too_long=True)
        case 429:
            return _failure_of_type("rate_limit_error", error)
        case 503 | 529:
            return _failure_of_type("overloaded_error", error)
        case status if status >= 500 or status in (408, 409):
            return _failure_of_type(error.type or "api_error", error)
        case _:
            return _failed("The model's service refused the request.", again=False)


def _failure_of_type(kind: str, error: anthropic.APIStatusError | None) -> _Failure:
    wait = _seconds(error.response.headers.get("retry-after")) if error else None
    match kind:
        case "overloaded_error":
            return _failed("The model is overloaded.", code="agent_overloaded", again=True, retry_after=wait)
        case "rate_limit_error":
            return _failed("The model's rate limit is reached.", code="agent_overloaded", again=True, retry_after=wait)
        case "timeout_error":
            return _failed("The model took too long.", code="agent_timeout", again=True, retry_after=wait)
        case _:
            return _failed("The model's service failed.", again=True, retry_after=wait)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
