"""Prometheus metrics, all from this process: a scrape never asks the engine.

Names begin with ``dovetail:`` and know no chip. A few are repeated under the names that gateways and autoscalers
read. What a client sends never becomes a label.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dovetail import __version__
from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo
from dovetail.engine.process import Outputs
from dovetail.engine.processor import CompletionDelta
from dovetail.messages import EngineStats, RequestTimes
from dovetail.plugins.registry import PluginStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_REASONS = ("stop", "length", "abort", "error")

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests that hold a slot.", lambda stats: stats.num_running),
    "num_requests_waiting": ("Requests that wait for a slot.", lambda stats: stats.num_waiting),
    "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", lambda stats: stats.kv_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_preemptions": ("Preemptions, to be computed again.", lambda stats: stats.num_preemptions),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    "engine_steps": ("Steps computed.", lambda stats: stats.steps),
    "engine_step_tokens": ("Tokens computed, prompt and output.", lambda stats: stats.step_tokens),
    "spec_decode_num_draft_tokens": ("Draft tokens verified.", lambda stats: stats.drafts_proposed),
    "spec_decode_num_accepted_tokens": ("Draft tokens accepted.", lambda stats: stats.drafts_accepted),
}


class Metrics:
    """What the server counts and measures.

    Args:
        compat: whether to repeat the gauges that gateways read under their names.
    """

    def __init__(self, *, compat: bool) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._engine = EngineCollector(compat=compat)
        self.registry.register(self._engine)
        gauge, counter = self._gauge, self._counter
        gauge("build_info", "The version that runs.", ("version",)).labels(__version__).set(1)
        gauge("process_start_time_seconds", "Unix time at which the server started.").set(time.time())
        self._ready_time = gauge("ready_time_seconds", "Unix time at which the server was ready; 0 before.")
        self._engine_up = gauge("engine_up", "Whether the engine runs and takes requests.")
        who = ("plugin", "distribution")
        self._plugin_info = gauge("plugin_info", "A plugin and its state.", (*who, "version", "state"))
        self._plugin_seconds = gauge("plugin_import_seconds", "What importing a plugin took.", who)
        self._plugins_failed = gauge("plugins_failed", "Plugins that are installed and broken.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        finished = counter("request_success", "Completions that ended, by reason.", ("finished_reason",))
        self.finished = {reason: finished.labels(reason) for reason in _REASONS}
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _LONG)
        self.itl = self._histogram("inter_token_latency_seconds", "Between tokens of one completion.", _SHORT)
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", _SHORT
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", "From first step to first token.", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _LONG)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Tokens per prompt.", _TOKENS)
        self.output_lengths = self._histogram("request_generation_tokens", "Tokens per completion.", _TOKENS)
        self.step_tokens = self._histogram("iteration_tokens", "Tokens computed per step.", _TOKENS)

    def set_plugins(self, plugins: Sequence[PluginStatus]) -> None:
        """What discovery found."""
        for plugin in plugins:
            self._plugin_info.labels(plugin.name, plugin.distribution, plugin.version, plugin.state).set(1)
            self._plugin_seconds.labels(plugin.name, plugin.distribution).set(plugin.seconds)
        self._plugins_failed.set(sum(plugin.broken for plugin in plugins))

    def ready(self, name: str, config: EngineConfig, info: ExecutorInfo) -> None:
        """The engine takes requests."""
        self._engine.set_model(name, config, info)
        self._ready_time.set(time.time())
        self._engine_up.set(1)

    def engine_down(self) -> None:
        """The engine is gone."""
        self._engine_up.set(0)

    def observe(self, outputs: Outputs) -> None:
        """One step's news: the engine's own clock, also for requests that nobody waits for any more."""
        stats, before = outputs.stats, self._engine.stats
        if stats.steps > before.steps:
            self.step_tokens.observe((stats.step_tokens - before.step_tokens) / (stats.steps - before.steps))
        self._engine.stats = stats
        for delta in outputs.deltas:
            if delta.times is not None:
                self._observe_times(delta.times)

    def render(self) -> bytes:
        """The text that a scraper gets."""
        return generate_latest(self.registry)

    def _observe_times(self, times: RequestTimes) -> None:
        if times.first_scheduled:
            self.queue.observe(max(0.0, times.first_scheduled - times.arrival))
        if times.first_token:
            self.prefill.observe(times.first_token - times.first_scheduled)
            self.decode.observe(max(0.0, times.last_token - times.first_token))

    def _gauge(self, name: str, help: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"dovetail:{name}", help, labels, registry=self.registry)

    def _counter(self, name: str, help: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"dovetail:{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dovetail:{name}", help, buckets=buckets, registry=self.registry)


class EngineCollector(Collector):
    """The engine's own gauges and counters, read from its latest statistics when they are scraped."""

    def __init__(self, *, compat: bool) -> None:
        self.stats = EngineStats()
        self._compat = compat
        self._model_name: str | None = None
        self._cache = {"block_size": "", "num_blocks": ""}

    def set_model(self, name: str, config: EngineConfig, info: ExecutorInfo) -> None:
        """What is served; before, there is nothing to collect."""
        self._cache = {"block_size": str(info.block_size), "num_blocks": str(info.num_blocks)}
        self._platform = config.platform.name
        self._config = _config_labels(config)
        self._model_name = name

    def collect(self) -> Iterable[Metric]:
        """One scrape."""
        if self._model_name is None:
            return
        stats = self.stats
        for name, (text, read) in _GAUGES.items():
            yield GaugeMetricFamily(f"dovetail:{name}", text, read(stats))
        for name, (text, read) in _COUNTERS.items():
            yield CounterMetricFamily(f"dovetail:{name}", text, read(stats))
        yield _info("dovetail:cache_config_info", "The KV cache.", self._cache)
        model = {"model_name": self._model_name, "platform": self._platform}
        yield _info("dovetail:model_info", "What is served, and on what.", model)
        yield _info("dovetail:config_info", "The effective configuration.", self._config)
        if self._compat:
            yield from self._compat_metrics(stats, self._model_name)

    def _compat_metrics(self, stats: EngineStats, model_name: str) -> Iterable[Metric]:
        """The names that gateways' endpoint pickers, autoscalers and dashboards are configured with."""
        for name, (text, read) in _GAUGES.items():
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))
            family.add_metric((model_name,), read(stats))
            yield family
        cache = {"block_size": self._cache["block_size"], "num_gpu_blocks": self._cache["num_blocks"]}
        yield _info("vllm:cache_config_info", "The KV cache.", cache)


