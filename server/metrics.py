"""The metrics of /metrics. Other modules count plain numbers, which are read when Prometheus requests them.

The values of labels are bounded: routes by their template, methods and outcomes by fixed sets. Nothing is counted per
token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from agent_chat.agents.mcp.pool import Pool
from agent_chat.server.ai_chat_service import AIChatService
from agent_chat.server.http.auth_failures import AuthFailures
from agent_chat.server.http.connections import Connections
from agent_chat.server.loop_share import LoopShares
from agent_chat.server.reading.streams import Streams
from agent_chat.server.statistics import Durations
from agent_chat.server.supervision import Supervisor

_METHODS = {"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", "WEBSOCKET"}


class Metrics(Collector):
    """The metrics of this process.

    Args:
        connections: None if another server than `serving.Server` serves the application.
    """

    def __init__(
        self,
        service: AIChatService,
        streams: Streams,
        supervisor: Supervisor,
        auth_failures: AuthFailures,
        shares: LoopShares,
        connections: Connections | None,
        tools: Pool,
    ) -> None:
        self._runner = service.runner
        self._queues = service.queues
        self._streams = streams
        self._supervisor = supervisor
        self._store = service.store
        self._log = service.log
        self._auth_failures = auth_failures
        self._shares = shares
        self._connections = connections
        self._tools = tools
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._latencies: defaultdict[str, Durations] = defaultdict(Durations)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. `route`: its template; `seconds`: until its response started."""
        self._requests[method if method in _METHODS else "other", route, str(status)] += 1
        self._latencies[route].add(seconds)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics, as prometheus_client's registry asks for them."""
        yield from self._collect_requests()
        yield from self._collect_runs()
        yield from self._collect_queues()
        yield GaugeMetricFamily("chat_streams_open", "Open event streams, SSE and WebSocket.", len(self._streams))
        yield GaugeMetricFamily("chat_log_bytes", "Memory that all event logs hold here.", self._log.budget.used)
        yield CounterMetricFamily(
            "chat_log_evictions", "Times that a log was evicted from memory.", self._log.budget.evictions
        )
        yield CounterMetricFamily("chat_store_failures", "Database calls that failed.", self._store.failures)
        yield CounterMetricFamily("chat_log_failures", "Attempts to append events that failed.", self._log.failures)
        yield GaugeMetricFamily(
            "chat_log_unavailable", "1 while the event log takes no events.", int(self._log.unreachable)
        )
        yield GaugeMetricFamily("chat_log_volatile", "1 while events are kept in memory only.", int(self._log.volatile))
        yield GaugeMetricFamily("chat_log_disk_bytes", "Bytes of the event log on this disk.", self._log.disk_bytes)
        yield CounterMetricFamily("chat_loop_restarts", "Background loops started again.", self._supervisor.restarts)
        yield GaugeMetricFamily("chat_loops_failing", "Background loops that fail.", len(self._supervisor.failing))
        connected = GaugeMetricFamily(
            "chat_tool_server_ready", "1 while an MCP server is connected.", labels=["server"]
        )
        for name, state in self._tools.states.items():
            connected.add_metric([name], int(state == "ready"))
        yield connected
        if self._connections is not None:
            yield from _collect_connections(self._connections)

    def _collect_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("chat_requests", "Requests.", labels=["method", "route", "status"])
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        help = "Times that a request waited because its organization took too much of the event loop."
        yield CounterMetricFamily("chat_requests_delayed", help, self._shares.waits)
        yield CounterMetricFamily("chat_auth_failures", "Wrong keys and sessions.", self._auth_failures.total)
        latencies = HistogramMetricFamily(
            "chat_response_start_seconds", "Seconds until a response started.", labels=["route"]
        )
        for route, durations in self._latencies.items():
            latencies.add_metric([route], buckets=durations.cumulated(), sum_value=durations.seconds)
        yield latencies

    def _collect_runs(self) -> Iterator[Metric]:
        runner, runs = self._runner, self._runner.statistics
        yield GaugeMetricFamily("chat_runs_in_progress", "Runs of this process.", runner.count)
        yield GaugeMetricFamily("chat_draining", "1 while the server is stopping.", int(runner.draining))
        yield CounterMetricFamily("chat_runs_started", "Runs started by this process.", runner.started)
        yield _counter("chat_runs_ended", "Runs whose finished message this process stored.", "status", runs.ended)
        yield _counter("chat_run_failures", "Failed runs by their error's code.", "code", runs.failures)
        yield _counter("chat_tokens", "Tokens that models reported.", "kind", runs.tokens)
        yield _counter("chat_tool_calls", "Tool calls of ended runs.", "outcome", runs.tool_calls)
        yield HistogramMetricFamily(
            "chat_first_text_seconds",
            "Seconds from a run's start to its first text.",
            buckets=runs.first_text.cumulated(),
            sum_value=runs.first_text.seconds,
        )

    def _collect_queues(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("chat_worker_waiting", "Texts and files that wait for a worker.", labels=["queue"])
        running = GaugeMetricFamily("chat_worker_running", "Texts and files in a worker.", labels=["queue"])
        refused = CounterMetricFamily(
            "chat_worker_refused", "Texts and files refused because the queue was full.", labels=["queue"]
        )
        for name, turns in self._queues.items():
            waiting.add_metric([name], turns.waiting)
            running.add_metric([name], turns.running)
            refused.add_metric([name], turns.refused)
        yield from (waiting, running, refused)


def _collect_connections(connections: Connections) -> Iterator[Metric]:
    yield GaugeMetricFamily("chat_connections_open", "Open connections.", len(connections))
    yield GaugeMetricFamily("chat_connections_limit", "Connections that may be open.", connections.limits.count)
    refused = Counter({"full": connections.refused, "malformed": connections.malformed})
    yield _counter("chat_connections_refused", "Connections or requests refused unread.", "reason", refused)
    yield _counter("chat_connections_expired", "Connections closed by a time limit.", "state", connections.expired)


def _counter(name: str, help: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
