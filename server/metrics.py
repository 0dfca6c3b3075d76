"""/metrics: what an operator watches, read off the parts when Prometheus asks. Nothing is counted per token."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.runner import Runner
from server.streams import Streams


class _Parts(Collector):
    def __init__(self, runner: Runner, streams: Streams) -> None:
        self._runner = runner
        self._streams = streams

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("chat_runs_in_progress", "Runs of this process.", self._runner.count)
        yield GaugeMetricFamily("chat_streams_open", "Open event streams, SSE and WebSocket.", len(self._streams))
        yield GaugeMetricFamily("chat_draining", "1 while the server is stopping.", int(self._runner.draining))
        yield CounterMetricFamily("chat_runs_started", "Runs begun by this process.", self._runner.started)
        ended = CounterMetricFamily("chat_runs_ended", "Runs whose end this process stored.", labels=["status"])
        for status, count in self._runner.ended.items():
            ended.add_metric([status], count)
        yield ended


class Metrics:
    def __init__(self, runner: Runner, streams: Streams) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Parts(runner, streams))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)
