"""GET /metrics: vLLM's names, which dashboards, routers and load generators read, and our own."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qnext.runtime.engine import Engine
from qnext.runtime.request import Output
from qnext.runtime.service import Service
from qnext.server.streams import REASONS

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SIZES = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


class EngineCollector:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, service: Service, model: str) -> None:
        self.service, self.model = service, model

    def collect(self) -> Iterator[Metric]:
        engine = self.service.engine
        for name, text, value in _gauges(engine):
            yield self._one(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, text, value in _counters(engine):
            yield self._one(CounterMetricFamily(name, text, labels=["model_name"]), value)
        finished = CounterMetricFamily(
            "vllm:request_success",
            "Requests that ended, by what ended them",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in sorted(_reasons(engine).items()):
            finished.add_metric([self.model, reason], count)
        yield finished
        accepted = CounterMetricFamily(
            "qnext:accepted_guesses",
            "Guesses that were accepted, by their position in the draft",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(engine.stats.acceptance.accepted):
            accepted.add_metric([self.model, str(position)], count)
        yield accepted

    def _one(self, family: Metric, value: float) -> Metric:
        family.add_metric([self.model], value)  # type: ignore[attr-defined]
        return family


def _gauges(engine: Engine) -> list[tuple[str, str, float]]:
    board, options = engine.board, engine.options
    used = options.pool - board.pages.free
    return [
        ("vllm:num_requests_running", "Requests that have a row", len(board.running)),
        ("vllm:num_requests_waiting", "Requests that wait for one", len(board.waiting)),
        ("vllm:kv_cache_usage_perc", "Share of pages in use, 0 to 1", used / options.pool),
        ("qnext:rows", "Rows for sequences", options.rows),
        ("qnext:rows_free", "Rows that no sequence has", board.free_rows),
        ("qnext:pages", "Pages of 128 tokens", options.pool),
        ("qnext:pages_free", "Pages that nobody holds", board.pages.free),
        ("qnext:pages_cached", "Pages that the prefix cache holds", board.cache.held),
        ("qnext:snapshots", "States in the prefix cache", len(board.cache)),
        ("qnext:snapshot_bytes", "Bytes of these states", board.cache.bytes),
        ("qnext:fallback_sites", "Sites of compiled steps left on the reference", engine.fallbacks),
    ]


def _counters(engine: Engine) -> list[tuple[str, str, float]]:
    stats = engine.stats
    drafted = sum(stats.acceptance.judged)
    return [
        ("vllm:prompt_tokens", "Tokens of prompts, cached ones among them", stats.prompt),
        ("vllm:generation_tokens", "Tokens generated", stats.generated),
        ("vllm:prefix_cache_queries", "Tokens looked up in the cache", stats.cache_queries),
        ("vllm:prefix_cache_hits", "Tokens found there", stats.cache_hits),
        ("vllm:num_preemptions", "Sequences swapped out", stats.preempted),
        ("vllm:corrupted_requests", "Requests whose logits were no numbers", stats.corrupted),
        ("vllm:spec_decode_num_drafts", "Drafts verified", stats.acceptance.steps),
        ("vllm:spec_decode_num_draft_tokens", "Guesses judged", drafted),
        (
            "vllm:spec_decode_num_accepted_tokens",
            "Guesses accepted",
            sum(stats.acceptance.accepted),
        ),
        ("qnext:steps", "Steps of the engine", stats.steps),
        ("qnext:failed_steps", "Steps in which a call raised", stats.failed_steps),
    ]


def _reasons(engine: Engine) -> dict[str, int]:
    counts: dict[str, int] = {"stop": 0, "length": 0, "abort": 0}
    for finish, count in list(engine.stats.finished.items()):
        reason = REASONS.get(finish, finish)
        counts[reason] = counts.get(reason, 0) + count
    return counts


class Figures(NamedTuple):
    """Of hand-offs so far: values, their bytes, the seconds they took, and failures by reason."""

    values: int
    nbytes: int
    seconds: float
    failures: dict[str, int]


class HandoffCollector:
    """Counts of hand-offs, read when they are asked for."""

    def __init__(self, figures: Callable[[], Figures], model: str) -> None:
        self.figures, self.model = figures, model

    def collect(self) -> Iterator[Metric]:
        values, nbytes, seconds, failures = self.figures()
        for name, text, value in (
            ("qnext:handoffs", "Values of prompts that were handed off", values),
            ("qnext:handoff_bytes", "Their bytes", nbytes),
            ("qnext:handoff_seconds", "Seconds that they took, all together", seconds),
        ):
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family
        failed = CounterMetricFamily(
            "qnext:handoff_failures", "Hand-offs that failed", labels=["model_name", "reason"]
        )
        for reason, count in sorted(failures.items()):
            failed.add_metric([self.model, reason], count)
        yield failed


class Metrics:
    """A registry of its own, so that a process may have several servers."""

    def __init__(self, model: str) -> None:
        self.registry, self.model = CollectorRegistry(), model

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            made = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
            return made.labels(model)

        self.first = histogram("vllm:time_to_first_token_seconds", "Arrival to the first token")
        self.between = histogram("vllm:inter_token_latency_seconds", "Between tokens")
        self.each = histogram(
            "vllm:request_time_per_output_token_seconds", "Of a request, per token after the first"
        )
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to the last token")
        self.prompt = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", SIZES)
        self.made = histogram("vllm:request_generation_tokens", "Tokens of an answer", SIZES)
        self.responses = Counter(
            "http_requests",
            "Requests by handler and status",
            ["handler", "status"],
            registry=self.registry,
        )

    def count(self, handler: str, status: str) -> None:
        """Count a response."""
        self.responses.labels(handler, status).inc()

    def watch(self, service: Service, handoffs: Callable[[], Figures] | None = None) -> None:
        """Tell of an engine, too, and of hand-offs, whose figures a function gives."""
        self.registry.register(EngineCollector(service, self.model))
        if handoffs is not None:
            self.registry.register(HandoffCollector(handoffs, self.model))


class Timer:
    """The times of one request's outputs; `note` each, with the clock's time."""

    def __init__(self, metrics: Metrics, now: float) -> None:
        self.metrics, self.began = metrics, now
        self.first: float | None = None
        self.last = now

    def note(self, output: Output, now: float) -> None:
        metrics, count = self.metrics, len(output.tokens)
        if count and self.first is None:
            self.first = now
            metrics.first.observe(now - self.began)
        elif count:
            for _ in range(count):
                metrics.between.observe((now - self.last) / count)
        self.last = now if count else self.last
        if output.finish:
            metrics.whole.observe(now - self.began)
            metrics.prompt.observe(output.prompt)
            metrics.made.observe(output.made)
            if self.first is not None and output.made > 1:
                metrics.each.observe((now - self.first) / (output.made - 1))
