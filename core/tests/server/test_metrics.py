"""GET /metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dovetail.config import Change
from dovetail.engine.process import Outputs
from dovetail.messages import EngineStats, RequestOutputDelta, RequestTimes
from dovetail.server.metrics import Metrics
from dovetail.testing import engine_config


def samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(server):
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return samples(response.text)


def grown(before, after, name, **labels):
    key = (name, tuple(sorted(labels.items())))
    return after[key] - before[key]


def test_counters_equal_the_sums_of_usage(server):
    before = scrape(server)
    answers = [
        server.complete("count me", max_tokens=7),
        server.complete(["a", "bb"], n=3, max_tokens=4),
        server.complete("say.", stop="efg", max_tokens=50),
        server.chat("say w"),
    ]
    events = server.events("/v1/completions", prompt="k", max_tokens=9, stream_options={"include_usage": True})
    usages = [answer["usage"] for answer in answers] + [events[-1]["usage"]]
    server.wait_for_metric("dovetail:num_requests_running", 0.0)
    after = scrape(server)
    assert grown(before, after, "dovetail:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
    assert grown(before, after, "dovetail:generation_tokens_total") == sum(u["completion_tokens"] for u in usages)
    finished = {
        reason: grown(before, after, "dovetail:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert finished == {"stop": 2, "length": 8, "abort": 0, "error": 0}


def test_histograms_count_every_completion(server):
    before = scrape(server)
    server.complete(["a", "b"], n=2, max_tokens=5)
    server.complete("say.", stop="c", max_tokens=50)
    server.wait_for_metric("dovetail:num_requests_running", 0.0)
    after = scrape(server)
    counts = {
        name: grown(before, after, f"dovetail:{name}_count")
        for name in (
            *("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_time_per_output_token_seconds"),
            *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
            *("request_generation_tokens", "request_prompt_tokens", "inter_token_latency_seconds"),
        )
    }
    assert counts.pop("request_prompt_tokens") == 3
    assert counts.pop("inter_token_latency_seconds") == 4 * 4 + 2
    assert set(counts.values()) == {5}, counts
    assert grown(before, after, "dovetail:iteration_tokens_count") >= 5
    assert 0 < grown(before, after, "dovetail:e2e_request_latency_seconds_sum") < 30
    assert grown(before, after, "dovetail:request_decode_time_seconds_sum") > 0


def test_the_prefix_cache(server):
    prompt = "the prefix cache is asked for this text of more than two blocks"
    before = scrape(server)
    server.complete(prompt, max_tokens=1)
    server.complete(prompt, max_tokens=1)
    after = scrape(server)
    assert grown(before, after, "dovetail:prefix_cache_queries_total") == 2 * (len(prompt) + 1)
    assert grown(before, after, "dovetail:prefix_cache_hits_total") == 64 - 16 * (len(prompt) == 63)


def test_refused_requests_count_nothing(server):
    before = scrape(server)
    assert server.post("/v1/completions", prompt=[10**6]).status_code == 400
    assert server.post("/v1/completions", prompt=["a", ""], n=2, add_special_tokens=False).status_code == 400
    after = scrape(server)
    assert grown(before, after, "dovetail:prompt_tokens_total") == 0
    assert grown(before, after, "dovetail:request_success_total", finished_reason="abort") == 0


def test_names_for_gateways(server, start):
    found = scrape(server)
    model = (("model_name", "fake"),)
    assert found["vllm:num_requests_running", model] == 0
    assert found["vllm:num_requests_waiting", model] == 0
    assert 0 <= found["vllm:kv_cache_usage_perc", model] <= 1
    (cache,) = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert cache == {"block_size": "16", "num_gpu_blocks": "4001"}
    plain = start(compat_metrics=False).http.get("/metrics").text
    assert "vllm" not in plain
    assert "dovetail:num_requests_running" in plain


def test_what_clients_choose_never_becomes_a_label(server):
    secret = "dear-diary"
    headers = {"X-Request-Id": secret, "User-Agent": secret}
    body = {"prompt": "k", "user": secret, "cache_salt": secret, "model": secret}
    server.http.post("/v1/completions", json=body, headers=headers)
    server.http.post("/v1/completions", json={**body, "model": "fake"}, headers=headers)
    text = server.http.get("/metrics").text
    assert secret not in text
    assert "_created" not in text


def test_life(server):
    found = scrape(server)
    assert found["dovetail:engine_up", ()] == 1
    assert 0 < found["dovetail:process_start_time_seconds", ()] <= found["dovetail:ready_time_seconds", ()]


@pytest.fixture
def metrics():
    return Metrics(compat=True)


def read(metrics, name):
    return samples(metrics.render().decode())[name, ()]


def test_nothing_of_the_engine_is_known_before_it_is_ready(metrics):
    text = metrics.render().decode()
    assert "num_requests" not in text
    assert read(metrics, "dovetail:engine_up") == 0


def test_statistics_and_times_of_the_engine(metrics):
    class Info:
        block_size, num_blocks = 16, 100

    metrics.ready("m", engine_config(), Info)
    times = RequestTimes(arrival=10.0, first_scheduled=11.0, first_token=13.0, last_token=17.0)
    unscheduled = RequestTimes(arrival=10.0, first_scheduled=0.0, first_token=0.0, last_token=12.0)
    deltas = [
        RequestOutputDelta(request_id="a", new_token_ids=[], finish_reason="stop", times=times),
        RequestOutputDelta(request_id="b", new_token_ids=[], finish_reason="abort", times=unscheduled),
        RequestOutputDelta(request_id="c", new_token_ids=[5]),
    ]
    stats = EngineStats(num_running=2, num_waiting=3, kv_usage=0.5, num_preemptions=4, steps=2, step_tokens=300)
    metrics.observe(Outputs(deltas, stats, []))
    for name, value in (
        ("num_requests_running", 2),
        ("num_requests_waiting", 3),
        ("kv_cache_usage_perc", 0.5),
        ("num_preemptions_total", 4),
        ("iteration_tokens_sum", 150),
        ("request_queue_time_seconds_sum", 1),
        ("request_queue_time_seconds_count", 1),
        ("request_prefill_time_seconds_sum", 2),
        ("request_decode_time_seconds_sum", 4),
    ):
        assert read(metrics, f"dovetail:{name}") == value, name
    metrics.engine_down()
    assert read(metrics, "dovetail:engine_up") == 0


def test_the_effective_configuration_is_exported(metrics):
    class Info:
        block_size, num_blocks = 16, 100

    change = Change(option="--dtype", asked="float16", got="float32", why=())
    metrics.ready("m", engine_config(max_model_len=77, fallbacks=(change,)), Info)
    found = samples(metrics.render().decode())
    ((labels, value),) = [
        (dict(labels), value) for (name, labels), value in found.items() if name == "dovetail:config_info"
    ]
    assert value == 1
    parts = ("platform", "attention", "quantization", "speculation", "model_family")
    assert {labels[part] for part in parts} == {"scripted", "none"}
    assert (labels["dtype"], labels["kv_dtype"], labels["max_model_len"]) == ("float32", "float32", "77")
    assert (labels["prefix_caching"], labels["fallbacks"]) == ("true", "1")