class RequestWatch:
    """Measures the completions of one request, as its client sees them.

    Args:
        prompt_lengths: tokens of each prompt.
        n: completions per prompt.
    """

    def __init__(self, metrics: Metrics, prompt_lengths: list[int], n: int) -> None:
        self._metrics = metrics
        self._prompt_lengths = prompt_lengths
        self._start = time.perf_counter()
        self._live = {(prompt, index): _Progress() for prompt in range(len(prompt_lengths)) for index in range(n)}
        self._answered: set[int] = set()

    def update(self, prompt: int, delta: CompletionDelta) -> None:
        """A completion got further."""
        metrics, now = self._metrics, time.perf_counter()
        progress = self._live[prompt, delta.index]
        if prompt not in self._answered:
            self._answered.add(prompt)
            metrics.prompt_tokens.inc(self._prompt_lengths[prompt])
            metrics.prompt_lengths.observe(self._prompt_lengths[prompt])
        count = len(delta.token_ids)
        if count:
            metrics.generation_tokens.inc(count)
            if progress.tokens == 0:
                metrics.ttft.observe(now - self._start)
                progress.first = now
            else:
                for _ in range(count):
                    metrics.itl.observe((now - progress.last) / count)
            progress.tokens += count
            progress.last = now
        if delta.finish_reason is not None:
            self._finish(progress, delta.finish_reason, now)
            del self._live[prompt, delta.index]

    def close(self) -> None:
        """Whatever is unfinished has been aborted."""
        self._metrics.finished["abort"].inc(len(self._live))
        self._live.clear()

    def _finish(self, progress: _Progress, reason: str, now: float) -> None:
        metrics = self._metrics
        metrics.finished[reason].inc()
        metrics.e2e.observe(now - self._start)
        metrics.output_lengths.observe(progress.tokens)
        if progress.tokens > 1:
            metrics.tpot.observe((progress.last - progress.first) / (progress.tokens - 1))


class _Progress:
    """One completion: its tokens so far, and when the first and the last came."""

    __slots__ = ("first", "last", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.first = self.last = 0.0


def _config_labels(config: EngineConfig) -> dict[str, str]:
    """What runs, in names and sizes that dashboards can tell servers apart by."""
    speculation = config.spec_decoder
    values = {
        "model_family": config.model.name,
        "platform": config.platform.name,
        "attention": config.attention.name,
        "quantization": config.quant.name,
        "speculation": "none" if speculation is None else speculation.name,
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
        "prefix_caching": config.enable_prefix_caching,
        "chunked_prefill": config.enable_chunked_prefill,
        "async_scheduling": config.async_scheduling,
        "scheduling_policy": config.scheduling_policy,
        "fallbacks": len(config.fallbacks),
    }
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def _info(name: str, text: str, labels: dict[str, str]) -> GaugeMetricFamily:
    """A constant 1 whose labels carry the information."""
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), 1)
    return family
