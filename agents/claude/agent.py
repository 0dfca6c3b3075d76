"""Agents of kind `claude`: Claude, or any server that implements the Anthropic Messages API.

The official SDK sends the requests (authentication, base URL, aiohttp transport). The raw lines of the stream are
decoded by messages_api.py, at a fraction of the CPU time that the SDK's typed events take per token. Retries are made
here and not by the SDK: they must also cover a stream that breaks before its first token, and must not wait for a long
Retry-After while a client waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import anthropic
import httpx2

from agent_chat.agents import AgentError, Part, Reasoning, Run, Text, Tool, ToolCompleted, ToolStarted, ToolUse
from agent_chat.agents.claude.attachments import load_files
from agent_chat.agents.claude.blocks import text_block
from agent_chat.agents.claude.history import model_name
from agent_chat.agents.claude.messages_api import Failure, RequestedCall, StreamedResponse, failure_of_status
from agent_chat.agents.claude.request import RequestBuilder
from agent_chat.agents.claude.tool_schemas import accepted_tools, describe_missing, describe_tool
from agent_chat.agents.model_http import RedirectRefused, model_client
from agent_chat.stores.models import Agent, JSONObject

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "claude-sonnet-5-5"
MAX_TOKENS = 8192
MAX_ROUNDS = 16
CONTEXT_TOKENS = 160_000
STALL_SECONDS = 60.0
ATTEMPTS = 3
RETRY_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""The longest Retry-After that the run waits for; a longer one is passed on to the client."""

ANTHROPIC_IDLE_SECONDS = 60.0
IDLE_SECONDS = 4.0
"""How long an idle connection may be used again. Servers on uvicorn (vLLM, many gateways) close it after 5 s, and a
request that is sent at that moment is lost."""
TITLE_SECONDS = 20.0

_LINGER_SECONDS = 0.5
_UNCOMPRESSED = {"Accept-Encoding": "identity"}
_CALLING = ("tool_use", "end_turn")
"""Stop reasons of a response whose calls are complete; some local servers send the second one."""
_TITLE = (
    "Write a title of at most six words for the chat below, in its language. Answer with the title alone, without "
    "quotes and without a full stop.\n\n"
)


class Claude:
    """The kind `claude` on one API: `reply` and `title`. Close it after its last run.

    An agent's metadata may contain `context_tokens`, if its model reads less (or more) than the default, and
    `thinking`, which is sent to the API unchanged.

    Args:
        api_key: None for servers that require none.
        base_url: None for Anthropic's.
        model: for agents without a model of their own.
        max_tokens: for agents without a limit of their own; at most MAX_TOKENS.
        title_model: for titles; None for the agent's model.
        stall_seconds: how long the stream may send nothing.
        context_tokens: how much history is sent, roughly.
        retry_seconds: the delay before the second attempt; the one before the third is twice as long.
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
                idle_seconds=IDLE_SECONDS if base_url else ANTHROPIC_IDLE_SECONDS,
            ),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def reply(self, run: Run) -> AsyncGenerator[Part, None]:
        """Generate the answer, with at most MAX_ROUNDS rounds of tool calls."""
        tools = accepted_tools(await run.tools.available()) if run.agent.mcp_servers else []
        names = {model_name(tool.name): tool.name for tool in tools}
        budget = self._budget(run.agent)
        builder = RequestBuilder(run, self._request(run, tools), budget, await load_files(run, budget))
        for round in range(MAX_ROUNDS + 1):
            last = round == MAX_ROUNDS
            try:
                async with aclosing(self._generate_with_retries(builder, last=last)) as parts:
                    begun = False
                    async for part in parts:
                        if not begun:
                            begun = True
                            yield builder.ended()  # a cancelled run still has its model and usage
                        builder.add(part)
                        yield part
            except AgentError:
                yield builder.ended()
                raise
            response = builder.response
            if last or not response.calls or response.stop_reason not in _CALLING:
                break
            yield builder.ended()
            builder.add_thinking(round, response.thinking)
            requested = builder.with_unique_ids(response.calls, round)
            async with aclosing(_make_calls(run, round, requested, names)) as calls:
                async for call in calls:
                    builder.add(call)
                    yield call
        yield builder.ended(response.stop_reason)

    def _budget(self, agent: Agent) -> int:
        tokens = agent.metadata.get("context_tokens")
        return tokens if isinstance(tokens, int) and tokens > 0 else self._context_tokens

    def _request(self, run: Run, tools: Sequence[Tool]) -> JSONObject:
        """The request without its messages. The end of its stable prefix is marked for caching, as is its own end.

        The note on missing tools follows the instructions. In the messages, where it is not stored, it would change
        what the next run sends before its own question.
        """
        agent = run.agent
        request: JSONObject = {
            "model": agent.model or self._model,
            "max_tokens": agent.max_tokens or self._max_tokens,
            "cache_control": {"type": "ephemeral"},
        }
        stable: list[JSONObject] = []
        if tools:
            request["tools"] = stable = [describe_tool(tool) for tool in sorted(tools, key=lambda tool: tool.name)]
        if agent.instructions.strip():
            request["system"] = stable = [text_block(agent.instructions)]
        if stable:
            stable[-1] = {**stable[-1], "cache_control": {"type": "ephemeral"}}
        if run.tools.missing:
            request["system"] = [*request.get("system", []), text_block(describe_missing(run.tools.missing))]
        if isinstance(thinking := agent.metadata.get("thinking"), dict):
            request["thinking"] = thinking
        return request

    async def _generate_with_retries(
        self, builder: RequestBuilder, *, last: bool
    ) -> AsyncGenerator[Text | Reasoning, None]:
        """Stream one response. Another attempt is made only as long as nothing was yielded. Raises: AgentError."""
        attempt = 1
        while True:
            response = builder.begin_response()
            try:
                async with aclosing(self._stream(builder.build(last=last), response)) as parts:
                    async for part in parts:
                        yield part
                return
            except Failure as failure:
                logger.info("run %s: attempt %d failed: %s", builder.run.id, attempt, failure)
                delay = self._retry_delay(failure, attempt)
                if response.has_output or (delay is None and not builder.simplify(failure)):
                    raise failure.error from failure
                if delay is not None:
                    await asyncio.sleep(delay)
                    attempt += 1
            finally:
                builder.count_usage()

    def _retry_delay(self, failure: Failure, attempt: int) -> float | None:
        """Seconds before the same request is sent again; None if it must not be."""
        delay = failure.error.retry_after
        if delay is None:
            delay = self._retry_seconds * 2 ** (attempt - 1) * (0.75 + random.random() / 2)
        return delay if failure.retryable and attempt < ATTEMPTS and delay <= PATIENCE_SECONDS else None

    async def _stream(self, request: JSONObject, response: StreamedResponse) -> AsyncGenerator[Text | Reasoning, None]:
        """Send one request. A stalled stream is detected by the transport's own read timeout. Raises: Failure."""
        try:
            messages = self._client.messages.with_streaming_response
            async with messages.create(stream=True, extra_headers=_UNCOMPRESSED, **request) as http:
                raw = http.http_response
                # aiter_bytes costs a tenth more, and is needed for compressed responses only
                received = raw.aiter_bytes() if "content-encoding" in raw.headers else raw.aiter_raw()
                async for data in received:
                    for part in response.feed(data):
                        yield part
                    if response.failure is not None:
                        raise response.failure
                    if response.complete:
                        # the connection is used again only if the body is read to its end
                        with contextlib.suppress(TimeoutError, httpx2.HTTPError):
                            async with asyncio.timeout(_LINGER_SECONDS):
                                await anext(received, None)
                        return
            raise Failure("The model's stream ended before its message did.", retryable=True)
        except anthropic.APIStatusError as error:
            logger.warning("Request to the model's service failed with status %d: %s", error.status_code, error.message)
            message = str(error.api_message or error.message)
            retry_after = error.response.headers.get("retry-after")
            raise failure_of_status(error.status_code, message, retry_after) from error
        except (anthropic.APITimeoutError, httpx2.TimeoutException) as error:
            raise Failure("The model stopped answering.", code="agent_timeout", retryable=True) from error
        except (anthropic.APIConnectionError, httpx2.HTTPError, OSError) as error:
            if isinstance(error.__cause__, RedirectRefused | httpx2.TooManyRedirects):
                logger.warning("Request to the model's service failed: %s", error.__cause__)
                raise Failure("The model's service redirects the request; this server does not follow.") from error
            raise Failure("The connection to the model was lost.", retryable=True) from error

    async def title(self, run: Run) -> str:
        """Generate a title; "" if the model generates none."""
        lines = [f"{message.role}: {message.content[:2000]}" for message in run.messages[:6] if message.content.strip()]
        if not lines:
            return ""
        try:
            async with asyncio.timeout(TITLE_SECONDS):
                response = await self._client.messages.create(
                    model=self._title_model or run.agent.model or self._model,
                    max_tokens=50,
                    messages=[{"role": "user", "content": _TITLE + "\n".join(lines)}],
                )
            text = "".join(block.text for block in response.content if block.type == "text")
            return text.strip().strip(" \"'.")
        except Exception as error:  # a server behind the URL may send anything, and a title can be made without it
            logger.warning("The model generated no title: %s", error)
            return ""


async def _make_calls(
    run: Run, round: int, calls: Sequence[RequestedCall], names: dict[str, str]
) -> AsyncGenerator[Part, None]:
    """Make the calls of one round. One whose arguments are not a JSON object completes with an error instead."""
    uses: list[ToolUse] = []
    for call in calls:
        use = ToolUse(call.id, names.get(call.name, call.name), call.arguments)
        if call.unreadable:
            yield ToolStarted(use.id, use.name, use.arguments, round, repeatable=True)  # it is not made
            yield ToolCompleted(use.id, error="The arguments were no JSON object.")
        else:
            uses.append(use)
    parts = run.tools.call(uses, round=round)
    try:
        async for part in parts:
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()
